"""Attacks on the machine that runs a model's programs: none may do harm, and none may pass."""

import os
import socket
import tempfile
import threading
import time
from pathlib import Path

import pytest

from src.errors import InputError
from src.sandbox import run as sandbox
from src.sandbox.run import Limits, missing_isolation, run_program

LIMITS = Limits(seconds=2.0, memory_mb=256)
isolated = pytest.mark.skipif(bool(missing_isolation()), reason=f"no isolation here: {missing_isolation()}")


def test_a_program_that_ends_passes_and_one_that_raises_fails():
    if missing_isolation():
        with pytest.raises(InputError, match="allow_code_execution"):
            run_program("x = 1")
        return
    assert run_program("import math, json, collections, random\nassert math.gcd(4, 6) == 2").passed
    outcome = run_program("assert 1 == 2, 'wrong sum'")
    assert outcome.ending == "failed"
    assert "wrong sum" in outcome.detail
    assert run_program("def f(:").ending == "failed"


@isolated
@pytest.mark.parametrize("leave", ["import os; os._exit(0)", "import sys; sys.exit(0)", "raise SystemExit", "quit()"])
def test_leaving_early_is_not_passing(leave):
    assert not run_program(leave, LIMITS).passed


@isolated
@pytest.mark.parametrize(
    "forge", ["import os\nfor fd in range(3, 200):\n  try: os.write(fd, b'a' * 32)\n  except OSError: pass"]
)
def test_a_guessed_token_does_not_pass(forge):
    assert not run_program(forge + "\nassert False", LIMITS).passed


@isolated
def test_fork_bomb():
    before = len(os.listdir("/proc"))
    started = time.monotonic()
    outcome = run_program("import os\nwhile True:\n    os.fork()", LIMITS)
    assert not outcome.passed
    assert time.monotonic() - started < 6
    assert len(os.listdir("/proc")) < before + 60


@isolated
def test_thread_bomb():
    code = "import threading, time\nfor _ in range(9999):\n    threading.Thread(target=time.sleep, args=(60,)).start()"
    assert not run_program(code, LIMITS).passed


@isolated
@pytest.mark.parametrize(
    "loop", ["while True: pass", "import time\ntime.sleep(100)", "while 1:\n  try: input()\n  except: 0"]
)
def test_infinite_loop_is_ended_in_time(loop):
    started = time.monotonic()
    assert run_program(loop, LIMITS).ending == "timeout"
    assert time.monotonic() - started < 8


@isolated
def test_memory_bomb():
    outcome = run_program("x = []\nwhile True:\n    x.append(bytearray(10_000_000))", LIMITS)
    assert outcome.ending == "failed"
    assert "MemoryError" in outcome.detail


@isolated
@pytest.mark.parametrize("signal", ["os.getppid(), 9", "0, 9", "-1, 9", "1, 9", "these tests, 9"])
def test_killing_the_parent(signal):
    signal = signal.replace("these tests", str(os.getpid()))
    assert not run_program(f"import os\nos.kill({signal})", LIMITS).passed


@isolated
def test_writing_outside_the_directory(tmp_path):
    tmp_path.chmod(0o777)
    victim, escape = tmp_path / "victim", Path(tempfile.gettempdir()) / f"sandbox-escape-{os.getpid()}"
    victim.write_text("before")
    victim.chmod(0o666)
    for code in (
        f"open({str(victim)!r}, 'w').write('after')",
        f"open({str(tmp_path / 'new')!r}, 'w').write('x')",
        f"import os\nos.remove({str(victim)!r})",
        f"open({str(escape)!r}, 'w').write('x')",
        "open('/dev/shm/sandbox-escape', 'w').write('x')",
        f"import os\nos.chmod({str(victim)!r}, 0)",
    ):
        assert not run_program(code, LIMITS).passed
    assert victim.read_text() == "before"
    assert victim.stat().st_mode & 0o777 == 0o666
    assert not (tmp_path / "new").exists()
    assert not escape.exists()


@isolated
def test_the_private_directory_is_small_and_leaves_nothing():
    found = set(Path(tempfile.gettempdir()).glob("sandbox-*"))
    assert run_program("open('x', 'w').write('y' * 1000)", LIMITS).passed
    for code in (
        "f = open('x', 'wb')\nwhile True: f.write(b'y' * 1_000_000)",
        "for i in range(100): open(str(i), 'wb').write(b'y' * 1_000_000)",
    ):
        assert not run_program(code, LIMITS).passed
    assert set(Path(tempfile.gettempdir()).glob("sandbox-*")) <= found


@isolated
def test_printing_a_gigabyte():
    started = time.monotonic()
    outcome = run_program("import sys\nfor _ in range(1000): sys.stdout.write('x' * 1_000_000)", LIMITS)
    assert outcome.ending == "output"
    assert len(outcome.detail) <= 2000
    assert time.monotonic() - started < 6


@isolated
def test_reading_the_parents_environment(monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    assert run_program("import os\nassert 'SECRET_TOKEN' not in os.environ\nassert len(os.environ) <= 1").passed
    code = f"text = open('/proc/{os.getpid()}/environ', 'rb').read()\nassert b'hunter2' in text"
    assert not run_program(code, LIMITS).passed
    everyone = (
        "import glob\nfound = b''\nfor p in glob.glob('/proc/[0-9]*/environ'):\n"
        "  try: found += open(p, 'rb').read()\n  except OSError: pass\nassert b'hunter2' in found"
    )
    assert not run_program(everyone, LIMITS).passed


@isolated
def test_opening_a_socket():
    reached = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(5)
        port = server.getsockname()[1]

        def accept():
            try:
                reached.append(server.accept()[0].close())
            except OSError:
                return

        thread = threading.Thread(target=accept)
        thread.start()
        assert not run_program(f"import socket\nsocket.create_connection(('127.0.0.1', {port}))", LIMITS).passed
        assert not run_program("import socket\nsocket.socket()", LIMITS).passed
        assert not run_program("import socket\nsocket.socketpair()", LIMITS).passed
        socket.create_connection(("127.0.0.1", port)).close()
        thread.join()
    assert len(reached) == 1  # only the test's own call: the server was there to be reached


@isolated
@pytest.mark.parametrize(
    "code",
    [
        "import subprocess\nsubprocess.run(['/bin/true'], check=True)",
        "import os\nos.execv('/bin/true', ['/bin/true'])",
        "import os\nos.setsid()",
        "import ctypes\nassert ctypes.CDLL(None).unshare(0x10000000) == 0",
        "import ctypes\nassert ctypes.CDLL(None).ptrace(16, 1, 0, 0) == 0",
        "open('/dev/vda', 'rb').read(1)",
        "import os\nos.mknod('x', 0o60666, 5)",
    ],
)
def test_other_ways_out_are_closed(code):
    assert not run_program(code, LIMITS).passed


def test_without_isolation_programs_are_refused_unless_allowed(monkeypatch):
    monkeypatch.setattr(sandbox, "missing_isolation", lambda: "no namespaces")
    with pytest.raises(InputError, match=r"cannot be isolated on this machine \(no namespaces\)"):
        run_program("x = 1")
    assert run_program("x = 1", LIMITS, allow_code_execution=True).passed
    assert run_program("while True: pass", LIMITS, allow_code_execution=True).ending == "timeout"
    for code in ("import socket\nsocket.socket()", "import os\nos.kill(os.getppid(), 9)", "import os\nos.fork()"):
        assert not run_program(code, LIMITS, allow_code_execution=True).passed
