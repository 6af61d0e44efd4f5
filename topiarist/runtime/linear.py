"""A linear layer that keeps its weight packed in memory and never makes it dense while decoding."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from topiarist.runtime.build import TILE_ROWS, TYPES, load_kernels

CPU = torch.device("cpu")
BYTES_PER_THREAD = 1 << 17  # waking another thread costs about as much as reading this
PANEL_BYTES = 1 << 21  # of dense weight that a large batch works on at a time: stays in L2 or L3


class PackedLinear(nn.Module):
    """y = x W^T + b with W packed: bits that say where, and the values. For inference; any batch, same results.

    Up to `max_batch` tokens the kernel expands the weight in registers. Larger batches expand one panel of rows after
    the other into cache and multiply it with torch, or use `dense`, the original weight, if that was kept.
    """

    masks: Tensor
    values: Tensor
    starts: Tensor

    def __init__(self, linear: nn.Linear, *, max_batch: int = 4, keep_dense: bool = False) -> None:
        super().__init__()
        weight = linear.weight.detach()
        self.out_features, self.in_features = weight.shape
        self.dtype = weight.dtype
        self.max_batch = max_batch
        self.training = False
        self._type = TYPES[weight.dtype]
        parts = load_kernels().pack(self._type, weight.contiguous(), torch.get_num_threads())
        for name, part in zip(("masks", "values", "starts"), parts, strict=True):
            # Not in the state dict, which shows the dense weight instead: a saved model must load without us.
            self.register_buffer(name, part, persistent=False)
        self.bias = linear.bias
        self.dense = weight if keep_dense else None
        self._most_threads = -(-self.packed_bytes // BYTES_PER_THREAD)

    @property
    def packed_bytes(self) -> int:
        """What one pass over the weight reads."""
        return self.masks.nbytes + self.values.nbytes + self.starts.nbytes

    @property
    def weight(self) -> Float[Tensor, "out in"]:
        """The dense weight, equal to the original (a -0.0 is now a +0.0); made anew at each call unless it was kept."""
        return self._rows(range(-(-self.out_features // TILE_ROWS))) if self.dense is None else self.dense

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        usable = x.dtype == self.dtype and x.device == self.masks.device == CPU and x.shape[-1] == self.in_features
        usable = usable and (self.bias is None or self.bias.dtype == self.dtype)
        if not usable or (x.requires_grad and torch.is_grad_enabled()):
            return F.linear(x, self.weight, self.bias)  # torch's own errors, and its gradients
        tokens = x.numel() // self.in_features
        if tokens > self.max_batch:
            return self.multiply_by_panels(x) if self.dense is None else F.linear(x, self.dense, self.bias)
        return self.multiply(x.reshape(tokens, self.in_features)).view(*x.shape[:-1], self.out_features)

    def multiply(self, x: Float[Tensor, "tokens in"]) -> Float[Tensor, "tokens out"]:
        """The kernel, whatever the number of tokens."""
        y = torch.empty(x.shape[0], self.out_features, dtype=self.dtype)
        load_kernels().multiply(
            self._type, self.out_features, self.in_features, self.masks, self.values, self.starts,
            x.contiguous(), self.bias, y, min(torch.get_num_threads(), self._most_threads),
        )  # fmt: skip
        return y

    def multiply_by_panels(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """torch's product with one panel of dense rows after the other, whatever the number of tokens."""
        row_bytes = self.in_features * self.dtype.itemsize
        step = max(1, PANEL_BYTES // (row_bytes * TILE_ROWS))
        num_tiles = -(-self.out_features // TILE_ROWS)
        parts = []
        for first in range(0, num_tiles, step):
            tiles = range(first, min(first + step, num_tiles))
            rows = slice(first * TILE_ROWS, tiles.stop * TILE_ROWS)
            parts.append(F.linear(x, self._rows(tiles), None if self.bias is None else self.bias[rows]))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def _rows(self, tiles: range) -> Tensor:
        if self.masks.device != CPU:
            raise RuntimeError(
                f"a packed linear was moved to {self.masks.device}; call restore(model) before moving it"
            )
        stop = min(tiles.stop * TILE_ROWS, self.out_features)
        out = torch.empty(stop - tiles.start * TILE_ROWS, self.in_features, dtype=self.dtype)
        load_kernels().expand(
            self._type, self.out_features, self.in_features, self.masks, self.values, self.starts,
            tiles, out, torch.get_num_threads(),
        )  # fmt: skip
        return out

    def to_linear(self) -> nn.Linear:
        """The ordinary layer again."""
        linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        linear.weight = nn.Parameter(self.weight, requires_grad=False)
        linear.bias = self.bias  # pyright: ignore[reportAttributeAccessIssue]
        return linear

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[prefix + "weight"] = self.weight
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
