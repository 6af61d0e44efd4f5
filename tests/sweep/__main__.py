"""python -m sweep [--types LIST] [--out FILE.md] [--jobs N] [--work DIR]: the tables of all types, from tests/.

Each type runs in a process of its own with a time limit, so that one that hangs or dies is one row. Results are kept in
the work folder as they come: the same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

import sweep.check  # noqa: F401  (before any process is forked)

LIMIT = 180
PARTS = ("prune", "cuts", "uses")
USES = ("sparsegpt", "alps", "learn", "int8")
UNITS = ("kv_groups", "heads", "channels", "experts", "block")
COLUMNS = "| type | class | 2:4 | way | covered | stays dense, or why not |\n|---|---|---|---|---|---|"
HEAD = """# Architectures

Every type of transformers {version}'s {mappings}, as a tiny random model with its stored buffers set at
random. *Works* means: pruned to 2:4 by `wanda` from its files and opened again by plain transformers, nothing missing and
nothing else changed; every matrix holds 2:4 in the files; every block, run alone, puts out what it does in the model's own
forward (relative error below 1e-3). *Covered*: share of the weights of the blocks that are prunable matrices; the rest is
named. *Way*: blocks are replayed one by one, or the model's own forward is paused at each (`models/calls.py`).

This page is written by `make sweep`{commit}.

{summary}
"""


ELSE = """`yes` under a kind of units: without some of them the model, written and opened again by plain transformers, has the
logits of the whole model with those units switched off (`structured/proof.py`).
"""


def types_of(mapping: str) -> list[str]:
    from sweep.tiny_types import NAMES

    return sorted(NAMES[mapping])


def one(mapping: str, model_type: str, part: str) -> dict[str, Any]:
    """What happened to one type, in this process. part: of `PARTS`."""
    import torch
    from transformers.utils import logging

    import topiarist as tp
    from sweep.check import check_type
    from sweep.cuts import cuts
    from sweep.tiny_types import tiny_model
    from sweep.uses import uses

    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder, "base")
        try:
            model = tiny_model(model_type, mapping)
            if part != "cuts":
                model.save_pretrained(base)
        except Exception as error:
            return {"built": False, "why": _line(error)}
        if part == "cuts":
            return {"built": True, "cuts": cuts(model)}
        if part == "uses":
            return {"built": True, "uses": uses(base, Path(folder))}
        try:
            return {"built": True, **asdict(check_type(base, Path(folder, "out")))}
        except tp.TopiaristError as error:
            return {"built": True, "refused": str(error).replace(str(base), model_type)}
        except Exception as error:
            return {"built": True, "why": f"{type(error).__name__}: {_line(error)}"}


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text.partition(". ")[0][:200] or type(error).__name__


def run(mapping: str, model_type: str, work: Path, parts: Sequence[str]) -> dict[str, Any]:
    """What happened to one type, each part in a process of its own; read from the work folder if it was run already."""
    found: dict[str, Any] = {}
    for part in parts:
        found = run_part(mapping, model_type, work, part) | found
    return found


def run_part(mapping: str, model_type: str, work: Path, part: str) -> dict[str, Any]:
    """What one part says of one type."""
    stored = work / f"{mapping}-{model_type}{'' if part == 'prune' else '-' + part}.json"
    if not stored.is_file():
        context = multiprocessing.get_context("fork")  # libraries are imported once
        target = lambda: stored.write_text(json.dumps(one(mapping, model_type, part)))  # noqa: E731
        process = context.Process(target=target, daemon=True)
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
    verdict = "works" if not found.get("why") else "**fails**"
    note = found.get("why") or "; ".join(found.get("dense", ()))
    covered = f"{found.get('covered', 0):.1%}"
    return (
        f"| {model_type} | {found.get('architecture', '')} | {verdict} | {found.get('way', '')} | {covered} | {note} |"
    )


def marks(found: dict[str, str], columns: Sequence[str], notes: list[str]) -> str:
    """One cell a column: yes, or the number of a reason in `notes`, which grows."""
    cells = []
    for column in columns:
        text = re.sub(r"'[\w-]+'", "this", found.get(column, ""))
        if text in ("", "yes"):
            cells.append(text)
            continue
        reason = re.sub(r"\d+", "N", text)
        if reason not in notes:
            notes.append(reason)
        cells.append(f"{'**fails**' if text.startswith('fails') else '–'} [{notes.index(reason) + 1}](#reasons)")
    return " | ".join(cells)


def cut_table(results: dict[str, dict[str, dict[str, Any]]]) -> list[str]:
    """The second table, if that part was run: type by what can be cut or done, and the reasons of empty cells."""
    cells = {
        name: {**result.get("uses", {}), **result.get("cuts", {})}
        for found in results.values()
        for name, result in found.items()
        if "cuts" in result or "uses" in result
    }
    columns = [column for column in (*USES, *UNITS) if any(column in found for found in cells.values())]
    if not columns:
        return []
    notes: list[str] = []
    rows = [f"| {name} | {marks(found, columns, notes)} |" for name, found in cells.items()]
    head = f"| type | {' | '.join(columns)} |\n|---{'|---' * len(columns)}|"
    reasons = "\n".join(f"{number}. {note}" for number, note in enumerate(notes, 1))
    return ["## What else\n", ELSE, head, *rows, "", "### Reasons\n", reasons, ""]


def page(results: dict[str, dict[str, dict[str, Any]]], commit: str | None) -> str:
    """The document of architectures. commit: that the results were measured at."""
    import transformers

    summary, tables = [], []
    for mapping, found in results.items():
        built = {t: r for t, r in found.items() if r.get("built", True)}
        good = sum("refused" not in r and not r.get("why") for r in built.values())
        refused = sum("refused" in r for r in built.values())
        summary.append(
            f"{mapping}: {good} of {len(built)} types that could be built work, {refused} are refused with the reason, "
            f"{len(built) - good - refused} fail; {len(found) - len(built)} could not be built tiny."
        )
        rows = "\n".join(row(t, r) for t, r in found.items())
        title = "Causal language models" if mapping == "causal" else "Image and text: the text decoder"
        tables.append(f"## {title}\n\n{COLUMNS}\n{rows}\n")
    said = f"; measured at commit `{commit}`" if commit else ""
    head = HEAD.format(
        version=transformers.__version__,
        mappings=" and ".join(results) + (" mapping" if len(results) == 1 else " mappings"),
        commit=said,
        summary="\n".join(f"* {line}" for line in summary),
    )
    return "\n".join([head, *tables, *cut_table(results)])


def main() -> None:
    parser = argparse.ArgumentParser(prog="sweep")
    parser.add_argument("--types", nargs="*")
    parser.add_argument("--mapping", choices=("causal", "image-text"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--commit")
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=PARTS)
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
            found = list(pool.map(lambda name, mapping=mapping: run(mapping, name, work, args.parts), names))
        results[mapping] = dict(zip(names, found, strict=True))
    text = page(results, args.commit)
    print(text)
    if args.out:
        args.out.write_text(text)
    failed = [r for found in results.values() for r in found.values() if r.get("built", True) and r.get("why")]
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
