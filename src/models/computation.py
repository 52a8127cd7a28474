"""What an evaluation computes on one batch: answers, likelihoods of references, scores of choices."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from src.data.batches import Batch
from src.data.chat import Encoded
from src.data.suite import Suite
from src.data.suite_tokens import SuiteTokens
from src.models.choices import letter_scores
from src.models.generation import Choose, greedy, likeliest, sampler
from src.models.logits import SCORED_TOGETHER, answer_nll, can_pack
from src.models.partial import Record
from src.models.products import fast_products
from src.models.speed import MatmulMode, choose_matmul


def choose_modes(mode: MatmulMode, model: torch.nn.Module, max_error: float, *, device: str = "cpu") -> dict[str, str]:
    """How float32 matrices are multiplied when scoring (many rows at once) and when decoding (few)."""
    # A mode that rounds to bfloat16 converts every weight anew at every decoding step: three times slower in a real
    # loop, although the products alone look faster.
    accepted = {"score": (max_error, 512), "decode": (min(max_error, 1e-5), 64)}
    return {
        use: choose_matmul(mode, model, max_error=error, rows=rows, device=device)
        for use, (error, rows) in accepted.items()
    }


@dataclass
class Computation:
    """Computes batches on one model.

    Args:
        model: A transformers causal language model.
        modes: How float32 matrices are multiplied when scoring and when decoding.
        sharded: Whether other processes hold parts of the weights: then every process makes the same passes.
    """

    model: Any
    modes: dict[str, str]
    sharded: bool
    _can_pack: bool | None = None

    def answers(self, suite: Suite, tokens: SuiteTokens, batch: Batch) -> list[str]:
        """Generated answers, as text. Code keeps its white space where it continues a prompt."""
        choose: Choose = likeliest
        if suite.temperature > 0:
            choose = sampler([_stream(suite, tokens, i) for i in batch.index.tolist()], suite.temperature)
        encoder = tokens.encoder
        # A sharded layer gathers its weights around its own forward pass, which must stay.
        with fast_products(self.model, "highest" if self.sharded else self.modes["decode"]):
            found = greedy(
                self.model,
                batch,
                max_new_tokens=suite.max_new_tokens,
                stop_ids=encoder.stop_ids,
                pad_id=encoder.tokenizer.pad_token_id,
                sharded=self.sharded,
                choose=choose,
            )
        if suite.kind == "code" and not encoder.chat:
            return [encoder.tokenizer.decode(ids, skip_special_tokens=True) for ids in found]
        return [encoder.decode(ids) for ids in found]

    def likelihoods(self, batch: Batch) -> list[Record]:
        """Negative log-likelihood (nats) and number of tokens of each reference answer."""
        torch.set_float32_matmul_precision(self.modes["score"])
        together = len(batch.index) if self.sharded else SCORED_TOGETHER
        nll, counts = answer_nll(self.model, batch, pack=self._packs(batch), together=together)
        return [{"nll": n, "tokens": c} for n, c in zip(nll.tolist(), counts.tolist(), strict=True)]

    def choices(self, tokens: SuiteTokens, batch: Batch) -> list[Record]:
        """Log-likelihoods: of all letters for a sequence that stands for its row, else of the sequence's choice."""
        if not tokens.letters:
            return [{"score": -record["nll"]} for record in self.likelihoods(batch)]
        torch.set_float32_matmul_precision(self.modes["score"])
        scores = letter_scores(self.model, batch, tokens.letters, pack=self._packs(batch)).tolist()
        rows: list[Any] = [tokens.encoded[i].row for i in batch.index.tolist()]
        return [{"scores": found[: len(row.choices)]} for found, row in zip(scores, rows, strict=True)]

    def strangeness(self, tokens: SuiteTokens, batch: Batch, answers: Sequence[str]) -> list[float]:
        """Mean negative log-likelihood (nats per token) of generated answers; 0 where there is none."""
        encoder, rows = tokens.encoder, []
        for index, answer in zip(batch.index.tolist(), answers, strict=True):
            prompt = tokens.encoded[index].prompt_ids
            ids = encoder.tokenizer(answer, add_special_tokens=False).input_ids or [encoder.end_id]
            rows.append(Encoded(tokens.encoded[index].row, [*prompt, *ids], len(prompt)))
        found = self.likelihoods(_batch(rows, encoder.tokenizer.pad_token_id, batch))
        return [record["nll"] / record["tokens"] for record in found]

    def _packs(self, batch: Batch) -> bool:
        """Whether to pack; tried out once per run."""
        if self.sharded:
            return False
        if self._can_pack is None:
            # Two rows tell: the trial costs as much as the rows it computes twice.
            first = next(batch.split(2))
            if first.common_prefix:
                self._can_pack = can_pack(self.model, first)
        return bool(self._can_pack)


def _stream(suite: Suite, tokens: SuiteTokens, index: int) -> str:
    """Name of a sequence's stream of random numbers: seed, row and sample."""
    return f"{suite.seed}/{tokens.encoded[index].row.id}/{index % suite.samples}"


def _batch(rows: Sequence[Encoded], pad: int, like: Batch) -> Batch:
    width, device = max(len(row.ids) for row in rows), like.ids.device
    return Batch(
        like.index,
        torch.tensor([row.ids + [pad] * (width - len(row.ids)) for row in rows], device=device),
        torch.tensor([len(row.ids) for row in rows], device=device),
        torch.tensor([row.answer_start for row in rows], device=device),
        like.weight,
    )
