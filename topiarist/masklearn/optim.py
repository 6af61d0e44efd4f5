"""AdamW on logits, with the mask's backward pass folded into the step, and lean states.

Layers hand over d loss / d(W * M), one value per weight, in place of the logits' gradient; the step turns it into dpi
and applies it at once, so a gradient of the logits (1.5 values per weight at 2:4) exists for one row at a time only.

Resident bytes per weight at 2:4 over a bf16 weight (2 bytes), 1.5 logits a weight:
    default   logits fp32 6, moments bf16 3 + 3                                            14
    lean      logits bf16 3, first moment bf16 3, one fp32 second moment a group 1          9
    8-bit     moments 1.5 + 1.5, or 1.5 + 1 when lean (eight_bit.py)                        11, lean 7.5
Everything in bf16 is written with stochastic rounding, so small updates count in expectation; plain rounding would lose
them (at |pi| = 0.25 one bf16 step is 1e-3 to 2e-3, an update less).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from topiarist.masklearn import eight_bit, kernels, native, noise
from topiarist.masklearn.adamw import Step, adamw_, native_adam
from topiarist.masklearn.layer import LearnedMask
from topiarist.masklearn.relaxation import Draw

SHARE = {"logit": 0, "group": 1, "row": 2}


class MaskAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter 2019) on the logits of `layers`: betas (0.9, 0.95), decay 0.1 (paper, section 1.6).

    second_moment  "logit": Adam itself. "group", "row": one second moment (the mean square) for all logits of a group
                   or of a weight row. Adam moves every logit by about lr whatever its gradient; with a shared moment a
                   logit that matters less to the loss moves less, and the state is smaller.
    moments        torch.bfloat16 with stochastic rounding, torch.float32, or torch.uint8: torchao's eight-bit codes, which
                   the fused C++ step does not know, so a step on the CPU takes plain torch's time.
    max_norm       clip the gradient's norm over all layers; costs one more pass over the masks.
    add_up         sums a squared norm over processes that hold different rows of the layers.

    Works with any learning-rate scheduler. If gradients sit in `logits.grad` (set by other code), it steps on those.
    """

    def __init__(
        self,
        layers: Iterable[LearnedMask],
        lr: float = 5e-4,
        *,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        max_norm: float | None = None,
        second_moment: str = "logit",
        moments: torch.dtype = torch.bfloat16,
        seed: int = 0,
        add_up: Callable[[float], float] | None = None,
    ) -> None:
        if second_moment not in SHARE:
            raise ValueError(f"second_moment is one of {', '.join(SHARE)}, got {second_moment!r}")
        if moments not in (torch.bfloat16, torch.float32, torch.uint8):
            raise ValueError(f"moments are kept in bfloat16, float32 or uint8, got {moments}")
        self.layers = list(layers)
        self.share, self.moments, self.max_norm, self.seed = SHARE[second_moment], moments, max_norm, seed
        self.add_up = add_up
        self.grad_norm: float | Tensor | None = None
        """Norm of the last step's gradient before clipping; None while max_norm is None."""
        super().__init__(
            [layer.logits for layer in self.layers],
            dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay),
        )
        self._pending: dict[int, tuple[Tensor, Draw]] = {}
        for position, layer in enumerate(self.layers):
            layer.sink = lambda grad, draw, position=position: self._take(position, grad, draw)
            self.state[layer.logits] = self._new_state(layer)

    def _new_state(self, layer: LearnedMask) -> dict[str, Tensor]:
        logits = layer.logits
        out, _, groups = logits.shape
        shape = [logits.shape, (out, groups), (out,)][self.share]

        def zeros(shape: Sequence[int], dtype: torch.dtype, *, signed: bool) -> Tensor:
            if dtype == torch.uint8:
                return eight_bit.zeros(shape, signed=signed, device=logits.device)
            return torch.zeros(shape, dtype=dtype, device=logits.device)

        return {
            "step": torch.zeros((), dtype=torch.int64),
            "m": zeros(logits.shape, self.moments, signed=True),
            "v": zeros(shape, torch.float32 if self.share else self.moments, signed=False),
        }

    def _take(self, position: int, grad: Tensor, draw: Draw) -> None:
        """The sink of one layer: micro-batches of one draw add up; a new draw turns the old one into logits.grad."""
        grad = grad.detach()
        if position in self._pending:
            held, held_draw = self._pending[position]
            if held_draw == draw:
                grad = held.float() + grad  # what autograd handed over may be an expanded view, or another's too
            else:
                self._flush(position)
        self._pending[position] = grad, draw

    def _flush(self, position: int) -> None:
        grad, draw = self._pending.pop(position)
        layer = self.layers[position]
        dpi = kernels.gradient(layer.relaxation, layer.matrix, layer.logits.detach(), grad, draw)
        held = layer.logits.grad
        layer.logits.grad = dpi.to(layer.logits.dtype) if held is None else held.add_(dpi)

    def pending(self) -> list[Tensor]:
        """What the layers handed over since the last step, in layer order."""
        return [self._pending[position][0] for position in sorted(self._pending)]

    @torch.no_grad()
    def synchronise(self, reduce: Callable[[Tensor], object], *, one_draw: bool) -> None:
        """Give every layer's gradient to `reduce`, which adds it up over processes in place; layer order, fp32.

        one_draw: all processes drew the same mask, so d loss / d(W * M) may be added before it becomes a gradient of
        the logits: two thirds of the traffic at 2:4.
        """
        for position, layer in enumerate(self.layers):
            held = self._pending.get(position)
            if held is None and layer.logits.grad is None:  # this process's tokens never reached the layer
                draw = layer.current_draw
                assert draw is not None
                held = self._pending[position] = torch.zeros_like(layer.matrix), draw
            if held is not None and (layer.logits.grad is not None or not one_draw):
                self._flush(position)
            if position in self._pending:
                grad, draw = self._pending[position]
                total = grad.float()
                self._pending[position] = total, draw
            else:
                total = layer.logits.grad
            assert total is not None
            reduce(total)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients of the logits, and those that layers handed over since the last step."""
        self._pending.clear()
        super().zero_grad(set_to_none)

    @torch.no_grad()
    def step(self, closure=None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step on every layer that has a gradient, then drop the gradients handed over by layers."""
        if closure is not None:
            raise ValueError("MaskAdamW takes no closure")
        for position in list(self._pending):
            if self.layers[position].logits.grad is not None:  # some of this step's draws are there already
                self._flush(position)
        scale = self._clip()
        group = self.param_groups[0]
        for position, layer in enumerate(self.layers):
            if position not in self._pending and layer.logits.grad is None:
                continue
            state = self.state[layer.logits]
            state["step"] += 1
            count = int(state["step"])  # a CPU tensor: no wait for a device
            step = Step(
                lr=float(group["lr"]), beta1=group["betas"][0], beta2=group["betas"][1], eps=group["eps"],
                weight_decay=group["weight_decay"], count=count, share=self.share,
                moment_key=noise.noise_key(self.seed, layer.index, count, 0, noise.ROUNDING),
                logit_key=noise.noise_key(self.seed, layer.index, count, 1, noise.ROUNDING),
            )  # fmt: skip
            self._update(position, state, step, scale)
        self._pending.clear()

    def _clip(self) -> float | Tensor:
        """The factor that brings the gradient's norm down to max_norm."""
        if self.max_norm is None:
            return 1.0
        squares: float | Tensor = sum(self._squared_norm(position) for position in range(len(self.layers)))
        if self.add_up is not None:
            squares = self.add_up(float(squares))
        norm = self.grad_norm = squares**0.5
        if isinstance(norm, Tensor):
            return (self.max_norm / (norm + 1e-6)).clamp(max=1.0)
        return min(1.0, self.max_norm / (norm + 1e-6))

    def _squared_norm(self, position: int) -> float | Tensor:
        layer = self.layers[position]
        if position not in self._pending:
            grad = layer.logits.grad
            return 0.0 if grad is None else grad.float().square().sum()
        grad, draw = self._pending[position]
        if kernels.native_fits(layer.relaxation, layer.matrix, layer.logits, grad):
            mask = kernels.native_mask(layer.relaxation, layer.matrix, layer.logits, draw, push=True)
            return native.backward(mask, kernels.native_grad(grad), squares=True)
        return kernels.gradient(layer.relaxation, layer.matrix, layer.logits, grad, draw).square().sum()

    def _update(self, position: int, state: dict[str, Tensor], step: Step, scale: float | Tensor) -> None:
        layer = self.layers[position]
        logits, m, v = layer.logits, state["m"], state["v"]
        if position in self._pending:
            grad, draw = self._pending[position]
            grad = grad.contiguous()
            fused = kernels.native_fits(layer.relaxation, layer.matrix, layer.logits, grad)
            if fused and not eight_bit.quantised(m):
                mask = kernels.native_mask(layer.relaxation, layer.matrix, logits, draw, push=True)
                native.backward(mask, native_adam(step, scale, m, v, grad_effective=grad))
                return
            grad = kernels.gradient(layer.relaxation, layer.matrix, logits, grad, draw)
        else:
            grad = logits.grad.float()  # pyright: ignore[reportOptionalMemberAccess]
        adamw_(logits, grad.mul_(scale), m, v, step, first_row=layer.first_row, first_group=layer.first_group)

    def load_state_dict(self, state_dict: dict) -> None:
        """Bit for bit: torch's own would cast the moments to the dtype of the logits."""
        super().load_state_dict(state_dict)
        for position, layer in enumerate(self.layers):
            fresh = self.state[layer.logits] = self._new_state(layer)
            for name, saved in state_dict["state"][position].items():
                fresh[name].copy_(saved.detach())


def resident_bytes(layers: Iterable[LearnedMask], optimizer: torch.optim.Optimizer | None = None) -> float:
    """Bytes per masked weight that live between steps: weight, logits, optimiser state, and gradients still held."""
    total, weights = 0, 0
    for layer in layers:
        weight = layer.matrix
        tensors = [weight, layer.logits, layer.logits.grad]
        if optimizer is not None:
            states = [t for t in optimizer.state.get(layer.logits, {}).values() if isinstance(t, Tensor)]
            tensors += [part for state in states for part in eight_bit.parts("", state).values()]
        weights += weight.numel()
        total += sum(tensor.nbytes for tensor in tensors if tensor is not None)
    if isinstance(optimizer, MaskAdamW):
        total += sum(t.numel() * t.element_size() for t in optimizer.pending())
    return total / weights
