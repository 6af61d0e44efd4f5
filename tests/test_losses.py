"""Losses made a few rows at a time against plain torch, in value, gradient and dtype."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from topiarist.core import losses
from topiarist.core.losses import divergence, next_token_loss, next_token_losses


def case(dtype: torch.dtype, batch: int = 3, window: int = 7) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits of a model, those of another one, tokens; 21 positions are no multiple of ROWS."""
    rng = torch.Generator().manual_seed(0)
    own, other = (4 * torch.randn(batch, window, 50, generator=rng) for _ in range(2))
    return own.to(dtype).requires_grad_(), other.to(dtype), torch.randint(50, (batch, window), generator=rng)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_of_every_token(dtype: torch.dtype):
    own, _, tokens = case(dtype)
    found = next_token_losses(own, tokens)
    expected = F.cross_entropy(own[:, :-1].float().flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    assert not found.requires_grad and found.dtype == torch.float32
    torch.testing.assert_close(found, expected.view(3, 6), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mean_loss_and_its_gradient(dtype: torch.dtype):
    own, _, tokens = case(dtype)
    (expected,) = torch.autograd.grad(
        3 * F.cross_entropy(own[:, :-1].float().flatten(0, 1), tokens[:, 1:].flatten()), own
    )
    loss = next_token_loss(own, tokens)
    (found,) = torch.autograd.grad(3 * loss, own)
    torch.testing.assert_close(loss, next_token_losses(own, tokens).mean())
    assert found.dtype == dtype and not bool(found[:, -1].any())
    torch.testing.assert_close(found, expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_divergence_and_its_gradient(dtype: torch.dtype):
    own, other, _ = case(dtype)
    target = other.float().log_softmax(-1)
    expected = F.kl_div(own.float().log_softmax(-1), target, reduction="none", log_target=True).sum(-1).mean()
    found = divergence(own, other)
    torch.testing.assert_close(found, expected)
    (slope,), (wanted,) = torch.autograd.grad(found, own), torch.autograd.grad(expected, own)
    assert slope.dtype == dtype
    torch.testing.assert_close(slope, wanted, rtol=1e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-6)
    assert abs(float(divergence(other, other))) < 1e-6


def test_rows_at_a_time_change_nothing(monkeypatch: pytest.MonkeyPatch):
    own, other, tokens = case(torch.bfloat16)
    found = []
    for rows in (1, 8, 64):
        monkeypatch.setattr(losses, "ROWS", rows)
        values = next_token_losses(own, tokens), next_token_loss(own, tokens), divergence(own, other)
        found.append([*values, *torch.autograd.grad(values[1] + values[2], own)])
    for values in found[1:]:
        for value, first in zip(values, found[0], strict=True):
            torch.testing.assert_close(value, first, rtol=1e-6, atol=0)


def test_a_loss_that_is_not_a_number_says_so():
    own, other, tokens = case(torch.float32)
    broken = torch.full_like(own, float("nan"))
    assert bool(next_token_loss(broken, tokens).isnan()) and bool(divergence(broken, other).isnan())
