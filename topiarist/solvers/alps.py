"""ALPS (Meng et al., NeurIPS 2024, arXiv 2406.07831): the support by ADMM, the weights by conjugate gradients.

Scaled variables (unit-diagonal Gram), as in the paper's preconditioning:
Hs  scaled damped Gram (in, in)   W  scaled dense weight (out, in)   K  resolvent rho (Hs + rho I)^-1
B   dense iterate                 D  its projection                  U  dual / rho          Y = W - D + U,  Z = Y K
"""

from __future__ import annotations

import functools
import math
import warnings
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from topiarist.core import linalg
from topiarist.core.errors import NumericalWarning
from topiarist.core.options import options
from topiarist.core.patterns import Pattern
from topiarist.solvers.admm import State
from topiarist.solvers.base import GramSolver

PRESETS: dict[str, dict[str, float]] = {
    "fast": {"ridge": 0.03, "rho_start": 0.06, "rho_end": 0.6, "iterations": 24, "relaxation": 1.12, "refit_steps": 4},
    "best": {"ridge": 0.02, "rho_start": 0.07, "rho_end": 0.45, "iterations": 99, "relaxation": 1.1, "refit_steps": 12},
}
FROM_PRESET: Any = None
REFIT_TOLERANCE = 1e-5
LIFT = 1.7
"""rho_end is at least this many typical eigenvalues of Hs; below, the support cycles where inputs hardly correlate."""
UNSETTLED = 0.2
"""Fraction of the support on which dense iterate and projection may still disagree at the end without a warning."""


@options
class ALPS(GramSolver):
    """Minimises tr((W - W') (H + ridge * diag H) (W - W')^T) over support and weights together (eq. 3): ADMM finds the support
    (eq. 4-6, over-relaxed), conjugate gradients the weights on it (section 3.3). The best one-shot solver here: choose
    `fast` by default, `best` when minutes do not matter.

    Cost: one Cholesky inverse (two where inputs hardly correlate) and one half product of (in, in), shared by all weights
    of an input; then iterations + refit_steps + 1 products of 2 * out * in^2 flops, in bf16 where the machine is fast at
    it. Memory: three (in, in) and about six (out, in) matrices.

    Differs from the authors' code in: 1. the ridge is relative to every channel's own energy, not to the mean, which
    outlier channels dominate (error 3-9 % lower, and scaling an input changes nothing). 2. No eigendecomposition: the
    resolvents of all rho are interpolated from one Cholesky inverse. 3. A fixed geometric schedule of rho with
    over-relaxation instead of 30-36 iterations steered by support changes: no state, same work for every layer.
    4. Residual form, so that products tolerate bf16. 5. Thresholds by selection; one product per refit step.
    6. Dead inputs take no part.
    """

    copies: ClassVar[tuple[int, int]] = (4, 8)

    preset: Literal["fast", "best"] = "fast"
    """`fast` or `best`: gives every field below that is not set its value."""
    ridge: NonNegativeFloat = FROM_PRESET
    """Added to the diagonal of H, as a fraction of itself; keeps few tokens from being fitted too closely."""
    rho_start: PositiveFloat = FROM_PRESET
    """First penalty. Lower explores more supports."""
    rho_end: PositiveFloat = FROM_PRESET
    """Last penalty, and the one whose resolvent is exact. Higher freezes the support sooner."""
    iterations: PositiveInt = FROM_PRESET
    """ADMM steps, rounded down to whole levels of rho."""
    rho_every: PositiveInt = 2
    """Steps at each level of rho."""
    relaxation: Annotated[float, Field(ge=1, lt=2)] = FROM_PRESET
    """Over-relaxation of the dense iterate, between 1 (none) and 2."""
    refit_steps: NonNegativeInt = FROM_PRESET
    """Conjugate gradient steps on the final support."""

    def __post_init__(self) -> None:
        for name, value in PRESETS[self.preset].items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)

    def derived(self) -> dict[str, float]:
        """Defaults that the preset sets."""
        return PRESETS[self.preset]

    def prepare(self, H: Float[Tensor, "in in"]) -> Scaled:
        """The scaled Gram and its resolvent."""
        search = linalg.search_dtype(H.device)
        scale = H.diagonal().sqrt()
        Hs = H / (scale * (1 + self.ridge))
        Hs.div_(scale[:, None])
        Hs.diagonal().fill_(1.0)
        K = Resolvent(Hs, self.rho_end, search)
        # Where inputs hardly correlate, a penalty below the typical curvature makes the support cycle: lift all of them.
        lift = max(1.0, LIFT * K.typical_eigenvalue / self.rho_end)
        if lift > 1.0:
            K = Resolvent(Hs, self.rho_end * lift, search)
        return Scaled(Hs.to(search), scale, K)

    def solve(
        self, state: Scaled, W: Float[Tensor, "out in"], pattern: Pattern
    ) -> tuple[Float[Tensor, "out in"], Bool[Tensor, "out in"]]:
        """Search the support, then fit the weights. Warns (NumericalWarning) if the support still moved at the last step."""
        Hs, search = state.Hs, state.Hs.dtype
        B, R, mask = self._search(W * state.scale, state.K, pattern)
        X = B * mask
        # (W - X) Hs = (W - B) Hs + (B - X) Hs: the first is known, the second is small enough for low precision.
        R += ((B - X).to(search) @ Hs).float()
        keep = mask.float()
        X = linalg.conjugate_gradients(
            lambda P: (P.to(search) @ Hs).float(),
            X,
            R.mul_(keep),
            keep,
            steps=self.refit_steps,
            tolerance=REFIT_TOLERANCE,
        )
        return X.div_(state.scale), mask

    def _search(self, W: Tensor, K: Resolvent, pattern: Pattern) -> tuple[Tensor, Tensor, Tensor]:
        """(B, (W - B) Hs, mask of B) after the ADMM iterations."""
        state = State(W, pattern, self.relaxation, K.K.dtype)
        steps = min(self.rho_every, self.iterations)
        levels = self.iterations // steps
        ratio = self.rho_start / self.rho_end
        # The last level, and a single one, is at the node: the residual below holds only where the resolvent is exact.
        rhos = [
            K.node * ratio ** ((levels - 1 - level) / max(levels - 1, 1))
            for level in range(levels)
            for _ in range(steps)
        ]
        Y, Z, K_rho = state.Y.to(K.K.dtype), W, K.K
        for step, rho in enumerate(rhos):
            if step % steps == 0:
                K_rho = K.at(rho)
            Z = Y @ K_rho
            if step + 1 < len(rhos):
                Y = state.step(Z, rho / rhos[step + 1])
        Z = Z.float()
        B = W - Z
        mask = pattern.mask(B.abs())
        moving = int((mask & ~pattern.mask(state.relaxed(Z).abs())).count_nonzero())
        moving /= max(pattern.num_kept((W.shape[0], W.shape[1])), 1)
        if moving > UNSETTLED:
            warnings.warn(
                f"ALPS stopped after {len(rhos)} iterations with {moving:.0%} of the support still moving: "
                "raise iterations or rho_end",
                NumericalWarning,
                stacklevel=2,
            )
        return B, state.Y.sub_(Z).mul_(rhos[-1]), mask


@dataclass(frozen=True)
class Scaled:
    """What the weights of one input share."""

    Hs: Float[Tensor, "in in"]
    """In the dtype of products."""
    scale: Float[Tensor, " in"]
    """Roots of the Gram's diagonal: W times it is the weight in scaled variables."""
    K: Resolvent


class Resolvent:
    """K(rho) = rho (Hs + rho I)^-1 for every rho from one factorisation, that of `node`.

    With k = node / (lambda + node) an eigenvalue of K(node), that of K(rho) is k / (k + t (1 - k)), t = node / rho. The
    nearest c k + (1 - c) k^2 stands in for it: exact at k = 0, at k = 1 and at rho = node.
    """

    def __init__(self, Hs: Tensor, node: float, dtype: torch.dtype) -> None:
        shifted = Hs.clone()
        shifted.diagonal().add_(node)
        self.node = node
        K = linalg.inverse(shifted).mul_(node)
        self.typical_eigenvalue = node * (float(1 / K.diagonal().mean()) - 1)
        self.K = K.to(dtype)

    @functools.cached_property
    def K2(self) -> Float[Tensor, "in in"]:
        """K(node)^2 (in, in), by upper blocks and their mirror images: half a product."""
        K2 = torch.empty_like(self.K)
        block = max(128, -(-len(K2) // 8))
        for start in range(0, len(K2), block):
            stop = start + block
            K2[start:stop, start:] = self.K[start:stop] @ self.K[:, start:]
            K2[stop:, start:stop] = K2[start:stop, stop:].T
        return K2

    def at(self, rho: float) -> Float[Tensor, "in in"]:
        """The approximation of K(rho), (in, in), its c fitted over eigenvalues of Hs from 0.01 to 100."""
        if math.isclose(rho, self.node):
            return self.K
        above = below = 0.0
        for i in range(201):
            eigenvalue = 10 ** (i / 50 - 2)
            k, wanted = self.node / (eigenvalue + self.node), rho / (eigenvalue + rho)
            above += (wanted - k * k) * (k - k * k)
            below += (k - k * k) ** 2
        return torch.lerp(self.K2, self.K, above / below)
