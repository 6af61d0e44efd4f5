"""The training loop of learned masks: batches, steps, evaluation of the hard masks, state. Writes no files.

A step: every layer draws its mask from (seed, layer, step); each micro-batch hands d loss / d(W * M) to the optimiser;
processes add theirs up; one AdamW step on all logits. Batches are a function of (seed, step), so nothing but logits,
moments and the step number is needed to go on.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from topiarist.errors import CalibrationError, NumericalError
from topiarist.masklearn import Annealing, MaskAdamW, Preset, dense, set_draws
from topiarist.pipelines.masking import MaskedModel
from topiarist.pipelines.processes import Processes

CERTAIN, STILL = 0.99, 1e-6
"""The stop rule: mean largest probability above the one, changed weights since the last evaluation below the other."""


class Batches:
    """Rows of a token table in an order that depends on the seed alone: epoch after epoch, each in its own order."""

    def __init__(self, num: int, size: int, seed: int) -> None:
        if num < size:
            raise CalibrationError(f"training text holds {num} sequences, a step needs {size}: add text")
        self.num, self.size, self.seed = num, size, seed
        self._epoch, self._order = -1, torch.empty(0)

    def rows(self, step: int) -> list[int]:
        """The rows of one step."""
        return [self._row(position) for position in range(step * self.size, (step + 1) * self.size)]

    def _row(self, position: int) -> int:
        epoch, place = divmod(position, self.num)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(1_000_003 * self.seed + epoch)
            self._epoch, self._order = epoch, torch.randperm(self.num, generator=generator)
        return int(self._order[place])


class MaskTrainer:
    """One run of learning on a masked model.

    tokens: training sequences (num, length). held_out: sequences that only watch. batch_size: sequences a forward.
    distill: share of the loss that is the divergence from the dense model's own predictions.
    """

    def __init__(
        self,
        masked: MaskedModel,
        tokens: Tensor,
        held_out: Tensor,
        preset: Preset,
        *,
        batch_size: int,
        seed: int = 0,
        distill: float = 0.0,
        processes: Processes | None = None,
    ) -> None:
        self.masked, self.tokens, self.held_out, self.preset = masked, tokens, held_out, preset
        self.seed, self.distill, self.processes = seed, distill, processes or Processes()
        self.batch_size = batch_size
        self.batches = Batches(len(tokens), preset.sequences, seed)
        self.annealing = Annealing(preset.kappa, preset.tau, preset.lam)
        self.optimizer = MaskAdamW(
            masked.layers,
            preset.lr(0, preset.steps),
            betas=preset.betas,
            eps=preset.eps,
            weight_decay=preset.weight_decay,
            max_norm=preset.max_norm,
            second_moment=preset.second_moment,
            seed=seed,
        )
        self.device = masked.source.device
        self.step = 0
        """Steps done."""
        self.history: list[dict[str, Any]] = []
        """One entry an evaluation: step, tokens, soft loss since the last one, hard loss, flips, moved, certainty."""
        self._last_bits = self._bits()
        self._losses: list[tuple[int, Tensor]] = []

    def run_step(self) -> Tensor:
        """One optimiser step on all processes. The mean soft loss, still on its device."""
        preset, step = self.preset, self.step
        rows = self.batches.rows(step)
        micro = [rows[i : i + self.batch_size] for i in range(0, len(rows), self.batch_size)]
        shared = preset.sample == "step"
        self.masked.train()
        self.optimizer.param_groups[0]["lr"] = preset.lr(step, preset.steps)
        total = torch.zeros((), device=self.device)
        for index in range(self.processes.rank, len(micro), self.processes.size):
            sample = {} if shared else {"sample": index, "samples": len(micro)}
            set_draws(self.masked.layers, self.annealing, step, preset.steps, seed=self.seed, **sample)
            loss = self._loss(self.tokens[micro[index]].to(self.device)) / len(micro)
            loss.backward()
            total += loss.detach()
        if self.processes.size > 1:
            self.optimizer.synchronise(self.processes.add_up, one_draw=shared)
            self.processes.add_up(total)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._losses.append((step, total))
        self.step += 1
        return total

    def _loss(self, tokens: Tensor) -> Tensor:
        logits = self._logits(tokens)
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        if self.distill:
            with torch.no_grad(), dense(self.masked.layers):
                teacher = self._logits(tokens).log_softmax(-1).flatten(0, 1)
            apart = F.kl_div(logits.log_softmax(-1).flatten(0, 1), teacher, log_target=True, reduction="batchmean")
            loss = (1.0 - self.distill) * loss + self.distill * apart
        return loss

    def _logits(self, tokens: Tensor) -> Tensor:
        return self.masked.model(input_ids=tokens, use_cache=False).logits[:, :-1].float()

    @torch.no_grad()
    def hard_loss(self) -> float:
        """Mean loss of the hard masks on the held-out sequences."""
        self.masked.train(False)
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for index in range(self.processes.rank, len(self.held_out), self.processes.size):
            tokens = self.held_out[index : index + 1].to(self.device)
            total += F.cross_entropy(self._logits(tokens).flatten(0, 1), tokens[:, 1:].flatten()).double()
        return float(self.processes.add_up(total)) / len(self.held_out)

    def evaluate(self) -> dict[str, Any]:
        """Look at the hard masks and note it in `history`. Raises NumericalError, naming the step, for a broken run."""
        for step, loss in self._losses:
            if not math.isfinite(float(loss)):
                raise NumericalError(f"the loss of step {step + 1} is not finite")
        self.masked.train()
        for target, layer in zip(self.masked.targets, self.masked.layers, strict=True):
            if not bool(torch.isfinite(layer.logits).all()):
                raise NumericalError(f"logits of {target.label} are not finite after step {self.step}")
        soft = [float(loss) for _, loss in self._losses]
        self._losses.clear()
        bits, last = self._bits(), self._last_bits
        self._last_bits = bits
        entry = {
            "step": self.step,
            "tokens": self.step * self.preset.sequences * self.tokens.shape[1],
            "loss": sum(soft) / len(soft) if soft else None,
            "hard_loss": self.hard_loss(),
            "flips": self._changed(bits, self.masked.prior_bits),
            "moved": self._changed(bits, last),
            "certainty": self._certainty(),
        }
        self.history.append(entry)
        return entry

    @property
    def settled(self) -> bool:
        """The stop rule: in the last quarter of the steps the masks are decided and, twice in a row, have not moved.

        Not before: at first no logit has come far enough to change a mask, and a steep tau decides early.
        """
        last = self.history[-2:]
        still = len(last) == 2 and all(entry["moved"] < STILL for entry in last)
        return still and 4 * self.step >= 3 * self.preset.steps and (last[-1]["certainty"] or 0.0) > CERTAIN

    def flips_by_layer(self) -> list[float]:
        return [
            _differing(now, then) / layer.matrix.numel()
            for now, then, layer in zip(self._bits(), self.masked.prior_bits, self.masked.layers, strict=True)
        ]

    def _bits(self) -> list[np.ndarray]:
        """The hard masks at one bit a weight, on the CPU."""
        return [np.packbits(layer.hard_mask().cpu().numpy()) for layer in self.masked.layers]

    def _changed(self, now: Sequence[np.ndarray], then: Sequence[np.ndarray]) -> float:
        """Fraction of the weights whose state differs."""
        weights = sum(layer.matrix.numel() for layer in self.masked.layers)
        return sum(map(_differing, now, then)) / weights

    def _certainty(self) -> float | None:
        """Mean over weights of the largest probability of their group, in the last step's draw."""
        parts = [(layer.statistics().get("certainty"), layer.matrix.numel()) for layer in self.masked.layers]
        if any(certainty is None for certainty, _ in parts):
            return None
        return sum(float(c) * n for c, n in parts if c is not None) / sum(n for _, n in parts)

    def state(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """All that is needed to go on to the same bits: tensors, and metadata as text. Taken after an evaluation."""
        tensors = {}
        for index, (key, tensor) in self._tensors():
            tensors[f"{self.masked.targets[index].name} {key}"] = tensor.detach()
        for target, bits in zip(self.masked.targets, self.masked.prior_bits, strict=True):
            tensors[f"{target.name} prior"] = torch.from_numpy(bits)
        return tensors, {"step": str(self.step), "history": json.dumps(self.history)}

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        """Go on from a state of the same recipe."""
        for index, (key, tensor) in self._tensors():
            tensor.copy_(tensors[f"{self.masked.targets[index].name} {key}"])
        self._last_bits = self._bits()
        self.step, self.history = int(metadata["step"]), json.loads(metadata["history"])

    def share(self) -> None:
        """Every process goes on from the first one's state."""
        if self.processes.size > 1:
            for _, (_, tensor) in self._tensors():
                self.processes.same(tensor.data)
            self.step, self.history = self.processes.once(lambda: (self.step, self.history))
            self._last_bits = self._bits()

    def _tensors(self) -> Iterator[tuple[int, tuple[str, Tensor]]]:
        for index, layer in enumerate(self.masked.layers):
            yield index, ("logits", layer.logits)
            for key, value in self.optimizer.state[layer.logits].items():
                yield index, (key, value)


def _differing(a: np.ndarray, b: np.ndarray) -> int:
    return int(np.bitwise_count(np.bitwise_xor(a, b)).sum(dtype=np.int64))
