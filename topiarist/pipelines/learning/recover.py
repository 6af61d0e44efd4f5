"""A short training of the kept weights under a fixed mask, on the language-model loss."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from topiarist.checkpoints.writing import SavedState
from topiarist.core.errors import NumericalError
from topiarist.core.losses import next_token_loss
from topiarist.pipelines.learning.processes import Processes
from topiarist.pipelines.learning.trainer import Batches

STATE_BYTES = 12
"""Of the state on disk, per trained weight: fp32 weights and moments."""
SAVED_AFTER, SHARE = 120.0, 0.05
"""A state is saved after so many seconds, or so many that saving takes no more than this share of them."""


@dataclass(frozen=True, kw_only=True)
class Recover:
    """How long and how fast. 16 bytes a masked weight: fp32 weights, gradients and Adam's moments."""

    steps: int = 50
    sequences: int = 2
    learning_rate: float = 1e-4
    """Peak; falls to zero along a cosine."""


Loss = Callable[[Tensor, Tensor], Tensor]
"""(logits, token ids) -> scalar"""


@dataclass(frozen=True, kw_only=True)
class Descent:
    """A short training: on what text, and where a killed call left its steps, for the same call to end in the same bits."""

    tokens: Tensor
    batch_size: int
    seed: int
    progress: Callable[[str, int, int], None] = lambda *_: None
    processes: Processes = field(default_factory=Processes)
    state: SavedState = field(default_factory=SavedState)

    def run(
        self, settings: Recover, masters: Sequence[nn.Parameter], logits: Callable[[Tensor], Tensor], loss: Loss
    ) -> list[float]:
        """Adam on `masters` along a cosine, for settings.steps steps of settings.sequences. The loss of every step.

        Raises NumericalError for one that is not finite.
        """
        processes, device = self.processes, masters[0].device
        rate, betas = settings.learning_rate, (0.9, 0.95)
        optimizer = torch.optim.AdamW(masters, lr=rate, betas=betas, weight_decay=0.0, fused=True)
        batches = Batches(len(self.tokens), settings.sequences, self.seed + 1)
        size = math.gcd(self.batch_size, settings.sequences)
        losses = self._resume(masters, optimizer)
        saved, pause = time.monotonic(), SAVED_AFTER
        for step in range(len(losses), settings.steps):
            optimizer.param_groups[0]["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / settings.steps))
            rows = batches.rows(step)
            micro = [rows[i : i + size] for i in range(0, len(rows), size)]
            total = torch.zeros((), device=device)
            for index in range(processes.rank, len(micro), processes.size):
                batch = self.tokens[micro[index]].to(device)
                share = loss(logits(batch), batch) / len(micro)
                share.backward()
                total += share.detach()
            processes.add_up(total)
            for master in masters:
                if master.grad is None:
                    master.grad = torch.zeros_like(master)
                processes.add_up(master.grad)
            if not math.isfinite(float(total)):
                raise NumericalError(f"the loss of recovery step {step + 1} is not finite: lower its learning rate")
            torch.nn.utils.clip_grad_norm_(masters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(total))
            self.progress(f"recovery, loss {losses[-1]:.3f}", step + 1, settings.steps)
            if processes.first and step + 1 < settings.steps and time.monotonic() - saved >= pause:
                started = time.monotonic()
                self._save(masters, optimizer, losses)
                saved = time.monotonic()
                pause = max(SAVED_AFTER, (saved - started) / SHARE)
        return losses

    def _save(self, masters: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer, losses: Sequence[float]) -> None:
        tensors = {
            f"{index} {key}": value.detach().cpu().contiguous()
            for index, master in enumerate(masters)
            for key, value in {"weight": master, **optimizer.state[master]}.items()
        }
        self.state.save(tensors, {"losses": json.dumps(losses)})

    @torch.no_grad()
    def _resume(self, masters: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer) -> list[float]:
        """Put the first process's saved state, if it has one, into every process's masters and moments. Its losses."""
        found = self.state.load() if self.processes.first else None
        losses: list[float] = self.processes.once(lambda: json.loads(found[1]["losses"]) if found else [])
        if losses:
            for index, master in enumerate(masters):
                empty = {"exp_avg": master, "exp_avg_sq": master, "step": torch.zeros((), device=master.device)}
                moments = {key: torch.empty_like(like, requires_grad=False) for key, like in empty.items()}
                for key, place in {"weight": master.data, **moments}.items():
                    self.processes.same(place.copy_(found[0][f"{index} {key}"]) if found else place)
                optimizer.state[master] = moments
        return losses


def recover_weights(
    model: nn.Module, masks: Mapping[str, Tensor], settings: Recover, descent: Descent, loss: Loss = next_token_loss
) -> tuple[dict[str, Tensor], list[float]]:
    """New values of the masked weights, by parameter name and in their dtype, and the loss of every step. The model
    itself stays as it is.
    """
    parameters = dict(model.named_parameters())
    device = next(model.parameters()).device
    kept = {name: mask.to(device) for name, mask in masks.items()}
    masters = {name: nn.Parameter(parameters[name].detach().float() * mask) for name, mask in kept.items()}

    def current() -> dict[str, Any]:
        return {name: (master * kept[name]).to(parameters[name].dtype) for name, master in masters.items()}

    def logits(batch: Tensor) -> Tensor:
        return functional_call(model, current(), kwargs={"input_ids": batch, "use_cache": False}).logits

    losses = descent.run(settings, list(masters.values()), logits, loss)
    # +0.0 where pruned: a product with the mask may leave -0.0.
    return {name: value.detach().masked_fill(~kept[name], 0.0) for name, value in current().items()}, losses
