"""Calibration windows out of text that is far larger than memory should be: seconds, memory, and whether draws repeat.

    python -m benchmarks.text --model .assets/smollm2-135m --text .assets/text/calibration.jsonl --folder /tmp/text \
        [--gigabytes 1]

Makes a `.jsonl` and a `.txt` of one line from the documents of --text, so often repeated as it takes, and draws from each in a
process of its own. Seconds are those of the processor with one thread; memory is the peak of the process, program, tokenizer
and a draw from the small text included, and what it was after that.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path


def make(source: Path, folder: Path, size: float) -> list[Path]:
    """The two files, unless they are there."""
    folder.mkdir(parents=True, exist_ok=True)
    documents = [json.loads(line)["text"] for line in source.read_text().splitlines()]
    lines, line = folder / "lines.jsonl", folder / "line.txt"
    for path, rows in (
        (lines, [json.dumps({"text": text}) + "\n" for text in documents]),
        (line, [" ".join(text.split()) + " " for text in documents]),
    ):
        if path.is_file():
            continue
        written = 0
        with path.open("w") as file:
            while written < size:
                for row in rows:
                    file.write(row)
                    written += len(row.encode())
    return [lines, line]


def draw(model: str, small: str, path: str, windows: int, window: int) -> None:
    """Print what a draw took."""
    import torch

    import topiarist as tp
    from topiarist.data import calibration_windows, load_tokenizer

    torch.set_num_threads(1)
    tokenizer = load_tokenizer(model)
    calibration_windows(tp.text_files(small), tokenizer, num_samples=2, window=64, seed=0)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    found = calibration_windows(tp.text_files(path), tokenizer, num_samples=windows, window=window, seed=0)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = time.process_time() - start
    print(
        json.dumps({"seconds": seconds, "before": before / 1e3, "megabytes": peak / 1e3, "digest": found.digest[:16]})
    )


def main() -> None:
    """Print a table with a row a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--windows", type=int, default=128)
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--draw", type=Path)
    given = parser.parse_args()
    if given.draw is not None:
        draw(given.model, str(given.text), str(given.draw), given.windows, given.window)
        return
    print("| file | windows | s | MB before | peak MB | digest |")
    print("|---|---|---|---|---|---|")
    for path in make(given.text, given.folder, given.gigabytes * 1e9):
        for _ in range(2):
            command = [sys.executable, "-m", "benchmarks.text", *sys.argv[1:], "--draw", str(path)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            row = json.loads(done.stdout.splitlines()[-1])
            cells = f"{row['seconds']:.1f} | {row['before']:.0f} | {row['megabytes']:.0f} | {row['digest']}"
            print(f"| {path.name} | {given.windows} x {given.window} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
