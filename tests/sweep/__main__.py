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
import resource
import signal
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
"""CPU seconds of one part of one type."""
LONGEST = 320
"""Characters of a reason."""
PARTS = ("prune", "cuts", "uses")
USES = ("sparsegpt", "alps", "learn", "int8")
TITLES = {"causal": "Causal language models", "image-text": "Image and text: the text decoder"}
UNITS = ("kv_groups", "heads", "channels", "experts", "block")
COLUMNS = "| type | class | 2:4 | way | covered | stays dense, or why not |\n|---|---|---|---|---|---|"
HEAD = """# Architectures

Every type of transformers {version}'s {mappings}, as a tiny random model with its stored buffers set at
random. *Works* means: pruned to 2:4 by `wanda` from its files and opened again by plain transformers, nothing missing and
nothing else changed; every matrix holds 2:4 in the files; every block, run alone, puts out what it does in the model's own
forward (relative error below 1e-3). *Covered*: share of the weights of the blocks that are prunable matrices; the rest is
named. *Way*: blocks are replayed one by one, or the model's own forward is paused at each (`models/calls.py`). Of an
encoder-decoder the decoder is pruned: its encoder reads the same tokens and stays dense.

This page is written by `make sweep`{commit}.

{summary}
"""


ELSE = """`yes` under a method: it ran from and to files. Under a kind of units: without some of them the model, written and
opened again by plain transformers, has the logits of the whole model with those units switched off (`structured/proof.py`).
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

        def work_on() -> None:
            resource.setrlimit(resource.RLIMIT_CPU, (LIMIT, LIMIT + 5))
            stored.write_text(json.dumps(one(mapping, model_type, part)))

        process = context.Process(target=work_on, daemon=True)
        process.start()
        process.join(20 * LIMIT)
        if process.is_alive():  # it waits for something
            process.kill()
            process.join()
        if not stored.is_file():
            slow = process.exitcode in (-signal.SIGXCPU, -signal.SIGKILL)
            why = f"took more than {LIMIT} s" if slow else f"died ({process.exitcode})"
            stored.write_text(json.dumps({"why": why}))
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
        text = re.sub(r"'[\w-]+'|^\S+(?= has no )", "this", found.get(column, ""))
        if text in ("", "yes"):
            cells.append(text)
            continue
        reason = re.sub(r"\d+", "N", text)
        reason = reason if len(reason) <= LONGEST else reason[: LONGEST - 4] + " ..."
        if reason not in notes:
            notes.append(reason)
        cells.append(f"{'**fails**' if text.startswith('fails') else '–'} [{notes.index(reason) + 1}](#reasons)")
    return " | ".join(cells)


def cut_tables(results: dict[str, dict[str, dict[str, Any]]]) -> list[str]:
    """A table a mapping, if those parts were run: type by what can be cut or done, and the reasons of empty cells."""
    notes: list[str] = []
    lines: list[str] = []
    for mapping, found in results.items():
        cells = {name: cells_of(result) for name, result in found.items() if "cuts" in result or "uses" in result}
        columns = columns_of(cells)
        if columns:
            head = f"| type | {' | '.join(columns)} |\n|---{'|---' * len(columns)}|"
            rows = [f"| {name} | {marks(cell, columns, notes)} |" for name, cell in cells.items()]
            lines += [f"### {TITLES[mapping]}\n", head, *rows, ""]
    if not lines:
        return []
    reasons = "\n".join(f"{number}. {note}" for number, note in enumerate(notes, 1))
    return ["## Cuts and other methods\n", ELSE, *lines, "### Reasons\n", reasons, ""]


def cells_of(result: dict[str, Any]) -> dict[str, str]:
    """What was found of each column."""
    return {**result.get("uses", {}), **result.get("cuts", {})}


def columns_of(cells: dict[str, dict[str, str]]) -> list[str]:
    """The columns that any type has something in."""
    return [column for column in (*USES, *UNITS) if any(column in found for found in cells.values())]


def counted(mapping: str, found: dict[str, dict[str, Any]]) -> list[str]:
    """How many types each of the other columns works on, a line; none if they were not run."""
    cells = {name: cells_of(result) for name, result in found.items() if "cuts" in result or "uses" in result}
    good = {column: sum(cell.get(column) == "yes" for cell in cells.values()) for column in columns_of(cells)}
    if "heads" in good:
        good["kv_groups or heads"] = sum("yes" in (c.get("kv_groups"), c.get("heads")) for c in cells.values())
    return [f"{mapping}, of {len(cells)} types: {', '.join(f'{c} {n}' for c, n in good.items())}."] if good else []


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
        summary += counted(mapping, found)
        rows = "\n".join(row(t, r) for t, r in found.items())
        tables.append(f"## {TITLES[mapping]}\n\n{COLUMNS}\n{rows}\n")
    said = f"; measured at commit `{commit}`" if commit else ""
    head = HEAD.format(
        version=transformers.__version__,
        mappings=" and ".join(results) + (" mapping" if len(results) == 1 else " mappings"),
        commit=said,
        summary="\n".join(f"* {line}" for line in summary),
    )
    return "\n".join([head, *tables, *cut_tables(results)])


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
    built = [r for found in results.values() for r in found.values() if r.get("built", True)]
    cells = [cell for r in built for cell in cells_of(r).values()]
    sys.exit(1 if any(r.get("why") for r in built) or any(cell.startswith("fails") for cell in cells) else 0)


if __name__ == "__main__":
    main()
