"""Linear layers that keep their weight packed in memory and never make all of it dense."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int8, Integer
from torch import Tensor, nn

from topiarist.runtime.build import FORMS, INTEGERS, TILE_ROWS, TYPES, Weight, load_kernels

CPU = torch.device("cpu")
BYTES_PER_THREAD = 1 << 17  # waking another thread costs about as much as reading this
EXPANDING_LEVEL = 2  # of LEVELS: the first with an instruction that spreads bytes by a mask
PANEL_BYTES = 1 << 21  # of dense weight that a large batch works on at a time: stays in L2 or L3
OWN_TOKENS = 160  # more are multiplied faster by torch


class PackedLinear(nn.Module):
    """y = x W^T + b with W packed: bits that say where, and the values. For inference; any batch, same results.

    Up to `max_batch` tokens the kernel expands the weight in registers. Larger batches expand one panel of rows after
    the other into cache and multiply it there, or use `dense`, the original weight, if that was kept.
    """

    masks: Tensor
    values: Tensor
    starts: Tensor

    def __init__(self, linear: nn.Linear, *, max_batch: int = 4, keep_dense: bool = False) -> None:
        weight = linear.weight.detach()
        parts = load_kernels().pack(weight.contiguous(), torch.get_num_threads())
        self._fill(tuple(weight.shape), weight.dtype, linear.bias, max_batch, dict(zip(_PARTS, parts, strict=True)))
        self.dense = weight if keep_dense else None

    def _fill(
        self, shape: tuple[int, ...], dtype: torch.dtype, bias: Tensor | None, max_batch: int, parts: dict[str, Tensor]
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = shape
        self.dtype = dtype
        self.max_batch = max_batch
        self.training = False
        for name, part in parts.items():
            # Not in the state dict, which shows the dense weight instead: a saved model must load without us.
            self.register_buffer(name, part, persistent=False)
        self.bias = bias
        self.dense: Tensor | None = None
        self._most_threads = -(-self.packed_bytes // BYTES_PER_THREAD)

    @property
    def packed_bytes(self) -> int:
        """What one pass over the weight reads."""
        return sum(part.nbytes for part in self.buffers())

    @property
    def weight(self) -> Float[Tensor, "out in"]:
        """The dense weight, equal to the original (a -0.0 is now a +0.0); made anew at each call unless it was kept."""
        return self._rows(range(-(-self.out_features // TILE_ROWS)), self.dtype) if self.dense is None else self.dense

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """x W^T + b; by torch on the dense weight where dtype or device do not fit the kernel, or x needs a gradient."""
        usable = x.dtype == self.dtype and x.device == self.values.device == CPU and x.shape[-1] == self.in_features
        usable = usable and (self.bias is None or self.bias.dtype == self.dtype)
        if not usable or (x.requires_grad and torch.is_grad_enabled()):
            return F.linear(x, self.weight, self.bias)  # torch's own errors, and its gradients
        tokens = x.numel() // self.in_features
        if tokens > self.max_batch:
            return self.multiply_by_panels(x) if self.dense is None else F.linear(x, self.dense, self.bias)
        return self.multiply(x.reshape(tokens, self.in_features)).view(*x.shape[:-1], self.out_features)

    def multiply(self, x: Float[Tensor, "tokens in"], *, level: int | None = None) -> Float[Tensor, "tokens out"]:
        """The kernel, whatever the number of tokens. `level`: an instruction set, as an index of LEVELS."""
        y = torch.empty(x.shape[0], self.out_features, dtype=self.dtype)
        threads = min(torch.get_num_threads(), self._most_threads)
        load_kernels().multiply(self.described(), x.contiguous(), y, threads, level)
        return y

    def multiply_by_panels(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """The product with one panel of dense rows after the other, whatever the number of tokens.

        Panels are multiplied by torch; by our own code those that few tokens meet, on a processor with bf16 products and
        without AMX.
        """
        weight, kernels = self.described(), load_kernels()
        inputs = x.reshape(-1, self.in_features)
        few = len(inputs) <= OWN_TOKENS and x.dtype == self.dtype == torch.bfloat16
        if few and kernels.has_panels(weight):
            out = torch.empty(len(inputs), self.out_features, dtype=self.dtype)
            kernels.multiply_by_panels(weight, inputs.contiguous(), out, torch.get_num_threads())
            return out.view(*x.shape[:-1], self.out_features)
        dtype = fastest_dtype(self.dtype)
        step = max(1, PANEL_BYTES // (self.in_features * dtype.itemsize * TILE_ROWS))
        num_tiles = -(-self.out_features // TILE_ROWS)
        inputs = inputs.to(dtype)
        bias = None if self.bias is None else self.bias.to(dtype)
        out = torch.empty(len(inputs), self.out_features, dtype=self.dtype)
        panel = torch.empty(min(step, num_tiles) * TILE_ROWS, self.in_features, dtype=dtype)
        for first in range(0, num_tiles, step):
            tiles = range(first, min(first + step, num_tiles))
            rows = slice(first * TILE_ROWS, min(tiles.stop * TILE_ROWS, self.out_features))
            dense = panel[: rows.stop - rows.start]
            kernels.expand(weight, tiles, dense, torch.get_num_threads())
            out[:, rows] = F.linear(inputs, dense, None if bias is None else bias[rows])
        return out.view(*x.shape[:-1], self.out_features)

    def described(self) -> Weight:
        """The weight as the kernels want it; valid as long as the module's buffers stay where they are."""
        if self.values.device != CPU:
            raise RuntimeError(
                f"a packed linear was moved to {self.values.device}; call restore(model) before moving it"
            )
        weight = Weight(rows=self.out_features, cols=self.in_features, type=TYPES[self.dtype])
        weight.masks, weight.values = self.masks.data_ptr(), self.values.data_ptr()
        weight.starts = self.starts.data_ptr()
        if self.bias is not None:
            weight.bias, weight.bias_type = self.bias.data_ptr(), TYPES[self.bias.dtype]
        return weight

    def _rows(self, tiles: range, dtype: torch.dtype) -> Tensor:
        weight, stop = self.described(), min(tiles.stop * TILE_ROWS, self.out_features)
        out = torch.empty(stop - tiles.start * TILE_ROWS, self.in_features, dtype=dtype)
        load_kernels().expand(weight, tiles, out, torch.get_num_threads())
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
        """Sizes and whether there is a bias, as nn.Linear shows them."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class QuantisedLinear(PackedLinear):
    """y = x W^T + b with W as 8-bit or 4-bit integers and scales, without its zeros where that is smaller.

    The kernel rounds x to 8 bits per token and 32 columns; products by panels do not. `weight` is code times scale, rounded
    once to `dtype`, which is what other programs compute with.

    codes: integers of at most `bits` bits. scales: one a row and group of columns; a group is a multiple of 32, or the
    whole row; inputs and outputs have their dtype. max_batch: tokens up to which the kernel is used. form: how the integers
    lie, a key of FORMS; default the fastest on this processor. Raises ValueError for groups that do not fit.
    """

    scales: Tensor

    def __init__(
        self,
        codes: Int8[Tensor, "out in"],
        scales: Float[Tensor, "out groups"],
        bits: int,
        *,
        bias: Tensor | None = None,
        max_batch: int = 4,
        form: str | None = None,
    ) -> None:
        rows, cols = codes.shape
        group = cols // scales.shape[1]
        if cols % scales.shape[1] or (scales.shape[1] > 1 and group % 32):
            raise ValueError(f"{scales.shape[1]} groups of {cols} columns are not multiples of 32 columns")
        form = form or form_of(codes, bits)
        parts = load_kernels().pack_integers(codes.contiguous(), bits, form, torch.get_num_threads())
        tiled = F.pad(scales, (0, 0, 0, -rows % TILE_ROWS)).unflatten(0, (-1, TILE_ROWS)).mT.contiguous()
        # As raw integers, which `.to(dtype)` of a model leaves alone; fp16 has values that bf16 has not.
        stored = tiled.view(torch.int16) if scales.dtype == torch.bfloat16 else tiled.float().view(torch.int32)
        buffers = dict(zip(_PARTS, parts, strict=True)) | {"scales": stored}
        self._fill((rows, cols), scales.dtype, bias, max_batch, buffers)
        self.bits, self.form, self.group = bits, form, group

    def described(self) -> Weight:
        """What the base class says, and where the scales are, in which dtype, and how integers are packed."""
        weight = super().described()
        weight.type, weight.form, weight.group = INTEGERS[self.bits], FORMS[self.form], self.group
        weight.scales = self.scales.data_ptr()
        weight.scale_type = TYPES[torch.bfloat16 if self.scales.dtype == torch.int16 else torch.float32]
        return weight

    @property
    def codes(self) -> Int8[Tensor, "out in"]:
        """The integers."""
        return self._rows(range(-(-self.out_features // TILE_ROWS)), torch.int8)

    def extra_repr(self) -> str:
        """What the base class shows, and bits, group and form."""
        return f"{super().extra_repr()}, bits={self.bits}, group={self.group}, form={self.form!r}"


_PARTS = ("masks", "values", "starts")


def form_of(codes: Int8[Tensor, "rows cols"], bits: int) -> str:
    """The form in which integers are multiplied fastest here.

    "2:4" wherever the pattern holds and most groups have two values. At other zeros "bitmask" takes fewer bytes than "full",
    and with AVX-512 it is the faster; without, placing the values costs more than reading the zeros.
    """
    kept = codes != 0
    share = float(kept.float().mean())
    two_four = codes.shape[1] % 4 == 0 and int(kept.unflatten(1, (-1, 4)).sum(-1, dtype=torch.int8).max()) <= 2
    if two_four and share > 0.45:
        return "2:4"
    return "bitmask" if share < 1 - 1 / bits and load_kernels().level >= EXPANDING_LEVEL else "full"


@functools.cache
def fastest_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which torch multiplies a panel fastest: a model's own, or fp32 where the processor lacks it.

    Measured once a process.
    """
    from topiarist.runtime.cpu import race

    if dtype == torch.float32:
        return dtype
    weight, x = torch.randn(512, 512), torch.randn(64, 512)
    calls = [functools.partial(F.linear, x.to(kind), weight.to(kind)) for kind in (dtype, torch.float32)]
    own, wide = race([calls], seconds=0.02)
    return dtype if own <= wide else torch.float32


class QuantisedEmbedding(nn.Module):
    """Token embeddings as 8-bit or 4-bit integers; `table` may be the model's head, where the two are tied."""

    def __init__(self, table: QuantisedLinear) -> None:
        super().__init__()
        self._table = (table,)  # not a submodule, whose weight would be saved twice
        self.training = False

    @property
    def table(self) -> QuantisedLinear:
        """The packed table, one row a token."""
        return self._table[0]

    @property
    def weight(self) -> Float[Tensor, "tokens width"]:
        """The dense embeddings, made anew at each call."""
        return self.table.weight

    def forward(self, ids: Integer[Tensor, "*batch"]) -> Float[Tensor, "*batch width"]:
        """The rows of the token ids, in the table's dtype. Raises IndexError for ids that the table has not."""
        out = torch.empty(ids.numel(), self.table.in_features)
        load_kernels().rows(self.table.described(), ids.flatten(), out)
        return out.to(self.table.dtype).view(*ids.shape, self.table.in_features)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[prefix + "weight"] = self.weight
