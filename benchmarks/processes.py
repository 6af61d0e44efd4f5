"""One pruning run by 1, 2, ... processes of so many threads: seconds, memory of a process, and whether the bytes agree.

    python -m benchmarks.processes --model .assets/model --data .assets/text/calibration.jsonl --folder /tmp/processes \
        [--processes 1 2] [--samples 128] [--window 512] [--threads 1] [-- --method alps --pattern 2:4]

Every number of processes is a run of its own, as a user starts it; what follows `--` goes to `topiarist prune`. Seconds are
those of the run itself (imports apart), by activity; the peak is that of the first process.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def run(out: Path, processes: int, words: list[str]) -> dict[str, Any]:
    """Prune into `out`, and what its run says of itself."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [*(start if processes > 1 else [sys.executable]), "-m", "topiarist", "prune", *words]
    subprocess.run(command, check=True, env=os.environ | {"TOKENIZERS_PARALLELISM": "false"}, stdout=subprocess.DEVNULL)
    return json.loads((out / "pruning_run.json").read_text())


def digest(out: Path) -> str:
    """Of all files but the timings."""
    total = hashlib.sha256()
    for path in sorted(out.iterdir()):
        if path.is_file() and path.name != "pruning_run.json":
            total.update(path.name.encode() + path.read_bytes())
    return total.hexdigest()[:16]


def main() -> None:
    """Print a table with a row for every number of processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    for name, default in (("samples", 128), ("window", 512), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("rest", nargs="*", default=["--method", "alps", "--pattern", "2:4"])
    given = parser.parse_args()
    rows = []
    for processes in given.processes:
        out = given.folder / f"{processes}"
        words = [given.model, str(out), "--data", given.data, "--samples", str(given.samples)]
        words += ["--window", str(given.window), "--threads", str(given.threads), *given.rest]
        about = run(out, processes, words)
        rows.append((processes, about, digest(out)))
    activities = sorted({name for _, about, _ in rows for name in about["seconds_by_activity"]})
    print(f"| processes | s | times | {' | '.join(activities)} | peak GB | bytes |")
    print("|" + "---|" * (5 + len(activities)))
    for processes, about, bytes_of in rows:
        parts = " | ".join(f"{about['seconds_by_activity'].get(name, 0.0):.1f}" for name in activities)
        times = rows[0][1]["seconds"] / about["seconds"]
        memory = about["peak_memory_bytes"] / 1e9
        print(f"| {processes} | {about['seconds']:.1f} | {times:.2f} | {parts} | {memory:.2f} | {bytes_of} |")


if __name__ == "__main__":
    main()
