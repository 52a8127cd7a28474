"""A Fisher pass in a few lines: what FisherModule does, with any accumulator, on the tiny model."""

import torch

from src.data.batches import EncodedRows
from src.data.chat import Encoder
from src.data.rows import Row
from src.fisher.accumulate import examples
from src.fisher.labels import draw_labels
from src.fisher.scores import ScoreRecorder, backward_parts, core_score, together
from src.models.logits import answer_logits, answer_rows, answer_targets, leaf_embeddings


def uneven_rows(tokenizer, count=7):
    """Encoded rows whose prompts and answers all have other lengths."""
    encoder = Encoder(tokenizer, max_length=256)
    return [encoder.encode(Row(f"r{i}", "p" * (1 + 5 * i % 13), "answer"[: 1 + i % 5])) for i in range(count)]


def make_batch(encoded, indices):
    return EncodedRows(encoded, 256)[(list(indices), 1.0)]


def batches(encoded, size, indices=None):
    rows = list(range(len(encoded))) if indices is None else list(indices)
    return [make_batch(encoded, rows[start : start + size]) for start in range(0, len(rows), size)]


def passed_scores(recorder, run, answers=None):
    """(N, D) scores from the one backward pass that ``run`` makes."""
    kept = {}
    recorder.sink = lambda name, delta, x: kept.update({name: core_score(delta, x)})
    with recorder.recording(answers):
        run()
    recorder.complete()
    return torch.cat([kept[name] for name in recorder.modules], dim=1)


def recorded_scores(model, batch, core, answers=None):
    """(N, D) scores of a batch's own answers."""

    def run():
        with leaf_embeddings(model) as leaves:
            log_p = answer_logits(model, batch).log_softmax(-1)
            torch.autograd.grad(log_p.gather(1, answer_targets(batch)[:, None]).sum(), leaves[0])

    return passed_scores(ScoreRecorder(model, core.u, core.v), run, answers)


def run_pass(model, given, accumulators, u, v, *, granularity="sequence", labels="data", draws=1, seed=0):
    """Feed every batch to the accumulators."""
    recorder = ScoreRecorder(model, u, v)
    recorder.sink = together(*(accumulator.update for accumulator in accumulators))
    for batch in given:
        ids = [f"r{i}" for i in batch.index.tolist()]
        with recorder.recording(), leaf_embeddings(model) as leaves:
            logits = answer_logits(model, batch)
            log_p = logits.log_softmax(-1)
            for draw in range(draws):
                chosen = answer_targets(batch)
                if labels == "model":
                    chosen = draw_labels(logits, answer_rows(batch), ids, seed=seed, draw=draw)
                picked = log_p.gather(1, chosen[:, None]).squeeze(1)
                for token, (total, present) in enumerate(
                    backward_parts(picked, answer_rows(batch), len(ids), granularity)
                ):
                    for accumulator in accumulators:
                        accumulator.begin(examples(batch.index, ids, draws=draws, present=present, token=token))
                    torch.autograd.grad(total, leaves[0], retain_graph=True)
                    recorder.complete()
    return accumulators


def no_bases(names):
    """Weight coordinates: both bases of every module are the identity."""
    return dict.fromkeys(names)
