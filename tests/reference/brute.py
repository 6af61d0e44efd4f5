"""Exact answers for problems small enough to enumerate."""

from __future__ import annotations

from itertools import combinations, product

import torch
from torch import Tensor


def least_squares(W: Tensor, H: Tensor, mask: Tensor) -> Tensor:
    """argmin tr((X - W) H (X - W)^T) with support `mask`, row by row, fp64."""
    W, H = W.double(), H.double()
    X = torch.zeros_like(W)
    for row, kept in enumerate(mask):
        if kept.any():
            X[row, kept] = torch.linalg.lstsq(H[kept][:, kept], (W[row] @ H)[kept, None]).solution[:, 0]
    return X


def error(W: Tensor, X: Tensor, H: Tensor) -> float:
    """tr((W - X) H (W - X)^T) / tr(W H W^T), fp64."""
    W, X, H = W.double(), X.double(), H.double()
    return float(torch.trace((W - X) @ H @ (W - X).T) / torch.trace(W @ H @ W.T))


def best_row(w: Tensor, H: Tensor, masks: list[Tensor]) -> tuple[float, Tensor]:
    """The smallest (w - x) H (w - x)^T over the given masks of one row, and that mask."""
    costs = []
    for mask in masks:
        delta = w.double() - least_squares(w[None], H, mask[None])[0]
        costs.append(float(delta @ H.double() @ delta))
    best = min(range(len(masks)), key=costs.__getitem__)
    return costs[best], masks[best]


def row_masks(width: int, keep: int) -> list[Tensor]:
    """All masks that keep `keep` of `width`."""
    masks = []
    for kept in combinations(range(width), keep):
        mask = torch.zeros(width, dtype=torch.bool)
        mask[list(kept)] = True
        masks.append(mask)
    return masks


def best_nm(W: Tensor, H: Tensor, keep: int, of: int) -> tuple[float, Tensor]:
    """The optimal relative error under N:M and its mask: every mask of every row, each with its best weights."""
    groups = [row_masks(of, keep)] * (W.shape[1] // of)
    candidates = [torch.cat(parts) for parts in product(*groups)]
    rows = [best_row(w, H, candidates) for w in W]
    dense = float(torch.trace(W.double() @ H.double() @ W.double().T))
    return sum(cost for cost, _ in rows) / dense, torch.stack([mask for _, mask in rows])


def best_transposable(score: Tensor, keep: int) -> float:
    """The largest total score of a square block with `keep` kept in every row and every column."""
    size = score.shape[0]
    rows = list(combinations(range(size), keep))
    best = {(0,) * size: 0.0}
    for row in score.double().tolist():
        step: dict[tuple[int, ...], float] = {}
        for counts, total in best.items():
            for kept in rows:
                new = list(counts)
                for j in kept:
                    new[j] += 1
                if max(new) <= keep:
                    value = total + sum(row[j] for j in kept)
                    key = tuple(new)
                    step[key] = max(step.get(key, float("-inf")), value)
        best = step
    return best[(keep,) * size]
