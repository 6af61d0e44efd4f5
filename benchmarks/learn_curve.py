"""Perplexity of learned masks against training tokens seen, on text that chose nothing.

    python -m benchmarks.learn_curve OUT [--preset quick] [--steps N] [--prior wanda] [--data DIR] [--threads N]
    python -m benchmarks.learn_curve OUT --measure [--at STEP ...] [--data DIR]

The first learns on the demo's calibration text (or on openwebtext and wikipedia of DIR/train, without every tenth
document) and keeps the mask of every evaluation; killed, it goes on. The second measures them on the first 16 windows
of 1024 tokens of the demo's held-out texts, and with DIR on those of the standard protocol, one mask after another, also of
a run that is not finished (cells stay in benchmarks/results/learn-curve.jsonl), and prints the table.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import platform
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

import topiarist as tp
from benchmarks.learn_cells import cell, demo_windows
from benchmarks.quality import documents, load_texts
from demo.assets import model_dir, text_dir
from topiarist.data import Windows, load_tokenizer
from topiarist.evaluation.perplexity import load_model
from topiarist.masklearn import relaxation_for
from topiarist.masks import read_npz, write_npz
from topiarist.pipelines.learning.files import STATE

CELLS = Path("benchmarks/results/learn-curve.jsonl")


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


def history(out: Path) -> list[dict[str, Any]]:
    """The evaluations of a run, finished or not."""
    if (report := out / "pruning_report.json").is_file():
        return json.loads(report.read_text())["history"]
    with safe_open(out / STATE, "pt") as state:
        return json.loads(state.metadata()["history"])


def measure(options: argparse.Namespace) -> None:
    """Every kept mask, or those of `--at`, on text that chose nothing; a mask is measured once on a text, the last first."""
    shapes = {name: tuple(tensor.shape) for name, tensor in load_model(model_dir()).state_dict().items()}
    texts: dict[str, Windows] = demo_windows(16)
    if options.data is not None:
        _, standard = load_texts(
            argparse.Namespace(protocol="standard", data=options.data, eval_windows=16), load_tokenizer(model_dir())
        )
        texts |= {f"standard {name}": windows for name, windows in standard.items()}
    run = options.out.name

    @functools.lru_cache(maxsize=1)
    def masked(path: Path) -> Any:
        model = load_model(model_dir())
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            for name, mask in read_npz(path, shapes).items():
                parameters[name].masked_fill_(~mask, 0.0)
        return model

    lines = [
        f"| step | tokens seen | changed | training slice | {' | '.join(texts)} |",
        "|---" * (4 + len(texts)) + "|",
    ]
    kept = options.out.with_name(f"{run}-masks")
    for entry in reversed(history(options.out)):
        path, found = kept / f"{entry['step']:05d}.npz", []
        if options.at and entry["step"] not in options.at:
            continue
        for name, windows in texts.items():
            value = cell(
                CELLS,
                f"{run}, step {entry['step']}, {name}",
                lambda path=path, windows=windows: {"perplexity": tp.perplexity(masked(path), windows).value},
            )
            found.append(f"{value['perplexity']:.1f}")
        print(f"step {entry['step']}: {found}", flush=True)
        lines.insert(
            2,
            f"| {entry['step']} | {entry['tokens']:,} | {entry['flips']:.2%} | {math.exp(entry['hard_loss']):.1f} | "
            f"{' | '.join(found)} |",
        )
    note = f"{time.strftime('%Y-%m-%d')}, {run}; {platform.machine()}, torch {torch.__version__}"
    print("\n".join([note, "", *lines]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--at", nargs="*", type=int, help="steps to measure; default: all that were kept")
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
