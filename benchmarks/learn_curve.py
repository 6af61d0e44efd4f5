"""Perplexity of learned masks against training tokens seen, on text that chose nothing.

    python -m benchmarks.learn_curve OUT [--preset quick] [--steps N] [--prior wanda] [--data DIR] [--threads N]
    python -m benchmarks.learn_curve OUT --measure

The first learns on the demo's calibration text (or on openwebtext and wikipedia of DIR/train, without every tenth
document) and keeps the mask of every evaluation; killed, it goes on. The second measures them on the first 16 windows
of 1024 tokens of the demo's held-out texts and appends the table to docs/results-learn.md.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path

import torch
from safetensors import safe_open

import topiarist as tp
from benchmarks.quality import documents
from demo.assets import model_dir, text_dir
from topiarist.data import evaluation_windows, load_tokenizer
from topiarist.evaluate import load_model
from topiarist.masklearn import relaxation_for
from topiarist.masks import read_npz, write_npz
from topiarist.pipelines.learned import STATE


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
    report = json.loads((options.out / "pruning_report.json").read_text())
    tokens = {entry["step"]: entry["tokens"] for entry in report["history"]}
    tokenizer = load_tokenizer(model_dir())
    texts = {
        name: evaluation_windows(
            tp.text_files(text_dir() / f"heldout_{name}.jsonl"), tokenizer, window=1024, max_windows=16
        )
        for name in ("c4", "wikipedia")
    }
    dense = load_model(model_dir()).state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in dense.items()}
    lines = ["| step | tokens seen | changed | training slice | c4 | wikipedia |", "|---|---|---|---|---|---|"]
    entries = {entry["step"]: entry for entry in report["history"]}
    for path in sorted(options.out.with_name(options.out.name + "-masks").glob("*.npz")):
        step, model = int(path.stem), load_model(model_dir())
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            for name, mask in read_npz(path, shapes).items():
                parameters[name].masked_fill_(~mask, 0.0)
        values = " | ".join(f"{tp.perplexity(model, windows).value:.1f}" for windows in texts.values())
        entry = entries[step]
        slice_ = torch.tensor(entry["hard_loss"]).exp()
        lines.append(f"| {step} | {tokens[step]:,} | {entry['flips']:.2%} | {slice_:.1f} | {values} |")
        print(lines[-1], flush=True)
    settings = report["settings"]
    note = (
        f"{time.strftime('%Y-%m-%d')}, {settings['preset']}, prior {settings['prior']}, {settings['steps']} steps; "
        f"{platform.machine()}, {torch.get_num_threads()} thread(s), torch {torch.__version__}"
    )
    with Path("docs/results-learn.md").open("a") as file:
        file.write("\n" + note + "\n\n" + "\n".join(lines) + "\n")


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
