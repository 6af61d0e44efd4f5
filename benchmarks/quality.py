"""Perplexity of the demo model after pruning: method x pattern, on text that chose nothing.

    python -m benchmarks.quality --protocol openwebtext
    python -m benchmarks.quality --protocol standard --data DIR --patterns 2:4 0.7 --methods wanda sparsegpt alps

A method is a name with fields after it: `sparsegpt`, `wanda:refit=true`, `alps:preset=best`,
`sparsellm:local=alps,epochs=0`; `+correct` adds error correction, `+refine` or `+refine:epochs=4` block refinement;
`alps-original` is the literal transcription of the released code.
`openwebtext` is the protocol of the originals' published-here numbers (128 x 512 tokens of the demo's calibration text,
the first 16 windows of 1024 of its held-out C4 text). `standard` takes DIR with train/c4.jsonl.gz, train/wikipedia.jsonl.gz
and eval/wikitext2.test.raw: every tenth document of a training file is held out, the others calibrate.

Finished cells are kept in a JSON-lines file and not run again, so a long table can be made in pieces.
"""

from __future__ import annotations

import argparse
import gzip
import json
import platform
import re
import shutil
import time
from pathlib import Path
from typing import Any

import torch

import topiarist as tp
from benchmarks.originals import ORIGINALS
from benchmarks.said import method_from_text
from demo.assets import assets_dir, model_dir, text_dir
from topiarist.data import Windows, evaluation_windows, load_tokenizer, read_documents
from topiarist.evaluation.perplexity import load_model

DEFAULT_METHODS = ("magnitude", "wanda", "sparsegpt", "alps")


def documents(path: Path, *, held_out: bool) -> list[str]:
    """Documents of a training file: index % 10 == 9 is held out."""
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in lines]
    return [text for i, text in enumerate(texts) if (i % 10 == 9) == held_out]


def load_texts(options: argparse.Namespace, tokenizer: Any) -> tuple[list[str], dict[str, Windows]]:
    """Calibration documents and the evaluation windows by name."""
    if options.protocol == "openwebtext":
        calibration = list(read_documents(tp.text_files(text_dir() / "calibration.jsonl")))
        sources = {name: tp.text_files(text_dir() / f"heldout_{name}.jsonl") for name in ("c4", "wikipedia")}
    else:
        if options.data is None:
            raise SystemExit("--protocol standard needs --data DIR")
        train = options.data / "train"
        calibration = documents(train / "c4.jsonl.gz", held_out=False)
        sources = {
            "wikitext2": tp.text_files(options.data / "eval" / "wikitext2.test.raw"),
            "c4": documents(train / "c4.jsonl.gz", held_out=True),
            "wikipedia": documents(train / "wikipedia.jsonl.gz", held_out=True),
        }
    windows = {
        name: evaluation_windows(source, tokenizer, window=1024, max_windows=options.eval_windows)
        for name, source in sources.items()
    }
    return calibration, windows


def measure(folder: Path, windows: dict[str, Windows]) -> dict[str, float]:
    model = load_model(folder)
    return {name: tp.perplexity(model, w).value for name, w in windows.items()}


def run_cell(
    options: argparse.Namespace,
    method: str,
    pattern: str,
    calibration: list[str],
    windows: Any,
    *,
    label: str = "",
    **more: Any,
) -> dict[str, Any]:
    """Prune with one method and pattern (and what else `tp.prune` takes), measure, throw the checkpoint away.

    label: tells cells apart that differ in nothing else, while they lie on disk.
    """
    if method == "dense":
        return {"perplexity": measure(model_dir(), windows)}
    out = assets_dir() / "quality" / re.sub("[:=,/]", "_", f"{method}-{pattern}{label}")
    cpu = time.process_time()
    solver, additions = (ORIGINALS[method](), {}) if method in ORIGINALS else method_from_text(method)
    report = tp.prune(
        model_dir(),
        out,
        method=solver,
        pattern=pattern,
        calibration=calibration,
        num_samples=options.samples,
        window=options.window,
        batch_size=None if additions.get("refine") else 4,
        true_sequential=options.true_sequential,
        **additions,
        **more,
    )
    cell = {
        "cpu_seconds": time.process_time() - cpu,
        "seconds": report.run["seconds"],
        "by_activity": report.run["seconds_by_activity"],
        "peak_gb": report.run["peak_memory_bytes"] / 1e9,
        "mean_error": report.mean_error,
        "perplexity": measure(out, windows),
    }
    if report.joint:
        cell["joint"] = [dict(block.errors) for block in report.joint]
    shutil.rmtree(out)
    return cell


def table(rows: dict[str, dict[str, Any]], options: argparse.Namespace, windows: dict[str, Windows]) -> str:
    names = list(windows)
    head = ["method", "pattern", *names, "prune CPU s", "solver s", "peak GB"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for key, cell in rows.items():
        method, pattern = key.split(" ")
        numbers = [f"{cell['perplexity'][name]:.2f}" for name in names]
        costs = ["", "", ""]
        if "cpu_seconds" in cell:
            costs = [f"{cell['cpu_seconds']:.0f}", f"{cell['by_activity']['solver']:.0f}", f"{cell['peak_gb']:.2f}"]
        lines.append(f"| {' | '.join([method, pattern.replace('-', ''), *numbers, *costs])} |")
    return "\n".join([*lines, "", note(options, windows)])


def note(options: argparse.Namespace, windows: dict[str, Windows]) -> str:
    """When, where and on what: the line below a table."""
    tokens = ", ".join(f"{name} {w.tokens.numel():,} tokens (sha256 {w.digest[:8]})" for name, w in windows.items())
    return (
        f"{time.strftime('%Y-%m-%d')}, {platform.machine()}, {options.threads} thread(s), torch {torch.__version__}; "
        f"calibration {options.samples} x {options.window}; windows of 1024 without overlap: {tokens}."
    )


def add_protocol(parser: argparse.ArgumentParser, *, samples: int, eval_windows: int) -> None:
    """What is calibrated and evaluated on; other benchmarks of quality take the same."""
    parser.add_argument("--protocol", choices=("openwebtext", "standard"), default="openwebtext")
    parser.add_argument("--data", type=Path, help="folder with train/ and eval/ for --protocol standard")
    parser.add_argument("--samples", type=int, default=samples)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--eval-windows", type=int, default=eval_windows, help="windows of each text; 0 for all")
    parser.add_argument("--true-sequential", action="store_true")
    parser.add_argument("--threads", type=int, default=1)


def prepare(options: argparse.Namespace) -> tuple[list[str], dict[str, Windows], list[Any]]:
    """Calibration documents, evaluation windows, and the settings that a stored cell must share to count."""
    options.eval_windows = options.eval_windows or None
    torch.set_num_threads(options.threads)
    from transformers.utils import logging

    logging.disable_progress_bar()
    calibration, windows = load_texts(options, load_tokenizer(model_dir()))
    settings = [options.protocol, options.samples, options.window, options.eval_windows, options.true_sequential]
    return calibration, windows, settings


def page(options: argparse.Namespace) -> Path:
    """The table's file: one for each protocol and calibration."""
    name = f"{options.results.stem}-{options.protocol}-{options.samples}x{options.window}.md"
    return options.results.with_name(name)


def stored_cells(path: Path, settings: list[Any]) -> dict[str, dict[str, Any]]:
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {line["cell"]: line for line in lines if line["settings"] == settings}


def keep_cell(path: Path, key: str, settings: list[Any], cell: dict[str, Any]) -> None:
    with path.open("a") as stream:
        stream.write(json.dumps({"cell": key, "settings": settings, **cell}) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_protocol(parser, samples=128, eval_windows=16)
    parser.add_argument("--methods", nargs="+", default=list(DEFAULT_METHODS))
    parser.add_argument("--patterns", nargs="+", default=["2:4", "0.5", "0.7"])
    parser.add_argument(
        "--results",
        type=Path,
        default=Path("benchmarks/results/quality.jsonl"),
        help="finished cells; the table is beside",
    )
    options = parser.parse_args()
    calibration, windows, settings = prepare(options)
    rows = stored_cells(options.results, settings)
    wanted = [("dense", "-")] + [(method, pattern) for pattern in options.patterns for method in options.methods]
    for method, pattern in wanted:
        key = f"{method} {pattern}"
        if key not in rows:
            rows[key] = run_cell(options, method, pattern, calibration, windows)
            keep_cell(options.results, key, settings, rows[key])
        print(key, {k: round(v, 2) for k, v in rows[key]["perplexity"].items()}, flush=True)
    ordered = dict(sorted(rows.items(), key=lambda row: row[0].split(" ")[1]))  # all that is known, a pattern at a time
    text = table(ordered, options, windows)
    page(options).write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
