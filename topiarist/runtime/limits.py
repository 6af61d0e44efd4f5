"""What was measured on this machine, kept beside the compiled kernels: timing every shape anew would slow each load."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch

from topiarist.checkpoints.atomic import write_atomically
from topiarist.core.compiled import cache_folder
from topiarist.core.errors import CheckpointError
from topiarist.runtime.build import LEVELS, load_kernels

FILE = "limits.json"


class Limits:
    """Numbers by what they were measured of, in memory and in `FILE`, which may be damaged or impossible to write."""

    def __init__(self) -> None:
        self._known: dict[str, int] = {}

    def of(self, kind: Sequence[Any], machine: str, measure: Callable[[], int]) -> int:
        """The number of this kind of layer on this machine, measured where it is not known.

        kind: what the number depends on beside the machine, the number of threads, torch and the kernels.
        """
        kernels = load_kernels()
        about = (torch.get_num_threads(), torch.__version__, LEVELS[kernels.level], kernels.digest)
        key = json.dumps([machine, *about, *map(str, kind)])
        if key not in self._known:
            self._known = {**self._stored(), **self._known}
        if key not in self._known:
            self._known[key] = measure()
            with suppress(CheckpointError, OSError):
                cache_folder().mkdir(parents=True, exist_ok=True)
                found = {**self._stored(), **self._known}
                write_atomically(cache_folder() / FILE, json.dumps(found, indent=1) + "\n")
        return self._known[key]

    def _stored(self) -> dict[str, int]:
        try:
            found = json.loads((cache_folder() / FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return {}
        good = isinstance(found, dict) and all(type(value) is int and value > 0 for value in found.values())
        return found if good else {}
