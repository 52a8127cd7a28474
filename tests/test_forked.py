"""Commands killed (SIGKILL) at every stage, which the same command finishes, and token scores of sharded weights.

All in forks of one process (:mod:`tests.forked`): a process of its own for each would take minutes.
"""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from src.cli import main
from src.errors import InputError
from src.files import begin_output, check_output, is_begun, new_directory
from src.fisher.files import load_fisher
from tests import evaluations
from tests.commands import ROOT, fisher_flags
from tests.forked import kill_at
from tests.tiny import write_rows

PASSES = ("safety", "utility")
SHARD = "src.fisher.shards:Shards.write"
"""7 harmful rows in parts of 4 are 2 calls, 22 benign ones 6 more."""
SHARDED = str(ROOT / "trainers" / "fsdp_sim.yaml")
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


@pytest.fixture(scope="module")
def found(base, adapters, rows, tmp_path_factory):
    """The folder of each job, and what :mod:`tests.forked` found."""
    folder = tmp_path_factory.mktemp("forked")
    suite = {"name": "one", "kind": "utility", "rows": str(write_rows(folder / "one.jsonl", 1, what="one"))}
    measure, token = fisher_flags(base, adapters, rows, "OUT"), ["--model.granularity", "token"]
    jobs = {
        "fisher": {"arguments": [*measure, "--model.shard_rows", "4"], "kills": list(KILLS.values())},
        "token": {"arguments": [*measure, *token, "--model.relearn", "true"], "sharded": ["--trainer", SHARDED]},
        "test": {
            "arguments": evaluations.flags(base, folder, [suite | {"max_new_tokens": 2}], "OUT"),
            "kills": [("src.models.results:write_json", 0)],
        },
    }
    path, answer = folder / "jobs.json", folder / "answer.json"
    path.write_text(json.dumps(list(jobs.values())))
    command = [sys.executable, "-W", "ignore", "-m", "tests.forked", str(path), str(answer)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True, env=environment)
    assert ended.returncode == 0, ended.stderr[-2000:]
    return {name: (folder / str(i), json.loads(answer.read_text())[i]) for i, name in enumerate(jobs)}


@pytest.mark.processes
def test_a_pass_killed_anywhere_is_finished_by_the_same_command(found):
    folder, ends = found["fisher"]
    whole = {name: load_file(folder / "whole" / f"{name}.safetensors") for name in PASSES}
    for number, (when, (ended, code, errors)) in enumerate(zip(KILLS, ends, strict=True)):
        out = folder / str(number)
        assert ended == signal.SIGKILL, when
        # The mark goes before the parts: a run that is killed in between is at its end.
        assert code == (2 if when == DELETED else 0), (when, errors)
        assert ("exists already" in errors) == (when == DELETED), when
        for name in PASSES:
            cut = load_file(out / f"{name}.safetensors")
            assert list(cut) == list(whole[name])
            assert all(torch.equal(cut[key], value) for key, value in whole[name].items()), when
        assert not list(out.glob(".parts*"))
        assert not (out / ".unfinished.json").exists()
    kept = {"between two parts": 3, "between the last renames": 6}
    for when, parts in kept.items():
        assert f"F_utility: {parts} parts of an interrupted pass are kept" in ends[list(KILLS).index(when)][2]


@pytest.mark.processes
def test_an_evaluation_killed_between_answers_and_metrics_is_finished_by_the_same_command(found):
    folder, [(ended, code, errors)] = found["test"]
    assert (ended, code) == (signal.SIGKILL, 0), errors
    assert evaluations.metrics(folder / "0") == evaluations.metrics(folder / "whole")


@pytest.mark.processes
def test_token_scores_of_sharded_weights_are_those_of_one_process(found):
    folder, [(*codes, first, second)] = found["token"]
    assert codes == [0, 0], first + second
    for name in (*PASSES, "benign"):
        one, two = (load_fisher(folder / run / f"{name}.safetensors") for run in ("whole", "ranks"))
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
