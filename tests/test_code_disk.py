"""What a program may hold on disk and in the kernel, and what is left of it afterwards."""

import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from src.sandbox import run as sandbox
from src.sandbox.folder import remove
from src.sandbox.run import Limits
from tests.test_code_sandbox_files import WAYS, given

ROOT = Path(__file__).resolve().parents[1]
LIMITS = Limits(seconds=10.0, memory_mb=256, file_mb=2)
HELD = "import ctypes, mmap, os, time\nctypes.CDLL(None).prctl(4, 0)\nkept, full = [], bytes(2 << 20)\n"
NAMELESS = "for i in range(8):\n    kept.append(open('x', 'wb'))\n    os.unlink('x')\n    kept[-1].write(full)\n"
MAPPED = """
libc = ctypes.CDLL(None)
libc.mmap.argtypes, libc.mmap.restype = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long], ctypes.c_void_p
for i in range(8):
    with open('x', 'w+b') as f:
        f.write(full)
        assert libc.mmap(None, 4096, 1, 2, f.fileno(), 0)
    os.unlink('x')
"""  # noqa: E501
DEEP = """
for i in range(20):
    os.mkdir('n' * 250)
    os.chdir('n' * 250)
for i in range(8): open(str(i), 'wb').write(full)
"""
CLOSED = "os.mkdir('d', 0o300)\nfor i in range(8): open(f'd/{i}', 'wb').write(full)\n"
MANY = "for i in range(5000): os.mkdir(str(i))\n"
LEADERLESS = """
import threading
def hold():
    time.sleep(0.1)
    for i in range(8):
        kept.append(open('x', 'wb'))
        os.unlink('x')
        kept[-1].write(full)
    time.sleep(1)
    print('kept', flush=True)
    os._exit(3)
threading.Thread(target=hold).start()
ctypes.CDLL(None).pthread_exit(None)
"""


@pytest.fixture
def scratch(monkeypatch):
    """A directory for temporary files that any user can write to."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o1777)
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(params=WAYS)
def run(request, scratch):
    if not given(request.param):
        pytest.skip(f"no {request.param} here")
    return lambda program: sandbox.run_isolated(program, LIMITS, isolation=request.param)


@pytest.mark.parametrize("code", [NAMELESS, MAPPED, DEEP, CLOSED, MANY, LEADERLESS])
def test_no_file_is_beyond_the_limit(run, code, scratch):
    outcome = run(HELD + code + "print('held')\ntime.sleep(1)\nprint('kept')")
    assert outcome.ending == "failed"
    assert "kept" not in outcome.detail
    assert list(scratch.iterdir()) == []


def test_files_without_a_name_are_allowed_within_the_limit(run):
    code = "f.write(bytes(1 << 20))\nf.flush()\nm = mmap.mmap(f.fileno(), 0)\nkept = [os.dup(f.fileno()), m]"
    outcome = run(f"import mmap, os, tempfile, time\nf = tempfile.TemporaryFile()\n{code}\ntime.sleep(0.3)")
    assert outcome.passed, outcome


def test_a_deep_directory_is_removed(run, scratch):
    outcome = run("import os\nfor i in range(1100):\n    os.mkdir('d')\n    os.chdir('d')")
    assert outcome.ending in ("passed", "failed")
    assert list(scratch.iterdir()) == []


def test_what_is_removed_may_be_closed_or_a_link(tmp_path):
    keep, folder = tmp_path / "keep", tmp_path / "folder"
    keep.mkdir()
    (keep / "file").write_text("x")
    (folder / "a" / "b" / "c").mkdir(parents=True)
    (folder / "a" / "b" / "file").write_text("x")
    (folder / "link").symlink_to(keep)
    for path in (folder / "a" / "b" / "c", folder / "a" / "b", folder / "a", folder):
        path.chmod(0)
    remove(str(folder))
    assert not folder.exists()
    assert (keep / "file").read_text() == "x"


def test_a_directory_that_stays_does_not_end_the_evaluation(scratch, monkeypatch, caplog):
    def stays(folder):
        raise PermissionError(f"{folder} stays")

    monkeypatch.setattr(sandbox, "remove", stays)
    assert sandbox.run_isolated("x = 1", LIMITS, isolation="none").passed
    assert "stays" in caplog.text


@pytest.mark.parametrize("way", [*WAYS, "none"])
def test_memory_beside_the_address_space_is_closed(way):
    if not given(way):
        pytest.skip(f"no {way} here")
    calls = ["shmget(0, 4096, 0o1600)", "semget(0, 1, 0o1600)", "msgget(0, 0o1600)", "memfd_create(b'x', 0)"]
    calls += ["inotify_init()", "vmsplice(1, None, 0, 0)", "syscall(447, 0)", "mq_open(b'/x', 0o102, 0o600, None)"]
    refused = "\n".join(f"assert libc.{call} == -1 and ctypes.get_errno() == 1, {call[:6]!r}" for call in calls)
    outcome = sandbox.run_isolated(
        f"import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n{refused}", LIMITS, isolation=way
    )
    assert outcome.passed, outcome


EVALUATOR = """
import sys
from src.sandbox.run import Limits, run_isolated
run_isolated("open('x', 'w').write('y')\\nwhile True: pass", Limits(seconds=60), isolation=sys.argv[1])
"""


def children(pid):
    """Processes that a process started and that have not ended."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = path.read_text().rpartition(")")[2].split()[:2]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(parent) == pid and state != "Z":
            found.append(int(path.parent.name))
    return found


def until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not (found := condition()) and time.monotonic() < end:
        time.sleep(0.02)
    return found


def ended(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("way", [*WAYS, "none"])
def test_a_killed_evaluation_leaves_nothing(way, scratch):
    if not given(way):
        pytest.skip(f"no {way} here")
    environment = {"PYTHONPATH": str(ROOT), "TMPDIR": str(scratch)}
    evaluator = subprocess.Popen([sys.executable, "-c", EVALUATOR, way], env=environment)
    (child,) = until(lambda: children(evaluator.pid))
    (program,) = until(lambda: children(child))
    assert until(lambda: way == "namespaces" or list(scratch.glob("sandbox-*/x")))
    evaluator.send_signal(signal.SIGKILL)
    evaluator.wait()
    assert until(lambda: ended(program) and ended(child))
    assert list(scratch.iterdir()) == []
