"""What a low-rank companion gives a pruned model: perplexity without and with it, its bytes, CPU seconds.

    python -m benchmarks.low_rank --protocol standard --data DIR --ranks 32 64 [--method alps] [--pattern 2:4]

DIR and the protocols are those of `benchmarks.quality`. The pruned weights are the same whatever the rank: the companion
is computed beside them and put on by PEFT for the evaluation. Finished cells are kept in benchmarks/results/low-rank.jsonl.
"""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path
from typing import Any

import topiarist as tp
from benchmarks import quality
from benchmarks.said import method_from_text
from demo.assets import assets_dir, model_dir
from topiarist.evaluation.adapter import with_adapter
from topiarist.evaluation.perplexity import load_model

RESULTS = Path(__file__).parent / "results" / "low-rank.jsonl"


def run_cell(options: argparse.Namespace, rank: int, calibration: list[str], windows: Any) -> dict[str, Any]:
    """Prune with a companion of a rank, measure without and with it; the checkpoint goes."""
    out, begun = assets_dir() / "quality" / f"low-rank-{rank}", time.process_time()
    solver, additions = method_from_text(options.method)
    report = tp.prune(
        model_dir(), out, method=solver, pattern=options.pattern, data=calibration, num_windows=options.samples,
        window_tokens=options.window, batch_size=4, low_rank=rank, **additions,
    )  # fmt: skip
    cpu = time.process_time() - begun
    model = with_adapter(load_model(out), out)
    found = {name: tp.perplexity(model, w).value for name, w in windows.items()}
    cell = {
        "cpu_seconds": cpu,
        "mean_error": report.mean_error,
        "perplexity": quality.measure(out, windows),
        "with": found,
        "companion": {key: value for key, value in report.companion.items() if key != "errors"},
        "weights_bytes": (out / "model.safetensors").stat().st_size,
    }
    shutil.rmtree(out)
    return cell


def main() -> None:
    """Measure what is not known yet, and print all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    quality.add_protocol(parser, samples=32, eval_windows=8)
    parser.add_argument("--ranks", type=int, nargs="+", default=[32, 64])
    parser.add_argument("--method", default="alps")
    parser.add_argument("--pattern", default="2:4")
    options = parser.parse_args()
    calibration, windows, settings = quality.prepare(options)
    known = quality.stored_cells(RESULTS, settings)
    for rank in options.ranks:
        key = f"{options.method} {options.pattern} rank {rank}"
        if key not in known:
            known[key] = run_cell(options, rank, calibration, windows)
            quality.keep_cell(RESULTS, key, settings, known[key])
        print(key, known[key], flush=True)


if __name__ == "__main__":
    main()
