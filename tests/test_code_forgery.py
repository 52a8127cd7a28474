"""Programs that try to pass without reaching their last line, from within the process that says so."""

import secrets

import pytest

from src.sandbox import run as sandbox
from tests.test_code_sandbox_files import LIMITS, WAYS, given

TOKEN = "5a" * 16
SEARCH = """
import gc, os, re, sys, threading
frames, frame = list(sys._current_frames().values()), sys._getframe()
while frame:
    frames.append(frame)
    frame = frame.f_back
kept = [*gc.get_objects(), *frames, *(one for f in frames for one in (f.f_locals, f.f_globals)), sys.stdin, os.environ]
seen, left, found = set(map(id, kept)), list(kept), set()
while left:
    one = left.pop()
    if isinstance(one, (str, bytes, bytearray)):
        text = one if isinstance(one, str) else bytes(one).decode("latin1")
        found |= set(re.findall("(?<![0-9a-f])[0-9a-f]{32}(?![0-9a-f])", text))
        continue
    for each in gc.get_referents(one):
        if id(each) not in seen:
            seen.add(id(each))
            kept.append(each)
            left.append(each)
print(len(seen) > 1000, found)
for token in found:
    for fd in range(3, 64):
        try: os.write(fd, token.encode())
        except OSError: pass
os._exit(0)
"""
TRACE = """
import sys
frame = sys._getframe(1)
lines = iter(sorted({line for *_, line in frame.f_code.co_lines() if line}) * 3)
def trace(frame, event, arg):
    if event == "line":
        try: frame.f_lineno = next(lines)
        except ValueError: pass
        except StopIteration: frame.f_trace = None
    return trace
while frame:
    frame.f_trace, frame = trace, frame.f_back
sys.settrace(trace)
raise SystemExit
"""
FRAME = """
import os, sys
frame = sys._getframe(1)
names = frame.f_locals
os.write(names["given"]["fd"], names["token"].encode())
os._exit(0)
"""
NAMES = """
import os, sys
frame = sys._getframe(1)
while frame:
    for name in frame.f_locals:
        frame.f_locals[name] = lambda *_, **__: None
    frame = frame.f_back
os._exit = os.write = os.read = lambda *_: 0
assert False
"""
BUILTINS = """
import builtins, os
os._exit = print
for name in ("BaseException", "Exception", "type", "exec", "compile", "len", "str", "print"):
    setattr(builtins, name, lambda *_, **__: None)
raise SystemExit
"""
READ = """
import os
found = []
for fd in range(3, 64):
    os.set_blocking(fd, False) if os.path.exists(f"/proc/self/fd/{fd}") else None
    for place in (fd, f"/proc/self/fd/{fd}"):
        try:
            number = place if place == fd else os.open(place, os.O_RDONLY | os.O_NONBLOCK)
            found.append(os.read(number, 4096))
        except OSError: pass
print(found)
for one in found:
    for fd in range(3, 64):
        try: os.write(fd, one[:32])
        except OSError: pass
os._exit(0)
"""
AGAIN = """
import os, sys
main = sys.modules["__main__"]
os.fork = lambda: 0
main.set_limits = main.give_up_rights = os.closerange = lambda *_: None
for fd in range(3, 64):
    given = {"program": "x = 1", "token": "", "fd": fd, "folder": ".", "limits": {}, "isolation": "none", "parent": 0}
    try: main.run(given, 2)
    except BaseException: pass
assert False
"""
FORGERIES = {
    "a dead exit": "import os\nos._exit = lambda code: None\nassert False",
    "a dead exit, leaving": "import os\nos._exit = print\nraise SystemExit",
    "the caller's frame": FRAME,
    "all frames and objects": SEARCH,
    "lines skipped by a trace": TRACE,
    "the callers' names": NAMES,
    "builtins": BUILTINS,
    "all descriptors": READ,
    "the child's own functions": AGAIN,
    "a text of the error": "import os\nclass E(Exception):\n  def __str__(self): os._exit(0)\nraise E",
    "at exit": "import atexit, os\nos._exit = print\natexit.register(os.abort)\nassert False",
    "a destructor": "class A:\n  def __del__(self):\n    import os\n    os._exit(0)\na = A()\nassert False",
    "a thread": "import os, threading\nthreading.Thread(target=os._exit, args=(0,)).start()\nwhile True: pass",
    "a dead flush": "import os, sys\nsys.stdout.flush = lambda: os._exit(0)\nassert False",
    "a signal": "import os, signal\nsignal.signal(14, lambda *_: os._exit(0))\nsignal.setitimer(0, 0.1)\nwhile 1: 0",
}


@pytest.mark.parametrize("way", [*WAYS, "none"])
@pytest.mark.parametrize("name", FORGERIES)
def test_a_program_cannot_say_itself_that_it_passed(way, name, monkeypatch):
    if not given(way):
        pytest.skip(f"no {way} here")
    monkeypatch.setattr(secrets, "token_hex", lambda _: TOKEN)
    outcome = sandbox.run_isolated(FORGERIES[name], LIMITS, isolation=way)
    assert outcome.ending == "failed", outcome
    assert TOKEN not in outcome.detail
    if FORGERIES[name] == SEARCH:
        assert outcome.detail.startswith("True"), outcome.detail


@pytest.mark.parametrize("way", [*WAYS, "none"])
@pytest.mark.parametrize(
    "code",
    [
        "import sys\nprint('x')\nsys.stdout = None",
        "import sys\nprint('x')\nsys.stdout.close()",
        "import io, sys\nsys.stdout = sys.stderr = io.StringIO()\nprint('x')",
        "import os\nprint('x')\nos.close(1)",
        "import os\nos._exit = lambda code: None",
        "import os\nopen(os.devnull, 'w').write('x')\nassert open(os.devnull).read() == ''",
        "import contextlib, os\nwith open(os.devnull, 'w') as f, contextlib.redirect_stdout(f):\n    print('x')",
        "import mmap, tempfile\nf = tempfile.TemporaryFile()\nf.truncate(9000)\nmmap.mmap(f.fileno(), 0)[0] = 1",
        "import sys\nassert len(sys.argv) == 1",
    ],
)
def test_an_honest_program_passes(way, code):
    if not given(way):
        pytest.skip(f"no {way} here")
    outcome = sandbox.run_isolated(code, LIMITS, isolation=way)
    assert outcome.passed, outcome


def test_text_that_is_no_unicode_is_an_ordinary_failure():
    assert sandbox.run_isolated("x = '\ud800'", LIMITS, isolation="none").ending == "failed"
    outcome = sandbox.run_isolated("raise ValueError('\\ud800 wrong')", LIMITS, isolation="none")
    assert "ValueError" in outcome.detail
