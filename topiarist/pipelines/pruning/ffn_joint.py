"""The feed-forward network of one block, pruned as a whole: the rounds of SparseLLM over a stream of tokens.

Several processes divide the tokens, and solve for the first matrices and the last at the same time; all sums are by slots.

W  weights as (out, in)      X, Y  inputs and wanted outputs of the network (tokens, width)
A  pre-activations (tokens, rows of the first matrices), gate above up      p  activations (tokens, hidden)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from topiarist.core.errors import NumericalError, NumericalWarning
from topiarist.core.gram import Gram
from topiarist.core.linalg import reconstruction_error
from topiarist.core.registry import name_of
from topiarist.pipelines.common.grams import GramCollector, GramGroup
from topiarist.pipelines.common.hidden_states import HiddenStates
from topiarist.pipelines.common.slot_sums import ProductSum, WindowShare
from topiarist.pipelines.pruning.network import CHUNK, Network, Weights, flat
from topiarist.pipelines.pruning.sparsellm import SparseLLM
from topiarist.pipelines.training.batches import held_out_count
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

Solve = Callable[[Sequence[GramGroup]], Iterable[tuple[GramGroup, list[Solution]]]]
"""Prune the weights asked of every group by the local solver, each in its owner; the solutions are everyone's."""


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
        share: WindowShare | None = None,
    ) -> None:
        """X, Y: of this process' windows. new_states: room for fp32 auxiliaries of some width, in memory or in a file.
        share: which of the run's windows these are; None: all.
        """
        self.settings, self.network, self._solve, self._new_states = settings, network, solve, new_states
        share = share or WindowShare.whole(len(X))
        held = held_out_count(settings.held_out, share.num)
        fitting = range(share.num - held)
        self.processes = share.processes
        self._fitting, self._having = share.rows(fitting), share.having(fitting)
        self._choosing = share.rows(range(share.num - held, share.num) if held else fitting)
        self.X, self.Y = X, Y
        self.dense = network.weights
        self.device = self.dense.down.device
        self.bias_first, self.bias_down = network.biases
        self._A: HiddenStates | None = None
        self.groups = self._grams()
        """Of the network's inputs, and of its dense activations."""

    def run(self, name: str, warn: Callable[[str, type[Warning]], None]) -> tuple[list[Solution], JointBlock]:
        """The chosen solutions in the order of `network.matrices`, and the error after every step."""
        settings = self.settings
        plain = self._plain()
        tried = {"local": plain}
        current: Candidate | None = plain
        for epoch in range(1, settings.epochs + 1):
            if current is None:
                break
            build = partial(self._refitted, *self._move(current.weights, keep=epoch < settings.epochs))
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
        first, down = self.groups
        asked = [replace(first, asked=self._by_matrix(self.dense.first)), replace(down, asked=[self.dense.down])]
        *solved, last = self._pruned(asked)
        return self._candidate(solved, last)

    def _refitted(self, C_A: Tensor | None, C_Y: Tensor | None, down: GramGroup, ridge: float) -> Candidate:
        """Weights refitted to the auxiliaries, then pruned."""
        pieces = [(self.groups[0], C_A, self.dense.first), (down, C_Y, self.dense.down)]
        *first, last = self._pruned(self._refit(pieces, ridge))
        return self._candidate(first, last)

    def _with_down_refit(self, first: list[Solution], ridge: float) -> Candidate:
        """The last matrix refitted to Y on the activations of the pruned first ones, then pruned."""
        collector, C_Y = GramCollector([self.network.down]), ProductSum(self.dense.down)
        pruned = _stacked(first)
        for rows in self._fitting:
            for x, y in self._chunks(rows):
                p = self.network.activate(x @ pruned.T + self.bias_first)
                collector.on_input(self.network.down, p)
                C_Y.add(y - self.bias_down, p)
                collector.end_of_forward()
            collector.end_of_slot()
            C_Y.end_of_slot()
        group, total = self._of_all(collector, C_Y)
        return self._candidate(first, *self._pruned(self._refit([(group, total, self.dense.down)], ridge)))

    def _of_all(self, collector: GramCollector, C_Y: ProductSum) -> tuple[GramGroup, Tensor | None]:
        """The Gram of the last matrix' inputs and C, over the tokens of all processes, in the one that solves for it."""
        owner = self.groups[1].owner
        [group] = collector.of_all(self.processes, owner)
        return group, C_Y.of_all(self.processes, owner, self._having)

    def _refit(self, pieces: Sequence[tuple[GramGroup, Tensor | None, Tensor]], ridge: float) -> list[GramGroup]:
        """Groups that ask for weights refitted to C, on the Grams that say what leaving those costs.

        The ridge is part of both. pieces: (group, C, dense weights); owners work at the same time. Raises NumericalError in
        all processes if one of them does.
        """
        found: list[GramGroup] = []
        failed: list[NumericalError | None] = []
        for group, C, dense in pieces:
            failure = None
            if group.owner == self.processes.rank and not any(failed):
                assert C is not None
                try:
                    group = self._refit_one(group, C, dense, ridge)
                except NumericalError as error:
                    failure = error
            found.append(group)
            failed.append(failure)
        for group, failure in zip(found, failed, strict=True):
            self.processes.share(failure, group.owner)
        return found

    def _refit_one(self, group: GramGroup, C: Tensor, dense: Tensor, ridge: float) -> GramGroup:
        gram = group.gram
        share = ridge * gram.in_features / gram.tokens
        H = gram.matrix
        weight = refit(H, C, dense, share)
        H.diagonal().mul_(1 + share)
        asked = [weight] if group.matrices == [self.network.down] else self._by_matrix(weight)
        return replace(group, gram=Gram.from_matrix(H, tokens=gram.tokens), asked=asked)

    def _by_matrix(self, first: Tensor) -> list[Tensor]:
        return list(first.split([matrix.shape[0] for matrix in self.network.first]))

    def _pruned(self, groups: Sequence[GramGroup]) -> list[Solution]:
        """Pruned by the local solver, in the dtype of the checkpoint, and finite in it."""
        found = []
        for group, solutions in self._solve(groups):
            for solution in solutions:
                weight = solution.weight.to(group.matrices[0].tensor.dtype).masked_fill(~solution.mask, 0.0)
                if not torch.isfinite(weight).all():
                    raise NumericalError(f"a pruned weight does not fit in {weight.dtype}")
                found.append(Solution(weight, solution.mask, solution.error))
        return found

    def errors(self, solutions: Sequence[Solution]) -> list[float]:
        """The error of every matrix against the dense weight, which the local solver need not have been given."""
        found: list[float] = []
        for group in self.groups:
            of_group = solutions[len(found) : len(found) + len(group.matrices)]
            told: list[float] = []
            if group.owner == self.processes.rank:
                pairs = zip(group.matrices, of_group, strict=True)
                told = [reconstruction_error(m.weight, s.weight, group.gram) for m, s in pairs]
            found += self.processes.share(told, group.owner)
        return found

    def _candidate(self, first: list[Solution], down: Solution) -> Candidate:
        weights = Weights(_stacked(first), down.weight.float())
        return Candidate(first, down, weights, self._error(weights))

    def _error(self, weights: Weights) -> float:
        """Relative squared error of the network's output on the windows that choose."""
        own: list[tuple[float, float]] = []
        for rows in self._choosing:
            wrong = torch.zeros((), dtype=torch.float64, device=self.device)
            energy = torch.zeros_like(wrong)
            for x, y in self._chunks(rows):
                wrong += (self.network(x, weights) - y).square().sum(dtype=torch.float64)
                energy += y.square().sum(dtype=torch.float64)
            own.append((float(wrong), float(energy)))
        by_slot = [slot for its in self.processes.gather(own) for slot in its]
        error = sum(wrong for wrong, _ in by_slot) / max(sum(energy for _, energy in by_slot), 1e-300)
        if error != error or error == float("inf"):
            raise NumericalError("the error of the pruned network is not finite")
        return error

    def _grams(self) -> list[GramGroup]:
        collector = GramCollector(self.network.matrices)
        for rows in self._fitting:
            for x, _ in self._chunks(rows):
                for matrix in self.network.first:
                    collector.on_input(matrix, x)
                collector.on_input(self.network.down, self.network.activate(x @ self.dense.first.T + self.bias_first))
                collector.end_of_forward()
            collector.end_of_slot()
        return collector.of_all(self.processes)

    def _move(self, weights: Weights, *, keep: bool) -> tuple[Tensor | None, Tensor | None, GramGroup]:
        """One round of auxiliary updates: p, then z, then s. Returns C of the first matrices, and C and the Gram of p.

        keep: another round will start from these auxiliaries.
        """
        network, down = self.network, self.network.down
        C_A, C_Y, collector = ProductSum(self.dense.first), ProductSum(self.dense.down), GramCollector([down])
        step = output_step(weights.down, self.settings.gamma / self.settings.beta)
        begun = self._A is not None
        if keep and self._A is None:
            self._A = self._new_states(self.dense.first.shape[0])
        for rows in self._fitting:
            stored = None if self._A is None else flat(self._A.values[rows])
            for number, (x, y) in enumerate(self._chunks(rows)):
                place, y = slice(number * CHUNK, number * CHUNK + len(x)), y - self.bias_down
                known = stored[place].to(self.device) if begun and stored is not None else None
                A = x @ self.dense.first.T + self.bias_first if known is None else known
                p, A = self._updated(network.split(A), x, y, weights, step)
                if keep and stored is not None:
                    stored[place] = A.cpu()
                C_A.add(A - self.bias_first, x)
                collector.on_input(down, p)
                C_Y.add(y, p)
                collector.end_of_forward()
            for sums in (C_A, C_Y, collector):
                sums.end_of_slot()
        group, total = self._of_all(collector, C_Y)
        return C_A.of_all(self.processes, self.groups[0].owner, self._having), total, group

    def _updated(
        self, auxiliaries: tuple[Tensor, Tensor | float], x: Tensor, y: Tensor, weights: Weights, step: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(p, A) after an update of p, z and s for some tokens. auxiliaries: (s, z) before."""
        settings, network = self.settings, self.network
        alpha, gamma = settings.alpha, settings.gamma
        s, z = auxiliaries
        m_s, m_z = network.split(x @ weights.first.T + self.bias_first)
        p = update_output(network.activation(s) * z, y, weights.down, step)
        if isinstance(z, Tensor) and isinstance(m_z, Tensor):
            z = update_linear(m_z, network.activation(s), p, alpha, gamma)
        if not network.gated and isinstance(network.activation, nn.ReLU):
            s = update_relu(m_s, p, alpha, gamma)
        else:
            s = update_gate(
                s, m_s, z, p, network.activation, alpha, gamma, steps=settings.gate_steps, rate=settings.gate_rate
            )
        return p, torch.cat([s, z], dim=1) if isinstance(z, Tensor) else s

    def _chunks(self, windows: slice) -> Iterator[tuple[Tensor, Tensor]]:
        """(x, y) in fp32 on the device, some tokens at a time."""
        if windows.start == windows.stop:
            return
        for x, y in zip(flat(self.X[windows]).split(CHUNK), flat(self.Y[windows]).split(CHUNK), strict=True):
            yield x.to(self.device).float(), y.to(self.device)


def _stacked(solutions: Sequence[Solution]) -> Tensor:
    return torch.cat([solution.weight.float() for solution in solutions])
