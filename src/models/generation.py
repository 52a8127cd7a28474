"""Batched decoding: the prompts' common beginning is computed once, finished rows leave the batch.

Keys and values are written in place (:mod:`src.models.kv_cache`), logits are computed at the last position only.
Sampling draws each row's tokens from a stream of its own, by inverting the cumulative distribution in float64: what a
row says does not depend on its neighbours.

Padding sees nothing. Models whose attention is written out (``eager``) mark what is not seen by the lowest number of
their weights' type and take the softmax in float32. The lowest number of float64 is −∞ there: the softmax of padding is
0/0, and in the next layer real tokens weigh its NaN by 0. So the lowest number of float32 stands in its place.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from src.data.batches import Batch
from src.errors import InputError

COMPACT_BELOW = 0.75
"""The batch is shrunk to its unfinished rows once they are fewer than this share of it."""


def left_padded_prompts(batch: Batch, pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts (N, P) padded on the left, with their attention mask: decoding continues every row at its right end."""
    starts = batch.answer_starts
    width = int(starts.max())
    positions = torch.arange(width, device=batch.ids.device)[None, :] - (width - starts)[:, None]
    mask = positions >= 0
    ids = batch.ids.gather(1, positions.clamp_min(0))
    return torch.where(mask, ids, pad_id), mask.long()


class NotFinite(ArithmeticError):
    """A row's logits name no likeliest token: one is NaN or +∞, or all are −∞. ``place`` is the row's in the batch."""

    def __init__(self, place: int) -> None:
        super().__init__(f"the logits of row {place} of the batch are not finite")
        self.place = place


def finite(logits: torch.Tensor) -> torch.Tensor:
    """Which rows of logits (N, V) name a likeliest token, (N,) bool; −∞ may exclude others."""
    return logits.amax(-1).isfinite()


def check_finite(sound: Sequence[bool], rows: Sequence[int]) -> None:
    """Check that the logits of all rows name a likeliest token.

    Args:
        sound: Whether those of each row do (:func:`finite`).
        rows: Positions of the rows in the batch.

    Raises:
        NotFinite: those of a row do not; it says which.
    """
    for row, good in zip(rows, sound, strict=True):
        if not good:
            raise NotFinite(row)


Choose = Callable[[torch.Tensor, list[int]], torch.Tensor]
"""Next tokens (N,) from logits (N, V), checked after it, and the positions of these rows in the batch."""


def likeliest(logits: torch.Tensor, _: list[int]) -> torch.Tensor:
    """The token with the highest logit."""
    return logits.argmax(-1)


def sampler(keys: Sequence[str], temperature: float) -> Choose:
    """Draws tokens; each row of the batch has a stream of its own, named by its key."""
    streams = [random.Random(key) for key in keys]

    def choose(logits: torch.Tensor, rows: list[int]) -> torch.Tensor:
        chance = (logits.double() / temperature).softmax(-1).cumsum(-1)
        drawn = torch.tensor([streams[row].random() for row in rows], dtype=torch.float64, device=logits.device)
        token = torch.searchsorted(chance, drawn[:, None] * chance[:, -1:], right=True).squeeze(1)
        return token.clamp_max(logits.shape[-1] - 1)

    return choose


def greedy(
    model: Any,
    batch: Batch,
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    pad_id: int,
    sharded: bool = False,
    choose: Choose = likeliest,
) -> list[list[int]]:
    """Tokens of N answers, greedy unless told otherwise, up to and without the first stop token.

    Args:
        model: A transformers causal language model.
        batch: N rows; only their prompts are read.
        max_new_tokens: Longest answer, in tokens.
        stop_ids: Tokens that end an answer.
        pad_id: Padding token.
        sharded: Whether other processes hold parts of the weights: then all go on until the last has finished, and
            decoding is greedy.
        choose: How the next token is chosen.

    Raises:
        NotFinite: the model gives a row logits that are not numbers.
    """
    if sharded:
        return _greedy_in_step(model, batch, max_new_tokens=max_new_tokens, stop_ids=stop_ids, pad_id=pad_id)
    # transformers is too heavy to import before there is something to decode.
    from src.models.kv_cache import cache_option, reserve

    ids, mask, cache = _prefill_inputs(model, batch, pad_id, max_new_tokens)
    answers: list[list[int]] = [[] for _ in range(len(batch.ids))]
    rows, live = list(range(len(answers))), [True] * len(answers)
    position, option = mask.cumsum(1)[:, -ids.shape[1] :] - 1, cache_option(model)
    for step in range(max_new_tokens):
        with _contiguous_output(model), _finite_masks():
            out = model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=position.clamp_min(0),
                use_cache=True,
                logits_to_keep=1,
                **{option: cache},
            )
        logits = out.logits[:, -1]
        token = choose(logits, rows)
        # All that the host is told of a step comes in one copy: each waits for the GPU.
        told, sound = torch.stack([token, finite(logits).to(token.dtype)]).tolist()
        check_finite(sound, rows)
        cache = _cache_of(out, model)
        if step == 0:
            reserve(cache, max_new_tokens - 1)
        live = [going and value not in stop_ids for going, value in zip(live, told, strict=True)]
        for row, value, going in zip(rows, told, live, strict=True):
            if going:
                answers[row].append(value)
        if not any(live):
            break
        position, mask = position[:, -1:] + 1, torch.nn.functional.pad(mask, (0, 1), value=1)
        if sum(live) < COMPACT_BELOW * len(live):
            kept = torch.tensor([place for place, going in enumerate(live) if going], device=ids.device)
            cache.reorder_cache(kept)
            token, position, mask = token[kept], position[kept], mask[kept]
            rows = [row for row, going in zip(rows, live, strict=True) if going]
            live = [True] * len(rows)
        ids = token[:, None]
    return answers


@contextmanager
def _contiguous_output(model: Any) -> Iterator[None]:
    """The output layer reads contiguous states: of the last positions alone, a strided view, products are slow."""

    def copied(_: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (args[0].contiguous(), *args[1:])

    with model.get_output_embeddings().register_forward_pre_hook(copied):
        yield


@contextmanager
def _finite_masks() -> Iterator[None]:
    """Attention that is written out marks what is not seen by a number that is finite in float32, too."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask

    def narrowed(*args: Any, dtype: torch.dtype = torch.float32, **kwargs: Any) -> Any:
        return eager_mask(*args, dtype=torch.float32 if dtype == torch.float64 else dtype, **kwargs)

    ALL_MASK_ATTENTION_FUNCTIONS["eager"] = narrowed
    try:
        yield
    finally:
        del ALL_MASK_ATTENTION_FUNCTIONS["eager"]


@contextmanager
def _no_defaults(model: Any) -> Iterator[None]:
    """``generate`` without what a model's ``generation_config.json`` asks for, such as a penalty on repetition."""
    from transformers import GenerationConfig

    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def _prefill_inputs(model: Any, batch: Batch, pad_id: int, more: int) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """Prompts without their common beginning, the mask over both, and the cache of the beginning.

    A layer with a sliding window counts padding as tokens, so where texts may outgrow a window none stands between the
    beginning and the rest: prompts stay whole. So they do where layers have states in place of keys and values.
    """
    ids, mask = left_padded_prompts(batch, pad_id)
    start = batch.common_prefix
    if not start or not hasattr(model, "get_decoder"):
        return ids, mask, None
    from src.models.kv_cache import has_states

    cache = _cache_of(model.get_decoder()(input_ids=batch.ids[:1, :start], use_cache=True), model)
    windows = [layer.sliding_window for layer in cache.layers if getattr(layer, "is_sliding", False)]
    # GPT-Neo's windows are in its masks alone.
    windows += [model.config.window_size] if "local" in (getattr(model.config, "attention_layers", None) or ()) else []
    if has_states(cache) or (windows and ids.shape[1] + more > min(windows)):
        return ids, mask, None
    cache.batch_repeat_interleave(len(ids))
    # The rest of each prompt, padded on the left again: the beginning now stands before the padding.
    rest = Batch(batch.index, batch.ids[:, start:], batch.lengths - start, batch.answer_starts - start)
    ids, rest_mask = left_padded_prompts(rest, pad_id)
    return ids, torch.nn.functional.pad(rest_mask, (start, 0), value=1), cache


def _cache_of(out: Any, model: Any) -> Any:
    for name in ("cache", "past_key_values"):
        cache = getattr(out, name, None)
        # Mamba and xLSTM keep states alone; MiniMax keeps its own beside the layers, where no row can be dropped.
        keys = any(getattr(layer, "keys", None) is not None for layer in getattr(cache, "layers", ()))
        if keys and not hasattr(cache, "linear_cache"):
            return cache
    raise InputError(f"{type(model).__name__} keeps no keys and values of past tokens; expected a transformer")


def _greedy_in_step(
    model: Any, batch: Batch, *, max_new_tokens: int, stop_ids: Sequence[int], pad_id: int
) -> list[list[int]]:
    prompts, mask = left_padded_prompts(batch, pad_id)
    rows, found = range(len(prompts)), []

    def checked(_: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        try:
            check_finite(finite(logits).tolist(), rows)
        except NotFinite as error:
            found.append(error)  # the other processes need this one to the last step
        return logits

    with _finite_masks(), _no_defaults(model):
        out = model.generate(
            input_ids=prompts,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=list(stop_ids),
            pad_token_id=pad_id,
            logits_processor=[checked],
            synced_gpus=True,
        )
    if found:
        raise found[0]
    return [_until_stop(row, stop_ids) for row in out[:, prompts.shape[1] :].tolist()]


def own_ends(model: Any) -> list[int]:
    """Tokens at which a model's ``generation_config.json`` says that text ends; often more than the tokenizer's one."""
    found = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return [found] if isinstance(found, int) else list(found or ())


def _until_stop(tokens: list[int], stop_ids: Sequence[int]) -> list[int]:
    ends = [i for i, token in enumerate(tokens) if token in stop_ids]
    return tokens[: ends[0]] if ends else tokens
