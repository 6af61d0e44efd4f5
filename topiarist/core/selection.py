"""Which entries of a matrix of scores stay: the largest of all, of a row, of a short group, of a block both ways.

Exact counts, ties by index. Transposable masks by entropic transport, rounding and repair (TSENOR, arXiv 2505.23949).
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def keep_largest(scores: Float[Tensor, "rows cols"], kept: int) -> Bool[Tensor, "rows cols"]:
    """Mask of the `kept` largest entries of a matrix. A threshold instead of a sort; ties by index."""
    total = scores.numel()
    if kept == total:
        return torch.ones_like(scores, dtype=torch.bool)
    if kept == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    # A transposed view flattens in its own memory order: the threshold does not depend on order.
    flat = scores.t().reshape(-1) if scores.stride(0) == 1 else scores.reshape(-1)
    threshold = _kth_largest(flat, kept)
    mask = scores >= threshold
    excess = int(mask.count_nonzero()) - kept
    if excess:
        ties = (scores == threshold).nonzero()
        rows, cols = ties[len(ties) - excess :].unbind(1)
        mask[rows, cols] = False
    return mask


def _kth_largest(values: Tensor, k: int) -> Tensor:
    """The k-th largest of a long vector: a sample brackets it, and only what lies in the bracket is searched."""
    total = len(values)
    if total >= 2**16:
        # Multiples of a large prime visit every column of a matrix; a plain stride may see few of them.
        scattered = torch.arange(2**14, device=values.device) * 2_654_435_761 % total
        sample = values[scattered]
        at, spread = len(sample) * k / total, 4 * math.sqrt(len(sample) * k / total * (1 - k / total)) + 4
        low = sample.kthvalue(max(len(sample) - int(at + spread), 1)).values
        high = sample.kthvalue(min(len(sample) - int(at - spread), len(sample))).values
        from_low = values >= low
        between = values[from_low & (values <= high)]
        above = int(from_low.count_nonzero()) - len(between)
        if above < k <= above + len(between):
            values, k = between, k - above
    return values.kthvalue(len(values) - k + 1).values


def keep_largest_per_row(scores: Float[Tensor, "*rows cols"], kept: int) -> Bool[Tensor, "*rows cols"]:
    """Mask of the `kept` largest along the last axis, by a stable sort."""
    order = scores.sort(dim=-1, descending=True, stable=True).indices[..., :kept]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order, True)


def keep_largest_evenly(scores: Float[Tensor, "rows cols"], kept: int) -> Bool[Tensor, "rows cols"]:
    """Mask of `kept` entries in all, the largest of every row, rows differing by at most one in their count."""
    rows = torch.arange(scores.shape[0] + 1, device=scores.device) * kept // scores.shape[0]
    order = scores.sort(dim=1, descending=True, stable=True).indices
    first = torch.arange(scores.shape[1], device=scores.device) < rows.diff()[:, None]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order, first)


def rank_network(groups: Float[Tensor, "*groups of"], kept: int) -> Bool[Tensor, "*groups of"]:
    """Mask of the `kept` largest in each short group, by comparing all pairs: no sort, only element-wise passes.

    Element j beats an earlier i only if strictly larger. Runs along memory when given a transposed view.
    """
    of = groups.shape[-1]
    columns = groups.unbind(-1)
    beaten_by = [torch.zeros_like(columns[0], dtype=torch.int8) for _ in range(of)]
    for i in range(of):
        for j in range(i + 1, of):
            later_wins = columns[j] > columns[i]
            beaten_by[i] += later_wins
            beaten_by[j] += ~later_wins
    mask = torch.empty_like(groups, dtype=torch.bool)
    for i in range(of):
        torch.lt(beaten_by[i], kept, out=mask[..., i])
    return mask


STEPS = 60  # of Dykstra's algorithm
SHARPNESS = 40.0  # the transport plan is exp(SHARPNESS * score / largest score of the block), then scaled


def transposable_mask(blocks: Float[Tensor, "blocks of of"], keep: int) -> Bool[Tensor, "blocks of of"]:
    """Mask (blocks, of, of) with `keep` in every row and column: transport, greedy rounding, repair."""
    size = blocks.shape[-1]
    scores = blocks / blocks.amax((1, 2), keepdim=True).clamp_min(1e-30)
    # Dykstra in the log domain: rows sum to keep, columns sum to keep, entries at most 1 (only that one needs a memory).
    plan = SHARPNESS * scores
    memory = torch.zeros_like(plan)
    for _ in range(STEPS):
        plan = plan + (math.log(keep) - plan.logsumexp(2, keepdim=True))
        plan = plan + (math.log(keep) - plan.logsumexp(1, keepdim=True)) + memory
        memory = plan.clamp_min(0)
        plan = plan - memory
    # Greedy: take entries by falling plan (then score) while row and column have room.
    rank = (plan.clamp_max(0).exp() + 1e-3 * scores).flatten(1).sort(dim=1, descending=True, stable=True).indices
    every = torch.arange(len(blocks), device=blocks.device)
    mask = torch.zeros_like(plan, dtype=torch.bool)
    rows = torch.full((len(blocks), size), keep, dtype=torch.int8, device=blocks.device)
    cols = rows.clone()
    for place in rank.unbind(1):
        i, j = place // size, place % size
        room = (rows[every, i] > 0) & (cols[every, j] > 0)
        mask[every, i, j] = room
        rows[every, i] -= room.to(torch.int8)
        cols[every, j] -= room.to(torch.int8)
    # Repair: row i and column j lack one. Trade a kept (i', j') for (i, j') and (i', j), at the best total score.
    while len(short := (rows > 0).any(1).nonzero().flatten()):
        m, s = mask[short], scores[short]
        n = torch.arange(len(short), device=blocks.device)
        i, j = rows[short].argmax(1), cols[short].argmax(1)
        gain = s[n, i][:, None, :] + s[n, :, j][:, :, None] - s
        legal = m & ~m[n, i][:, None, :] & ~m[n, :, j][:, :, None]
        best = gain.masked_fill(~legal, -torch.inf).flatten(1).argmax(1)
        i2, j2 = best // size, best % size
        mask[short, i2, j2] = False
        mask[short, i, j2] = True
        mask[short, i2, j] = True
        rows[short, i] -= 1
        cols[short, j] -= 1
    return _improve_pairs(mask, scores)


def _improve_pairs(mask: Tensor, scores: Tensor) -> Tensor:
    """Local search: two rows exchange one kept column each, the best exchange of every block at a time, while it pays."""
    size = mask.shape[-1]
    active = torch.arange(len(mask), device=mask.device)
    for _ in range(2 * size):
        m, s = mask[active], scores[active]
        # move[b, i, k, j]: what handing column j from row i to row k would gain.
        move = s[:, None, :, :] - s[:, :, None, :]
        move = move.masked_fill(~(m[:, :, None, :] & ~m[:, None, :, :]), -torch.inf)
        best, column = move.max(-1)
        gain, pair = (best + best.transpose(1, 2)).flatten(1).max(1)
        pays = gain > 1e-6
        if not bool(pays.any()):
            break
        active, pair, column = active[pays], pair[pays], column[pays]
        n = torch.arange(len(active), device=mask.device)
        i, k = pair // size, pair % size
        given, taken = column[n, i, k], column[n, k, i]
        mask[active, i, given] = False
        mask[active, k, given] = True
        mask[active, k, taken] = False
        mask[active, i, taken] = True
    return mask
