"""The best low-rank approximation in a Gram's norm, from its symmetric square root, term by term."""

from __future__ import annotations

import torch
from torch import Tensor


def best_low_rank(E: Tensor, H: Tensor, rank: int) -> Tensor:
    """The product B A of the given rank that minimises tr((E - B A) H (E - B A)^T), fp64; H must have an inverse."""
    E, H = E.double(), H.double()
    values, vectors = torch.linalg.eigh(H)
    root = vectors @ torch.diag(values.sqrt()) @ vectors.T
    U, S, Vh = torch.linalg.svd(E @ root)
    cut = sum((S[i] * torch.outer(U[:, i], Vh[i]) for i in range(rank)), torch.zeros_like(E))
    return cut @ torch.linalg.inv(root)
