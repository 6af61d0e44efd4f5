"""Perplexity of learned masks against training tokens seen, on text that chose nothing.

    python -m benchmarks.learn_curve OUT [--preset quick] [--steps N] [--prior wanda] [--data DIR] [--threads N]
    python -m benchmarks.learn_curve OUT --measure

The first learns on the demo's calibration text (or on openwebtext and wikipedia of DIR/train, without every tenth
document) and keeps the mask of every evaluation; killed, it goes on. The second measures them on the first 16 windows
of 1024 tokens of the demo's held-out texts, one mask after another (finished ones stay in docs/learn-curve.jsonl), and
prints the table.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

import topiarist as tp
from benchmarks.learn_cells import cell, demo_windows, finished
from benchmarks.quality import documents
from demo.assets import model_dir, text_dir
from topiarist.evaluate import load_model
from topiarist.masklearn import relaxation_for
from topiarist.masks import read_npz, write_npz
from topiarist.pipelines.learning.files import STATE

CELLS = Path("docs/learn-curve.jsonl")


def keep_mask(out: Path, kept: Path, pattern: str) -> None:
    """The hard masks of the saved state, beside the run."""
    with safe_open(out / STATE, "pt") as state:
        step = int(state.metadata()["step"])
        names = [key.removesuffix(" logits") for key in state.keys() if key.endswith(" logits")]  # noqa: SIM118
        relaxation = relaxation_for(pattern)
        masks = {name: relaxation.hard_mask(state.get_tensor(f"{name} logits")) for name in names}
    kept.mkdir(exist_ok=True)
    write_npz(kept / f"{step:05d}.npz", masks)


def run(options: argparse.Namespace) -> None:
    kept, started = options.out.with_name(options.out.name + "-masks"), time.time()
    log = options.out.with_name(options.out.name + ".log")

    def progress(what: str, done: int, total: int) -> None:
        line = f"{time.time() - started:7.0f} s  cpu {time.process_time():7.0f} s  {done}/{total}  {what}"
        with log.open("a") as file:
            file.write(line + "\n")
        if what.startswith("hard mask"):
            keep_mask(options.out, kept, options.pattern)

    data = tp.text_files(text_dir() / "calibration.jsonl")
    if options.data is not None:
        train = options.data / "train"
        data = [d for n in ("openwebtext", "wikipedia") for d in documents(train / f"{n}.jsonl.gz", held_out=False)]
    tp.learn(
        model_dir(), options.out, data=data, pattern=options.pattern, prior=options.prior, preset=options.preset,
        steps=options.steps, progress=progress,
    )  # fmt: skip


def measure(options: argparse.Namespace) -> None:
    """Every kept mask on text that chose nothing; a mask is measured once, the last first."""
    report = json.loads((options.out / "pruning_report.json").read_text())
    settings = report["settings"]
    shapes = {name: tuple(tensor.shape) for name, tensor in load_model(model_dir()).state_dict().items()}
    texts = demo_windows(16)

    def perplexities(path: Path) -> dict[str, Any]:
        model = load_model(model_dir())
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            for name, mask in read_npz(path, shapes).items():
                parameters[name].masked_fill_(~mask, 0.0)
        return {"perplexity": {name: tp.perplexity(model, windows).value for name, windows in texts.items()}}

    run = f"{settings['preset']} {settings['prior']} {settings['steps']} steps {report['data']['digest'][:8]}"
    entries = {entry["step"]: entry for entry in report["history"]}
    paths = sorted(options.out.with_name(options.out.name + "-masks").glob("*.npz"))
    for path in reversed(paths):
        found = cell(CELLS, f"{run}, step {int(path.stem)}", lambda path=path: perplexities(path))
        print(f"step {int(path.stem)}: {found['perplexity']}", flush=True)
    lines = ["| step | tokens seen | changed | training slice | c4 | wikipedia |", "|---|---|---|---|---|---|"]
    for path in paths:
        entry = entries[int(path.stem)]
        value = finished(CELLS)[f"{run}, step {entry['step']}"]["perplexity"]
        lines.append(
            f"| {entry['step']} | {entry['tokens']:,} | {entry['flips']:.2%} | {math.exp(entry['hard_loss']):.1f} | "
            f"{value['c4']:.1f} | {value['wikipedia']:.1f} |"
        )
    note = f"{time.strftime('%Y-%m-%d')}, {run}; {platform.machine()}, torch {torch.__version__}"
    print("\n".join([note, "", *lines]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--preset", default="quick")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--prior", default="wanda")
    parser.add_argument("--pattern", default="2:4")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    from transformers.utils import logging

    logging.disable_progress_bar()
    (measure if options.measure else run)(options)


if __name__ == "__main__":
    main()
