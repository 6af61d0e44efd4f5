"""One run a folder: a lock that the kernel gives up when its holder ends, however it ends."""

from __future__ import annotations

import json
import os
import socket
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from topiarist.checkpoints.atomic import disk_errors, make_folder, remove_empty
from topiarist.core.errors import CheckpointError

LOCK = "pruning_run.lock"


class FolderLock:
    """The lock of one folder. The file says who holds it; a file left by a kill is locked by nobody and is taken over."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._made: list[Path] = []
        """Folders that `acquire` created, the innermost first."""
        self._lock: FileLock | None = None
        self._holder: Any = None

    @property
    def held(self) -> bool:
        """Whether this object holds the lock now."""
        return self._lock is not None

    @property
    def made(self) -> bool:
        """Whether `acquire` created the folder."""
        return self.folder in self._made

    def acquire(self, *, wait: float = 0.0) -> None:
        """Create the folder if need be, and lock it. wait: seconds to wait for another holder, who takes a moment.

        Raises CheckpointError that names the process which holds it.
        """
        path = self.folder / LOCK
        self._made = make_folder(self.folder)
        with disk_errors(f"cannot create {self.folder}"):
            lock = FileLock(path, timeout=wait)
            try:
                lock.acquire()
            except Timeout:
                raise CheckpointError(
                    f"{self.folder} is being written by {_holder(path)}: wait for it, or choose another output"
                ) from None
            # Open until the release: where locks belong to a process, closing any handle of the file would end them.
            self._holder = path.open("w", encoding="utf-8")
            self._holder.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
            self._holder.flush()
        self._lock = lock

    def release(self) -> None:
        """Unlock. A folder in which nothing was written goes again, so that a refusal leaves nothing behind."""
        if self._lock is None:
            return
        with suppress(OSError):
            (self.folder / LOCK).unlink(missing_ok=True)  # before the release: nobody else's file is removed
        self._holder.close()
        self._lock.release()
        self._lock = None
        remove_empty(self._made)


def _holder(path: Path) -> str:
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        return f"process {known['pid']} on {known['host']}"
    except (OSError, ValueError, KeyError, TypeError):  # it has not written its name yet
        return "another process"
