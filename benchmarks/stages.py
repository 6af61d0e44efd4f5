"""What each stage of a recipe adds and costs: commands in a row, each measured by perplexity on text that chose nothing.

    python -m benchmarks.stages --data DIR --folder WORK "prune pattern=2:4 method=alps" "recover tokens=300k"
    python -m benchmarks.stages --data DIR --folder WORK --table

Every argument is a command of `topiarist` with its flags as key=value; each takes what the one before it wrote. The demo
model is pruned, cut and quantised on C4's train part (128 x 512 tokens unless the stage says otherwise), recovered on
equal parts of C4, FineWeb-Edu, Wikipedia and OpenWebText, and evaluated by the standard protocol of `quality.py`;
documents of which a part is evaluated are left out of all of these. What a row of stages wrote stays in WORK, so that a
longer row begins there; cells are kept in benchmarks/results/stages.jsonl. With --tasks, zero-shot tasks as well.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.quality import documents, load_texts, measure
from demo.assets import model_dir
from topiarist.data import load_tokenizer
from topiarist.evaluation.tasks import compare_tasks

RESULTS = Path(__file__).parent / "results" / "stages.jsonl"
MIXED = ("c4", "fineweb_edu", "wikipedia", "openwebtext")
SHARE = 900
"""Documents of each text in the mixture: as many as the smallest has."""
TASKS = ("piqa", "arc_easy", "hellaswag", "lambada_openai")
ON_MIXTURE = ("recover", "learn")


def texts(data: Path, folder: Path) -> dict[bool, Path]:
    """The file that calibrates, and the mixture that trains (True)."""
    files = {False: folder / "c4.jsonl", True: folder / "mixture.jsonl"}
    for mixed, file in files.items():
        if not file.exists():
            names = MIXED if mixed else ("c4",)
            rows = [documents(data / "train" / f"{name}.jsonl.gz", held_out=False) for name in names]
            kept = [row[:SHARE] for row in rows] if mixed else rows
            file.write_text("".join(json.dumps({"text": text}) + "\n" for row in kept for text in row))
    return files


def run_stage(stage: str, source: Path, out: Path, text: dict[bool, Path], threads: int) -> dict[str, float]:
    """Run one command; its processor seconds and peak memory, the program's own start included."""
    name, *fields = stage.split()
    flags = [part for key, value in (field.split("=", 1) for field in fields) for part in (f"--{key}", value)]
    flags = [part for part in flags if part != "true"]
    line = [sys.executable, "-m", "topiarist", name, str(source), str(out), *flags, "--threads", str(threads)]
    line += ["--data", str(text[name in ON_MIXTURE])]
    _, status, used = os.wait4(subprocess.Popen(line).pid, 0)
    if status:
        raise SystemExit(f"{stage}: exit status {os.waitstatus_to_exitcode(status)}")
    return {"cpu_seconds": round(used.ru_utime + used.ru_stime, 1), "peak_gb": round(used.ru_maxrss / 1e6, 2)}


def cells() -> dict[str, dict[str, Any]]:
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    found: dict[str, dict[str, Any]] = {}
    for line in lines:
        cell = json.loads(line)
        found.setdefault(cell["stages"], {}).update(cell)
    return found


def keep(cell: dict[str, Any]) -> None:
    print(json.dumps(cell), flush=True)
    with RESULTS.open("a") as file:
        file.write(json.dumps(cell) + "\n")


def table() -> str:
    """Every row of stages, the dense model first, with what it costs in all."""
    rows = cells()
    dense = rows["dense"]["perplexity"]
    names, tasks = list(dense), sorted({task for cell in rows.values() for task in cell.get("tasks", {})})
    head = ["stages", *names, "of dense", *tasks, "last stage, CPU s", "all, CPU s", "peak GB"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for key, cell in rows.items():
        parts = key.split(" | ")
        spent = [rows[" | ".join(parts[: i + 1])].get("cpu_seconds", 0.0) for i in range(len(parts))]
        found = cell.get("perplexity", {})
        numbers = [f"{found[name]:.1f}" if found else "" for name in names]
        numbers.append(", ".join(f"{found[name] / dense[name]:.2f}" for name in names) if found else "")
        numbers += [f"{cell['tasks'][task]:.3f}" if task in cell.get("tasks", {}) else "" for task in tasks]
        lines.append(
            f"| {' | '.join([key.replace(' | ', ', then '), *numbers, f'{spent[-1]:.0f}', f'{sum(spent):.0f}'])}"
            f" | {cell.get('peak_gb', '')} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with train/, eval/ and tasks/")
    parser.add_argument("--folder", type=Path, help="where results lie")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--eval-windows", type=int, default=16)
    parser.add_argument("--commit", default="", help="kept in the cells")
    parser.add_argument("--tasks", action="store_true", help="zero-shot tasks of the last stage as well")
    parser.add_argument("--limit", type=int, default=1000, help="items of each task")
    parser.add_argument("--table", action="store_true", help="print what was measured and stop")
    parser.add_argument("stages", nargs="*", help="commands with key=value; none: the dense model")
    options = parser.parse_args()
    if options.table:
        print(table())
        return
    options.folder.mkdir(parents=True, exist_ok=True)
    options.protocol = "standard"
    torch.set_num_threads(options.threads)
    text, source, done = texts(options.data, options.folder), model_dir(), cells()
    _, windows = load_texts(options, load_tokenizer(model_dir()))
    for i in range(len(options.stages)):
        key = " | ".join(options.stages[: i + 1])
        out = options.folder / "".join(c if c.isalnum() else "-" for c in key)
        cell = done.get(key)
        if cell is None or not out.is_dir():
            cell = {"stages": key, "commit": options.commit, "threads": options.threads}
            cell |= run_stage(options.stages[i], source, out, text, options.threads)
            keep({**cell, "perplexity": measure(out, windows), "eval_windows": options.eval_windows})
        source = out
    key = " | ".join(options.stages) or "dense"
    if not options.stages and key not in done:
        keep({"stages": key, "perplexity": measure(source, windows), "eval_windows": options.eval_windows})
    if options.tasks and "tasks" not in done.get(key, {}):
        begun = time.process_time()
        (found,) = compare_tasks(
            [str(source)], TASKS, files=options.data / "tasks", limit=options.limit, reference=False, batch_size=8
        )
        scores = {f"{score.task} {score.metric}": score.value for score in found.scores}
        keep({"stages": key, "tasks": scores, "limit": options.limit, "task_cpu": time.process_time() - begun})


if __name__ == "__main__":
    main()
