"""What a program can read and do in each way of isolation, run by this user and by an ordinary one."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from src.errors import InputError
from src.sandbox import run as sandbox
from src.sandbox.libc import anyone_can_read
from src.sandbox.run import Limits, missing_isolation, run_program

ROOT = Path(__file__).resolve().parents[1]
LIMITS = Limits(seconds=3.0, memory_mb=256, file_mb=8)
WAYS = ("namespaces", "landlock")
MODULES = "import ctypes, datetime, decimal, hashlib, heapq, json, math, random, re, sqlite3, statistics, typing, zlib"


def given(way):
    """Whether this machine gives a way of isolation."""
    return sys.platform == "linux" and sandbox.run_isolated("x = 1", LIMITS, isolation=way).passed


@pytest.fixture(params=WAYS)
def run(request):
    if not given(request.param):
        pytest.skip(f"no {request.param} here")
    return lambda program: sandbox.run_isolated(program, LIMITS, isolation=request.param)


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home with a secret that this user can read, and anyone."""
    for name in (".ssh", ".cache/huggingface"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / ".ssh" / "id").write_text("hunter2")
    (tmp_path / ".cache" / "huggingface" / "token").write_text("hunter2")
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_files_of_the_user_cannot_be_read(run, home):
    for path in (home / ".ssh" / "id", home / ".cache/huggingface/token", ROOT / "pyproject.toml", "/etc/hostname"):
        assert Path(path).read_bytes()
        outcome = run(f"print(open({str(path)!r}).read())")
        assert outcome.ending == "failed"
        assert "FileNotFoundError" in outcome.detail or "PermissionError" in outcome.detail
    for folder in (home, home / ".ssh", ROOT, Path("/proc/self"), Path("/var")):
        assert not run(f"import os\nassert os.listdir({str(folder)!r})").passed
    for way in ("os.link({0!r}, 'x')", "os.symlink({0!r}, 'x')", "os.rename({0!r}, 'x')", "shutil.copy({0!r}, 'x')"):
        outcome = run("import os, shutil\n" + way.format(str(home / ".ssh" / "id")) + "\nopen('x').read()")
        assert outcome.ending == "failed"
    assert (home / ".ssh" / "id").read_text() == "hunter2"


def test_what_programs_need_is_there(run):
    code = (
        "open('x', 'w').write('y')\nimport os, tempfile\nos.mkdir('d')\nos.rename('x', 'd/x')\nassert os.listdir('d')"
    )
    outcome = run(f"{MODULES}\n{code}\ntempfile.TemporaryFile().write(b'x')\nos.remove('d/x')\nos.rmdir('d')")
    assert outcome.passed, outcome.detail
    threads = "import threading\nt = threading.Thread(target=print)\nt.start()\nt.join()"
    assert run(threads).passed


@pytest.mark.parametrize(
    "code",
    [
        "import os\nwhile True:\n    os.fork()",
        "import threading, time\nfor _ in range(999):\n    threading.Thread(target=time.sleep, args=(60,)).start()",
        "import os\nos.kill(os.getppid(), 9)",
        "import os\nos.kill(-1, 9)",
        "import socket\nsocket.socket()",
        "import subprocess\nsubprocess.run(['/bin/true'], check=True)",
        "import os\nos.setpriority(os.PRIO_PROCESS, PARENT, 1)",
        "import resource\nresource.prlimit(PARENT, resource.RLIMIT_NOFILE, (1, 1))",
        "import fcntl\nfcntl.fcntl(0, fcntl.F_SETOWN, PARENT)\nassert fcntl.fcntl(0, fcntl.F_GETOWN)",
        "import ctypes\nassert ctypes.CDLL(None).shmget(0, 4096, 0o1600) >= 0\nopen('/dev/vda', 'rb')",
        "for i in range(100): open(str(i), 'wb').write(b'y' * 1_000_000)\nimport time\ntime.sleep(9)",
        "f = open('x', 'wb')\nwhile True: f.write(b'y' * 1_000_000)",
        "import os\nos.mknod('x', 0o60666, 5)",
        "import os\nfor fd in os.listdir('/proc/self/fd'): pass",
    ],
)
def test_attacks_fail_in_every_way(run, code):
    before = len(os.listdir("/proc"))
    assert run(code.replace("PARENT", str(os.getpid()))).ending == "failed"
    assert len(os.listdir("/proc")) < before + 60


def test_modes_and_times_of_the_users_files_stay(run, home):
    victim = home / ".ssh" / "id"
    victim.chmod(0o666)
    before = victim.stat()
    for change in ("chmod({0!r}, 0)", "utime({0!r}, (1, 1))", "truncate({0!r}, 1)", "setxattr({0!r}, 'user.a', b'b')"):
        assert not run(f"import os\nos.{change.format(str(victim))}").passed
        assert not run(f"import os\nos.{change.format('/proc/1/cwd' + str(victim))}").passed
    after = victim.stat()
    assert (after.st_mode, after.st_mtime, after.st_size) == (before.st_mode, before.st_mtime, before.st_size)


AS_ANOTHER = """
import json, os, sys
from pathlib import Path
from src.sandbox.run import Limits, run_isolated, best_isolation

home = Path(sys.argv[1])
secret = home / ".ssh" / "id"
secret.parent.mkdir(mode=0o700)
secret.write_text("hunter2")
secret.chmod(0o600)
found = {"user": os.getuid(), "best": best_isolation()[0]}
codes = {
    "plain": "open('x', 'w').write('y')",
    "read": f"print(open({str(secret)!r}).read())",
    "list": f"import os\\nprint(os.listdir({str(home)!r}))",
    "chmod": f"import os\\nos.chmod({str(secret)!r}, 0)",
    "write": f"open({str(home / 'new')!r}, 'w')",
    "thread": "import threading\\nthreading.Thread(target=print).start()",
    "kill": f"import os\\nos.kill({os.getpid()}, 9)",
    "hold": "import ctypes, os, time\\nctypes.CDLL(None).prctl(4, 0)\\nkept = []\\nfor i in range(9):\\n"
    "  kept.append(open('x', 'wb'))\\n  os.unlink('x')\\n  kept[-1].write(bytes(2 << 20))\\ntime.sleep(1)",
}
harmless = (
    "import os\\nopen(os.devnull, 'w').write('x')",
    "import os\\nfor i in range(200):\\n  os.mkdir('d')\\n  os.chdir('d')",
)
for way in ("namespaces", "landlock"):
    found[f"harmless, {way}"] = [run_isolated(code, Limits(seconds=60), isolation=way).ending for code in harmless]
    found[way] = {name: vars(run_isolated(code, Limits(seconds=60), isolation=way)) for name, code in codes.items()}
print(json.dumps(found | {"secret": secret.read_text(), "new": (home / "new").exists()}))
"""


def ordinary_python():
    """A Python that an ordinary user can start."""
    named = [sys.executable, *(shutil.which(f"python3{minor}") for minor in ("", ".13", ".12", ".11"))]
    for path in filter(None, [*named, "/usr/bin/python3"]):
        if anyone_can_read(path) and anyone_can_read(str(Path(path).resolve())):
            wanted = "import os, sys; print(os.__file__ if sys.version_info >= (3, 11) else '')"
            library = subprocess.run([path, "-c", wanted], capture_output=True, text=True, check=False).stdout.strip()
            if library and anyone_can_read(library):
                return path
    return None


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="only root can become another user")
def test_an_ordinary_users_home_is_closed_to_programs_in_both_ways(tmp_path):
    python = ordinary_python()
    if python is None or not anyone_can_read(str(ROOT / "src" / "sandbox" / "child.py")):
        pytest.skip("an ordinary user can start no Python 3.11, or cannot read this project")
    home = Path(subprocess.run(["mktemp", "-d"], capture_output=True, text=True, check=True).stdout.strip())
    os.chown(home, 65534, 65534)
    try:
        done = subprocess.run(
            [python, "-c", AS_ANOTHER, str(home)],
            env={"PYTHONPATH": str(ROOT), "HOME": str(home), "PYTHONDONTWRITEBYTECODE": "1"},
            cwd="/", user=65534, group=65534, extra_groups=[], capture_output=True, text=True, check=True,
        )  # fmt: skip
    finally:
        shutil.rmtree(home)
    found = json.loads(done.stdout)
    assert (found["user"], found["secret"], found["new"]) == (65534, "hunter2", False)
    ways = [way for way in WAYS if found[way]["plain"]["ending"] == "passed"]
    if not ways:
        pytest.skip(f"an ordinary user has no isolation here: {found['namespaces']['plain']['detail']}")
    assert found["best"] == ways[0]
    for way in ways:
        passed = {name for name, outcome in found[way].items() if outcome["ending"] == "passed"}
        assert passed == {"plain", "thread"}, (way, found[way])
        assert found[f"harmless, {way}"] == ["passed", "passed"]


def test_landlock_stands_in_where_there_are_no_namespaces(monkeypatch, home):
    if not given("landlock"):
        pytest.skip("no landlock here")
    original = sandbox.run_isolated

    def without(program, limits, *, isolation):
        if isolation == "namespaces":
            return sandbox.Outcome("failed", "unshare: Operation not permitted")
        return original(program, limits, isolation=isolation)

    monkeypatch.setattr(sandbox, "run_isolated", without)
    sandbox.best_isolation.cache_clear()
    try:
        assert sandbox.best_isolation() == ("landlock", "unshare: Operation not permitted")
        assert missing_isolation() == ""
        assert run_program("x = 1", LIMITS).passed
        assert not run_program(f"open({str(home / '.ssh' / 'id')!r})", LIMITS).passed
    finally:
        sandbox.best_isolation.cache_clear()


def test_without_any_way_the_refusal_says_what_stays_open(monkeypatch):
    monkeypatch.setattr(
        sandbox, "run_isolated", lambda *_, isolation, **__: sandbox.Outcome("failed", f"no {isolation}")
    )
    sandbox.best_isolation.cache_clear()
    try:
        with pytest.raises(InputError, match=r"\(no namespaces; no landlock\); .* read and change every file that you"):
            run_program("x = 1")
    finally:
        sandbox.best_isolation.cache_clear()
