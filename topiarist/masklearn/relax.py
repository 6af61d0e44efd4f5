"""Relaxations: how a discrete mask becomes a smooth function of logits. One interface, three parameterisations.

    Categorical   MaskLLM: one logit for every legal mask of a group. N:M with at most 128 masks a group
    TopN          RoI: one logit per weight, N draws without replacement. Any N:M; fewer logits, less expressive
    Bernoulli     LEAP: one gate per weight and a density penalty. Unstructured masks

A relaxation is a frozen value; weights, logits and the `Draw` (noise key and schedules of one step) are arguments. The
functions here are the plain and readable ones, and the oracle of the fused kernels (`kernels.py`).

W   weight (out, in)                     pi  logits (out, classes, groups), contiguous: each class is a vector
S   candidates (classes, of)             g   noise           y  class probabilities     M  soft mask
kappa  scale of the logits               tau temperature     lam  weight of the regulariser  G  d loss / d(W * M)

Logits keep the weight's rows as their first axis, so both shard alike along it and no group straddles a shard.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from topiarist.core.errors import PatternError
from topiarist.core.patterns import NM, Pattern, Unstructured, parse_pattern
from topiarist.masklearn import noise
from topiarist.masklearn.candidates import candidates, num_classes, similarity
from topiarist.masklearn.relaxation import Dense, Draw, Logits, Mask, Relaxation


@dataclass(frozen=True)
class Categorical(Relaxation):
    """MaskLLM: a categorical distribution over the C(of, keep) legal masks of every group.

    y = softmax((kappa pi + g) / tau),  M = y S,  dpi = kappa / tau * y * (dM S^T - <y, dM S^T>).

    The reference choice at 2:4 and 1:4; 4:8 needs 8.75 logits a weight. Fang et al. 2024 (arXiv 2409.17481), equations
    4 to 6.
    """

    pattern: NM
    name: ClassVar[str] = "categorical"

    def __post_init__(self) -> None:
        candidates(self.pattern)  # raises for patterns with too many

    def logits_shape(self, shape: tuple[int, int]) -> tuple[int, int, int]:
        """(out, C(of, keep), groups) for a weight of `shape`. Raises PatternError if groups do not fill its rows."""
        self.pattern.check(shape)
        return shape[0], num_classes(self.pattern), shape[1] // self.pattern.of

    def probabilities(self, logits: Logits, draw: Draw) -> Logits:
        """y, the soft index."""
        return (self.noisy(logits, draw) / draw.tau).softmax(1)

    def certainty(self, logits: Logits, draw: Draw) -> Float[Tensor, ""]:
        """Mean over groups of the largest probability."""
        return self.probabilities(logits, draw).amax(1).mean()

    def soft_mask(self, logits: Logits, draw: Draw) -> Dense:
        """M = y S: the legal masks of a group, weighted by their probabilities."""
        return self._mix(self.probabilities(logits, draw))

    def _mix(self, y: Tensor) -> Tensor:
        S = candidates(self.pattern, y.device).to(y.dtype)
        return torch.einsum("ocg,cm->ogm", y, S).flatten(1)

    def soft_mask_backward(self, logits: Logits, draw: Draw, dM: Dense) -> Logits:
        """dpi = kappa / tau * y * (dM S^T - <y, dM S^T>)."""
        return self._backward(self.probabilities(logits, draw), draw, dM)

    def _backward(self, y: Tensor, draw: Draw, dM: Tensor) -> Tensor:
        S = candidates(self.pattern, y.device).to(y.dtype)
        dy = torch.einsum("ogm,cm->ocg", dM.unflatten(1, (-1, self.pattern.of)), S)
        return (draw.kappa / draw.tau) * y * (dy - (y * dy).sum(1, keepdim=True))

    def gradient(self, weight: Dense, logits: Logits, grad_effective: Dense, draw: Draw) -> Logits:
        """What the base class gives, with one computation of y for the forward and the backward part."""
        W = weight.to(logits.dtype)
        y = self.probabilities(logits, draw)
        dM = grad_effective.to(logits.dtype) * W
        if draw.lam:
            dM = dM - 2.0 * draw.lam * W.square() * self._mix(y)
        return self._backward(y, draw, dM)

    def preference(self, mask: Mask) -> Logits:
        """How many weights each legal mask shares with the prior's, with mean zero over a group."""
        return similarity(mask.unflatten(1, (-1, self.pattern.of)), self.pattern).transpose(1, 2).contiguous()

    def hard_mask(self, logits: Logits) -> Mask:
        """The legal mask with the largest logit of every group."""
        return candidates(self.pattern, logits.device)[logits.argmax(1)].flatten(1)


@dataclass(frozen=True)
class TopN(Relaxation):
    """RoI: one logit per weight; `keep` successive softmaxes, each with what was already taken removed.

    r = kappa pi + g;  a_1 = softmax(r / tau);  r <- r + log(1 - a_n);  M = a_1 + ... + a_keep: a soft N-hot mask whose
    limit tau -> 0 is Gumbel-top-N, a draw without replacement (at a high tau an entry can exceed 1). 1.0 logit a weight
    for every N:M, where Categorical has 1.5 at 2:4 and 8.75 at 4:8; the default from `of` = 8 on. A little less
    expressive: it cannot prefer a pair as such.
    """

    pattern: NM
    name: ClassVar[str] = "topn"

    def logits_shape(self, shape: tuple[int, int]) -> tuple[int, int, int]:
        """(out, of, groups) for a weight of `shape`. Raises PatternError if groups do not fill its rows."""
        self.pattern.check(shape)
        return shape[0], self.pattern.of, shape[1] // self.pattern.of

    def soft_mask(self, logits: Logits, draw: Draw) -> Dense:
        """M = a_1 + ... + a_keep, the sum of successive softmaxes over a group."""
        r = self.noisy(logits, draw)
        M = torch.zeros_like(r)
        for _ in range(self.pattern.keep):
            a = (r / draw.tau).softmax(1)
            M = M + a
            # log1p(-1) is -inf and its gradient NaN: a probability within fp32 rounding of one counts as 1 - 1e-6.
            r = r + torch.log1p(-a.clamp_max(1.0 - 1e-6))
        return M.transpose(1, 2).flatten(1)

    def preference(self, mask: Mask) -> Logits:
        """1 - keep / of for the weights that the prior keeps, - keep / of for the others."""
        groups = mask.unflatten(1, (-1, self.pattern.of)).transpose(1, 2).float()
        return (groups - self.pattern.keep / self.pattern.of).contiguous()

    def hard_mask(self, logits: Logits) -> Mask:
        """The `keep` largest logits of every group."""
        return self.pattern.mask(logits.transpose(1, 2).flatten(1))


@dataclass(frozen=True)
class Bernoulli(Relaxation):
    """LEAP: an independent gate per weight, M = sigmoid((kappa pi + l) / tau) with logistic noise l.

    For unstructured masks. The density is held by a penalty density_weight * out * in * (mean M - target)^2, folded
    into the backward pass; the hard mask keeps exactly the target number of largest logits. Only the abstract of the
    paper (arXiv 2605.17289) was at hand: the penalty is ours.
    """

    pattern: Unstructured
    density_weight: float = 1.0
    name: ClassVar[str] = "bernoulli"
    takes: ClassVar[type[Pattern]] = Unstructured
    by_row: ClassVar[bool] = False  # the density penalty looks at the whole matrix

    def logits_shape(self, shape: tuple[int, int]) -> tuple[int, int, int]:
        """(out, 1, in): one logit a weight. Raises PatternError for an empty matrix."""
        self.pattern.check(shape)
        return shape[0], 1, shape[1]

    def noise_of(self, words: Int[Tensor, "*words"]) -> Float[Tensor, "*words"]:
        """Standard logistic noise from random 32-bit words, the difference of two Gumbel variables."""
        return noise.logistic(words)

    def soft_mask(self, logits: Logits, draw: Draw) -> Dense:
        """M = sigmoid((kappa pi + l) / tau), an independent gate a weight."""
        return (self.noisy(logits, draw) / draw.tau).sigmoid().squeeze(1)

    def soft_mask_backward(self, logits: Logits, draw: Draw, dM: Dense) -> Logits:
        """dpi = kappa / tau * M * (1 - M) * (dM + push), `push` holding the density."""
        M = self.soft_mask(logits, draw)
        return ((draw.kappa / draw.tau) * M * (1.0 - M) * (dM + self.push(M.mean(), draw))).unsqueeze(1)

    def push(self, density, draw: Draw):
        """What the density penalty adds to every dM, given mean M."""
        return 2.0 * draw.share * self.density_weight * (density - (1.0 - self.pattern.sparsity))

    def preference(self, mask: Mask) -> Logits:
        """1/2 for the weights that the prior keeps, -1/2 for the others."""
        return mask.float().sub_(0.5).unsqueeze(1)

    def hard_mask(self, logits: Logits) -> Mask:
        """The largest logits, as many as the pattern keeps."""
        return self.pattern.mask(logits.squeeze(1))


RELAXATIONS: dict[str, type[Relaxation]] = {kind.name: kind for kind in (Categorical, TopN, Bernoulli)}


def relaxation_for(pattern: Pattern | str, name: str | None = None) -> Relaxation:
    """The relaxation of that name for a pattern; by default Categorical below `of` = 8, TopN above, Bernoulli for
    unstructured masks. Raises PatternError for a name or pattern that has none.
    """
    pattern = parse_pattern(pattern)
    if name is None:
        if isinstance(pattern, NM):
            name = "categorical" if pattern.of < 8 else "topn"
        elif isinstance(pattern, Unstructured):
            name = "bernoulli"
    kind = RELAXATIONS.get(name or "")
    if kind is None or not isinstance(pattern, kind.takes):
        raise PatternError(
            f"no relaxation {name or ''} for pattern {pattern}: categorical and topn learn N:M masks, bernoulli "
            "unstructured ones"
        )
    return kind(pattern)
