"""The legal masks of one group: all rows of `of` bits with `keep` ones, and what a given mask says about them.

The row order is lexicographic with ones first: 1100, 1010, 1001, 0110, 0101, 0011 (the paper's equation 2 swaps the
fourth and fifth). Mask files store the order's name, so the index of a row means the same everywhere.

S  candidates (classes, of)      m0  a given mask, grouped (..., of)      True = kept
"""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import combinations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from topiarist.core.errors import PatternError
from topiarist.core.patterns import NM

ORDER = "lexicographic"
MAX_CLASSES = 128  # 4:8 has 70; 8:16 has 12,870, where a logit per candidate stops being usable


def num_classes(pattern: NM) -> int:
    """How many legal masks a group has: C(of, keep)."""
    return math.comb(pattern.of, pattern.keep)


def candidates(pattern: NM, device: torch.device | str = "cpu") -> Bool[Tensor, "classes of"]:
    """S: every legal mask of one group, in lexicographic order.

    Raises PatternError for more than 128 of them: the relaxation `TopN` needs one logit per weight only.
    """
    if num_classes(pattern) > MAX_CLASSES:
        raise PatternError(
            f"pattern {pattern} has {num_classes(pattern)} masks a group, more than {MAX_CLASSES}; "
            "use the relaxation TopN (one logit per weight)"
        )
    return torch.tensor(_rows(pattern), dtype=torch.bool, device=device)


@lru_cache(maxsize=64)
def _rows(pattern: NM) -> tuple[tuple[bool, ...], ...]:
    return tuple(tuple(i in kept for i in range(pattern.of)) for kept in combinations(range(pattern.of), pattern.keep))


def similarity(mask: Bool[Tensor, "*groups of"], pattern: NM) -> Float[Tensor, "*groups classes"]:
    """How well each candidate agrees with a given mask: sim_i = <m0, S_i> - mean_j <m0, S_j>.

    The mean is keep^2 / of (1 for 2:4). The paper prints keep / 2, which is the same only where of = 2 keep; either way
    it is a constant that the softmax ignores.
    """
    S = candidates(pattern, mask.device).float()
    return mask.float() @ S.T - pattern.keep**2 / pattern.of


def index_of(mask: Bool[Tensor, "*groups of"], pattern: NM) -> Int[Tensor, "*groups"]:
    """The row of S that each group of the mask is. Raises PatternError if a group does not keep exactly `keep`.

    Computed from binomial coefficients (the combinatorial number system), so it also works where S would be too long
    to list.
    """
    if bool((mask.sum(-1) != pattern.keep).any()):
        wrong = int((mask.sum(-1) != pattern.keep).sum())
        raise PatternError(f"{wrong} groups of the mask do not keep exactly {pattern.keep} of {pattern.of}")
    index = torch.zeros(mask.shape[:-1], dtype=torch.int64, device=mask.device)
    left = torch.full_like(index, pattern.keep)
    table = _binomials(pattern, mask.device)
    for position in range(pattern.of):
        # A zero here skips every row that has a one here and agrees so far.
        skipped = table[pattern.of - position - 1, (left - 1).clamp_min(0)] * (left > 0)
        kept = mask[..., position]
        index += torch.where(kept, 0, skipped)
        left -= kept.long()
    return index


def mask_of(index: Int[Tensor, "*groups"], pattern: NM) -> Bool[Tensor, "*groups of"]:
    """The inverse of `index_of`. Raises PatternError for an index outside 0 .. C(of, keep) - 1."""
    rest = index.long()
    if rest.numel() and not bool(((rest >= 0) & (rest < num_classes(pattern))).all()):
        raise PatternError(f"candidate index outside 0..{num_classes(pattern) - 1} for pattern {pattern}")
    if num_classes(pattern) <= MAX_CLASSES:
        return candidates(pattern, index.device)[rest]
    mask = torch.zeros(*index.shape, pattern.of, dtype=torch.bool, device=index.device)
    left = torch.full_like(rest, pattern.keep)
    table = _binomials(pattern, index.device)
    for position in range(pattern.of):
        skipped = table[pattern.of - position - 1, (left - 1).clamp_min(0)] * (left > 0)
        kept = (rest < skipped) & (left > 0)
        rest = torch.where(kept, rest, rest - skipped)
        mask[..., position] = kept
        left -= kept.long()
    return mask


def _binomials(pattern: NM, device: torch.device) -> Tensor:
    """binomials[n, k] = C(n, k), int64."""
    rows = [[math.comb(n, k) for k in range(pattern.keep + 1)] for n in range(pattern.of)]
    return torch.tensor(rows, dtype=torch.int64, device=device)
