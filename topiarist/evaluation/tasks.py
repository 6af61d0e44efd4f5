"""Zero-shot tasks through lm-evaluation-harness: its own by name, or the same tasks from item files without a network.

An item file is .jsonl in the folder that `files` names, called after its task (piqa_valid.jsonl); see items.py.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from topiarist.core.errors import CalibrationError, TopiaristError, first_line
from topiarist.evaluation.comparison import is_dense, with_reference
from topiarist.evaluation.items import LocalTask, local_task
from topiarist.evaluation.perplexity import check_batch_size
from topiarist.models.derive import check_has_text_loss
from topiarist.models.opened import evaluated, open_model

BOOTSTRAP = 1000
"""Resamples for the standard error of figures that have no formula for it, such as LAMBADA's perplexity."""


@dataclass(frozen=True)
class Score:
    """One figure of one model on one task."""

    task: str
    metric: str
    value: float
    stderr: float | None
    num_items: int
    digest: str
    """sha256 of the item file, or the version of the harness's own task."""


@dataclass(frozen=True)
class Scores:
    """All figures of one model."""

    model: str
    dense: bool
    dtype: str
    harness: str
    scores: list[Score]
    base: str | None = None
    """Of a pruned model: the dense model among them that it was made of."""


def compare_tasks(
    models: Sequence[str],
    tasks: Sequence[str],
    *,
    files: str | Path | None = None,
    limit: int | None = None,
    batch_size: int = 1,
    device: str | None = None,
    reference: bool = True,
    trust_remote_code: bool = False,
    tokenizer: Any = None,
    progress: Callable[[str, int, int], None] = lambda *_: None,
) -> list[Scores]:
    """Every task on every model, dense models first (the base of a pruned one joins, as in `compare`).

    limit: only the first items of each task. All item files are read, and refused, before any model is loaded.
    Raises as `open_model` does, CalibrationError for items that do not fit, TopiaristError without the harness.
    """
    check_batch_size(batch_size)
    harness = installed_harness()
    specs = specs_of(tasks, files, limit)
    digests = {spec.name: spec.digest for spec in specs if isinstance(spec, LocalTask)}
    named = with_reference(models, reference)
    opened = [
        open_model(name, device=device, trust_remote_code=trust_remote_code, tokenizer=tokenizer) for name, *_ in named
    ]
    for source in opened:
        check_has_text_loss(source.model, "a zero-shot task")
    results = []
    for number, ((name, dense, base), source) in enumerate(zip(named, opened, strict=True)):
        progress(f"tasks: {Path(name).name}", number, len(named))
        model = source.whole().model
        found = _run(harness, model, source.tokenizer(), specs, limit, batch_size)
        dtype = str(model.dtype).removeprefix("torch.")
        dense = dense and is_dense(name, model)
        results.append(Scores(name, dense, dtype, f"lm-eval {harness.__version__}", _scores(found, digests), base))
        del model
    return results


def specs_of(tasks: Sequence[str], files: str | Path | None, limit: int | None) -> list[str | LocalTask]:
    """What the harness is asked for: every task by its name, or with its items from the folder `files`.

    Raises CalibrationError for items that do not fit or a limit below 1, TopiaristError for items or a limit of no task.
    """
    if not tasks and (files is not None or limit is not None):
        what = "task files are" if files is not None else "a limit is"
        raise TopiaristError(f"{what} of zero-shot tasks, and none is named: name tasks, or leave that out")
    if limit is not None and limit < 1:
        raise CalibrationError(f"--limit {limit}: 1 item is the least")
    return [task if files is None else local_task(task, files) for task in tasks]


def entries(results: Sequence[Scores]) -> dict[str, list[dict[str, Any]]]:
    """What is stored beside every pruned model, each figure with that of its own base on the same items."""
    found: dict[str, list[dict[str, Any]]] = {}
    for result in (result for result in results if not result.dense):
        for score in result.scores:
            key = (score.task, score.metric, score.digest, score.num_items)
            same = (
                {"model": other.model, "value": s.value, "stderr": s.stderr}
                for other in results
                if other.dense and other.model == result.base
                for s in other.scores
                if (s.task, s.metric, s.digest, s.num_items) == key
            )
            more = {"dtype": result.dtype, "harness": result.harness, "dense": next(same, None)}
            found.setdefault(result.model, []).append(vars(score) | more)
    return found


def installed_harness() -> Any:
    """The package of lm-evaluation-harness. Raises TopiaristError if it cannot be imported."""
    try:
        harness = importlib.import_module("lm_eval")
        importlib.import_module("lm_eval.models.huggingface")  # needs more than the package itself does
    except ImportError as error:
        raise TopiaristError(
            f"tasks need lm-evaluation-harness, which cannot be imported ({error}): pip install 'topiarist[eval]'"
        ) from error
    return harness


def _run(
    harness: Any, model: Any, tokenizer: Any, specs: Sequence[str | LocalTask], limit: int | None, batch_size: int
) -> Mapping[str, Any]:
    """The harness's own result. What it prints goes to stderr, so that ours can be piped."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    wrapped = harness.models.huggingface.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    package = Path(harness.__file__).parent
    try:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr), evaluated(model):
            return harness.simple_evaluate(
                model=wrapped,
                tasks=[s if isinstance(s, str) else str(s.write(Path(folder), package)) for s in specs],
                limit=limit,
                bootstrap_iters=BOOTSTRAP,
                log_samples=False,
            )
    except TopiaristError:
        raise
    except (KeyError, ValueError, OSError, RuntimeError) as error:  # unknown names, and items that cannot be fetched
        reason = first_line(error).strip("'\"")
        names = ", ".join(spec if isinstance(spec, str) else spec.name for spec in specs)
        raise TopiaristError(
            f"lm-eval cannot run {names}: {reason}; without a network, pass --task-files DIR"
        ) from error


def _scores(found: Mapping[str, Any], digests: Mapping[str, str]) -> list[Score]:
    """Figures in the order of the tasks; a task's usual metric (normalised accuracy, if it has one) first."""
    scores = []
    for task, figures in found["results"].items():
        values = {key.partition(",")[0]: value for key, value in figures.items() if isinstance(value, int | float)}
        digest = digests.get(task, f"lm-eval task version {found.get('versions', {}).get(task)}")
        count = int(found.get("n-samples", {}).get(task, {}).get("effective", 0))
        metrics = [name for name in values if not name.endswith("_stderr") and name not in ("alias", "sample_len")]
        for metric in sorted(metrics, key=lambda name: (name != "acc_norm", name != "acc")):
            stderr = values.get(f"{metric}_stderr")
            scores.append(
                Score(task, metric, float(values[metric]), None if stderr is None else float(stderr), count, digest)
            )
    return scores
