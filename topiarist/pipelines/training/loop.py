"""The loop of every training of weights: AdamW on fp32 masters, masks held, the best state kept, resumed to the same bits."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from topiarist.checkpoints.writing import SavedState
from topiarist.core.errors import NumericalError
from topiarist.core.slots import SLOTS, PairwiseSum, added, slots_of
from topiarist.models.quick_attention import quick_attention
from topiarist.pipelines.training.batches import accumulate_gradients
from topiarist.pipelines.training.processes import Processes
from topiarist.pipelines.training.sharded_state import ShardedState
from topiarist.pipelines.training.weights import TrainedWeights

SAVED_AFTER, SHARE = 120.0, 0.05
"""A state is saved after so many seconds, or so many that saving takes no more than this share of them."""
RATE = 1.6e-3
"""Peak learning rate towards a dense model's predictions, if nothing is said: of the weights' typical size."""
MicroBatch = TypeVar("MicroBatch")
Progress = Callable[[str, int, int], None]
"""(what is going on, done, in all)"""


@dataclass
class History:
    """What a training did: the loss of every step, and the held-out losses with the steps after which they were measured."""

    losses: list[float] = field(default_factory=list)
    evaluations: list[tuple[int, float]] = field(default_factory=list)

    @property
    def best(self) -> tuple[int, float]:
        """(steps, loss) of the evaluation with the least held-out loss; the earliest of equals."""
        return min(self.evaluations, key=lambda evaluation: evaluation[1])


@dataclass(frozen=True, kw_only=True)
class FineTuning:
    """How long and how fast weights are trained: AdamW without decay, along a cosine."""

    steps: int
    learning_rate: float
    """Peak."""
    scales: Sequence[float] | None = None
    """Factors of the learning rate, one a parameter; None: 1 for all."""
    final_learning_rate: float = 0.0
    """Fraction of the learning rate that the cosine ends at."""
    warmup: int = 0
    """Steps over which the learning rate climbs to its peak."""
    betas: tuple[float, float] = (0.9, 0.95)
    max_norm: float | None = 1.0
    """The gradient's norm over all parameters is clipped to it."""
    evaluate_every: int = 0
    """Steps between two looks at the held-out loss, where there is one."""
    name: str = "recovery"
    """What progress lines and errors call this training."""
    progress: Progress = lambda *_: None
    processes: Processes = field(default_factory=Processes)
    slot_of: Callable[[Any], int] | None = None
    """The slot of a micro-batch, whose process has the inputs; gradients are then added pairwise over slots. None: all have
    all inputs and take turns, and the order of a sum depends on how many they are."""
    state: SavedState | ShardedState = field(default_factory=SavedState)
    """Of the second kind where every process has rows of the weights: each saves its own."""

    def rate(self, step: int) -> float:
        """Factor of the learning rate at `step`, counted from 0."""
        if step < self.warmup:
            return (step + 1) / (self.warmup + 1)
        fraction = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.final_learning_rate + (1 - self.final_learning_rate) * 0.5 * (1 + math.cos(math.pi * fraction))

    def run(
        self,
        module: nn.Module,
        weights: TrainedWeights,
        micro_batches: Callable[[int], Sequence[MicroBatch]],
        loss: Callable[[MicroBatch], Float[Tensor, ""]],
        held_out: Callable[[], float] | None = None,
    ) -> History:
        """Train `weights`, parameters of `module`, in place.

        micro_batches: of a step. loss: mean over one of them, with the module's weights as they are. held_out: loss that
        chooses among the states before the first step and after every `evaluate_every`; the best one is what the module
        holds at the end, also when an error ends the training. Without it, that is the last.

        Raises NumericalError, naming the step, for a loss, held-out loss or gradient that is not finite.
        """
        run = _Run(self, weights)
        history = run.resume(held_out is not None)
        saved, pause = time.monotonic(), SAVED_AFTER
        with weights.training(module), run.best_at_the_end(held_out), quick_attention():
            if not history.evaluations:
                run.evaluate(0, held_out)
            for step in range(len(history.losses), self.steps):
                history.losses.append(run.step(step, micro_batches(step), loss))
                if step + 1 == self.steps or (self.evaluate_every and (step + 1) % self.evaluate_every == 0):
                    run.evaluate(step + 1, held_out)
                self.progress(f"{self.name}, loss {history.losses[-1]:.3f}", step + 1, self.steps)
                if step + 1 < self.steps and run.saves_now(time.monotonic() - saved >= pause):
                    started = time.monotonic()
                    run.save()
                    saved = time.monotonic()
                    pause = max(SAVED_AFTER, (saved - started) / SHARE)
        if held_out is None:  # no later look would see what the last step did
            run.check_weights()
        return history


class _Run:
    """One run of a FineTuning: optimiser, history and the best state so far."""

    def __init__(self, settings: FineTuning, weights: TrainedWeights) -> None:
        self.settings, self.weights = settings, weights
        self.processes = settings.processes
        self.masters = list(weights.masters.values())
        scales = settings.scales or [1.0] * len(self.masters)
        self.scales = dict(zip(self.masters, scales, strict=True))
        groups = [{"params": [master], "lr": 0.0} for master in self.masters]
        self.optimizer = torch.optim.AdamW(groups, betas=settings.betas, weight_decay=0.0, fused=True)
        self.history = History()
        self.best: Mapping[str, Shaped[Tensor, "..."]] | None = None

    def step(self, step: int, micro_batches: Sequence[Any], loss: Callable[[Any], Tensor]) -> float:
        settings = self.settings
        for group in self.optimizer.param_groups:
            group["lr"] = settings.learning_rate * self.scales[group["params"][0]] * settings.rate(step)
        device = self.masters[0].device
        if settings.slot_of is None:
            total = float(accumulate_gradients(micro_batches, loss, self.processes, device))
            self.weights.finish_gradients(self.processes)
        else:
            total = float(self._by_slots(micro_batches, loss, settings.slot_of))
            self.weights.finish_gradients(Processes())
        norm = 0.0
        if settings.max_norm is not None:
            norm = self._clip(settings.max_norm)
        for what, value in (("loss", total), ("gradient", norm)):
            self._check_finite(math.isfinite(value), f"the {what} of {settings.name} step {step + 1}", trained=step > 0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.weights.write_back()
        return total

    @staticmethod
    def _check_finite(finite: bool, what: str, *, trained: bool) -> None:
        """Raise NumericalError for what is not finite. what: its name. trained: whether a step was taken before."""
        if finite:
            return
        cure = (
            "lower its learning rate, and give the run another output"
            if trained
            else "nothing is trained yet: what the model computes is too large for its dtype, so let it compute in float32"
        )
        raise NumericalError(f"{what} is not finite: {cure}")

    def check_weights(self) -> None:
        """Raise NumericalError unless all weights are finite."""
        finite = all(bool(torch.isfinite(parameter).all()) for parameter in self.weights.parameters.values())
        self._check_finite(finite, f"a weight after the last step of {self.settings.name}", trained=True)

    def _clip(self, most: float) -> float:
        """Scale the gradients so that their norm is `most` at most; what it was."""
        grads = [master.grad for master in self.masters if master.grad is not None]
        norm = self.weights.whole_norm(nn.utils.get_total_norm(grads))
        nn.utils.clip_grads_with_norm_(self.masters, most, norm)
        return float(norm)

    def _by_slots(
        self, micro_batches: Sequence[Any], loss: Callable[[Any], Tensor], slot_of: Callable[[Any], int]
    ) -> Float[Tensor, ""]:
        """Mean loss; its gradients, and it, are sums whose bits are the same for any number of processes."""
        slots: list[list[Any]] = [[] for _ in range(SLOTS)]
        for micro_batch in micro_batches:
            slots[slot_of(micro_batch)].append(micro_batch)
        rank, size = self.processes.rank, self.processes.size
        sums = [PairwiseSum() for _ in range(1 + len(self.masters))]
        for slot in slots_of(rank, size):
            value = None
            for micro_batch in slots[slot]:
                part = loss(micro_batch) / len(micro_batches)
                part.backward()
                value = added(value, part.detach())
            for total, term in zip(sums, [value, *self.weights.take_gradients()], strict=True):
                total.push(term)
        having = [any(slots[slot] for slot in slots_of(other, size)) for other in range(size)]
        like = [torch.zeros((), device=self.masters[0].device), *self.masters]
        total, *grads = self.processes.totals([total.total for total in sums], like, having)
        self.weights.put_gradients(grads)
        assert total is not None
        return total

    def evaluate(self, steps: int, held_out: Callable[[], float] | None) -> None:
        if held_out is None:
            return
        loss = held_out()
        what = f"the held-out loss of {self.settings.name} " + (f"after step {steps}" if steps else "at the start")
        self._check_finite(math.isfinite(loss), what, trained=steps > 0)
        if not self.history.evaluations or loss < self.history.best[1]:
            self.best = self.weights.snapshot()
        self.history.evaluations.append((steps, loss))

    @contextmanager
    def best_at_the_end(self, held_out: Callable[[], float] | None) -> Iterator[None]:
        try:
            yield
        finally:
            if held_out is not None and self.best is not None:
                self.weights.restore(self.best)

    def saves_now(self, due: bool) -> bool:
        """Whether this process saves a state now. due: whether it is time, by its own clock."""
        if isinstance(self.settings.state, ShardedState):  # all do, by the main one's clock
            return self.processes.on_main(lambda: due)
        return due and self.processes.is_main

    def save(self) -> None:
        loop = {"history": json.dumps({"losses": self.history.losses, "evaluations": self.history.evaluations})}
        state = self.settings.state
        if isinstance(state, ShardedState):
            state.save(len(self.history.losses), self._tensors(), loop)
        else:
            state.save({name: tensor.cpu().contiguous() for name, tensor in self._tensors().items()}, loop)

    def _tensors(self) -> dict[str, Tensor]:
        """What this process holds of the masters, their moments and the best state so far."""
        rows = self.weights.rows
        found = {
            f"{name} {key}": rows(value.detach())
            for name, master in self.weights.masters.items()
            for key, value in {"weight": master, **self.optimizer.state[master]}.items()
        }
        return found | {f"{name} best": value for name, value in (self.best or {}).items()}

    @torch.no_grad()
    def resume(self, watched: bool) -> History:
        """Put the saved state, if there is one, into every process. Its history.

        watched: whether there is a held-out loss, and so a best state.
        """
        state = self.settings.state
        if isinstance(state, ShardedState):
            for master in self.masters:
                moments = {key: torch.zeros_like(master, requires_grad=False) for key in ("exp_avg", "exp_avg_sq")}
                self.optimizer.state[master] = {"step": torch.zeros((), device=master.device), **moments}
            self.best = self.weights.snapshot() if watched else None
            loop = state.load(self._tensors())
            if loop is None:
                self.optimizer.state.clear()
                self.best = None
                return self.history
            return self._told(json.loads(loop["history"]))
        found = state.load() if self.processes.is_main else None
        history = self.processes.on_main(lambda: json.loads(found[1]["history"]) if found else None)
        if history is None:
            return self.history
        self._told(history)

        def told(key: str, like: Tensor) -> Tensor:
            value = torch.empty_like(like, requires_grad=False)
            return self.processes.broadcast(value.copy_(found[0][key]) if found else value)

        for name, master in self.weights.masters.items():
            master.data.copy_(told(f"{name} weight", master))
            count = torch.zeros((), device=master.device)
            like = {"step": count, "exp_avg": master, "exp_avg_sq": master}
            self.optimizer.state[master] = {key: told(f"{name} {key}", tensor) for key, tensor in like.items()}
        if self.history.evaluations:
            self.best = {name: told(f"{name} best", p) for name, p in self.weights.parameters.items()}
        self.weights.write_back()
        return self.history

    def _told(self, history: Mapping[str, Any]) -> History:
        self.history.losses = history["losses"]
        self.history.evaluations = [(step, loss) for step, loss in history["evaluations"]]
        return self.history
