"""What an evaluation computes on one batch: answers, likelihoods of references, scores of choices."""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch

from src.data.batches import Batch, EncodedRows
from src.data.chat import Encoded
from src.data.suite import Suite
from src.data.suite_tokens import SuiteTokens
from src.models.generation import Choose, greedy, likeliest, sampler
from src.models.logits import SCORED_TOGETHER, answer_nll, can_pack, letter_scores
from src.models.partial import Record
from src.models.products import NarrowCopies, fast_products
from src.models.settling import MOST_SHARED, settle
from src.models.speed import MatmulMode, choose_matmul


def choose_modes(
    mode: MatmulMode, model: torch.nn.Module, max_error: float, *, choices: bool, device: str = "cpu"
) -> dict[str, str]:
    """How float32 matrices are multiplied when scoring (many rows), decoding (few), for choices and for close ones."""
    # A mode that rounds to bfloat16 converts every weight anew at every decoding step: three times slower in a real
    # loop, although the products alone look faster.
    accepted = {"score": (max_error, 512), "decode": (min(max_error, 1e-5), 64)}
    accepted |= {"settle": (min(max_error, 1e-5), 512), "choose": (max_error, 512)} if choices else {}
    found = {
        use: choose_matmul(mode, model, max_error=error, rows=rows, copies=use == "choose", device=device)
        for use, (error, rows) in accepted.items()
    }
    # Of a mode that was asked for nobody knows whether it rounds.
    return found | {"settle": "highest"} if choices and mode != "auto" else found


@dataclass
class Computation:
    """Computes batches on one model.

    Args:
        model: A transformers causal language model.
        modes: How float32 matrices are multiplied for each use, see :func:`choose_modes`.
        sharded: Whether other processes hold parts of the weights: then every process makes the same passes.
        max_tokens: Most tokens of one pass over choices, where rows share no beginning.
    """

    model: Any
    modes: dict[str, str]
    sharded: bool
    max_tokens: int | None = None
    _can_pack: bool | None = None
    _copies: NarrowCopies | None = None

    def answers(self, suite: Suite, tokens: SuiteTokens, batch: Batch) -> list[Record]:
        """Generated answers, as text, and whether each stopped at the most tokens that it may have.

        Code keeps its white space where it continues a prompt.
        """
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
            prompts = (tokens.encoded[i].prompt_ids for i in batch.index.tolist())
            texts = [encoder.continuation(p, ids) for p, ids in zip(prompts, found, strict=True)]
        else:
            texts = [encoder.decode(ids) for ids in found]
        # A stop token is none of an answer's.
        return [
            {"answer": text, "unfinished": len(ids) == suite.max_new_tokens}
            for text, ids in zip(texts, found, strict=True)
        ]

    def likelihoods(self, batch: Batch) -> list[Record]:
        """Negative log-likelihood (nats) and number of tokens of each reference answer."""
        torch.set_float32_matmul_precision(self.modes["score"])
        nll, counts = answer_nll(self.model, batch, pack=self._packs(batch), together=self._together(batch))
        return [{"nll": n, "tokens": c} for n, c in zip(nll.tolist(), counts.tolist(), strict=True)]

    def choices(self, tokens: SuiteTokens, batch: Batch) -> list[Record]:
        """Log-likelihoods: of all letters for a sequence that stands for its row, else of the sequence's choice.

        Where products round, rows that hang on it are computed again with exact ones (:mod:`src.models.settling`).
        """
        precise, mode = self.modes["settle"], self.modes["choose"]
        # A sharded layer needs every process in every pass, and which rows are computed again differs between them.
        if self.sharded or _share_of_beginning(batch) > MOST_SHARED:
            mode = precise
        found = self._choice_scores(tokens, batch, mode)
        if mode != precise:
            units, rows = _units(tokens, batch)

            def flat(scores: Sequence[list[float]], unit: list[int]) -> list[float]:
                return [score for place in unit for score in scores[place]]

            def exact(which: list[int]) -> list[list[float]]:
                places = [place for i in which for place in units[i]]
                again = self._choice_scores(tokens, batch.part(places), precise)
                for place, scores in zip(places, again, strict=True):
                    found[place] = scores
                return [flat(found, units[i]) for i in which]

            weights = [_ways(row, letters=bool(tokens.letters)) for row in rows]
            settle([flat(found, unit) for unit in units], weights, exact)
        return [{"scores": scores} if tokens.letters else {"score": scores[0]} for scores in found]

    def _choice_scores(self, tokens: SuiteTokens, batch: Batch, mode: str) -> list[list[float]]:
        """Of each sequence: the log-likelihoods of its row's letters, or that of its own choice."""
        narrow, packs = mode == "bfloat16", self._packs(batch)
        torch.set_float32_matmul_precision("highest" if narrow else mode)
        if narrow and self._copies is None:
            self._copies = NarrowCopies(self.model)
        with self._copies.used() if narrow and self._copies else nullcontext():
            if not tokens.letters:
                nll, _ = answer_nll(self.model, batch, pack=packs, narrow=narrow, together=self._together(batch))
                return [[-one] for one in nll.tolist()]
            parts = [batch] if packs or self.sharded else self._within_budget(batch)
            found = [letter_scores(self.model, part, tokens.letters, pack=packs, narrow=narrow) for part in parts]
            scores = torch.cat(found).tolist()
        rows: list[Any] = [tokens.encoded[i].row for i in batch.index.tolist()]
        return [one[: len(row.choices)] for one, row in zip(scores, rows, strict=True)]

    def strangeness(self, tokens: SuiteTokens, batch: Batch, answers: Sequence[str]) -> list[float]:
        """Mean negative log-likelihood (nats per token) of generated answers; an empty one's is of the end token."""
        encoder, rows = tokens.encoder, []
        for index, answer in zip(batch.index.tolist(), answers, strict=True):
            prompt = tokens.encoded[index].prompt_ids
            ids = encoder.tokenizer(answer, add_special_tokens=False).input_ids or [encoder.end_id]
            rows.append(Encoded(tokens.encoded[index].row, [*prompt, *ids], len(prompt)))
        whole = EncodedRows(rows, encoder.tokenizer.pad_token_id)[(list(range(len(rows))), batch.weight)]
        found = self.likelihoods(whole.to(batch.ids.device))
        return [record["nll"] / record["tokens"] for record in found]

    def _together(self, batch: Batch) -> int:
        """Rows whose answers are scored in one pass: of sharded weights every process makes one a batch."""
        return len(batch.index) if self.sharded else SCORED_TOGETHER

    def _within_budget(self, batch: Batch) -> Iterator[Batch]:
        """Parts of a batch that was laid out for a beginning that is computed once, where each row computes it."""
        rows = len(batch.index) if self.max_tokens is None else max(1, self.max_tokens // batch.ids.shape[1])
        return batch.split(rows)

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


def _share_of_beginning(batch: Batch) -> float:
    """Share of the tokens computed for a packed batch that all of its rows begin with."""
    rest = int((batch.lengths - batch.common_prefix).sum())
    return batch.common_prefix / (batch.common_prefix + rest)


def _units(tokens: SuiteTokens, batch: Batch) -> tuple[list[list[int]], list[Any]]:
    """Places in the batch of each row's sequences, which lie side by side, and the rows."""
    rows: list[Any] = [tokens.encoded[i].row for i in batch.index.tolist()]
    units = [[place for place, _ in group] for _, group in groupby(enumerate(rows), key=lambda pair: id(pair[1]))]
    return units, [rows[unit[0]] for unit in units]


def _ways(row: Any, *, letters: bool) -> list[list[float]]:
    """Factors of the choices' scores, for each way in which a row is graded: as they are, and by length."""
    plain = [1.0] * len(row.choices)
    return [plain] if letters else [plain, [1 / len(choice) for choice in row.choices]]


def _stream(suite: Suite, tokens: SuiteTokens, index: int) -> str:
    """Name of a sequence's stream of random numbers: seed, row and sample."""
    return f"{suite.seed}/{tokens.encoded[index].row.id}/{index % suite.samples}"
