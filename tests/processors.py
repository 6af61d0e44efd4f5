"""Runs pytest as on several processors: held to AVX2, to AVX-512 without AMX, free, and emulated (see rounding.py).

    python tests/processors.py [PYTEST ARGUMENTS]

What this processor does not have is skipped, and said. The exit code is that of the first run that failed.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple


class Run(NamedTuple):
    """needs: a flag of /proc/cpuinfo, empty = none; environment: read by torch, oneDNN and MKL when they are loaded."""

    name: str
    needs: str
    environment: dict[str, str]
    arguments: list[str]


def held(aten: str, onednn: str, mkl: str) -> dict[str, str]:
    return {"ATEN_CPU_CAPABILITY": aten, "ONEDNN_MAX_CPU_ISA": onednn, "MKL_ENABLE_INSTRUCTIONS": mkl}


RUNS = [
    Run("without vectors", "", held("default", "SSE41", "SSE4_2"), []),
    Run("AVX2", "avx2", held("avx2", "AVX2", "AVX2"), []),
    Run("AVX-512 without AMX", "avx512f", held("avx512", "AVX512_CORE_BF16", "AVX512"), []),
    Run("free", "", {}, []),
    Run("products rounded otherwise", "", {}, ["--processor=other"]),
    Run("searches in bf16", "", {}, ["--processor=bf16"]),
]


def main(arguments: list[str]) -> int:
    cpuinfo = Path("/proc/cpuinfo")
    flags = set(cpuinfo.read_text().split()) if cpuinfo.exists() else set()
    for run in RUNS:
        if run.needs and run.needs not in flags:
            print(f"== {run.name}: this processor does not have it", flush=True)
            continue
        print(f"== {run.name}", flush=True)
        code = subprocess.call(
            [sys.executable, "-m", "pytest", *run.arguments, *arguments], env=os.environ | run.environment
        )
        if code:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
