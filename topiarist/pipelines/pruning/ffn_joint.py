"""The feed-forward network of one block, pruned as a whole: the rounds of SparseLLM over a stream of tokens.

W  weights as (out, in)      X, Y  inputs and wanted outputs of the network (tokens, width)
A  pre-activations (tokens, rows of the first matrices), gate above up      p  activations (tokens, hidden)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from topiarist.core.errors import NumericalError, NumericalWarning
from topiarist.core.gram import Gram
from topiarist.core.registry import name_of
from topiarist.models.families import Matrix
from topiarist.pipelines.common.hidden_states import HiddenStates
from topiarist.pipelines.pruning.network import CHUNK, Network, Weights, flat
from topiarist.pipelines.pruning.sparsellm import SparseLLM
from topiarist.results.report import JointBlock
from topiarist.solvers import SOLVERS, Solution
from topiarist.solvers.auxiliary import (
    output_step,
    refit,
    update_gate,
    update_linear,
    update_output,
    update_relu,
)

Solve = Callable[[Sequence[Matrix], Sequence[Tensor], Gram], list[Solution]]
"""Prune these weights of these matrices, which share one input, by the local solver."""


@dataclass(frozen=True)
class Candidate:
    """Pruned weights, rounded as they will be stored, and the network's relative error with them."""

    first: list[Solution]
    down: Solution
    weights: Weights
    error: float


class JointSolver:
    """Rounds of: refit to the auxiliaries, prune, move the auxiliaries. Nothing of the model changes here."""

    def __init__(
        self,
        settings: SparseLLM,
        network: Network,
        X: Float[Tensor, "num window in"],
        Y: Float[Tensor, "num window out"],
        solve: Solve,
        new_states: Callable[[int], HiddenStates],
    ) -> None:
        """new_states: room for fp32 auxiliaries of some width, in memory or in a file."""
        self.settings, self.network, self._solve, self._new_states = settings, network, solve, new_states
        held = round(settings.held_out * len(X))
        held = max(1, held) if settings.held_out > 0 and len(X) > 1 else 0
        self._fitting, self._choosing = slice(0, len(X) - held), slice(len(X) - held, None) if held else slice(None)
        self.X, self.Y = X, Y
        self.dense = network.weights
        self.device = self.dense.down.device
        self.bias_first, self.bias_down = network.biases
        self._A: HiddenStates | None = None
        self.gram_X, self.gram_p = self._grams()

    def run(self, name: str, warn: Callable[[str, type[Warning]], None]) -> tuple[list[Solution], JointBlock]:
        """The chosen solutions in the order of `network.matrices`, and the error after every step."""
        settings = self.settings
        plain = self._plain()
        tried = {"local": plain}
        current: Candidate | None = plain
        for epoch in range(1, settings.epochs + 1):
            if current is None:
                break
            sums = self._move(current.weights, keep=epoch < settings.epochs)
            build = partial(self._refitted, *sums)
            current = self._attempt(build, settings.ridge, f"{name}: epoch {epoch}", warn)
            if current is not None:
                tried[f"epoch {epoch}"] = current
        if settings.down_refit:
            build = partial(self._with_down_refit, self._best(tried)[1].first)
            refitted = self._attempt(build, settings.down_ridge, f"{name}: down_refit", warn)
            if refitted is not None:
                tried["down_refit"] = refitted
        best, chosen = self._best(tried)
        errors = {step: candidate.error for step, candidate in tried.items()}
        return [*chosen.first, chosen.down], JointBlock(name, errors, best)

    def _best(self, tried: dict[str, Candidate]) -> tuple[str, Candidate]:
        if not self.settings.keep_best:
            return list(tried.items())[-1]
        return min(tried.items(), key=lambda step: step[1].error)

    def _attempt(
        self,
        build: Callable[[float], Candidate],
        ridge: float,
        what: str,
        warn: Callable[[str, type[Warning]], None],
    ) -> Candidate | None:
        """A candidate with the ridge that was asked for, or ten times that; None, with a warning, if neither is finite."""
        try:
            return build(ridge)
        except NumericalError as first:
            ridge = 10 * (ridge or 1e-6)
            try:
                candidate = build(ridge)
            except NumericalError as second:
                local = name_of(SOLVERS, self.settings.local)
                message = (
                    f"{what} failed, with a ridge of {ridge:g} too ({second}); kept what came before, {local} at worst"
                )
                warn(message, NumericalWarning)
                return None
            warn(f"{what} failed ({first}); a ridge of {ridge:g} helped", NumericalWarning)
            return candidate

    def _plain(self) -> Candidate:
        """What the local solver alone gives."""
        return self._candidate(self._first(self.dense.first, self.gram_X), self._down(self.dense.down, self.gram_p))

    def _refitted(self, C_A: Tensor, C_Y: Tensor, gram_p: Gram, ridge: float) -> Candidate:
        """Weights refitted to the auxiliaries, then pruned."""
        first = self._first(*self._refit(self.gram_X, C_A, self.dense.first, ridge))
        return self._candidate(first, self._down(*self._refit(gram_p, C_Y, self.dense.down, ridge)))

    def _with_down_refit(self, first: list[Solution], ridge: float) -> Candidate:
        """The last matrix refitted to Y on the activations of the pruned first ones, then pruned."""
        gram, C_Y = Gram(self.dense.down.shape[1], device=self.device), torch.zeros_like(self.dense.down)
        pruned = _stacked(first)
        for x, y in self._chunks(self._fitting):
            p = self.network.activate(x @ pruned.T + self.bias_first)
            gram.add(p)
            C_Y.addmm_((y - self.bias_down).T, p)
        return self._candidate(first, self._down(*self._refit(gram, C_Y, self.dense.down, ridge)))

    def _refit(self, gram: Gram, C: Tensor, dense: Tensor, ridge: float) -> tuple[Tensor, Gram]:
        """A refitted weight, and the Gram that says what leaving it costs: the ridge is part of both."""
        share = ridge * gram.in_features / gram.tokens
        H = gram.matrix
        weight = refit(H, C, dense, share)
        H.diagonal().mul_(1 + share)
        return weight, Gram.from_matrix(H, tokens=gram.tokens)

    def _first(self, weights: Tensor, gram: Gram) -> list[Solution]:
        rows = [matrix.shape[0] for matrix in self.network.first]
        return self._pruned(self.network.first, weights.split(rows), gram)

    def _down(self, weight: Tensor, gram: Gram) -> Solution:
        return self._pruned([self.network.down], [weight], gram)[0]

    def _pruned(self, matrices: Sequence[Matrix], weights: Sequence[Tensor], gram: Gram) -> list[Solution]:
        """Pruned by the local solver, in the dtype of the checkpoint, and finite in it."""
        found = []
        for solution in self._solve(matrices, weights, gram):
            weight = solution.weight.to(matrices[0].tensor.dtype).masked_fill(~solution.mask, 0.0)
            if not torch.isfinite(weight).all():
                raise NumericalError(f"a pruned weight does not fit in {weight.dtype}")
            found.append(Solution(weight, solution.mask, solution.error))
        return found

    def _candidate(self, first: list[Solution], down: Solution) -> Candidate:
        weights = Weights(_stacked(first), down.weight.float())
        return Candidate(first, down, weights, self._error(weights))

    def _error(self, weights: Weights) -> float:
        """Relative squared error of the network's output on the windows that choose."""
        wrong = torch.zeros((), dtype=torch.float64, device=self.device)
        energy = torch.zeros_like(wrong)
        for x, y in self._chunks(self._choosing):
            wrong += (self.network(x, weights) - y).square().sum(dtype=torch.float64)
            energy += y.square().sum(dtype=torch.float64)
        error = float(wrong / energy.clamp_min(1e-300))
        if error != error or error == float("inf"):
            raise NumericalError("the error of the pruned network is not finite")
        return error

    def _grams(self) -> tuple[Gram, Gram]:
        """Of the network's inputs, and of its dense activations."""
        gram_X, gram_p = (Gram(w.shape[1], device=self.device) for w in self.dense)
        for x, _ in self._chunks(self._fitting):
            gram_X.add(x)
            gram_p.add(self.network.activate(x @ self.dense.first.T + self.bias_first))
        return gram_X, gram_p

    def _move(self, weights: Weights, *, keep: bool) -> tuple[Tensor, Tensor, Gram]:
        """One round of auxiliary updates: p, then z, then s. Returns C of the first matrices, and C and the Gram of p.

        keep: another round will start from these auxiliaries.
        """
        settings, network = self.settings, self.network
        alpha, gamma = settings.alpha, settings.gamma
        C_A, C_Y = torch.zeros_like(self.dense.first), torch.zeros_like(self.dense.down)
        gram_p = Gram(self.dense.down.shape[1], device=self.device)
        step = output_step(weights.down, gamma / settings.beta)
        previous = self._auxiliaries()
        if keep and previous is None:
            self._A = self._new_states(self.dense.first.shape[0])
        kept = self._auxiliaries() if keep else None
        for number, (x, y) in enumerate(self._chunks(self._fitting)):
            rows = slice(number * CHUNK, number * CHUNK + len(x))
            A = x @ self.dense.first.T + self.bias_first if previous is None else previous[rows].to(self.device)
            s, z = network.split(A)
            m_s, m_z = network.split(x @ weights.first.T + self.bias_first)
            y = y - self.bias_down
            p = update_output(network.activation(s) * z, y, weights.down, step)
            if isinstance(z, Tensor) and isinstance(m_z, Tensor):
                z = update_linear(m_z, network.activation(s), p, alpha, gamma)
            if not network.gated and isinstance(network.activation, nn.ReLU):
                s = update_relu(m_s, p, alpha, gamma)
            else:
                s = update_gate(
                    s, m_s, z, p, network.activation, alpha, gamma, steps=settings.gate_steps, rate=settings.gate_rate
                )
            A = torch.cat([s, z], dim=1) if isinstance(z, Tensor) else s
            if kept is not None:
                kept[rows] = A.cpu()
            C_A.addmm_((A - self.bias_first).T, x)
            gram_p.add(p)
            C_Y.addmm_(y.T, p)
        return C_A, C_Y, gram_p

    def _auxiliaries(self) -> Tensor | None:
        """The stored A of the fitting tokens; None before the first round, when it is what the dense matrices give."""
        return None if self._A is None else flat(self._A.values[self._fitting])

    def _chunks(self, windows: slice) -> Iterator[tuple[Tensor, Tensor]]:
        """(x, y) in fp32 on the device, some tokens at a time."""
        for x, y in zip(flat(self.X[windows]).split(CHUNK), flat(self.Y[windows]).split(CHUNK), strict=True):
            yield x.to(self.device).float(), y.to(self.device)


def _stacked(solutions: Sequence[Solution]) -> Tensor:
    return torch.cat([solution.weight.float() for solution in solutions])
