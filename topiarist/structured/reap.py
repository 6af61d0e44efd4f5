"""REAP: which experts of a mixture matter, by what they add to the tokens that the router sends to them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from pydantic import PositiveInt
from torch import Tensor, nn

from topiarist.core.errors import CalibrationWarning, NumericalError, TopiaristError
from topiarist.core.options import options
from topiarist.models.hooks import hooked
from topiarist.models.mixtures import Choices, expert_output
from topiarist.models.opened import at_rest
from topiarist.structured.methods import Method, Scores, Task
from topiarist.structured.units import UnitGroup

FEW_TOKENS = 64
"""Calibration tokens of an expert below which its mean is said to be a guess."""
NAMED = 8
"""Layers that a warning names."""


class Contributions:
    """What the experts of one layer add to the tokens that are routed to them."""

    def __init__(self, count: int) -> None:
        self.total: Float[Tensor, " count"] = torch.zeros(count, dtype=torch.float64)
        """Sum over tokens of router weight times the norm of the expert's output."""
        self.tokens: Int[Tensor, " count"] = torch.zeros(count, dtype=torch.int64)
        """Tokens that the router sent to each expert."""

    def add(self, experts: Any, choices: Choices) -> None:
        """Count the tokens of one call of `experts`."""
        for expert in choices.experts.unique().tolist():
            if expert < len(self.tokens):  # transformers marks tokens of other processes by a number beyond the last
                hidden, weights = choices.of_expert(expert)
                norms = torch.linalg.vector_norm(expert_output(experts, expert, hidden).float(), dim=-1)
                self.total[expert] += float((weights.abs().double() * norms.double()).sum())
                self.tokens[expert] += len(hidden)

    @property
    def score(self) -> Float[Tensor, " count"]:
        """The mean over the tokens of each expert; 0 for one that saw none."""
        return self.total / self.tokens.clamp_min(1)


@contextmanager
def contributions(modules: Mapping[str, nn.Module], counts: Mapping[str, int]) -> Iterator[dict[str, Contributions]]:
    """While inside, every forward adds to the contributions of the experts of `modules` (name -> module of all experts)."""
    found = {name: Contributions(counts[name]) for name in modules}

    def hook(name: str) -> Any:
        return lambda module, args, kwargs: found[name].add(module, Choices.of(args, kwargs))

    with hooked(*(m.register_forward_pre_hook(hook(name), with_kwargs=True) for name, m in modules.items())):
        yield found


def layers_of(groups: list[UnitGroup]) -> dict[str, list[UnitGroup]]:
    """Name of the module of all experts -> its groups of units, in the order in which the router counts them."""
    found: dict[str, list[UnitGroup]] = {}
    for group in sorted(groups, key=lambda group: (group.block, group.start)):
        found.setdefault(group.parts[0].parameter.rpartition(".")[0], []).append(group)
    return found


@options
class Reap(Method):
    """Keeps the experts that add most to the tokens they are chosen for: the mean of router weight times output norm.

    Source: Lasby et al., arXiv 2510.13999; it bounds the error that leaving an expert out makes at the tokens
    that chose it. Choose it for `experts`, whose default it is. The router renormalises over the experts that stay.
    Cost: one pass over the text, in which every expert runs twice on its tokens.

    merge: REAM (arXiv 2604.04356): each expert that goes is averaged into one that stays, see merging.py.

    Differs from the authors' code in: 1. where the model itself picks experts from few of several groups (n_group), each
    group keeps the same number.
    """

    kinds: ClassVar[tuple[str, ...]] = ("experts",)
    scope: ClassVar[str] = "per_layer"
    merge: bool = False
    """Average the experts that go into those that stay, instead of dropping them."""
    group_size: PositiveInt = 16
    """Of merge: the experts that one kept expert takes in, at most; the best one takes first."""
    merge_tokens: PositiveInt = 512
    """Of merge: tokens a layer on which outputs and channels of experts are compared."""

    def __post_init__(self) -> None:
        if self.merge and find_spec("scipy") is None:
            raise TopiaristError("merging experts needs scipy: pip install 'topiarist[merge]', or leave merge out")

    @torch.inference_mode()
    def scores(self, task: Task) -> Scores:
        """The mean contribution of every expert; a warning names layers whose experts saw few tokens."""
        layers = layers_of(list(task.groups))
        modules = {name: task.model.get_submodule(name) for name in layers}
        counts = {name: sum(group.count for group in groups) for name, groups in layers.items()}
        batches = task.tokens.split(task.batch_size)
        with contributions(modules, counts) as found, at_rest(task.model):
            for number, batch in enumerate(batches):
                task.progress("looking at experts", number, len(batches))
                task.model(input_ids=batch.to(task.model.device), use_cache=False)
        warn_of_few_tokens(found)
        scores: Scores = {}
        for name, groups in layers.items():
            if not bool(torch.isfinite(found[name].total).all()):
                raise NumericalError(f"NaN or Inf in what {name} puts out: check the model's weights and dtype")
            for group in groups:
                scores[group.key] = found[name].score[group.start : group.start + group.count]
        return scores


def warn_of_few_tokens(found: Mapping[str, Contributions]) -> None:
    """Warn of layers with experts whose mean is of few tokens."""
    thin = []
    for name, layer in found.items():
        few = int((layer.tokens < FEW_TOKENS).sum())
        if few:
            thin.append(f"{name} ({few} of {len(layer.tokens)}, the fewest {int(layer.tokens.min())} tokens)")
    if thin:
        more = f" and {len(thin) - NAMED} more layers" if len(thin) > NAMED else ""
        warnings.warn(
            f"experts that saw fewer than {FEW_TOKENS} calibration tokens, so that their scores are guesses: "
            f"{', '.join(thin[:NAMED])}{more}; add calibration text",
            CalibrationWarning,
            stacklevel=2,
        )
