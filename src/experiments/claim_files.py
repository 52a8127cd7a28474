"""Claims: which process works on which cell, as files that exactly one process can create (O_EXCL).

Several processes, or machines on a shared folder, work on one grid without a server. A claim names host, process and
the process's start, and is touched while its owner lives. It is stale where that process is gone (same host), where it
has not been touched for long, by the clock of the folder (another host), or where it was never written to its end.
Stale claims are removed under a lock, so that no two processes remove one after the other what is fresh by then.
"""

import json
import os
import socket
import threading
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock

HEARTBEAT = 20.0
"""Seconds between touches of a claim."""
UNWRITTEN = 5.0
"""Seconds after which a claim that names no owner was left by a process that was killed while it wrote it."""


class Claims:
    """Claims of one process in a folder.

    Args:
        folder: The folder, shared by all processes that work on the grid.
        stale_after: Seconds without a touch after which another host's claim counts as left behind.
    """

    def __init__(self, folder: Path, stale_after: float = 600.0) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.stale_after = folder, stale_after
        self.host, self.pid, self.machine = socket.gethostname(), os.getpid(), _machine()
        self._token = uuid.uuid4().hex
        self._clock = folder / f".clock-{self.host}-{self.pid}"
        self._held: set[str] = set()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def take(self, key: str) -> bool:
        """Claim a cell; false where another process that lives has it."""
        if self._create(key):
            return True
        with FileLock(self.folder / ".lock"):
            if not self.is_stale(key):
                return False
            self._path(key).unlink(missing_ok=True)
        return self._create(key)

    def release(self, key: str) -> None:
        """Give a claim back, unless it was taken over meanwhile."""
        self._held.discard(key)
        with FileLock(self.folder / ".lock"):
            if (self._read(key) or {}).get("token") == self._token:
                self._path(key).unlink(missing_ok=True)

    def close(self) -> None:
        """Give all claims back and stop touching them."""
        self._stop.set()
        for key in list(self._held):
            self.release(key)
        if self._thread is not None:
            self._thread.join()
        self._clock.unlink(missing_ok=True)

    def is_stale(self, key: str) -> bool:
        """Whether a claim exists and its owner is gone."""
        try:
            age = self.now() - self._path(key).stat().st_mtime
        except FileNotFoundError:
            return False
        owner = self._read(key)
        if owner is None:
            return age > UNWRITTEN
        if (owner.get("host"), owner.get("machine")) == (self.host, self.machine):
            return process_start(owner["pid"]) != owner["started"]
        return age > self.stale_after

    def now(self) -> float:
        """Time by the clock that stamps the folder's files: clocks of machines differ."""
        self._clock.touch()
        os.utime(self._clock)  # NFS sends nothing for an empty file that is emptied
        return self._clock.stat().st_mtime

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.claim"

    def _create(self, key: str) -> bool:
        try:
            handle = os.open(self._path(key), os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        except FileExistsError:
            return False
        owner = {"host": self.host, "machine": self.machine, "pid": self.pid, "started": process_start(self.pid)}
        owner["token"] = self._token
        with os.fdopen(handle, "w") as file:
            json.dump(owner, file)
        self._held.add(key)
        self._keep_touching()
        return True

    def _read(self, key: str) -> dict[str, Any] | None:
        """The owner; nothing where the file is gone, or is being written, or was cut by a crash."""
        try:
            found: dict[str, Any] = json.loads(self._path(key).read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            return None
        return found

    def _keep_touching(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._touch, daemon=True)
            self._thread.start()

    def _touch(self) -> None:
        while not self._stop.wait(HEARTBEAT):
            for key in list(self._held):
                # Given back meanwhile, or a file system that does not answer now: the others are still to be touched.
                with suppress(OSError):
                    os.utime(self._path(key))


def _machine() -> str:
    """Which processes this one can ask about: containers may have one host name, and numbers of their own."""
    found = []
    with suppress(OSError):
        found.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        found.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(found)


def process_start(pid: int) -> str | None:
    """When a process of this host started, as the kernel counts; nothing where it is gone (numbers are used again)."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return _without_proc(pid)
    state, *rest = text.rpartition(")")[2].split()
    return None if state in ("Z", "X") else rest[18]


def _without_proc(pid: int) -> str | None:
    """Systems without /proc tell only whether the process exists."""
    if Path("/proc/self").exists():
        return None
    try:
        with suppress(PermissionError):
            os.kill(pid, 0)
    except ProcessLookupError:
        return None
    return "runs"
