"""The training loop of learned masks: batches, steps, evaluation of the hard masks, state. Writes no files.

A step: every layer draws its mask from (seed, layer, step); each micro-batch hands d loss / d(W * M) to the optimiser;
processes add theirs up; one AdamW step on all logits. Batches are a function of (seed, step), so nothing but logits,
moments and the step number is needed to go on.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from topiarist.core.errors import NumericalError
from topiarist.core.losses import divergence, next_token_loss
from topiarist.masklearn import Annealing, MaskAdamW, Preset, eight_bit
from topiarist.pipelines.learning.masking import MaskedModel
from topiarist.pipelines.training.batches import Batches, accumulate_gradients, held_out_mean
from topiarist.pipelines.training.processes import Processes
from topiarist.pipelines.training.text import Sequences

CERTAIN, STILL = 0.99, 1e-6
"""The stop rule: mean largest probability above the one, changed weights since the last evaluation below the other."""


class MaskTrainer:
    """One run of learning on a masked model.

    tokens: training sequences. held_out: sequences (num, length) that only watch. batch_size: sequences a forward.
    distill: share of the loss that is the divergence from the dense model's own predictions.
    """

    def __init__(
        self,
        masked: MaskedModel,
        tokens: Sequences,
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
            moments=torch.uint8 if preset.moments == "8-bit" else torch.bfloat16,
            seed=seed,
            add_up=self._over_shards if masked.sharded else None,
        )
        self.device = masked.device
        self.step = 0
        """Steps done."""
        self.history: list[dict[str, Any]] = []
        """One entry an evaluation: step, tokens, soft loss since the last one, hard loss, flips, moved, certainty."""
        self._last_bits = self._bits()
        self.best_bits = [bits.copy() for bits in self._last_bits]
        """The hard masks of the evaluation with the least loss on held-out sequences, the prior's own among them."""
        self._losses: list[tuple[int, Tensor]] = []

    def run_step(self) -> Float[Tensor, ""]:
        """One optimiser step on all processes. The mean soft loss, still on its device."""
        preset, step = self.preset, self.step
        micro_batches = self.batches.micro_batches(step, self.batch_size)
        shared, split = preset.sample == "step", self.masked.sharded
        self.masked.train()
        self.optimizer.param_groups[0]["lr"] = preset.lr(step, preset.steps)

        def loss(numbered: tuple[int, list[int]]) -> Tensor:
            # Shards draw one mask together, so a micro-batch of theirs is what all processes run at the same time.
            together = self.processes.size if split else 1
            index, samples = numbered[0] // together, len(micro_batches) // together
            sample = {} if shared else {"sample": index, "samples": samples}
            self.masked.set_draws(self.annealing, step, preset.steps, seed=self.seed, **sample)
            return self._loss(self.tokens[numbered[1]].to(self.device))

        total = accumulate_gradients(
            list(enumerate(micro_batches)), loss, self.processes, self.device, after_backward=self.masked.collect
        )
        if self.processes.size > 1 and not split:
            self.optimizer.synchronise(self.processes.all_reduce, one_draw=shared)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._losses.append((step, total))
        self.step += 1
        return total

    def _loss(self, tokens: Tensor) -> Tensor:
        logits = self._logits(tokens)
        loss = next_token_loss(logits, tokens)
        if self.distill:
            with torch.no_grad(), self.masked.dense():
                teacher = self._logits(tokens)
            apart = divergence(logits[:, :-1], teacher[:, :-1])
            loss = (1.0 - self.distill) * loss + self.distill * apart
        return loss

    def _logits(self, tokens: Tensor) -> Tensor:
        return self.masked.model(input_ids=tokens, use_cache=False).logits

    def hard_loss(self) -> float:
        """Mean loss of the hard masks on the held-out sequences."""
        self.masked.train(False)

        def loss(row: int) -> Tensor:
            tokens = self.held_out[row : row + 1].to(self.device)
            return next_token_loss(self._logits(tokens), tokens)

        return held_out_mean(len(self.held_out), loss, self.processes, self.device, in_step=self.masked.sharded)

    def evaluate(self) -> dict[str, Any]:
        """Look at the hard masks and note it in `history`. Raises NumericalError, naming the step, for a broken run."""
        for step, loss in self._losses:
            if not math.isfinite(float(loss)):
                raise NumericalError(f"the loss of step {step + 1} is not finite")
        self.masked.train()
        for target, layer in zip(self.masked.targets, self.masked.layers, strict=True):
            if self._over_shards(float((~torch.isfinite(layer.logits)).sum())):
                raise NumericalError(f"logits of {target.label} are not finite after step {self.step}")
        soft = [float(loss) for _, loss in self._losses]
        self._losses.clear()
        bits, last = self._bits(), self._last_bits
        self._last_bits = bits
        entry = {
            "step": self.step,
            "tokens": self.step * self.preset.sequences * self.held_out.shape[1],
            "loss": sum(soft) / len(soft) if soft else None,
            "hard_loss": self.hard_loss(),
            "flips": self._changed(bits, self.masked.prior_bits),
            "moved": self._changed(bits, last),
            "certainty": self._certainty(),
        }
        if all(entry["hard_loss"] < earlier["hard_loss"] for earlier in self.history):
            for best, now in zip(self.best_bits, bits, strict=True):
                best[:] = now
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
        """Fraction of each layer's weights whose state in the best masks differs from the prior's."""
        return [
            self._over_shards(_differing(now, then)) / self._over_shards(layer.matrix.numel())
            for now, then, layer in zip(self.best_bits, self.masked.prior_bits, self.masked.layers, strict=True)
        ]

    def _bits(self) -> list[np.ndarray]:
        """The hard masks at one bit a weight, on the CPU."""
        return [np.packbits(layer.hard_mask().cpu().numpy(), axis=1) for layer in self.masked.layers]

    def _changed(self, now: Sequence[np.ndarray], then: Sequence[np.ndarray]) -> float:
        """Fraction of the weights whose state differs."""
        weights = sum(layer.matrix.numel() for layer in self.masked.layers)
        return self._over_shards(sum(map(_differing, now, then))) / self._over_shards(weights)

    def _certainty(self) -> float | None:
        """Mean over weights of the largest probability of their group, in the last step's draw.

        Of copies, the first process': draws differ, and the processes decide by it when to stop.
        """

        def own() -> tuple[float, int] | None:
            parts = [(layer.statistics().get("certainty"), layer.matrix.numel()) for layer in self.masked.layers]
            if any(certainty is None for certainty, _ in parts):
                return None
            return sum(float(c) * n for c, n in parts if c is not None), sum(n for _, n in parts)

        found = own() if self.masked.sharded else self.processes.on_main(own)
        return None if found is None else self._over_shards(found[0]) / self._over_shards(found[1])

    def _over_shards(self, value: float) -> float:
        """The sum over all processes of what each has counted in its rows; the value itself where there are no shards."""
        if not self.masked.sharded:
            return value
        return float(self.processes.all_reduce(torch.tensor(float(value), dtype=torch.float64, device=self.device)))

    def tensors(self) -> dict[str, Tensor]:
        """Logits, moments, counts and the best masks so far, by parameter name: with `progress`, all that is needed to go
        on to the same bits. They share memory with the trainer's own.
        """
        found = {}
        for target, layer, best in zip(self.masked.targets, self.masked.layers, self.best_bits, strict=True):
            parts = {"logits": layer.logits, "best": torch.from_numpy(best)}
            for key, state in self.optimizer.state[layer.logits].items():
                parts |= eight_bit.parts(key, state)
            found.update({f"{target.name} {key}": tensor.detach() for key, tensor in parts.items()})
        return found

    def progress(self) -> dict[str, str]:
        """The steps done and the history, as text that a saved state can hold."""
        return {"step": str(self.step), "history": json.dumps(self.history)}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor], progress: Mapping[str, str]) -> None:
        """Go on from a state of the same recipe."""
        for key, tensor in self.tensors().items():
            tensor.copy_(tensors[key])
        self.go_on(progress)

    def go_on(self, progress: Mapping[str, str]) -> None:
        """Once the tensors are those of a state."""
        self._last_bits = self._bits()
        self.step, self.history = int(progress["step"]), json.loads(progress["history"])

    def share(self) -> None:
        """Every process goes on from the first one's state."""
        if self.processes.size > 1:
            for tensor in self.tensors().values():
                self.processes.broadcast(tensor)
            self.go_on(self.processes.on_main(self.progress))


def _differing(a: np.ndarray, b: np.ndarray) -> int:
    return int(np.bitwise_count(np.bitwise_xor(a, b)).sum(dtype=np.int64))
