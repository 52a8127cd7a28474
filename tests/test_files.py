"""Output directories: whole or as they were, whatever ends a run, and nothing of a killed run stays beside them."""

import errno
import os
import signal
from pathlib import Path

import pytest

from src.cli import main
from src.errors import InputError
from src.files import check_output, new_directory, read_json
from src.merge.combinations.task_arithmetic import TaskArithmetic
from src.merge.stage import merge
from tests.test_cli import fails


def write(path, text="new"):
    with new_directory(path) as folder:
        (folder / "result").write_text(text)


def names(folder):
    return sorted(entry.name for entry in folder.iterdir())


@pytest.mark.parametrize("renames", [0, 1])
def test_an_interrupt_at_a_rename_keeps_the_old_output(tmp_path, monkeypatch, renames):
    write(tmp_path / "m", "old")
    rename, seen = Path.rename, []

    def interrupted(self, target):
        seen.append(target)
        if len(seen) == renames + 1:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "m")
    assert (tmp_path / "m" / "result").read_text() == "old"
    assert names(tmp_path) == ["m"]


@pytest.mark.parametrize("given", [".", "z/..", "..", "z/../../work"])
def test_the_working_directory_is_no_output(tmp_path, monkeypatch, given):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    with pytest.raises(InputError, match=r"--output .* the working directory lies there"):
        write(Path(given))
    assert names(tmp_path) == ["work"]
    write(Path("z/../other"))
    assert names(tmp_path / "work") == ["other"]


def test_a_file_is_replaced_and_leaves_nothing(tmp_path):
    (tmp_path / "m").write_text("a file")
    write(tmp_path / "m")
    assert names(tmp_path) == ["m"]
    assert names(tmp_path / "m") == ["result"]


def test_a_link_stays_one_and_what_it_points_to_is_replaced(tmp_path):
    (tmp_path / "there").mkdir()
    write(tmp_path / "there" / "real", "old")
    (tmp_path / "link").symlink_to(tmp_path / "there" / "real")
    write(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "there" / "real" / "result").read_text() == "new"
    assert names(tmp_path) == ["link", "there"]
    assert names(tmp_path / "there") == ["real"]


def test_what_a_killed_run_left_is_removed_and_what_runs_is_not(tmp_path):
    left = [".m.abcdefgh.tmp", ".m.abcdefgh.old", ".m.0123_xyz.tmp"]
    kept = [".m.x.abcdefgh.tmp", ".n.abcdefgh.tmp", ".m.long.tmp"]
    for name in [*left, *kept]:
        (tmp_path / name).mkdir()
    write(tmp_path / "m")
    assert names(tmp_path) == sorted([*kept, "m"])
    with new_directory(tmp_path / "m") as outer:
        write(tmp_path / "m", "inner")
        assert outer.is_dir()
        (outer / "result").write_text("outer")
    assert (tmp_path / "m" / "result").read_text() == "outer"
    assert names(tmp_path) == sorted([*kept, "m"])


def test_an_output_that_a_killed_run_moved_aside_comes_back(tmp_path):
    (tmp_path / ".m.abcdefgh.tmp").mkdir()
    write(tmp_path / ".m.abcdefgh.old", "old")
    with pytest.raises(KeyboardInterrupt), new_directory(tmp_path / "m"):
        raise KeyboardInterrupt
    assert names(tmp_path) == ["m"]
    assert (tmp_path / "m" / "result").read_text() == "old"


def test_an_output_in_a_file_is_refused_before_any_work(tmp_path, capsys):
    (tmp_path / "file").touch()
    for place in (tmp_path / "file" / "sub", tmp_path / "file" / "sub" / "deeper"):
        with pytest.raises(InputError, match="file is a file; name a path in a directory"):
            check_output(place, overwrite=True)
    given = ["--utility", str(tmp_path / "nowhere"), "--output", str(tmp_path / "file" / "sub")]
    assert "is a file; name a path in a directory" in fails(["merge", *given], capsys)


@pytest.mark.parametrize("overwrite", [False, True])
def test_of_two_runs_at_once_the_first_result_stays_unless_it_may_be_replaced(tmp_path, overwrite):
    out = tmp_path / "m"
    check_output(out, overwrite=overwrite)

    def second():
        with new_directory(out) as folder:
            (folder / "result").write_text("second")
            out.mkdir()
            (out / "result").write_text("first")

    if overwrite:
        second()
        assert (out / "result").read_text() == "second"
        return
    with pytest.raises(InputError, match="another run has put its result there meanwhile, which stays") as told:
        second()
    beside = Path(str(told.value).rpartition(" ")[2])
    assert names(tmp_path) == ["m", beside.name]
    assert (out / "result").read_text() == "first"
    assert (beside / "result").read_text() == "second"


def test_a_result_that_cannot_be_put_in_place_lies_beside_it(tmp_path, monkeypatch):
    write(tmp_path / "m", "old")
    rename = Path.rename

    def busy(self, target):
        if self.name == "m":
            raise OSError(errno.EBUSY, "Device or resource busy")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", busy)
    with pytest.raises(InputError, match=r"m: Device or resource busy; the new result is in .*/m\.\w{8}$") as told:
        write(tmp_path / "m")
    assert (tmp_path / "m" / "result").read_text() == "old"
    assert (Path(str(told.value).rpartition(" ")[2]) / "result").read_text() == "new"
    assert len(names(tmp_path)) == 2


def test_a_mount_point_is_refused_before_any_work_unless_it_is_written_in_place(tmp_path, monkeypatch):
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path)
    with pytest.raises(InputError, match="a mount point, which cannot be replaced; name a directory in it"):
        check_output(tmp_path, overwrite=True)
    check_output(tmp_path, overwrite=False, beside=frozenset())
    check_output(tmp_path / "m", overwrite=False)


@pytest.mark.parametrize(("text", "why"), [("1" * 5000, "Exceeds the limit"), ("[" * 100_000, "recursion depth")])
def test_json_beyond_pythons_limits_is_one_line(tmp_path, text, why):
    (tmp_path / "f.json").write_text(text)
    with pytest.raises(InputError, match=f"f.json: not valid JSON .*{why}.*; expected a list"):
        read_json(tmp_path / "f.json", "a list")


def test_a_directory_that_cannot_be_made_is_one_line(adapters, capsys):
    given = ["--utility", str(adapters["utility"]), "--output", "/proc/xx"]
    assert "error: /proc/xx: " in fails(["merge", *given], capsys)


@pytest.mark.parametrize("foreign", ["thesis.tex", "sub/train.jsonl", "run/checkpoints/last.ckpt", "notes.txt"])
def test_what_a_command_has_not_written_is_not_overwritten(adapters, tmp_path, foreign):
    given = {"utility": str(adapters["utility"]), "safety": str(adapters["safety"]), "method": TaskArithmetic()}
    merge(**given, alpha=[0.5, 1.0], output=str(tmp_path / "m"))
    merge(**given, alpha=1.0, output=str(tmp_path / "m"), overwrite=True)
    (tmp_path / "m" / foreign).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "m" / foreign).write_text("mine")
    with pytest.raises(InputError, match=f"{foreign} is not this command's, and would be lost"):
        merge(**given, alpha=1.0, output=str(tmp_path / "m"), overwrite=True)
    assert (tmp_path / "m" / foreign).read_text() == "mine"
    assert (tmp_path / "m" / "adapter_config.json").is_file()


def test_sigterm_ends_a_command_as_ctrl_c_does(adapters, tmp_path, capsys, monkeypatch):
    def missed(number, frame):
        raise AssertionError("SIGTERM reached the handler from before")

    def killed(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("went on")

    before = signal.signal(signal.SIGTERM, missed)
    try:
        monkeypatch.setattr("src.merge.stage.manifest", killed)
        given = ["--utility", str(adapters["utility"]), "--output", str(tmp_path / "m")]
        assert "error: interrupted; " in fails(["merge", *given], capsys)
        assert names(tmp_path) == []
        assert signal.getsignal(signal.SIGTERM) is missed
        monkeypatch.undo()
        assert main(["merge", *given]) == 0
    finally:
        signal.signal(signal.SIGTERM, before)
