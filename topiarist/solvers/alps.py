"""ALPS (Meng et al., NeurIPS 2024, arXiv 2406.07831): the support by ADMM, the weights by conjugate gradients.

Scaled variables (unit-diagonal Gram), as in the paper's preconditioning:
Hs  scaled Gram (in, in)    W  scaled dense weight (out, in)    G = W Hs
B  dense iterate            D  sparse copy                      U  dual / rho
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from topiarist import linalg
from topiarist.solvers.base import Problem, Solver


@dataclass(frozen=True, kw_only=True)
class ALPS(Solver):
    """Minimises tr((W - W') (H + damping) (W - W')^T) over weights and support together (eq. 3-6)."""

    damping: float = 0.01
    rho: float = 0.1
    max_iterations: int = 300
    check_every: int = 3
    refit_steps: int = 10

    def solve_all(self, problems: Sequence[Problem]) -> list[tuple[Tensor, Tensor]]:
        H = linalg.damped(problems[0].H, self.damping)
        scale = H.diagonal().sqrt()
        Hs = H / scale / scale[:, None]
        return [self._admm(problem, Hs, scale) for problem in problems]

    def solve(self, problem: Problem) -> tuple[Tensor, Tensor]:
        return self.solve_all([problem])[0]

    def _admm(self, problem: Problem, Hs: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        W = problem.W * scale
        G = W @ Hs
        kept = problem.pattern.num_kept(tuple(W.shape))
        rho = self.rho
        M = linalg.inverse(Hs + rho * torch.eye(len(Hs)))
        U = torch.zeros_like(W)
        mask = problem.pattern.mask(W.abs())
        D, previous, B = W * mask, mask, W
        for iteration in range(1, self.max_iterations + 1):
            B = torch.addmm(G, D - U, torch.eye(len(Hs)), beta=1, alpha=rho) @ M
            T = B + U
            mask = problem.pattern.mask(T.abs())
            D = T * mask
            U = T - D
            if iteration % self.check_every:
                continue
            flips = int((mask ^ previous).sum())
            previous = mask
            factor = 1.3 if flips > 0.1 * kept else 1.2 if flips > 0.005 * kept else 1.1 if flips else 1.0
            if flips == 0 or (iteration >= 30 and flips < 0.0003 * kept):
                break
            rho_new = min(rho * factor, 1e6)
            U *= rho / rho_new
            rho = rho_new
            M = linalg.inverse(Hs + rho * torch.eye(len(Hs)))
        mask = problem.pattern.mask(B.abs())
        X = linalg.masked_least_squares(W, Hs, mask, start=B, damping=0.0, steps=self.refit_steps, tolerance=1e-4)
        return X / scale, mask
