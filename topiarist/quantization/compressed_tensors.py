"""The `pack-quantized` format of the compressed-tensors package (0.20), which transformers and vLLM open.

A matrix P of (out, in) in b bits with groups of g weights is stored as
    P.weight_packed  int32 (out, ceil(in * b / 32))  q + 2^(b-1), packed along a row
    P.weight_scale   the model's dtype (out, in / g)
    P.weight_shape   int64 (2,)
and config.json says how to read it. There is no zero point: a zero weight stays an exact zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from topiarist.core.errors import QuantizationError
from topiarist.quantization.grid import Grid, QuantizedWeight
from topiarist.quantization.packing import pack, unpack

PACKED, SCALE, SHAPE = "weight_packed", "weight_scale", "weight_shape"


def to_tensors(weight: QuantizedWeight) -> dict[str, Tensor]:
    """The tensors of one matrix, by the ends of their names."""
    offset = 1 << (weight.grid.bits - 1)
    return {
        PACKED: pack(weight.q.to(torch.int16) + offset, weight.grid.bits),
        SCALE: weight.scale,
        SHAPE: torch.tensor(weight.q.shape, dtype=torch.int64),
    }


def from_tensors(tensors: Mapping[str, Tensor], bits: int) -> QuantizedWeight:
    """The inverse of `to_tensors`, bit for bit. Raises QuantizationError if the three do not fit each other."""
    packed, scale, shape = tensors[PACKED], tensors[SCALE], tensors[SHAPE].tolist()
    if len(shape) != 2 or packed.shape[0] != shape[0] or scale.shape[0] != shape[0] or shape[1] % scale.shape[1]:
        raise QuantizationError(
            f"packed weights {tuple(packed.shape)} and scales {tuple(scale.shape)} do not make a matrix {tuple(shape)}: the "
            "file is damaged; download it again"
        )
    q = unpack(packed, bits, shape[1]) - (1 << (bits - 1))
    group = None if scale.shape[1] == 1 else shape[1] // scale.shape[1]
    return QuantizedWeight(q.to(torch.int8), scale, Grid(bits=8 if bits == 8 else 4, group=group))


def quantization_config(groups: Sequence[tuple[Sequence[str], Grid]], ignore: Sequence[str]) -> dict[str, Any]:
    """The `quantization_config` of config.json.

    groups: (classes or `re:` expressions of module names, grid) of each kind of module. ignore: modules that keep
    their weights.
    """
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": list(ignore),
        "kv_cache_scheme": None,
        "config_groups": {
            f"group_{i}": {
                "targets": list(targets),
                "input_activations": None,
                "output_activations": None,
                "weights": _weights(grid),
            }
            for i, (targets, grid) in enumerate(groups)
        },
    }


def _weights(grid: Grid) -> dict[str, Any]:
    return {
        "num_bits": grid.bits,
        "type": "int",
        "symmetric": True,
        "strategy": "channel" if grid.group is None else "group",
        "group_size": grid.group,
        "dynamic": False,
        "actorder": None,
    }
