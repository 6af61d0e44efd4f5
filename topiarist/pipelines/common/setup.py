"""What a pipeline starts from: the model as blocks, a pattern for every layer, calibration windows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from topiarist import allocate
from topiarist.allocate.fixed import check_budget, read_file
from topiarist.checkpoints.access import check_name
from topiarist.checkpoints.locking import LOCK
from topiarist.checkpoints.writing import REPORT, OutputFolder
from topiarist.core.errors import CalibrationError, PatternError
from topiarist.core.patterns import Pattern
from topiarist.data import Windows, calibration_windows, check_vocabulary
from topiarist.models.opened import OpenedModel, open_model
from topiarist.pipelines.common.options import DataOptions, TextOptions
from topiarist.pipelines.training.processes import Processes, computing


def resolve_patterns(
    source: OpenedModel,
    pattern: Pattern,
    allocation: str | Path | Mapping[str, str | None] | None,
    skip: Sequence[str],
    *,
    budgeted: bool = False,
) -> tuple[dict[str, Pattern | None], list[str]]:
    """A pattern for every prunable layer, checked against every shape before any work is done.

    allocation: said layer by layer; with `budgeted` it must keep as many weights as `pattern` everywhere would.
    """
    shapes = source.shapes()
    if allocation is None:
        dense, unmatched = allocate.without(dict.fromkeys(shapes, pattern), skip)
        fitting = allocate.uniform({n: shapes[n] for n, p in dense.items() if p is not None}, pattern)
        _check_any(fitting)
        return {name: fitting.get(name) for name in shapes}, unmatched
    if isinstance(allocation, Mapping):
        patterns, uncounted, what = allocate.given(shapes, allocation, source.stays_dense), [], "the allocation"
    else:
        check_name(Path(allocation))
        if not Path(allocation).is_file():
            raise PatternError(
                f"allocation {str(allocation)!r} is neither a file nor a rule; rules are {', '.join(allocate.ALLOCATIONS)}"
            )
        patterns, uncounted = read_file(shapes, allocation, source.stays_dense)
        what = f"allocation {allocation}"
    if budgeted:
        counted, _ = allocate.without(dict.fromkeys(sorted(set(shapes) - set(uncounted)), pattern), skip)
        check_budget({n: shapes[n] for n in shapes if counted.get(n) is not None}, patterns, pattern, what)
    left, unmatched = allocate.without(patterns, skip)
    _check_any(left)
    return left, unmatched


def _check_any(patterns: Mapping[str, Pattern | None]) -> None:
    if all(pattern is None for pattern in patterns.values()):
        raise PatternError("nothing is left to prune: --skip or the allocation leaves every matrix dense")


def open_for(options: DataOptions, model: str | Path | nn.Module | OpenedModel) -> OpenedModel:
    """The model, opened as the options say; from here on torch has their threads."""
    options.use_threads()
    return open_model(
        model, device=options.device, trust_remote_code=options.trust_remote_code, tokenizer=options.tokenizer,
        stands_for=options.stands_for,
    )  # fmt: skip


def open_output(
    out: str | Path | None, fingerprint: Mapping[str, Any], device: torch.device, processes: Processes, held: ExitStack
) -> OutputFolder | None:
    """The folder that the main process writes, locked there until `held` ends, once all processes agree on the run.

    out: None, where nothing is written. Raises ProcessError for processes that do not agree, or see another folder.
    """
    processes.check_agreement({"out": str(out), **computing(device), **fingerprint})
    if out is None:
        return None
    output = processes.on_main(lambda: held.enter_context(OutputFolder(out, fingerprint)))
    processes.check_shared((output.folder / (REPORT if output.complete else LOCK)).read_text, str(out))
    return output


def check_window(asked: int | None, source: OpenedModel) -> None:
    """Raise CalibrationError for a window that is longer than the model's limit. asked: tokens; None: nothing was asked for."""
    if asked is not None and source.limit is not None and asked > source.limit:
        raise CalibrationError(
            f"window {asked} is longer than the model's limit of {source.limit} tokens; ask for {source.limit} or fewer"
        )


def windows_of(options: TextOptions, source: OpenedModel) -> Windows:
    """The windows that the options ask for, within the model's limits; none at all if they name no text."""
    data, asked = options.data, options.window_tokens
    if data is None:
        return Windows(torch.empty(0, 0, dtype=torch.int64), "", frozenset())
    check_window(asked, source)  # before the text is read
    tokenizer = None if isinstance(data, Tensor) else source.tokenizer(options.tokenizer)
    windows = calibration_windows(
        data,
        tokenizer,
        num_samples=options.num_windows,
        window=asked or source.window,
        seed=options.seed,
        bos=options.bos,
    )
    check_window(windows.window, source)  # of token windows too, which nobody asked for by length
    check_vocabulary(windows.tokens, source.vocabulary)
    return windows
