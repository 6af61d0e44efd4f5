"""What each part of learning masks is worth: one table, one change a row.

    python -m benchmarks.learn_ablation [--steps 40] [--rows base topn ...] [--windows 16] [--threads N]

Demo model, 2:4, preset `quick` shortened to `--steps` (its learning rate follows), trained on the demo's OpenWebText,
measured on its held-out C4 and Wikipedia. A row takes about 16 CPU seconds a step, 150 for its prior and 100 to
measure. Killed, a row goes on where it was; finished rows are kept in docs/learn-ablation.jsonl.
"""

from __future__ import annotations

import argparse
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import topiarist as tp
from benchmarks.learn_cells import cell, demo_training_text, demo_windows, finished
from demo.assets import assets_dir, model_dir
from topiarist.evaluate import load_model
from topiarist.masklearn import PRESETS, Preset, Schedule
from topiarist.pipelines.learning.job import shortened

CELLS, PAGE = Path("docs/learn-ablation.jsonl"), Path("docs/learn-ablation.md")

# Name -> (fields of the preset that change, other options of tp.learn)
ROWS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "base": ({}, {}),
    "prior: Wanda's own mask": ({"prior_sweeps": 0}, {}),
    "prior: SparseGPT's own mask": ({"prior_sweeps": 0}, {"prior": "sparsegpt"}),
    "prior: SparseGPT, descent": ({}, {"prior": "sparsegpt"}),
    "prior: magnitude, descent": ({}, {"prior": "magnitude"}),
    "prior: random first logits, alpha 3": ({"gap": None}, {}),
    "regulariser 1e-5": ({"lam": Schedule(1e-5, 0.0)}, {}),
    "TopN instead of Categorical": ({}, {"relaxation": "topn"}),
    "tau linear": ({"tau": Schedule(1.0, 0.05)}, {}),
    "tau 4 to 0.05, linear": ({"tau": Schedule(4.0, 0.05)}, {}),
    "noise for each micro-batch": ({"sample": "micro-batch"}, {"batch_size": 2}),
    "second moment per group": ({"second_moment": "group"}, {}),
    "distillation 0.5": ({}, {"distill": 0.5}),
}


def run(name: str, recipe: Preset, num_windows: int) -> dict[str, Any]:
    """Learn one row's masks and measure them; the folder goes when its numbers are known."""
    fields, options = ROWS[name]
    out = assets_dir() / "learn-ablation" / "".join(c if c.isalnum() else "-" for c in name)
    settings = {"prior": "wanda", "stop": False, **options}
    report = tp.learn(model_dir(), out, data=demo_training_text(), preset=replace(recipe, **fields), **settings)
    model = load_model(out)
    perplexity = {key: tp.perplexity(model, w).value for key, w in demo_windows(num_windows).items()}
    shutil.rmtree(out)
    return {
        "steps": recipe.steps,
        "tokens": recipe.tokens,
        "slice_before": math.exp(report.prior_loss),
        "slice": math.exp(report.loss),
        "flips": report.flips,
        "perplexity": perplexity,
    }


def page(steps: int) -> str:
    lines = [
        f"# Ablations of learned masks\n\nDemo model, 2:4, {steps} steps of 2,048 tokens, "
        "`python -m benchmarks.learn_ablation`. The slice is training text that was not trained on; "
        "before: the prior's mask.\n",
        "| change | slice before | slice | changed | c4 | wikipedia | CPU s |",
        "|---|---|---|---|---|---|---|",
    ]
    for found in finished(CELLS).values():
        if found["steps"] == steps:
            name, value = found["name"].rpartition(" @")[0], found["perplexity"]
            lines.append(
                f"| {name} | {found['slice_before']:.1f} | {found['slice']:.1f} | {found['flips']:.2%} | "
                f"{value['c4']:.1f} | {value['wikipedia']:.1f} | {found['cpu_seconds']} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rows", nargs="*", default=list(ROWS), choices=list(ROWS), metavar="ROW")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    from transformers.utils import logging

    logging.disable_progress_bar()
    recipe = shortened(PRESETS["quick"], options.steps)
    for name in options.rows:
        cell(CELLS, f"{name} @{options.steps}", lambda name=name: run(name, recipe, options.windows))
        PAGE.write_text(page(options.steps))
    print(page(options.steps))


if __name__ == "__main__":
    main()
