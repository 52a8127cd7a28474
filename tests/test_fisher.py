import json
import random

import pytest
import torch

from src.adapters.basis import core_basis
from src.data.batches import LengthBatches
from src.errors import InputError
from src.fisher.files import FisherFile, load_fisher
from src.fisher.labels import draw_labels
from src.fisher.lowrank import LowRankFisher
from src.models.logits import answer_logits, answer_rows
from tests.fisher_pass import make_batch, recorded_scores
from tests.oracles import autograd_scores
from tests.tiny import random_pairs


@pytest.mark.parametrize("union", [False, True])
def test_scores_equal_autograd_per_example(model, encoded, union):
    adapters = [random_pairs(model, 2, 1), random_pairs(model, 3, 2)]
    core = core_basis(adapters if union else adapters[:1])
    batch = make_batch(encoded, range(7))
    found, expected = recorded_scores(model, batch, core), autograd_scores(model, batch, core.u, core.v)
    assert found.shape == (7, core.dim)
    assert (found - expected).norm() / expected.norm() < 1e-9


@pytest.mark.parametrize("size", [1, 2, 7])
def test_scores_do_not_depend_on_the_batch(model, encoded, size):
    core = core_basis([random_pairs(model, 2, 1)])
    whole = recorded_scores(model, make_batch(encoded, range(7)), core)
    parts = [recorded_scores(model, make_batch(encoded, range(i, min(i + size, 7))), core) for i in range(0, 7, size)]
    torch.testing.assert_close(torch.cat(parts), whole)


def test_a_squared_batch_mean_is_not_what_is_stored(model, encoded):
    core = core_basis([random_pairs(model, 2, 1)])
    scores = recorded_scores(model, make_batch(encoded, range(7)), core)
    fisher = LowRankFisher(scores, 7)
    assert fisher.trace() > 2 * scores.mean(0).square().sum()


def test_drawn_labels_do_not_depend_on_the_batch(model, encoded):
    whole = make_batch(encoded, range(7))
    ids = [f"r{i}" for i in range(7)]
    logits = answer_logits(model, whole)
    drawn = draw_labels(logits, answer_rows(whole), ids, seed=3, draw=0)
    for i in range(7):
        alone = make_batch(encoded, [i])
        mine = draw_labels(answer_logits(model, alone), answer_rows(alone), [ids[i]], seed=3, draw=0)
        assert torch.equal(mine, drawn[answer_rows(whole) == i])
    assert not torch.equal(drawn, draw_labels(logits, answer_rows(whole), ids, seed=3, draw=1))
    assert not torch.equal(drawn, draw_labels(logits, answer_rows(whole), ids, seed=4, draw=0))


def test_drawn_labels_follow_the_model():
    logits = torch.tensor([[0.0, 1.0, -1.0, 2.0]]).double()
    n = 20_000
    drawn = draw_labels(logits.expand(n, 4), torch.zeros(n, dtype=torch.int64), ["row"], seed=0, draw=0)
    share = torch.bincount(drawn, minlength=4).double() / n
    p = logits[0].softmax(-1)
    # Five standard errors of a share: one failure in a million seeds, and the seed is fixed.
    assert ((share - p).abs() <= 5 * (p * (1 - p) / n).sqrt()).all()


@pytest.mark.parametrize(("count", "size", "world"), [(7, 2, 1), (7, 2, 2), (7, 2, 3), (1, 4, 3), (9, 3, 2)])
def test_every_row_is_dealt_exactly_once(count, size, world):
    lengths = [3 + i * 5 % 7 for i in range(count)]
    samplers = [LengthBatches(lengths, size, rank=r, world_size=world, seed=None) for r in range(world)]
    dealt = [list(sampler) for sampler in samplers]
    assert [len(part) for part in dealt] == [len(sampler) for sampler in samplers]
    assert sorted(i for part in dealt for rows, weight in part if weight for i in rows) == list(range(count))
    assert len({len(part) for part in dealt}) == 1


def test_training_batches_change_by_epoch_and_cover_all_rows():
    epoch = [0]
    sampler = LengthBatches(list(range(50)), 4, rank=0, world_size=1, seed=1, epoch=lambda: epoch[0])
    first = list(sampler)
    assert first == list(sampler)
    epoch[0] = 1
    assert first != list(sampler)
    assert sorted(i for rows, _ in sampler for i in rows) == list(range(50))


def test_rows_are_sorted_by_length_within_the_window_and_no_further():
    def spread(window):
        sampler = LengthBatches(list(range(64)), 4, rank=0, world_size=1, seed=0, window=window, epoch=lambda: 0)
        return max(max(rows) - min(rows) for rows, _ in sampler)

    assert spread(16) == 3  # all rows in one window: neighbours in length
    assert 3 < spread(4) < 63
    shuffled = list(range(64))
    random.Random("0/0").shuffle(sorted_longest := sorted(shuffled, reverse=True))
    sampler = LengthBatches(shuffled, 4, rank=0, world_size=1, seed=0, window=1, epoch=lambda: 0)
    assert {frozenset(rows) for rows, _ in sampler} == {
        frozenset(sorted_longest[start : start + 4]) for start in range(0, 64, 4)
    }


def some_file():
    u, v = ({"m": torch.eye(4, 2).double()} for _ in range(2))
    return FisherFile(LowRankFisher(torch.arange(12.0).reshape(3, 4), 3), u, v, {"pass": "safety"})


def test_a_fisher_file_survives_the_round_trip(tmp_path):
    path = tmp_path / "safety.safetensors"
    some_file().save(path)
    loaded = load_fisher(path)
    assert torch.equal(loaded.fisher.scores, some_file().fisher.scores)
    assert loaded.record["count"] == 3
    assert loaded.record["modules"] == ["m"]


def test_bad_fisher_files_are_named(tmp_path):
    path = tmp_path / "safety.safetensors"
    with pytest.raises(InputError, match="no such file"):
        load_fisher(path)
    path.write_bytes(b"nonsense")
    with pytest.raises(InputError, match="not a readable"):
        load_fisher(path)
    broken = some_file()
    broken.fisher.scores[1, 2] = float("nan")
    broken.save(path)
    with pytest.raises(InputError, match="scores of m hold NaN"):
        load_fisher(path)


def test_an_adapter_is_not_a_fisher_file(adapters):
    with pytest.raises(InputError, match="not a Fisher file"):
        load_fisher(adapters["safety"] / "adapter_model.safetensors")


def test_json_record_keeps_every_character(tmp_path):
    file = some_file()
    file.record["rows"] = ["é", "\u2028"]
    file.save(tmp_path / "f.safetensors")
    assert json.dumps(load_fisher(tmp_path / "f.safetensors").record["rows"]) == json.dumps(["é", "\u2028"])
