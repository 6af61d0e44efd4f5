"""Where learning starts: one-shot masks without their weight update, or masks from a file."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from topiarist.checkpoints.access import check_name
from topiarist.core import linalg
from topiarist.core.errors import CheckpointError, PatternError
from topiarist.core.patterns import NM, Pattern
from topiarist.masklearn.candidates import MAX_CLASSES, num_classes
from topiarist.masklearn.descent import improve_mask
from topiarist.masklearn.relaxation import check_prior
from topiarist.masks import MaskFile, read_npz, weight_digest
from topiarist.models.opened import ObjectModel, at_rest
from topiarist.pipelines.common.stream import BlockStream
from topiarist.pipelines.learning.masking import Target
from topiarist.pipelines.pruning.block import BlockPruner
from topiarist.solvers import SOLVERS, Solution, Solver


@dataclass(frozen=True, kw_only=True)
class MaskOnly(Solver):
    """Another solver's mask on the weights as they are, because learned masks start from dense weights; an N:M mask is
    then improved by descent (masklearn/descent.py).
    """

    solver: Solver
    sweeps: int = 0
    """Passes of descent over the groups; 0 leaves the solver's mask."""

    def together(self, weights, gram, patterns) -> list[Solution]:
        """The solver's masks, improved by descent if `sweeps` says so, on the weights as they came."""
        found = self.solver.together(weights, gram, patterns)
        H = gram.matrix.to(weights[0].device)
        return [
            self._on_dense(weight, solution, H, pattern)
            for weight, solution, pattern in zip(weights, found, patterns, strict=True)
        ]

    def _on_dense(self, weight: Tensor, solution: Solution, H: Tensor, pattern: Pattern) -> Solution:
        mask = solution.mask
        if self.sweeps and isinstance(pattern, NM) and num_classes(pattern) <= MAX_CLASSES:
            mask = improve_mask(weight.detach().float(), H, mask, pattern, sweeps=self.sweeps)
        kept = weight.masked_fill(~mask, 0.0)
        return Solution(kept, mask, linalg.reconstruction_error(weight, kept, H))

    def without_data(self, weight, pattern) -> Solution:
        """What the solver gives for the weight alone."""
        return self.solver.without_data(weight, pattern)


@torch.no_grad()
def one_shot_masks(
    source: ObjectModel,
    wanted: Sequence[Sequence[Target]],
    patterns: Mapping[str, Pattern | None],
    tokens: Int[Tensor, "num window"],
    solver: Solver,
    *,
    sweeps: int = 0,
    batch_size: int = 4,
    progress: Callable[[str, int, int], None] = lambda *_: None,
) -> tuple[dict[str, Tensor], list[str]]:
    """Masks by parameter name, and warnings. Block by block, each on inputs that passed the masked blocks before it.

    sweeps: passes of descent that fit an N:M mask to weights that are not updated.

    The model's weights are as before when this returns: a block is masked in place, run, and put back.
    """
    masks: dict[str, Tensor] = {}
    by_matrix: dict[str, Tensor] = {}
    pruner = BlockPruner(
        MaskOnly(solver=solver, sweeps=sweeps),
        patterns,
        on_solution=lambda name, solution: by_matrix.__setitem__(name, solution.mask),
    )
    names = source.block_names
    with at_rest(source.model):
        stream = BlockStream.of(source, tokens, batch_size=batch_size)
        for index, path in enumerate(names):
            progress("prior", index, len(names))
            block = source.load(index)
            dense = {target.name: target.parameter.clone() for target in wanted[index]}
            try:
                pruner.prune(stream, index, block, source.matrices(index), path, sequential=False)
                if index + 1 < len(names):
                    stream.advance(index, block)
            finally:
                for target in wanted[index]:
                    target.parameter.copy_(dense[target.name])
            masks.update({target.name: target.whole(by_matrix, path) for target in wanted[index]})
            by_matrix.clear()
    return masks, pruner.warned


def prior_identity(prior: str | Path | Mapping[str, Tensor] | None) -> str:
    """What a resume compares: a method's name, or a digest. Raises PatternError if there is no prior."""
    if prior is None:
        raise PatternError("learning masks needs a prior: wanda, sparsegpt, magnitude, or a masks.safetensors")
    if isinstance(prior, Mapping):
        total = hashlib.sha256()
        for name in sorted(prior):
            total.update(f"{name} {weight_digest(prior[name])}".encode())
        return f"masks {total.hexdigest()[:16]}"
    if isinstance(prior, str) and prior in SOLVERS:
        return prior
    path = Path(prior)
    check_name(path)
    if not path.is_file():
        raise CheckpointError(f"prior {prior} is neither a method ({', '.join(SOLVERS)}) nor a mask file")
    with path.open("rb") as stream:
        return f"masks {hashlib.file_digest(stream, 'sha256').hexdigest()[:16]}"


def given_masks(prior: str | Path | Mapping[str, Tensor], wanted: Sequence[Target]) -> dict[str, Tensor]:
    """The prior's masks of all targets, from a mask file (checked against the weights), an .npz, or a mapping; none of a
    method, which finds them.

    Raises CheckpointError for another base, PatternError for a mask that is missing or of another shape or pattern.
    """
    if isinstance(prior, str) and prior in SOLVERS:
        return {}
    shapes = {target.name: tuple(target.parameter.shape) for target in wanted}
    if isinstance(prior, Mapping):
        masks: Mapping[str, Tensor] = prior
    elif Path(prior).suffix == ".npz":
        masks = read_npz(prior, shapes)
    else:
        masks = MaskFile(prior)
    origin = "the prior" if isinstance(prior, Mapping) else str(prior)
    if missing := [name for name in shapes if name not in masks]:
        raise PatternError(
            f"{origin} has no mask for {missing[0]} ({len(missing)} such): skip them, or use another prior"
        )
    for target in wanted:
        if isinstance(masks, MaskFile):
            masks.check(target.name, target.parameter)
    chosen: dict[str, Tensor] = {}
    for target in wanted:
        mask = chosen[target.name] = masks[target.name]
        if tuple(mask.shape) != shapes[target.name]:
            raise PatternError(
                f"{origin}: mask of {target.name} has shape {tuple(mask.shape)}, the weight {shapes[target.name]}"
            )
        check_prior(target.rows(mask), target.pattern, f"layer {target.label}: {origin}")
    return chosen
