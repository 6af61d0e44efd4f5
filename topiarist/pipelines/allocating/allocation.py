"""From a model, a rule and calibration text to a pattern for every layer; what was measured on the way."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Container, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from topiarist import allocate
from topiarist.allocate import Rule, Scores, Search, Sensitivity, Uniform
from topiarist.allocate.fixed import kept_by
from topiarist.checkpoints.atomic import make_folder, refuse_foreign, remove_empty, write_atomically
from topiarist.checkpoints.journal import read_sealed, sealed
from topiarist.checkpoints.writing import OutputFolder
from topiarist.core.errors import CheckpointError, NumericalWarning
from topiarist.core.options import given_or_made, takes
from topiarist.core.patterns import NM, Pattern, TransposableNM
from topiarist.core.registry import name_of
from topiarist.core.slots import check_slots
from topiarist.data import Windows
from topiarist.models.opened import OpenedModel, at_rest
from topiarist.models.probe import flow_of
from topiarist.pipelines.allocating.database import ELSEWHERE
from topiarist.pipelines.allocating.measure import measure
from topiarist.pipelines.allocating.options import AllocateOptions
from topiarist.pipelines.allocating.search import search
from topiarist.pipelines.common.options import Progress
from topiarist.pipelines.common.setup import open_for, resolve_patterns, windows_of
from topiarist.pipelines.pruning.options import PruneOptions
from topiarist.pipelines.training.processes import Processes, check_same_run

MOST_UNSURE = 0.25
"""Share of the layers whose score may drown in its own noise without a warning."""

MARK = '"standard_errors"'
"""In every allocation that was written, and hardly in a file of anybody else."""
FILE = "pruning_allocation.json"


@dataclass(frozen=True)
class FoundAllocation:
    """What a rule gave: exact patterns, and the scores it went by."""

    rule: Mapping[str, Any]
    pattern: str
    """The one that says how many weights are kept in all."""
    shapes: Mapping[str, tuple[int, int]]
    patterns: Mapping[str, Pattern | None]
    skipped: Sequence[str]
    """Layers left dense that the budget does not count."""
    scores: Scores

    @property
    def sparsity(self) -> float:
        """Fraction of zeros over all layers that were not skipped."""
        total = sum(out * width for name, (out, width) in self.shapes.items() if name not in set(self.skipped))
        return self.zeros / total if total else 0.0

    @property
    def zeros(self) -> int:
        """Number of zeros over all layers."""
        total = sum(out * width for out, width in self.shapes.values())
        return total - kept_by(self.shapes, self.patterns)

    def to_dict(self) -> dict[str, Any]:
        """As it is written to a file, which `allocation=` of `prune` takes."""
        return {
            "rule": dict(self.rule),
            "pattern": self.pattern,
            "sparsity": self.sparsity,
            "zeros": self.zeros,
            "skipped": list(self.skipped),
            "patterns": {name: None if p is None else str(p) for name, p in self.patterns.items()},
            "scores": dict(self.scores.values),
            "standard_errors": dict(self.scores.errors),
            **({"notes": dict(self.scores.notes)} if self.scores.notes else {}),
        }

    def save(self, path: str | Path) -> None:
        """Write the allocation as a file that `allocation=` takes. Raises CheckpointError before a file of another kind."""
        refuse_foreign(Path(path), MARK)
        write_atomically(Path(path), self.as_text())

    def as_text(self) -> str:
        """The content of that file, sealed: a run that resumes goes on from nothing else. Who edits it needs no seal."""
        return sealed(self.to_dict(), indent=2) + "\n"


def fixed_patterns(options: PruneOptions, source: OpenedModel) -> tuple[dict[str, Pattern | None], list[str]]:
    """The patterns that need no measurement, and expressions of `skip` that match nothing.

    Of a rule they are those before it: `pattern` everywhere. Raises PatternError for a rule that cannot meet it.
    """
    if options.rule is not None:
        check_rule(options.rule, source, options.base_pattern, options.skip)
    said = None if options.rule is not None else options.allocation
    assert not isinstance(said, Rule)
    return resolve_patterns(
        source, options.base_pattern, said, options.skip, budgeted=said is not None and options.pattern is not None
    )


def check_rule(rule: Rule, source: OpenedModel, pattern: Pattern, skip: Sequence[str]) -> None:
    """Raise PatternError if bounds or choices cannot meet the budget, or a pattern does not fit, before the slow part."""
    _check_met(rule, *_counted(source, pattern, skip), pattern)


def _check_met(rule: Rule, counted: Mapping[str, tuple[int, int]], depths: Mapping[str, int], pattern: Pattern) -> None:
    """As `check_rule`, of the layers that are known to count: with one score for all, a rule gives what it can give."""
    rule.patterns(counted, depths, pattern, dict.fromkeys(counted, 0.5))


def _counted(
    source: OpenedModel, pattern: Pattern, skip: Sequence[str], uncalled: Container[int] = ()
) -> tuple[dict[str, tuple[int, int]], dict[str, int]]:
    """(shapes of the layers that a budget counts, numbers of the blocks of all). uncalled: blocks that stay dense."""
    shapes = source.shapes()
    pruned, _ = allocate.without(dict.fromkeys(shapes, pattern), skip)
    depths = {
        f"{path}.{m.name}": index for index, path in enumerate(source.block_names) for m in source.matrices(index)
    }
    return {n: shapes[n] for n, p in pruned.items() if p is not None and depths[n] not in uncalled}, depths


def allocated(
    options: PruneOptions,
    rule: Rule,
    source: OpenedModel,
    windows: Windows,
    output: OutputFolder | None,
    progress: Progress,
    processes: Processes,
) -> tuple[dict[str, Pattern | None], dict[str, Any]]:
    """The rule's patterns for a run, and what its report says of them, in all processes that measure together.

    A resumed run reads them from its folder.
    """
    shapes, stored = source.shapes(), None if output is None else output.folder / FILE
    if stored is None or not processes.on_main(stored.is_file):
        work = options.allocation_work
        if isinstance(rule, Search) and work is None and output is not None:
            work = output.folder.with_name(output.folder.name + ".search")
        asked = AllocateOptions(
            rule=rule, pattern=options.base_pattern, method=options.method, skip=options.skip, seed=options.seed,
            batch_size=options.windows_a_forward, work=work,
        )  # fmt: skip
        found = apply_rule(asked, source, windows, progress, processes)
        if output is None:
            return dict(found.patterns), _facts(found.to_dict())
        folder = output

        def write() -> None:
            source.begin(folder)
            folder.write_text(FILE, found.as_text())

        processes.on_main(write)
    kept = stored
    assert kept is not None

    def read() -> tuple[dict[str, Pattern | None], dict[str, Any]]:
        if (plain := read_sealed(kept)) is None:
            raise CheckpointError(f"{kept} is damaged: delete it and run the same command again")
        return allocate.from_file(shapes, kept), _facts(plain)

    return processes.on_main(read)


def _facts(plain: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in plain.items() if key != "patterns"}


@takes(AllocateOptions)
def find_allocation(
    model: str | Path | nn.Module,
    rule: str | Rule | None = None,
    *,
    options: AllocateOptions | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> FoundAllocation:
    """How much each layer should get by a rule of `tp.allocate.ALLOCATIONS`, without pruning anything.

    Another call with the same `work` folder resumes and reuses what was slow to get. Under `torchrun` the measuring is
    divided among the processes, to the same numbers. Raises a TopiaristError for everything a user can mend.
    """
    options = given_or_made(AllocateOptions, options, settings if rule is None else {"rule": rule, **settings})
    options.check_text()
    processes = Processes.join()
    source = open_for(options, model)
    windows = windows_of(options, source)
    check_same_run(processes, options, source, {"calibration digest": windows.digest})
    return apply_rule(options, source, windows, progress or (lambda *_: None), processes)


def apply_rule(
    options: AllocateOptions,
    source: OpenedModel,
    windows: Windows,
    progress: Progress,
    processes: Processes,
) -> FoundAllocation:
    """Measure what the rule asks for (or read it from the work folder), and let it say the patterns.

    Raises ProcessError for windows that so many processes cannot divide.
    """
    shapes, pattern, rule = source.shapes(), options.base_pattern, options.rule
    counted, depths = _counted(source, pattern, options.skip, _uncalled(source, windows))
    scores = Scores({}, {})
    if rule.measured_by and counted:
        _check_met(rule, counted, depths, pattern)
        check_divides(options, windows, processes)
        with at_rest(source.model):
            scores = _scores(options, source, windows, counted, depths, progress, processes)
    if len(scores.unsure) > MOST_UNSURE * len(counted):
        warnings.warn(
            f"{len(scores.unsure)} of {len(counted)} traces are within two standard errors of zero, so their ranks are "
            "unsure: raise sequences or probes",
            NumericalWarning,
            stacklevel=2,
        )
    patterns = rule.patterns(counted, depths, pattern, scores.values)
    same = len(set(patterns.values())) == 1 < len(patterns)
    if same and isinstance(pattern, NM | TransposableNM) and not isinstance(rule, Uniform):
        name = name_of(allocate.ALLOCATIONS, rule)
        warnings.warn(
            f"{name} gives every layer {pattern}, as uniform would: what it wishes is nearer to that than to other patterns "
            "of its kind. Widen its half_width, or give a share of zeros such as 0.5",
            UserWarning,
            stacklevel=2,
        )
    return FoundAllocation(
        rule=allocate.recipe(rule),
        pattern=str(pattern),
        shapes=shapes,
        patterns={name: patterns.get(name) for name in shapes},
        skipped=[name for name in shapes if name not in counted],
        scores=scores,
    )


def _uncalled(source: OpenedModel, windows: Windows) -> Container[int]:
    """Blocks that the forward of a text goes past. A run on text leaves them dense, so zeros there would be missing."""
    if not len(windows.tokens):
        return ()
    found = flow_of(source, windows.tokens[:1]).uncalled
    source.release_embeddings()
    source.release(0)
    return found


def _scores(
    options: AllocateOptions,
    source: OpenedModel,
    windows: Windows,
    shapes: Mapping[str, tuple[int, int]],
    depths: Mapping[str, int],
    progress: Progress,
    processes: Processes,
) -> Scores:
    """What the rule measures, read from the work folder if the same was measured before."""
    rule = options.rule
    made_of = {
        "model": source.digest(),
        "calibration": windows.digest,
        "seed": options.seed,
    }
    work = options.work
    if isinstance(rule, Search):
        return search(options, rule, source, windows.tokens, shapes, depths, made_of, work, progress, processes)
    rule_fields = {key: value for key, value in allocate.recipe(rule).items() if key in ("name", *rule.measured_by)}
    recipe = json.dumps({**made_of, "rule": rule_fields, "layers": sorted(shapes)})
    stored = None if work is None else work / f"scores-{hashlib.sha256(recipe.encode()).hexdigest()[:16]}.json"
    if stored is not None and (known := processes.on_main(partial(_read, stored))) is not None:
        return known
    # Before the slow part too: a folder that cannot be.
    made = [] if work is None else processes.on_main(partial(make_folder, work, cure=ELSEWHERE))
    try:
        scores = measure(
            rule,
            source,
            windows.tokens,
            list(shapes),
            batch_size=options.batch_size,
            seed=options.seed,
            progress=progress,
            processes=processes,
        )
        if stored is not None and processes.is_main:
            write_atomically(stored, sealed(asdict(scores)))
        return scores
    finally:
        if processes.is_main:
            remove_empty(made)


def _read(stored: Path) -> Scores | None:
    """What was measured before; None, so that it is measured again, if that is damaged."""
    return None if (plain := read_sealed(stored)) is None else Scores(**plain)


def check_divides(options: AllocateOptions, windows: Windows, processes: Processes) -> None:
    """Raise ProcessError unless so many processes can divide the forwards that the rule's measuring consists of."""
    rule, num = options.rule, len(windows.tokens)
    batches = -(-(num - rule.sequences if isinstance(rule, Search) else num) // options.batch_size)
    if processes.size > 1:
        check_slots(min(rule.sequences, num) if isinstance(rule, Sensitivity) else batches, processes.size)
