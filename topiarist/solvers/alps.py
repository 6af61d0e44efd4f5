"""ALPS (Meng et al., NeurIPS 2024, arXiv 2406.07831): the support by ADMM, the weights by conjugate gradients.

Scaled variables (unit-diagonal Gram), as in the paper's preconditioning:
Hs  scaled damped Gram (in, in)   W  scaled dense weight (out, in)   K  resolvent rho (Hs + rho I)^-1
B   dense iterate                 D  its projection                  U  dual / rho          Y = W - D + U,  Z = Y K
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from topiarist import linalg
from topiarist.errors import NumericalWarning
from topiarist.patterns import Pattern
from topiarist.solvers.base import Problem, Solver

PRESETS: dict[str, dict[str, float]] = {
    "fast": {"damping": 0.01, "rho_start": 0.15, "rho_end": 0.6, "iterations": 12, "relaxation": 1.8, "refit_steps": 6},
    "best": {"damping": 0.01, "rho_start": 0.1, "rho_end": 0.7, "iterations": 60, "relaxation": 1.6, "refit_steps": 20},
}


@dataclass(frozen=True, kw_only=True)
class ALPS(Solver):
    preset: str = "fast"
    damping: float | None = None
    rho_start: float | None = None
    rho_end: float | None = None
    iterations: int | None = None
    rho_every: int = 3
    relaxation: float | None = None
    refit_steps: int | None = None

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise ValueError(f"ALPS has presets {', '.join(PRESETS)}; got {self.preset!r}")
        for name, value in PRESETS[self.preset].items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)

    def solve(self, problem: Problem) -> tuple[Tensor, Tensor]:
        return self.solve_all([problem])[0]

    def solve_all(self, problems: Sequence[Problem]) -> list[tuple[Tensor, Tensor]]:
        H = problems[0].H
        search = linalg.search_dtype(H.device)
        mean = H.diagonal().mean()
        scale = (H.diagonal() + self.damping * mean).sqrt()
        Hs = H / scale
        Hs.div_(scale[:, None])
        Hs.diagonal().fill_(1.0)
        K = Resolvent(Hs, self.rho_end, search)
        Hs = Hs.to(search)
        # The refit's own, lighter ridge: its matrix is Hs minus this diagonal.
        lighter = (self.damping - self.refit_damping) * mean / scale.square()
        pruned = []
        for problem in problems:
            W = problem.W * scale
            B, R, mask = self._search(W, K, problem.pattern)
            X = B * mask
            # (W - X) Hs = (W - B) Hs + (B - X) Hs: the first is known, the second is small enough for low precision.
            R += ((B - X).to(search) @ Hs).float()
            R -= (W - X) * lighter
            keep = mask.to(W.dtype)
            X = linalg.conjugate_gradients(
                lambda P: (P.to(search) @ Hs).float().addcmul_(P, lighter, value=-1),
                X,
                R.mul_(keep),
                keep,
                steps=self.refit_steps,
                tolerance=1e-5,
                diagonal=1 - lighter,
            )
            pruned.append((X / scale, mask))
        return pruned

    def _search(self, W: Tensor, K: Resolvent, pattern: Pattern) -> tuple[Tensor, Tensor, Tensor]:
        """(B, (W - B) Hs, mask of B) after the ADMM iterations."""
        D = W * pattern.mask(W.abs())
        U = torch.zeros_like(W)
        rho = self.rho_start
        levels = self.iterations // self.rho_every
        for level in range(levels):
            rho_next = self.rho_start * (self.rho_end / self.rho_start) ** (level / max(levels - 1, 1))
            U *= rho / rho_next
            rho = rho_next
            K_rho = K.at(rho)
            for _ in range(self.rho_every):
                Y = torch.sub(W, D).add_(U)
                Z = (Y.to(K_rho.dtype) @ K_rho).float()
                B = W - Z
                T = torch.lerp(D, B, self.relaxation).add_(U)
                D = T * pattern.mask(T.abs())
                U = T.sub_(D)
        return B, Y.sub_(Z).mul_(rho), pattern.mask(B.abs())


class Resolvent:
    """K(rho) = rho (Hs + rho I)^-1 for every rho from one factorisation, that of `node`.

    With k = node / (lambda + node) an eigenvalue of K(node), that of K(rho) is k / (k + t (1 - k)), t = node / rho. The
    nearest c k + (1 - c) k^2 stands in for it: exact at k = 0, at k = 1 and at rho = node.
    """

    def __init__(self, Hs: Tensor, node: float, dtype: torch.dtype) -> None:
        shifted = Hs.clone()
        shifted.diagonal().add_(node)
        self.node = node
        self.K = linalg.inverse(shifted).mul_(node).to(dtype)
        self.K2 = torch.empty_like(self.K)
        block = max(128, -(-len(Hs) // 8))
        for start in range(0, len(Hs), block):
            stop = start + block
            self.K2[start:stop, start:] = self.K[start:stop] @ self.K[:, start:]
            self.K2[stop:, start:stop] = self.K2[start:stop, stop:].T

    def at(self, rho: float) -> Tensor:
        if math.isclose(rho, self.node):
            return self.K
        above = below = 0.0
        for i in range(201):
            eigenvalue = 10 ** (i / 50 - 2)
            k, wanted = self.node / (eigenvalue + self.node), rho / (eigenvalue + rho)
            above += (wanted - k * k) * (k - k * k)
            below += (k - k * k) ** 2
        return torch.lerp(self.K2, self.K, above / below)
