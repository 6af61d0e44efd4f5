"""python -m sweep [--types LIST] [--out FILE.md] [--jobs N] [--work DIR]: the table of all types, from tests/.

Each type runs in a process of its own with a time limit, so that one that hangs or dies is one row. Results are kept in
the work folder as they come: the same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

import sweep.check  # noqa: F401  (before any process is forked)

LIMIT = 180
COLUMNS = "| type | class | 2:4 | way | covered | stays dense, or why not |\n|---|---|---|---|---|---|"
HEAD = """# Architectures

Every type of transformers {version}'s causal and image-text mappings, as a tiny random model with its stored buffers set at
random. *Works* means: pruned to 2:4 by `wanda` from its files and opened again by plain transformers, nothing missing and
nothing else changed; every matrix holds 2:4 in the files; every block, run alone, puts out what it does in the model's own
forward (relative error below 1e-3). *Covered*: share of the weights of the blocks that are prunable matrices; the rest is
named. *Way*: blocks are replayed one by one, or the model's own forward is paused at each (`models/calls.py`).

This page is written by `make sweep`.

{summary}
"""


def types_of(mapping: str) -> list[str]:
    from transformers.models.auto import modeling_auto as auto

    names = (
        auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        if mapping == "causal"
        else auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    )
    return sorted(names)


def one(mapping: str, model_type: str) -> dict[str, Any]:
    """What happened to one type, in this process."""
    import torch
    from transformers.utils import logging

    import topiarist as tp
    from sweep.check import check_type
    from sweep.tiny_types import tiny_folder

    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        try:
            base = tiny_folder(Path(folder, "base"), model_type, mapping)
        except Exception as error:
            return {"built": False, "why": _line(error)}
        try:
            return {"built": True, **asdict(check_type(base, Path(folder, "out")))}
        except tp.TopiaristError as error:
            return {"built": True, "refused": str(error).replace(str(base), model_type)}
        except Exception as error:
            return {"built": True, "why": f"{type(error).__name__}: {_line(error)}"}


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text[:200] or type(error).__name__


def run(mapping: str, model_type: str, work: Path) -> dict[str, Any]:
    """What happened to one type, in a process of its own; read from the work folder if it was run already."""
    stored = work / f"{mapping}-{model_type}.json"
    if not stored.is_file():
        context = multiprocessing.get_context("fork")  # libraries are imported once
        process = context.Process(target=lambda: stored.write_text(json.dumps(one(mapping, model_type))), daemon=True)
        process.start()
        process.join(LIMIT)
        if process.is_alive():
            process.kill()
            stored.write_text(json.dumps({"why": f"took more than {LIMIT} s"}))
        elif not stored.is_file():
            stored.write_text(json.dumps({"why": f"died ({process.exitcode})"}))
    return json.loads(stored.read_text())


def row(model_type: str, found: dict[str, Any]) -> str:
    if not found.get("built", True):
        return f"| {model_type} | | not built | | | {found['why']} |"
    if "refused" in found:
        return f"| {model_type} | | refused | | | {found['refused']} |"
    verdict = "works" if not found["why"] else "**fails**"
    note = found["why"] or "; ".join(found.get("dense", ()))
    covered = f"{found.get('covered', 0):.1%}"
    return (
        f"| {model_type} | {found.get('architecture', '')} | {verdict} | {found.get('way', '')} | {covered} | {note} |"
    )


def page(results: dict[str, dict[str, dict[str, Any]]]) -> str:
    """The document of architectures."""
    import transformers

    summary, tables = [], []
    for mapping, found in results.items():
        built = {t: r for t, r in found.items() if r.get("built", True)}
        good = sum("refused" not in r and not r["why"] for r in built.values())
        refused = sum("refused" in r for r in built.values())
        summary.append(
            f"{mapping}: {good} of {len(built)} types that could be built work, {refused} are refused with the reason, "
            f"{len(built) - good - refused} fail; {len(found) - len(built)} could not be built tiny."
        )
        rows = "\n".join(row(t, r) for t, r in found.items())
        title = "Causal language models" if mapping == "causal" else "Image and text: the text decoder"
        tables.append(f"## {title}\n\n{COLUMNS}\n{rows}\n")
    head = HEAD.format(version=transformers.__version__, summary="\n".join(f"* {line}" for line in summary))
    return "\n".join([head, *tables])


def main() -> None:
    parser = argparse.ArgumentParser(prog="sweep")
    parser.add_argument("--types", nargs="*")
    parser.add_argument("--mapping", choices=("causal", "image-text"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--work", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    work = args.work or Path(tempfile.mkdtemp(prefix="sweep-"))
    work.mkdir(parents=True, exist_ok=True)
    results: dict[str, dict[str, dict[str, Any]]] = {}
    for mapping in [args.mapping] if args.mapping else ["causal", "image-text"]:
        names = [name for name in types_of(mapping) if not args.types or name in args.types]
        with ThreadPoolExecutor(args.jobs) as pool:
            found = list(pool.map(lambda name, mapping=mapping: run(mapping, name, work), names))
        results[mapping] = dict(zip(names, found, strict=True))
    text = page(results)
    print(text)
    if args.out:
        args.out.write_text(text)
    failed = [r for found in results.values() for r in found.values() if r.get("built", True) and r.get("why")]
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
