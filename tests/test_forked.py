"""Commands killed (SIGKILL) at every stage, which the same command finishes, and token scores of sharded weights.

In forks of one process (:mod:`tests.forked`): a process of its own for each would take minutes.
"""

import os
import signal

import pytest
import torch
from safetensors.torch import load_file

from src.cli import main
from src.errors import InputError
from src.files import begin_output, check_output, is_begun, new_directory
from src.fisher.files import load_fisher
from tests import evaluations
from tests.commands import fisher_flags, run_processes
from tests.forked import kill_at
from tests.tiny import write_rows

PASSES = ("safety", "utility")
SHARD = "src.fisher.shards:Shards.write"
"""7 harmful rows in parts of 4 are 2 calls, 22 benign ones 6 more."""
DELETED = "before the parts are deleted"
KILLS = {
    "before the first part": (SHARD, 0),
    "in the rename of a part": ("src.files:Path.replace", 1),
    "between two parts": (SHARD, 5),
    "after the last part, before joining": ("src.models.fisher_pass:FisherPass.join", 0),
    "with one file written and one not": ("src.models.fisher:write_pass", 1),
    "between the last renames": ("src.models.fisher_output:ready_file", 1),
    "after the last rename": ("src.models.fisher_output:end_output", 0),
    # The calls before it find nothing: what earlier runs have left.
    DELETED: ("src.models.fisher_output:shutil.rmtree", 2),
}


@pytest.mark.processes
def test_a_pass_killed_anywhere_is_finished_by_the_same_command(base, adapters, rows, tmp_path, capsys):
    def measure(name):
        return fisher_flags(base, adapters, rows, tmp_path / name, "--model.shard_rows", "4")

    assert main(measure("whole")) == 0
    whole, said = tensors(tmp_path / "whole"), {}
    for when, kill in KILLS.items():
        # The mark goes before the parts: a run that is killed in between is at its end.
        run_processes(measure(when), kill=kill, ranks=None)
        capsys.readouterr()
        assert main(measure(when)) == (2 if when == DELETED else 0), when
        said[when] = " ".join(capsys.readouterr().err.split())
        assert ("exists already" in said[when]) == (when == DELETED), when
        for name, cut in tensors(tmp_path / when).items():
            assert list(cut) == list(whole[name])
            assert all(torch.equal(cut[key], value) for key, value in whole[name].items()), when
        assert not list((tmp_path / when).glob(".parts*"))
        assert not (tmp_path / when / ".unfinished.json").exists()
    kept = {"between two parts": 3, "between the last renames": 6}
    for when, parts in kept.items():
        assert f"F_utility: {parts} parts of an interrupted pass are kept" in said[when]


def tensors(folder):
    return {name: load_file(folder / f"{name}.safetensors") for name in PASSES}


@pytest.mark.processes
def test_an_evaluation_killed_between_answers_and_metrics_is_finished_by_the_same_command(base, tmp_path):
    rows = write_rows(tmp_path / "one.jsonl", 1, what="one")
    suite = {"name": "one", "kind": "utility", "rows": str(rows), "max_new_tokens": 2}
    whole, cut = (evaluations.flags(base, tmp_path, [suite], tmp_path / name) for name in ("whole", "cut"))
    assert main(whole) == 0
    run_processes(cut, kill=("src.models.results:write_json", 0), ranks=None)
    assert main(cut) == 0
    assert evaluations.metrics(tmp_path / "cut") == evaluations.metrics(tmp_path / "whole")


@pytest.mark.processes
def test_token_scores_of_sharded_weights_are_those_of_one_process(base, adapters, rows, tmp_path):
    token = ["--model.granularity", "token", "--model.relearn", "true"]
    assert main(fisher_flags(base, adapters, rows, tmp_path / "whole", *token)) == 0
    run_processes(fisher_flags(base, adapters, rows, tmp_path / "ranks", *token, hardware="fsdp_sim.yaml"))
    for name in (*PASSES, "benign"):
        one, two = (load_fisher(tmp_path / run / f"{name}.safetensors") for run in ("whole", "ranks"))
        assert one.fisher.count == two.fisher.count > len(one.record["rows"])
        assert torch.equal(one.fisher.groups, two.fisher.groups)
        assert (one.fisher.scores - two.fisher.scores).norm() / one.fisher.scores.norm() < 1e-10
        if name != "utility":
            torch.testing.assert_close(one.mean, two.mean, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("renames", [0, 1])
def test_a_directory_killed_between_its_renames_is_absent_or_whole(tmp_path, renames):
    path = tmp_path / "merged"
    path.mkdir()
    (path / "before").touch()

    def write():
        with new_directory(path) as folder:
            (folder / "a").write_text("a")

    child = os.fork()
    if not child:
        kill_at("src.files:Path.rename", renames)
        write()
        os._exit(99)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert [file.name for file in path.glob("*")] == (["before"] if renames == 0 else [])
    with pytest.raises(InputError, match="exists already"):
        check_output(path, overwrite=False)
    assert [file.name for file in path.iterdir()] == ["before"]  # what was moved aside is back
    check_output(path, overwrite=True)
    write()
    assert [file.name for file in path.iterdir()] == ["a"]


def test_an_output_is_taken_up_by_its_own_command_alone(tmp_path, base, adapters, rows, capsys):
    out = tmp_path / "out"
    begin_output(out, {"seed": 1, "pair": (1, 2)})
    assert is_begun(out, {"seed": 1, "pair": [1, 2]})
    assert not is_begun(out, {"seed": 2, "pair": [1, 2]})
    assert not is_begun(tmp_path, {"seed": 1})
    (out / "safety.safetensors").write_bytes(b"half of a result")
    assert main(fisher_flags(base, adapters, rows, out)) == 2
    assert "exists already" in capsys.readouterr().err
    assert (out / "safety.safetensors").read_bytes() == b"half of a result"
