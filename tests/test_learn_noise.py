"""The noise is a pure function of its counters, bit by bit, and it is distributed as it should be."""

import pytest
import torch

from topiarist.masklearn import noise

KEY0, KEY1 = -101518757, -163047464
WORDS = [
    -2106273801,
    1480278573,
    -719383452,
    140538353,
    313067989,
    -1016645587,
    -1891646820,
    -116847950,
    82452188,
    -2126053737,
    -957119875,
    -1099541862,
]


def test_recorded_words():
    """Pinned: a change of any bit changes every mask that a resumed run would draw."""
    assert noise.noise_key(1, 2, 3, 4) == (KEY0, KEY1)
    words = noise.bits((KEY0, KEY1), 2, 3, 2)
    assert words.dtype == torch.int32
    assert words.flatten().tolist() == WORDS


def test_a_shard_draws_what_the_whole_draws():
    key = noise.noise_key(0, 5, 7)
    whole = noise.bits(key, 12, 6, 40)
    assert torch.equal(noise.bits(key, 5, 6, 40, first_row=4), whole[4:9])
    assert torch.equal(noise.bits(key, 12, 6, 15, first_group=20), whole[:, :, 20:35])


@pytest.mark.parametrize("part", range(5))
def test_every_part_of_the_key_counts(part):
    parts = [1, 2, 3, 4, 0]
    other = [value + (index == part) for index, value in enumerate(parts)]
    a, b = (noise.uniform(noise.bits(noise.noise_key(*k), 64, 6, 64)).flatten() for k in (parts, other))
    assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1]) < 0.03


def test_words_are_uniform_and_uncorrelated():
    """Moments, every single bit, neighbours along all three axes, and the same place in consecutive steps."""
    words = [noise.bits(noise.noise_key(0, 0, step), 256, 6, 256) for step in range(2)]
    n = words[0].numel()
    u = noise.uniform(words[0])
    assert u.min() > 0 and u.max() < 1
    assert abs(u.mean() - 0.5) < 4 * 0.289 / n**0.5
    for bit in range(32):
        ones = ((words[0] >> bit) & 1).float().mean()
        assert abs(ones - 0.5) < 5 * 0.5 / n**0.5, f"bit {bit}"
    centred = u - 0.5
    for axis in range(3):
        size = u.shape[axis]
        product = centred.narrow(axis, 0, size - 1) * centred.narrow(axis, 1, size - 1)
        assert abs(product.mean()) * 12 < 5 / product.numel() ** 0.5, f"axis {axis}"
    assert abs((centred * (noise.uniform(words[1]) - 0.5)).mean()) * 12 < 5 / n**0.5


def test_distributions():
    key = noise.noise_key(0, 0, 0)
    gumbel = noise.gumbel(noise.bits(key, 512, 6, 256))
    assert abs(gumbel.mean() - 0.5772) < 0.006 and abs(gumbel.std() - 1.2825) < 0.006
    logistic = noise.logistic(noise.bits(key, 512, 6, 256))
    assert abs(logistic.mean()) < 0.01 and abs(logistic.std() - 1.8138) < 0.01
    normal = noise.normal(key, noise.noise_key(0, 0, 1), (512, 6, 256))
    assert abs(normal.mean()) < 0.006 and abs(normal.std() - 1.0) < 0.006


def test_gumbel_argmax_draws_from_the_softmax():
    p = torch.tensor([0.5, 0.3, 0.15, 0.05])
    g = noise.gumbel(noise.bits(noise.noise_key(3, 0, 0), 400, 4, 500))
    drawn = (p.log()[None, :, None] + g).argmax(1).flatten()
    assert torch.allclose(torch.bincount(drawn) / len(drawn), p, atol=0.005)
