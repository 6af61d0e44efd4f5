"""Runs that are killed, and what they leave."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import tqdm.auto

from topiarist.checkpoints.writing import SavedState


class Killed(Exception):
    """Raised where a kill would come."""


class Kept(SavedState):
    """A state that outlives the call."""

    def __init__(self) -> None:
        self.saved = None

    def load(self):
        return self.saved

    def save(self, tensors, metadata) -> None:
        self.saved = {key: value.clone() for key, value in tensors.items()}, dict(metadata)


def contents(folder: Path) -> dict[str, str]:
    """Hashes of every file of a folder, or of a file; only the timings may differ between runs."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in (sorted(folder.rglob("*")) if folder.is_dir() else [folder])
        if path.is_file() and path.name != "pruning_run.json"
    }


def run_and_kill(work: Callable[[], object], delay: float) -> bool:
    """Work in a forked process and SIGKILL it after `delay` seconds. True if it was killed before it finished."""
    pid = os.fork()
    if pid == 0:
        try:
            for bar in (tqdm.std.tqdm, tqdm.auto.tqdm):  # their locks are shared: killed holding one, a child hangs us
                bar.set_lock(threading.RLock())
            work()
            os._exit(0)
        except BaseException:
            os._exit(1)
    time.sleep(delay)
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    assert not os.WIFEXITED(status) or os.WEXITSTATUS(status) == 0, "a resumed run failed"
    return os.WIFSIGNALED(status)


def assert_kills_change_nothing(work: Callable[[Path], object], folder: Path, *, kills: int, each: int) -> None:
    """Kill `work(out)` at random moments, at least `kills` times, `each` times a folder so that a resume is itself
    interrupted; every folder must end in the bytes of a whole run."""
    work(folder / "warm-up")
    started = time.perf_counter()
    work(folder / "whole")
    duration = time.perf_counter() - started
    expected = contents(folder / "whole")
    generator, killed, rounds = random.Random(0), 0, 0
    while killed < kills:
        out = folder / f"killed-{rounds}"
        rounds += 1
        for _ in range(each):
            killed += run_and_kill(lambda: work(out), generator.uniform(0.02, 1.1) * duration)  # noqa: B023
        work(out)
        found = contents(out)
        different = [name for name in sorted(found | expected) if found.get(name) != expected.get(name)]
        assert not different, f"{out.name} differs in {different}"
