"""What a mask file says about its masks, checked before anything is read that it describes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from topiarist.core.errors import CheckpointError
from topiarist.core.patterns import parse_pattern
from topiarist.masks.bitpack import check_packed


@dataclass(frozen=True, config=ConfigDict(extra="forbid", strict=True))
class Entry:
    """What a file says about one mask."""

    pattern: str
    shape: Annotated[tuple[Annotated[int, Field(gt=0)], ...], Field(min_length=1)]
    axis: Literal[-1, -2]
    """The axis that groups run along: -1, or -2 where the weight is stored (in, out)."""
    encoding: Literal["bitmap", "index8", "index64"]
    dtype: str
    sha256: str
    """Of the dense weight that the mask belongs to, in `dtype`."""
    packed_sha256: str

    @property
    def packed_shape(self) -> tuple[int, ...]:
        """The shape in which groups run along the last axis."""
        shape = list(self.shape)
        shape[-1], shape[self.axis] = shape[self.axis], shape[-1]
        return tuple(shape)

    def check(self, dtype: str, count: int) -> None:
        """Raise CheckpointError or PatternError unless `count` stored elements of `dtype` can be this mask."""
        if not isinstance(getattr(torch, self.dtype, None), torch.dtype):
            raise CheckpointError(f"there is no dtype {self.dtype}")
        if self.axis < -len(self.shape):
            raise CheckpointError(f"shape {self.shape} has no axis {self.axis}")
        check_packed((dtype, count), self.packed_shape, parse_pattern(self.pattern), self.encoding)


def read_entry(stated: Any) -> Entry:
    """An entry from its JSON. Raises KeyError, TypeError or ValueError if it is none."""
    return Entry(**{**stated, "shape": tuple(stated["shape"])})


def metadata_digest(metadata: Mapping[str, Any]) -> str:
    """sha256 over all that a file says about its masks."""
    rest = {key: value for key, value in metadata.items() if key != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
