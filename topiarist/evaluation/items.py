"""Item files of zero-shot tasks, as the datasets of lm-evaluation-harness's own tasks have their rows.

A task made of them includes the harness's own YAML and changes only where the rows come from, so that prompts, choices
and metrics are those of the harness that is installed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from topiarist.checkpoints.access import check_name
from topiarist.checkpoints.reading import file_digest
from topiarist.core.errors import CalibrationError, TopiaristError

Item = Mapping[str, Any]


@dataclass(frozen=True)
class Format:
    """What an item file of a task holds, and how the harness's dataset has it."""

    yaml: str
    """The harness's own file, below its folder of tasks."""
    fields: tuple[str, ...]
    """That every item has."""
    row: Callable[[Item], Item] = lambda item: item
    changes: Mapping[str, Any] = field(default_factory=dict)
    """What the included file does to its rows that has been done to the items already."""


def _lettered(question: str) -> Callable[[Item], Item]:
    """Rows whose choices have letters, as ARC and OpenBookQA have them."""

    def row(item: Item) -> Item:
        letters = [chr(ord("A") + i) for i in range(len(item["choices"]))]
        choices = {"text": item["choices"], "label": letters}
        return {question: item["question"], "choices": choices, "answerKey": letters[int(item["label"])]}

    return row


def _last_word(item: Item) -> Item:
    if not item["continuation"] or " " in item["continuation"]:
        raise ValueError(f"the continuation {item['continuation']!r} is not one word")
    return {"text": f"{item['context']} {item['continuation']}"}


_QUESTION = ("question", "choices", "label")
FORMATS: Mapping[str, Format] = {
    "arc_easy": Format("arc/arc_easy.yaml", _QUESTION, _lettered("question")),
    "arc_challenge": Format("arc/arc_challenge.yaml", _QUESTION, _lettered("question")),
    "piqa": Format("piqa/piqa.yaml", ("goal", "sol1", "sol2", "label")),
    "hellaswag": Format("hellaswag/hellaswag.yaml", ("query", "choices", "label"), changes={"process_docs": None}),
    "openbookqa": Format("openbookqa/openbookqa.yaml", _QUESTION, _lettered("question_stem")),
    "winogrande": Format(
        "winogrande/default.yaml",
        ("sentence", "option1", "option2", "answer"),
        lambda item: {**item, "answer": str(item["answer"])},
    ),
    "boolq": Format(
        "super_glue/boolq/default.yaml",
        ("question", "passage", "answer"),
        lambda item: {"question": item["question"], "passage": item["passage"], "label": int(item["answer"])},
    ),
    "social_iqa": Format("siqa/siqa.yaml", ("context", "question", "answerA", "answerB", "answerC", "label")),
    "lambada_openai": Format("lambada/lambada_openai.yaml", ("context", "continuation"), _last_word),
}


@dataclass(frozen=True)
class LocalTask:
    """A task of the harness with rows from a file."""

    name: str
    rows: list[Item]
    digest: str
    """sha256 of the item file."""

    def write(self, folder: Path, harness: Path) -> Path:
        """Write the task's YAML and rows to a folder. Returns the YAML's path.

        harness: the package's folder. Raises TopiaristError if it has no such task.
        """
        form = FORMATS[self.name]
        own = harness / "tasks" / form.yaml
        if not own.is_file():
            raise TopiaristError(f"the installed lm-eval has no tasks/{form.yaml}: pip install -U lm-eval")
        data, path = folder / f"{self.name}.jsonl", folder / f"{self.name}.yaml"
        data.write_text("".join(json.dumps(row) + "\n" for row in self.rows), encoding="utf-8")
        changed = {
            "include": str(own.resolve()),
            "task": self.name,
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": {"test": str(data.resolve())}},
            "training_split": None,
            "validation_split": None,
            "test_split": "test",
            **form.changes,
        }
        path.write_text(json.dumps(changed), encoding="utf-8")  # JSON is YAML
        return path


def local_task(task: str, folder: str | Path) -> LocalTask:
    """The items of a task from `folder`, read and checked.

    Raises CalibrationError if they do not fit, CheckpointError for a folder that may not be looked into.
    """
    check_name(Path(folder))
    if task not in FORMATS:
        raise CalibrationError(f"no item format is known for task {task!r}; known are {', '.join(FORMATS)}")
    found = sorted(Path(folder).glob(f"{task}*.jsonl"))
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise CalibrationError(f"{folder} must hold one file {task}*.jsonl, found {names}")
    (path,) = found
    return LocalTask(task, _rows(path, FORMATS[task]), file_digest(path))


def _rows(path: Path, form: Format) -> list[Item]:
    rows: list[Item] = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"cannot read {path}: {error}") from error
    for number, line in enumerate(lines, 1):
        try:
            item = json.loads(line)
            lacking = [name for name in form.fields if name not in item]
        except (ValueError, TypeError, RecursionError) as error:
            raise CalibrationError(f"{path} line {number} is not a JSON object ({error})") from error
        if lacking:
            raise CalibrationError(
                f"{path} line {number} has no field {lacking[0]!r}; items have {', '.join(form.fields)}"
            )
        try:
            rows.append(form.row(item))
        except (ValueError, TypeError, IndexError, KeyError) as error:
            raise CalibrationError(f"{path} line {number} does not fit its task ({error})") from error
    if not rows:
        raise CalibrationError(f"{path} is empty")
    return rows
