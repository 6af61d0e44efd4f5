"""Counter-based noise: every random number is a pure function of (seed, layer, step, sample, row, group, class).

Nothing is drawn from a stateful generator, so the noise of a group is the same whatever the batch split, the order of
layers, a recompute in backward, the number of processes or the sharding; backward draws it again instead of storing it.

The hash is two rounds of multiply and xor-shift on 32-bit words (the "lowbias32" constants of Chris Wellons' hash
prospector, avalanche bias 0.17) with a second key word added between the rounds. Every operation is a 32-bit integer
operation that wraps, so plain torch, C++ and Triton agree in every bit. It costs about a quarter of Philox-4x32-10.

All of it happens in int32: torch has no uint32 arithmetic, and a logical shift is an arithmetic one and a mask.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

M1 = 0x7FEB352D
M2 = 0x846CA68B - (1 << 32)  # as a signed 32-bit word
GOLDEN = 0x9E3779B97F4A7C15
WORD = (1 << 64) - 1

# What a key is for. Noise of different use never shares a stream, even at the same step.
GUMBEL, INIT_A, INIT_B, ROUNDING = 0, 1, 2, 3

Key = tuple[int, int]
"""Two signed 32-bit words."""


def noise_key(seed: int, layer: int, step: int, sample: int = 0, use: int = GUMBEL) -> Key:
    """Mix what a stream is keyed by into two words (splitmix64, one round per part). Plain Python, no tensor."""
    state = 0
    for part in (seed, layer, step, sample, use):
        state = (state + GOLDEN + part) & WORD
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & WORD
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & WORD
        state ^= state >> 31
    return _signed(state & 0xFFFFFFFF), _signed(state >> 32)


def _signed(word: int) -> int:
    return word - (1 << 32) if word >= 1 << 31 else word


def _shift(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (32 - bits)) - 1)


def mix(x: Int[Tensor, "*words"], k1: Int[Tensor, "..."] | int) -> Int[Tensor, "*words"]:
    """The hash of one 32-bit word under the second key word; a bijection of x for every k1."""
    x = x ^ _shift(x, 16)
    x = x * M1
    x = x + k1
    x = x ^ _shift(x, 15)
    x = x * M2
    return x ^ _shift(x, 16)


def row_keys(key: Key, rows: int, *, first_row: int = 0, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Two int32 words for each row; `first_row` is the global index of the first one when the weight is sharded."""
    row = torch.arange(first_row, first_row + rows, dtype=torch.int32, device=device)
    k0 = mix(row ^ key[0], key[1])
    return k0, mix(k0 ^ key[1], key[0])


def bits(
    key: Key,
    rows: int,
    classes: int,
    groups: int,
    *,
    first_row: int = 0,
    first_group: int = 0,
    device: torch.device | str = "cpu",
) -> Int[Tensor, "rows classes groups"]:
    """Random 32-bit words, one for every (row, class, group). The counter of a word is group * classes + class."""
    k0, k1 = row_keys(key, rows, first_row=first_row, device=device)
    group = torch.arange(first_group, first_group + groups, dtype=torch.int32, device=device)
    counter = group[None, :] * classes + torch.arange(classes, dtype=torch.int32, device=device)[:, None]
    return mix(counter ^ k0[:, None, None], k1[:, None, None])


def uniform(words: Int[Tensor, "*words"]) -> Float[Tensor, "*words"]:
    """fp32 in the open interval (0, 1): the middles of 2^23 equal cells, every one exact in fp32."""
    return (_shift(words, 9).float() + 0.5) * 2.0**-23


def gumbel(words: Int[Tensor, "*words"]) -> Float[Tensor, "*words"]:
    """Standard Gumbel noise -log(-log u), fp32, from -2.8 to 16.6."""
    return uniform(words).log_().neg_().log_().neg_()


def logistic(words: Int[Tensor, "*words"]) -> Float[Tensor, "*words"]:
    """Standard logistic noise log u - log(1 - u): the difference of two Gumbel variables."""
    u = uniform(words)
    return u.log() - (1.0 - u).log()


def normal(key_a: Key, key_b: Key, shape: tuple[int, int, int], **where) -> Float[Tensor, "rows classes groups"]:
    """Standard normal noise by Box and Muller, from two streams."""
    radius = (-2.0 * uniform(bits(key_a, *shape, **where)).log()).sqrt_()
    return radius * (2.0 * torch.pi * uniform(bits(key_b, *shape, **where))).cos_()
