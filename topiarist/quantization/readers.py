"""Quantised tensors of other programs' formats, back to floating point.

Every function takes the tensors of one parameter as they are stored and gives the parameter as a model holds it.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int, Shaped, UInt8
from torch import Tensor

from topiarist.core.errors import QuantizationError
from topiarist.quantization.packing import unpack

FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""Values of the codes 0 to 15 of E2M1 (OCP Microscaling Formats 1.0, table 5)."""
FP4_GROUP = 32
FP4_BIAS = 127


def from_packed_integers(
    packed: Int[Tensor, "out words"],
    scale: Float[Tensor, "out groups"],
    shape: tuple[int, int],
    zero_point: Int[Tensor, "words_of_rows groups"] | None = None,
    g_idx: Int[Tensor, " in"] | None = None,
) -> Float[Tensor, "out in"]:
    """compressed-tensors `pack-quantized`: (q - zero) * scale, in the scale's dtype.

    zero_point: packed along the rows. g_idx: the group of every column, where columns were sorted before they were grouped.
    Raises QuantizationError if the tensors do not fit each other.
    """
    rows, columns = shape
    bits = packed.shape[1] * 32 // columns if columns else 0
    q = unpack(packed, bits, columns)
    if packed.shape[0] != rows or scale.ndim != 2 or scale.shape[0] != rows or not scale.shape[1]:
        raise QuantizationError(
            f"packed weights {tuple(packed.shape)} and scales {tuple(scale.shape)} do not make a matrix {tuple(shape)}: the "
            "file is damaged; download it again"
        )
    offset = 1 << (bits - 1)
    zero = torch.full_like(scale, offset, dtype=torch.int16)
    if zero_point is not None:
        zero = unpack(zero_point.t().contiguous(), bits, rows).t()
    return _grouped(q, scale, zero, g_idx)


def from_integers(
    q: Int[Tensor, "out in"], scale: Float[Tensor, "*scale_shape"], zero_point: Shaped[Tensor, "..."] | None = None
) -> Float[Tensor, "out in"]:
    """compressed-tensors `int-quantized`: (q - zero) * scale with a scale a tensor, a row, or a group of a row."""
    scale = scale.reshape(scale.shape[0] if scale.ndim else 1, -1)
    scale = scale.expand(q.shape[0], -1)
    zero = torch.zeros_like(scale) if zero_point is None else zero_point.reshape(-1, scale.shape[1]).expand_as(scale)
    return _grouped(q, scale, zero, None)


def from_float8(
    weight: Shaped[Tensor, "out in"], scale: Float[Tensor, "*scale_shape"], block: tuple[int, int] = (128, 128)
) -> Float[Tensor, "out in"]:
    """float8 weights times a scale a tensor, a row (out, 1), or a block of rows and columns, in fp32.

    block: rows and columns of a block (DeepSeek-V3, arXiv 2412.19437, section 3.3); the last one of an axis may be smaller.
    Raises QuantizationError if the scales are none of these.
    """
    W, scale = weight.float(), scale.float()
    rows, columns = W.shape
    if scale.numel() == 1:
        return W * scale.reshape(())
    if tuple(scale.shape) in ((rows,), (rows, 1)):
        return W * scale.reshape(-1, 1)
    if tuple(scale.shape) != (-(-rows // block[0]), -(-columns // block[1])):
        raise QuantizationError(
            f"scales {tuple(scale.shape)} of float8 weights {tuple(W.shape)} are not one a block of {block[0]} x {block[1]}: "
            "config.json and the file do not belong together"
        )
    scale = scale.repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :columns]
    return W * scale


def from_mxfp4(
    blocks: UInt8[Tensor, "*lead groups bytes"], scales: UInt8[Tensor, "*lead groups"]
) -> Float[Tensor, "*lead in"]:
    """MXFP4: two E2M1 codes a byte, low nibble first, times a power of two for every 32 of them, in fp32."""
    if blocks.shape[:-1] != scales.shape or blocks.shape[-1] * 2 != FP4_GROUP:
        raise QuantizationError(
            f"MXFP4 blocks {tuple(blocks.shape)} do not fit scales {tuple(scales.shape)}: "
            "the file is damaged; download it again"
        )
    table = torch.tensor(FP4, device=blocks.device)
    values = torch.stack([table[(blocks & 15).long()], table[(blocks >> 4).long()]], -1).flatten(-2)
    return torch.ldexp(values, scales.to(torch.int32)[..., None] - FP4_BIAS).flatten(-2)


def from_gptq(
    qweight: Int[Tensor, "words_of_in out"],
    qzeros: Int[Tensor, "groups words_of_out"],
    scales: Float[Tensor, "groups out"],
    g_idx: Int[Tensor, " in"] | None = None,
    *,
    bits: int = 4,
    stored_less_one: bool = True,
) -> Float[Tensor, "out in"]:
    """AutoGPTQ's layout, in the scales' dtype: weights packed along the inputs, zero points along the outputs.

    stored_less_one: zero points are stored one less than they are (`checkpoint_format` "gptq"; not so in "gptq_v2").
    """
    groups, out = scales.shape
    columns = qweight.shape[0] * 32 // bits
    q = unpack(qweight.t().contiguous(), bits, columns)
    zero = unpack(qzeros, bits, out).t()
    if stored_less_one:
        zero = (zero + 1) & ((1 << bits) - 1)
    if qzeros.shape[0] != groups or q.shape[0] != out:
        raise QuantizationError(
            f"GPTQ weights {tuple(qweight.shape)} do not fit scales {tuple(scales.shape)}: "
            "the file is damaged; download it again"
        )
    return _grouped(q, scales.t(), zero, g_idx)


def _grouped(
    q: Int[Tensor, "out in"],
    scale: Float[Tensor, "out groups"],
    zero: Tensor,
    g_idx: Int[Tensor, " in"] | None,
) -> Float[Tensor, "out in"]:
    """(q - zero) * scale, each column with its group's."""
    columns, groups = q.shape[1], scale.shape[1]
    if g_idx is None:
        if columns % groups:
            raise QuantizationError(
                f"{groups} groups do not divide {columns} columns: the file is damaged; download it again"
            )
        index = torch.arange(columns, device=q.device) // (columns // groups)
    else:
        index = g_idx.long()
    return (q - zero[:, index]).to(scale.dtype) * scale[:, index]
