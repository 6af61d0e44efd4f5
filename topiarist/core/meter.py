"""What a run costs: seconds by activity, memory of the process."""

from __future__ import annotations

import ctypes
import functools
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch


@dataclass
class Meter:
    """Counts from when it is made."""

    seconds: dict[str, float] = field(default_factory=dict)
    """By activity."""
    started: float = field(default_factory=time.perf_counter)

    @contextmanager
    def timed(self, activity: str) -> Iterator[None]:
        """Add the seconds that the block takes to those of the activity, even if it raises."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[activity] = self.seconds.get(activity, 0.0) + time.perf_counter() - start

    def run(self, device: torch.device) -> dict[str, Any]:
        """What a report says of the run so far, and of where it ran."""
        return {
            "seconds": time.perf_counter() - self.started,
            "seconds_by_activity": dict(self.seconds),
            "peak_memory_bytes": peak_memory_bytes(),
            "threads": torch.get_num_threads(),
            "device": str(device),
            "torch": torch.__version__,
        }


def reset_peak_memory() -> None:
    """Forget the peak so far, where the system can (Linux); `peak_memory_bytes` then speaks of what follows."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_memory_bytes() -> int:
    """Largest resident size of this process, plus the GPU's own peak if one was used."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        host = int(line.split()[1]) * 1024
    else:
        import resource

        host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return host + (torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0)


def return_freed_memory() -> None:
    """Give memory that was freed back to the system: glibc keeps pieces below 32 MB, and they add up over the blocks."""
    if (trim := _glibc("malloc_trim")) is not None:
        trim(0)


def give_back_at_once() -> None:
    """Let glibc give back pieces from 128 KB on when they are freed, for the rest of this process.

    It comes to keep those below 32 MB, and what a training takes and frees once a block, between what it keeps, leaves
    holes. Shards of small matrices are below 1 MB.
    """
    if (option := _glibc("mallopt")) is not None:
        option(_MMAP_THRESHOLD, 1 << 17)


_MMAP_THRESHOLD = -3
"""glibc's number of that option."""


@functools.cache
def _glibc(name: str) -> Any:
    try:
        return getattr(ctypes.CDLL(None), name)
    except (OSError, AttributeError):  # another C library
        return None


def resident_bytes() -> int:
    """Resident size of this process now."""
    pages = Path("/proc/self/statm")
    if not pages.exists():
        return peak_memory_bytes()
    return int(pages.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def duration(seconds: float) -> str:
    """A time as text in seconds, minutes or hours, whichever is readable."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
