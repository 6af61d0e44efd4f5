"""How to fuse fine and coarse estimates: the loss of the demo model on held-out CALIBRATION text, rule by rule.

    python -m benchmarks.fusion --orders mix --pooling each
    python -m benchmarks.fusion --keeps 0.8 --scopes per_layer global

The default of `topiarist shrink --method taylor` is chosen here and never on evaluation text. Estimates are collected
once for every order and kept beside the assets; a finished choice is a line of JSON and is not tried again.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any

import torch

import topiarist as tp
from benchmarks.quality import keep_cell, stored_cells
from demo.assets import assets_dir, model_dir, text_dir
from topiarist.data import calibration_windows, load_tokenizer
from topiarist.evaluation.perplexity import load_model
from topiarist.structured import METHODS, Scores, Task, gates, layer_counts, units_of
from topiarist.structured.estimates import Estimates, taylor_estimates
from topiarist.structured.fusion import FUSIONS
from topiarist.structured.taylor import LEVELS, Taylor
from topiarist.structured.trial import chosen, gated_loss, short_windows, split

BASELINES = ("wanda-sp", "flap", "magnitude", "random")


def estimates(task: Task, options: argparse.Namespace, order: str, pooled: bool) -> Estimates:
    windows = task.tokens[: options.samples]
    how = f"{'pooled' if pooled else 'each'}-{len(windows)}x{options.window}"
    path = assets_dir() / "structured" / f"taylor-{order}-{how}.pt"
    if path.exists():
        return Estimates(**torch.load(path))
    found = taylor_estimates(task, windows, order=order, pooled=pooled)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(vars(found), path)
    return found


def candidates(options: argparse.Namespace) -> list[str]:
    """Names of all choices: baselines, then order/pooling/fusion/level."""
    grains = [f"{order}/{how}" for order in options.orders for how in options.pooling]
    rules = [f"{fusion}/{level}" for fusion in options.fusions for level in LEVELS]
    return [*options.baselines, *(f"{grain}/{rule}" for grain in grains for rule in rules)]


def scores(name: str, task: Task, options: argparse.Namespace, known: dict[str, Any]) -> Scores:
    if name in METHODS:
        if name not in known:
            known[name] = METHODS[name]().scores(Task(task.model, task.groups, task.tokens[:32], task.keep))
        return known[name]
    order, how, fusion, level = name.split("/")
    grain = f"{order}/{how}"
    if grain not in known:
        known[grain] = estimates(task, options, order, how == "pooled")
    method = Taylor(
        fusion=fusion, level=level, window_tokens=options.window, learn_windows=options.learn_windows, head_weight=1.0
    )  # nothing is refitted here
    return method.fused(task, known[grain])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keeps", nargs="+", type=float, default=[0.8, 0.7])
    parser.add_argument("--scopes", nargs="+", default=[Taylor.scope], help="per_layer, global or parameters")
    parser.add_argument("--orders", nargs="+", default=["mix", "first"])
    parser.add_argument("--pooling", nargs="+", choices=("each", "pooled"), default=["each", "pooled"])
    parser.add_argument("--fusions", nargs="+", default=list(FUSIONS))
    parser.add_argument("--baselines", nargs="*", default=list(BASELINES))
    parser.add_argument("--window", type=int, default=Taylor.window_tokens)
    parser.add_argument("--samples", type=int, default=48, help="windows for the estimates")
    parser.add_argument("--held-out", type=int, default=8, help="windows that judge")
    parser.add_argument("--learn-windows", type=int, default=4, help="windows a trial of the learned fusion")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/fusion.jsonl"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = load_model(model_dir()).requires_grad_(False)
    text = tp.text_files(text_dir() / "calibration.jsonl")
    tokens = calibration_windows(text, load_tokenizer(model_dir()), num_samples=64, window=512).tokens
    groups = units_of(model, ("kv_groups", "channels"))
    training, watching = split(short_windows(tokens, options.window), options.held_out)
    settings = [options.window, options.samples, options.held_out, options.learn_windows]
    rows = {key: cell["loss"] for key, cell in stored_cells(options.results, settings).items()}
    known: dict[str, Any] = {}
    names = candidates(options)
    columns = [(keep, scope) for keep in options.keeps for scope in options.scopes]
    for name in names:
        for keep, scope in columns:
            key = f"{name} {keep} {scope}"
            idle = (
                name.endswith("/layer") != (scope == "per_layer") and "/" in name
            )  # levels matter between layers only
            if key in rows or idle:
                continue
            counts = layer_counts(groups, keep) if scope == "per_layer" else None
            task = Task(model, groups, training, keep, scope, counts)
            found = scores(name, task, options, known)
            with gates(model, groups) as masks:
                rows[key] = gated_loss(task, masks, chosen(task, found), watching)
            keep_cell(options.results, key, settings, {"loss": rows[key]})
            print(key, round(rows[key], 3), flush=True)
    lines = [
        f"| scores | {' | '.join(f'{keep} {scope}' for keep, scope in columns)} |",
        "|---|" + "---|" * len(columns),
    ]
    for name in names:
        losses = [rows.get(f"{name} {keep} {scope}") for keep, scope in columns]
        if not any(losses):
            continue
        lines.append(f"| {name} | {' | '.join('' if x is None else f'{math.exp(x):.1f}' for x in losses)} |")
    note = (
        f"{time.strftime('%Y-%m-%d')}: perplexity of {len(watching)} held-out calibration windows of {options.window} tokens; "
        f"estimates from {options.samples} others."
    )
    text = "\n".join([*lines, "", note])
    options.results.with_suffix(".md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
