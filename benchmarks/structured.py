"""Smaller dense models of the demo model: method x keep x what follows the cut. Perplexity, size, speed, minutes.

    python -m benchmarks.structured --keeps 0.8 0.7 --variants cut refit
    python -m benchmarks.structured --methods policy-gradient:steps=200 taylor flap --layout hetero
    python -m benchmarks.structured --methods activation --units hidden kv_groups channels --variants refit
    python -m benchmarks.structured --tasks piqa arc_easy --task-files DIR --limit 200

A method is a name of the table of structured methods with fields after it. Variants: `cut` (nothing after the cut but
what the method itself brings, as FLAP its biases), `refit` (least squares), `recover` (refit, then low-rank distillation).
The cut decides the units once; its later variants take the same ones. Texts and calibration are those of
benchmarks.quality; perplexity is of the same tokens in windows of 1024 and of 128.

Finished cells are kept in a JSON-lines file and not run again; a killed cell goes on where its run can.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import topiarist as tp
from benchmarks.quality import keep_cell, load_texts, stored_cells
from demo.assets import assets_dir, model_dir
from topiarist.core.options import Registered
from topiarist.data import Windows, load_tokenizer
from topiarist.evaluation.perplexity import load_model
from topiarist.evaluation.tasks import compare_tasks
from topiarist.runtime.bench import generation_seconds, machine
from topiarist.structured import KINDS, METHODS, Method, PruneSpec, Scores, Task
from topiarist.structured.trial import short_windows

WINDOWS = (1024, 128)
PHASES = ("prefill", "decode")
PROMPT, DECODED, ROUNDS = 128, 32, 3
VARIANTS = ("cut", "refit", "recover")


@dataclass(frozen=True, kw_only=True)
class Given(Method):
    """The units of a PruneSpec."""

    path: str
    kinds: tuple[str, ...] = KINDS  # pyright: ignore
    scope: str = "global"  # pyright: ignore

    def scores(self, task: Task) -> Scores:
        return {key: mask.float() for key, mask in PruneSpec.load(self.path).masks(task.groups).items()}


def method_of(text: str) -> Method:
    return Registered(METHODS).parse(text)


def perplexities(model: Any, texts: dict[str, Windows]) -> dict[str, float]:
    """{text@window: perplexity}, over the same tokens for every window."""
    return {
        f"{name}@{window}": tp.perplexity(model, short_windows(w.tokens, window), batch_size=1024 // window).value
        for name, w in texts.items()
        for window in WINDOWS
    }


@torch.inference_mode()
def speeds(model: Any) -> dict[str, float]:
    """Median tokens a second of one sequence: a prompt, then greedy steps."""
    ids = torch.randint(model.config.vocab_size, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    rounds = [generation_seconds(model, ids, DECODED) for _ in range(ROUNDS)]
    return {
        phase: count / statistics.median(seconds[phase] for seconds in rounds)
        for phase, count in zip(PHASES, (PROMPT, DECODED), strict=True)
    }


def measure(folder: Path, options: argparse.Namespace, texts: dict[str, Windows]) -> dict[str, Any]:
    model = load_model(folder, trust_remote_code=True)
    parameters = sum({id(p): p.numel() for p in model.parameters()}.values())
    found = {"perplexity": perplexities(model, texts), "parameters": parameters, "tokens_per_second": speeds(model)}
    if options.tasks:
        results = compare_tasks(
            [str(folder)], options.tasks, files=options.task_files, limit=options.limit, reference=False,
            trust_remote_code=True,
        )  # fmt: skip
        found["tasks"] = {f"{s.task} {s.metric}": s.value for result in results for s in result.scores}
    return found


def run_cell(
    options: argparse.Namespace, method: str, keep: float, variant: str, calibration: Sequence[str], texts: Any
) -> dict[str, Any]:
    """Shrink, measure, throw the checkpoint away; its PruneSpec stays for the later variants."""
    model = options.model or model_dir()
    if method == "dense":
        return measure(model, options, texts)
    folder = assets_dir() / "structured"
    stem = f"{method}-{keep}-{options.layout}-{options.protocol}-{options.samples}x{options.window}"
    stem += "".join(f"-{unit}" for unit in options.units or ())
    stem = stem.replace(":", "_").replace("=", "_").replace(",", "_")
    out, spec = folder / f"{stem}-{variant}", folder / f"{stem}.json"
    folder.mkdir(parents=True, exist_ok=True)
    scorer = method_of(method)
    if variant != "cut" and "cut" in options.variants:
        if not spec.exists():
            raise SystemExit(f"{method} {keep}: run the variant cut before {variant}")
        units = PruneSpec.load(spec).units
        scorer = Given(path=str(spec), kinds=units, scope=scorer.scope)
    report = tp.shrink(
        model,
        out,
        units=options.units,
        method=scorer,
        keep=keep,
        layout=options.layout,
        data=calibration,
        refit=variant != "cut",
        recover=tp.Distill(steps=options.recover_steps) if variant == "recover" else None,
        num_samples=options.samples,
        window=options.window,
        batch_size=4,
        progress=(lambda *what: print(*what, flush=True)) if options.verbose else None,
    )
    if variant == "cut":
        shutil.copy(out / "pruning_spec.json", spec)
    cell = {
        "seconds": report.run["seconds"],
        "by_activity": report.run["seconds_by_activity"],
        "peak_gb": report.run["peak_memory_bytes"] / 1e9,
        "kept": {kind: counts[0] / counts[1] for kind, counts in report.counts().items()},
        **measure(out, options, texts),
    }
    shutil.rmtree(out)
    return cell


def in_order(rows: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """All that is known, the dense model first: by what is kept, then the variant, then the first perplexity."""

    def place(row: tuple[str, dict[str, Any]]) -> tuple[float, int, float]:
        _, keep, variant = row[0].split("@")[0].split(" ")
        order = VARIANTS.index(variant) if variant in VARIANTS else -1
        return -float(keep), order, next(iter(row[1]["perplexity"].values()))

    return dict(sorted(rows.items(), key=place))


def table(rows: dict[str, dict[str, Any]], options: argparse.Namespace, texts: dict[str, Windows]) -> str:
    names = [f"{name}@{window}" for name in texts for window in WINDOWS]
    tasks = sorted({task for cell in rows.values() for task in cell.get("tasks", {})})
    head = ["method", "keep", "variant", *names, *tasks, "M params", "prefill/s", "decode/s", "min", "peak GB"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for key, cell in rows.items():
        numbers = [f"{cell['perplexity'][name]:.2f}" for name in names]
        numbers += [f"{cell['tasks'][task]:.3f}" if task in cell.get("tasks", {}) else "" for task in tasks]
        numbers.append(f"{cell['parameters'] / 1e6:.1f}")
        numbers += [f"{cell['tokens_per_second'][phase]:.0f}" for phase in PHASES]
        numbers += [f"{cell['seconds'] / 60:.1f}", f"{cell['peak_gb']:.2f}"] if "seconds" in cell else ["", ""]
        lines.append(f"| {' | '.join([*key.split(' '), *numbers])} |")
    tokens = ", ".join(f"{name} {w.tokens.numel():,} tokens (sha256 {w.digest[:8]})" for name, w in texts.items())
    note = (
        f"{time.strftime('%Y-%m-%d')}, {machine()}; layout {options.layout}; calibration {options.samples} x "
        f"{options.window}; text@window: perplexity of {tokens}, windows without overlap. tokens/s: batch 1, prompt "
        f"{PROMPT}, {DECODED} greedy steps."
    )
    return "\n".join([*lines, "", note])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--protocol", choices=("openwebtext", "standard"), default="openwebtext")
    parser.add_argument("--data", type=Path, help="folder with train/ and eval/ for --protocol standard")
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--keeps", nargs="+", type=float, default=[0.8, 0.7, 0.9, 0.5])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--units", nargs="+", help="kinds of units; the method's own if none are named")
    parser.add_argument("--model", type=Path, help="folder of the dense model, if not the demo's")
    parser.add_argument("--layout", default="uniform", help="uniform, padded, hetero or masked")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--recover-steps", type=int, default=50)
    parser.add_argument("--eval-windows", type=int, default=8, help="windows of 1024 of each text; 0 for all")
    parser.add_argument("--tasks", nargs="*", default=[], help="zero-shot tasks through lm-eval")
    parser.add_argument("--task-files", type=Path, help="folder with their items")
    parser.add_argument("--limit", type=int, help="items of a task")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--verbose", action="store_true")
    parser.add_argument(
        "--results",
        type=Path,
        default=Path("benchmarks/results/structured.jsonl"),
        help="finished cells; the table is beside",
    )
    options = parser.parse_args()
    options.eval_windows = options.eval_windows or None
    torch.set_num_threads(options.threads)
    from transformers.utils import logging

    logging.disable_progress_bar()
    calibration, texts = load_texts(options, load_tokenizer(model_dir()))
    settings = [
        options.protocol, options.layout, options.samples, options.window, options.eval_windows, options.recover_steps,
        [*options.tasks, options.limit] if options.tasks else [],
    ]  # fmt: skip
    rows = stored_cells(options.results, settings)
    wanted = [("dense", 1.0, "-")]
    wanted += [(m, keep, variant) for keep in options.keeps for m in options.methods for variant in options.variants]
    for method, keep, variant in wanted:
        key = f"{method} {keep} {variant}"
        key += f"@{','.join(options.units)}" if options.units and method != "dense" else ""
        if key not in rows:
            rows[key] = run_cell(options, method, keep, variant, calibration, texts)
            keep_cell(options.results, key, settings, rows[key])
        print(key, {k: round(v, 2) for k, v in rows[key]["perplexity"].items()}, flush=True)
    text = table(in_order(rows), options, texts)
    page = f"{options.results.stem}-{options.layout}-{options.protocol}-{options.samples}x{options.window}"
    page += f"-eval{options.eval_windows or ''}" + ("-tasks" if options.tasks else "")
    options.results.with_name(f"{page}.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
