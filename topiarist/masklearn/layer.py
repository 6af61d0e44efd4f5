"""Layers whose mask is learned: a frozen weight and trainable logits. Usable in anyone's training loop.

    layer = MaskedLinear.from_module(linear, relaxation, prior_mask, index=0)
    layer.draw = annealing.draw(step, total, layer=0)      # once per step, or once per micro-batch
    loss(layer(x)).backward()                              # layer.logits.grad is set; the weight has no gradient
    mask = layer.finalize()                                # bool, exactly of the pattern

In evaluation mode, or while `draw` is None, a layer uses its hard mask without noise. No layer ever waits for a device.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from topiarist.core.errors import PatternError
from topiarist.masklearn import kernels, noise
from topiarist.masklearn.relaxation import Draw, Prior, Relaxation
from topiarist.masklearn.schedule import KAPPA, LAMBDA, TAU, Schedule


@dataclass(frozen=True)
class Annealing:
    """The schedules of a run, and from them the draw of any layer at any step."""

    kappa: Schedule = KAPPA
    tau: Schedule = TAU
    lam: Schedule = LAMBDA
    """lambda of the regulariser. The paper keeps it constant, its code lets it fall to zero."""
    straight_through: bool = False

    def draw(self, step: int, total: int, *, layer: int, seed: int = 0, sample: int = 0, samples: int = 1) -> Draw:
        """The draw of a layer; `sample` counts the micro-batches of a step if each has its own noise (global count).

        `samples` is how many draws share one step: each then carries its share of the regulariser and of a density penalty.
        """
        key = noise.noise_key(seed, layer, step, sample)
        lam = self.lam(step, total) / samples
        kappa, tau = self.kappa(step, total), self.tau(step, total)
        return Draw(key, kappa, tau, lam, self.straight_through, share=1.0 / samples)


class LearnedMask(nn.Module):
    """Logits of one weight, seen as a matrix (rows, in). The base of the layers below.

    index       the layer's number in the model: part of its noise key
    draw        the current sample, or None for the hard mask; plain numbers, set by whoever runs the loop
    sink        if set, takes d loss / d(W * M) in place of logits.grad (see optim.py)
    first_row, first_group   where a sharded weight begins in the whole one, so that its noise is the same
    lam_scale   multiplies the regulariser: 1 for the paper's raw sum, 1 / ||W||^2 to free it of scale and size
    bypassed    True runs the dense weight: a teacher for distillation in the same memory
    relaxation  gives the logits' shape
    mask        the prior (rows, in), bool, True = kept; `prior` says how it becomes logits
    seed        of the prior's noise
    dtype       of the logits
    """

    def __init__(
        self,
        relaxation: Relaxation,
        mask: Tensor | None,
        *,
        index: int,
        prior: Prior | None = None,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        first_row: int = 0,
        first_group: int = 0,
    ) -> None:
        super().__init__()
        self.relaxation, self.index = relaxation, index
        self.first_row, self.first_group = first_row, first_group
        where = {"first_row": first_row, "first_group": first_group}
        logits = relaxation.init_logits(mask, prior or Prior(), seed=seed, layer=index, **where)
        self.logits = nn.Parameter(logits.to(dtype).contiguous())
        self.draw: Draw | None = None
        self.sink: kernels.Sink | None = None
        self.lam_scale = 1.0
        self.bypassed = False

    @property
    def matrix(self) -> Float[Tensor, "rows in"]:
        """The frozen weight as the mask sees it: groups run along its rows."""
        raise NotImplementedError

    @property
    def current_draw(self) -> Draw | None:
        """The draw that the next forward uses: None in evaluation mode, where the hard mask counts."""
        if self.draw is None or not self.training:
            return None
        lam = self.draw.lam * self.lam_scale
        return replace(self.draw, lam=lam, first_row=self.first_row, first_group=self.first_group)

    @torch.no_grad()
    def hard_mask(self) -> Bool[Tensor, "rows in"]:
        """The most likely mask, exactly of the pattern."""
        return self.relaxation.hard_mask(self.logits)

    def finalize(self) -> Bool[Tensor, "..."]:
        """The hard mask in the shape of the weight as its module stores it."""
        raise NotImplementedError

    @torch.no_grad()
    def statistics(self, prior: Bool[Tensor, "rows in"] | None = None) -> dict[str, Tensor]:
        """What to watch, as 0-dim tensors on the layer's device: reading them later is the only wait.

        certainty: mean largest probability under the current draw (near 1 at the end of a run). flips: fraction of
        weights whose state differs from a prior mask.
        """
        found = {}
        if self.draw is not None:
            draw = replace(self.draw, first_row=self.first_row, first_group=self.first_group)
            found["certainty"] = self.relaxation.certainty(self.logits.float(), draw)
        if prior is not None:
            found["flips"] = (self.hard_mask() != prior).float().mean()
        return found


class MaskedLinear(LearnedMask):
    """A linear layer with a frozen weight (out, in), its bias kept, and a learned mask."""

    def __init__(
        self, weight: Float[Tensor, "out in"], bias: Tensor | None, relaxation: Relaxation, mask, **kwargs
    ) -> None:
        super().__init__(relaxation, mask, **kwargs)
        if mask.shape != weight.shape:
            raise PatternError(f"the prior mask has shape {tuple(mask.shape)}, the weight {tuple(weight.shape)}")
        self.out_features, self.in_features = weight.shape
        self.weight = _frozen(weight)
        self.bias = None if bias is None else _frozen(bias)
        self.transposed = False

    @classmethod
    def from_module(cls, module: nn.Module, relaxation: Relaxation, mask, **kwargs) -> MaskedLinear:
        """From nn.Linear, or transformers' Conv1D, whose weight is (in, out); `mask` has the shape of the weight.

        nn.Linear's weight is shared, not copied. Raises PatternError for other modules.
        """
        weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
        if not isinstance(weight, Tensor) or weight.ndim != 2:
            raise PatternError(f"{type(module).__name__} has no weight matrix to mask")
        if mask is None:
            raise PatternError("a masked layer needs a prior mask; compute one with a one-shot method")
        if not hasattr(module, "nf"):
            return cls(weight, bias, relaxation, mask, **kwargs)
        layer = cls(weight.detach().T.contiguous(), bias, relaxation, mask.T.contiguous(), **kwargs)
        layer.transposed = True
        return layer

    @property
    def matrix(self) -> Float[Tensor, "out in"]:
        """The frozen weight itself."""
        return self.weight

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """x (W * M)^T + b, M the current draw's soft mask, or the hard one without a draw; x W^T + b while `bypassed`."""
        draw = self.current_draw
        if self.bypassed:
            return F.linear(x, self.weight, self.bias)
        if draw is None:
            return F.linear(x, kernels.effective(self.relaxation, self.weight, self.logits, None), self.bias)
        return kernels.masked_linear(x, self.weight, self.logits, self.bias, self.relaxation, draw, self.sink)

    def finalize(self) -> Bool[Tensor, "..."]:
        """The hard mask in the shape of the original module's weight."""
        return self.hard_mask().T if self.transposed else self.hard_mask()

    def extra_repr(self) -> str:
        """Sizes, relaxation and pattern, as printing the model shows them."""
        return f"{self.in_features}, {self.out_features}, {self.relaxation.name} {self.relaxation.pattern}"


class MaskedExperts(LearnedMask):
    """A learned mask of a parameter (experts, out, in), or (experts, in, out) if `transposed`; without experts, of (out, in).

    Registered as a parametrization, so the module that owns the parameter stays as it is: `mask_parameter` below.
    """

    def __init__(self, weight: Tensor, relaxation: Relaxation, mask, *, transposed: bool = False, **kwargs) -> None:
        if mask is None or mask.shape != weight.shape:
            raise PatternError(f"a parameter of shape {tuple(weight.shape)} needs a prior mask of that shape")
        self.transposed = transposed
        super().__init__(relaxation, self._rows(mask), **kwargs)
        self._weight = [weight]  # in a list: the parameter stays registered where it was

    def _rows(self, tensor: Tensor) -> Tensor:
        return (tensor.mT if self.transposed else tensor).flatten(0, -2).contiguous()

    def _unrows(self, rows: Tensor, shape: torch.Size) -> Tensor:
        if not self.transposed:
            return rows.view(shape)
        return rows.view(*shape[:-2], shape[-1], shape[-2]).mT

    @property
    def matrix(self) -> Float[Tensor, "rows in"]:
        """The experts' rows below each other; a copy if the parameter is stored transposed."""
        return self._rows(self._weight[0].detach())

    def forward(self, weight: Float[Tensor, "*experts rows cols"]) -> Float[Tensor, "*experts rows cols"]:
        """W * M in the parameter's own layout, with the current draw's mask or the hard one; W while `bypassed`."""
        if self.bypassed:
            return weight
        rows, draw = self._rows(weight.detach()), self.current_draw
        if draw is None:
            masked = kernels.effective(self.relaxation, rows, self.logits, None)
        else:
            masked = kernels.effective_weight(rows, self.logits, self.relaxation, draw, self.sink)
        return self._unrows(masked, weight.shape)

    def finalize(self) -> Bool[Tensor, "..."]:
        """The hard mask in the shape of the parameter."""
        return self._unrows(self.hard_mask(), self._weight[0].shape)


def mask_parameter(module: nn.Module, name: str, relaxation: Relaxation, mask, **kwargs) -> MaskedExperts:
    """Give a parameter a learned mask, whatever its module does with it. Undo with `parametrize.remove_parametrizations`."""
    weight = getattr(module, name)
    weight.requires_grad_(False)
    learned = MaskedExperts(weight, relaxation, mask, **kwargs)
    parametrize.register_parametrization(module, name, learned, unsafe=True)  # unsafe: skips a needless first call
    return learned


def learned_masks(model: nn.Module) -> list[LearnedMask]:
    """Every learned mask of a model, in model order."""
    return [module for module in model.modules() if isinstance(module, LearnedMask)]


def set_draws(
    layers: Iterable[LearnedMask],
    annealing: Annealing,
    step: int,
    total: int,
    *,
    seed: int = 0,
    sample: int = 0,
    samples: int = 1,
) -> None:
    """Give every layer its draw for a step (and micro-batch, if each has its own noise)."""
    for layer in layers:
        layer.draw = annealing.draw(step, total, layer=layer.index, seed=seed, sample=sample, samples=samples)


@contextmanager
def dense(layers: Iterable[LearnedMask]) -> Iterator[None]:
    """The layers run with their dense weights while inside."""
    listed = list(layers)
    for layer in listed:
        layer.bypassed = True
    try:
        yield
    finally:
        for layer in listed:
            layer.bypassed = False


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach(), requires_grad=False)
