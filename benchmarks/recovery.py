"""What a step of recovery costs, and which settings gain most from a few tokens. Models in fp32, one thread.

    python -m benchmarks.recovery step DENSE PRUNED
    python -m benchmarks.recovery settings DENSE PRUNED --data mix.jsonl --tokens 4096 window_tokens=256,sequences=1

`step`: CPU seconds of a step on one sequence of 512 tokens: plain training of the dense model, recovery towards next
tokens, and towards the dense model's predictions. `settings`: for each set of `recover`'s settings, divergence from the
dense model on 8 sequences of 512 from the end of the text, which none of them trains on. Finished cells are printed as
JSON lines and kept in benchmarks/results/recovery.jsonl.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import topiarist as tp
from topiarist.core.losses import divergence
from topiarist.data import calibration_windows, load_tokenizer
from topiarist.evaluation.perplexity import load_model

RESULTS = Path(__file__).parent / "results" / "recovery.jsonl"
WINDOW, JUDGED, STEPS = 512, 8, 5


def load(folder: str) -> Any:
    """A model in fp32: products in bf16 are emulated on many CPUs."""
    return load_model(folder).float()


def keep(cell: dict[str, Any]) -> None:
    line = json.dumps(cell)
    print(line, flush=True)
    with RESULTS.open("a") as file:
        file.write(line + "\n")


def plain_training(dense: str, tokens: torch.Tensor) -> list[float]:
    """CPU seconds of every step of an ordinary loop."""
    model, times = load(dense), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    for step in range(STEPS):
        begun, batch = time.process_time(), tokens[step : step + 1]
        model(input_ids=batch, labels=batch, use_cache=False).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.process_time() - begun)
    return times


def recovery(dense: str, pruned: str, loss: str, tokens: torch.Tensor) -> list[float]:
    """CPU seconds of every step of `recover` but the first, which warms up."""
    marks: list[float] = []
    tp.recover(
        load(pruned), teacher=load(dense) if loss == "kl" else None, data=tokens, tokens=STEPS * WINDOW, loss=loss,
        window_tokens=WINDOW, sequences=1, batch_size=1, held_out=1, evaluate_every=STEPS,
        progress=lambda *_: marks.append(time.process_time()),
    )  # fmt: skip
    return [after - before for before, after in itertools.pairwise(marks[:-1])]


def step(options: argparse.Namespace) -> None:
    tokens = torch.randint(1000, 40_000, (2 * JUDGED, WINDOW), generator=torch.Generator().manual_seed(0))
    ways: dict[str, Callable[[], list[float]]] = {
        "plain training": lambda: plain_training(options.dense, tokens)[1:],
        "recover, next tokens": lambda: recovery(options.dense, options.pruned, "lm", tokens),
        "recover, dense model's predictions": lambda: recovery(options.dense, options.pruned, "kl", tokens),
    }
    for name, way in ways.items():
        keep({"cell": "step", "way": name, "cpu_seconds": round(statistics.median(way()), 2)})


def settings(options: argparse.Namespace) -> None:
    tokenizer, dense = load_tokenizer(options.dense), load(options.dense)
    text = tp.text_files(options.data)
    for said in options.settings:
        given = {key: json.loads(value) for key, value in (entry.split("=") for entry in said.split(","))}
        window = given.get("window_tokens", WINDOW)
        needed = options.tokens + (JUDGED + 1) * WINDOW
        rows = calibration_windows(text, tokenizer, num_samples=needed // WINDOW, window=WINDOW, seed=0).tokens
        judged, trained = rows[-JUDGED:], rows[:-JUDGED].reshape(-1, window)
        model = load(options.pruned)
        before, begun = judge(model, dense, judged), time.process_time()
        tp.recover(
            model, teacher=dense, data=trained, tokens=options.tokens, held_out=1, evaluate_every=10**6, batch_size=1, **given
        )  # fmt: skip
        cpu = time.process_time() - begun
        cell = {"cell": "settings", "tokens": options.tokens, **given, "before": before}
        keep({**cell, "after": judge(model, dense, judged), "cpu_seconds": round(cpu)})


@torch.no_grad()
def judge(model: Any, dense: Any, rows: torch.Tensor) -> float:
    """Mean divergence from the dense model, in nats."""
    losses = [divergence(model(row[None]).logits, dense(row[None]).logits) for row in rows]
    return round(float(torch.stack(losses).mean()), 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for run in (step, settings):
        command = commands.add_parser(run.__name__)
        command.set_defaults(run=run)
        command.add_argument("dense")
        command.add_argument("pruned")
    # Of the last command alone.
    command.add_argument("--data", nargs="+", required=True)
    command.add_argument("--tokens", type=int, default=4096)
    command.add_argument("settings", nargs="+", help="field=value,... of recover")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.run(options)


if __name__ == "__main__":
    main()
