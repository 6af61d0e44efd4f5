"""What each part of learning masks is worth: one table, one change a row.

    python -m benchmarks.learn_ablation [--steps 24] [--rows base ...] [--windows 8] [--threads N]

Demo model, 2:4, preset `quick` shortened to `--steps` (its learning rate follows), trained on the demo's OpenWebText,
measured on its held-out C4 and Wikipedia. A row takes about 18 CPU seconds a step and 60 to measure; rows with the
preset's own prior share its mask, others take 200 more for theirs. Killed, a row goes on where it was; finished rows are
kept in benchmarks/results/learn-ablation.jsonl.
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
from topiarist.evaluation.perplexity import load_model
from topiarist.masklearn import PRESETS, Preset, Schedule
from topiarist.pipelines.learning.job import shortened

CELLS, PAGE = Path("benchmarks/results/learn-ablation.jsonl"), Path("benchmarks/results/learn-ablation.md")

STILL = Schedule(0.0, 0.0)
NOTHING = "nothing learned: the prior's mask"

# Name -> (fields of the preset that change, other options of tp.learn). Rows that name no prior start from the first one's.
ROWS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    NOTHING: ({"steps": 1, "lr": STILL}, {"prior": "wanda"}),
    "base": ({}, {}),
    "TopN instead of Categorical": ({}, {"relaxation": "topn"}),
    "random first logits, alpha 3": ({"gap": None}, {}),
    "regulariser 1e-5": ({"lam": Schedule(1e-5, 0.0)}, {}),
    "distillation 0.5": ({}, {"distill": 0.5}),
    "recovery, 24 steps of 1,024 tokens": ({}, {"recover": tp.Recover(steps=24)}),
    "tau linear": ({"tau": Schedule(1.0, 0.05)}, {}),
    "noise for each micro-batch": ({"sample": "micro-batch"}, {"batch_size": 2}),
    "prior: Wanda's own mask": ({"prior_sweeps": 0}, {"prior": "wanda"}),
    "prior: SparseGPT's mask, descent": ({}, {"prior": "sparsegpt"}),
    "tau 4 to 0.05, linear": ({"tau": Schedule(4.0, 0.05)}, {}),
    "second moment per group": ({"second_moment": "group"}, {}),
    "prior: magnitude's mask, descent": ({}, {"prior": "magnitude"}),
}


def run(name: str, recipe: Preset, num_windows: int) -> dict[str, Any]:
    """Learn one row's masks and measure them; the folder goes when its numbers are known."""
    fields, options = ROWS[name]
    folder = assets_dir() / "learn-ablation"
    out, shared = folder / "".join(c if c.isalnum() else "-" for c in name), folder / "prior.safetensors"
    recipe = replace(recipe, **fields)
    settings = {"prior": shared, "stop": False, **options}
    report = tp.learn(model_dir(), out, data=demo_training_text(), preset=recipe, **settings)
    if name == NOTHING:
        (out / "masks.safetensors").replace(shared)
    model = load_model(out)
    perplexity = {key: tp.perplexity(model, w).value for key, w in demo_windows(num_windows).items()}
    shutil.rmtree(out)
    return {
        "tokens": 0 if name == NOTHING else recipe.tokens,
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
        name, _, length = found["name"].rpartition(" @")
        if int(length) == steps:
            value = found["perplexity"]
            lines.append(
                f"| {name} | {found['slice_before']:.1f} | {found['slice']:.1f} | {found['flips']:.2%} | "
                f"{value['c4']:.1f} | {value['wikipedia']:.1f} | {found['cpu_seconds']} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--rows", nargs="*", default=list(ROWS), choices=list(ROWS), metavar="ROW")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    from transformers.utils import logging

    logging.disable_progress_bar()
    recipe = shortened(PRESETS["quick"], options.steps)
    for name in dict.fromkeys((NOTHING, *options.rows)):
        cell(CELLS, f"{name} @{options.steps}", lambda name=name: run(name, recipe, options.windows))
        PAGE.write_text(page(options.steps))
    print(page(options.steps))


if __name__ == "__main__":
    main()
