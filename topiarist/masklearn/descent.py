"""A better start for frozen weights: descent on the error that a given N:M mask leaves, from the Gram alone.

A one-shot method chooses its mask for weights that it will update (SparseGPT, ALPS), or looks at every weight alone
(Wanda); for weights that stay as they are neither is the best mask that the Gram knows of.

W  weight (out, in)    H  Gram (in, in)    E = W * (1 - M), what the mask takes away    S  candidates (classes, of)
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from topiarist.core.patterns import NM
from topiarist.masklearn.candidates import candidates, index_of

BLOCK = 64  # inputs whose changes reach the other inputs in one product


def improve_mask(
    W: Float[Tensor, "out in"],
    H: Float[Tensor, "in in"],
    mask: Bool[Tensor, "out in"],
    pattern: NM,
    *,
    sweeps: int,
) -> Bool[Tensor, "out in"]:
    """Minimise tr(E H E^T) over N:M masks: each group in turn takes the best of its C(of, keep) masks while all others
    stay, for all rows at once; `sweeps` passes over the groups, fewer if nothing moves any more.

    The error never rises. Cost of a pass: 4 out in^2 flops in products, C(of, keep) trials a group. Raises PatternError
    for a pattern with more than 128 masks a group.
    """
    S = candidates(pattern, W.device)
    gone = (~S).to(W.dtype)
    index = index_of(mask.unflatten(1, (-1, pattern.of)), pattern)  # (out, groups)
    width = max(1, BLOCK // pattern.of) * pattern.of
    for _ in range(sweeps):
        last = index.clone()
        R = W.masked_fill(S[index].flatten(1), 0.0) @ H  # E H; afresh in every pass, so that rounding does not add up
        for start in range(0, W.shape[1], width):
            end = min(start + width, W.shape[1])
            inside = R[:, start:end].clone()
            change = torch.zeros_like(inside)
            for at in range(start, end, pattern.of):
                here = slice(at - start, at - start + pattern.of)
                H_g = H[at : at + pattern.of, start:end]
                e = W[:, None, at : at + pattern.of] * gone  # what each candidate would take away
                old = index[:, at // pattern.of]
                now = W[:, at : at + pattern.of] * gone[old]
                from_others = inside[:, here] - now @ H_g[:, here]
                cost = (e * (e @ H_g[:, here] + 2.0 * from_others[:, None])).sum(-1)
                # The present mask stays unless another is strictly better: rounding must not move it to and fro.
                best = cost.argmin(1)
                better = cost.gather(1, best[:, None]) < cost.gather(1, old[:, None])
                new = torch.where(better[:, 0], best, old)
                index[:, at // pattern.of] = new
                change[:, here] = W[:, at : at + pattern.of] * gone[new] - now
                inside += change[:, here] @ H_g
            R += change @ H[start:end]
        if torch.equal(index, last):
            break
    return S[index].flatten(1)
