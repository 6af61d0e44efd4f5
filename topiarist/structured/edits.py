"""Other numbers in a config, through its own constructor and its checks."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from typing import Any

from topiarist.structured.units import Stated

_LAYERS = re.compile(r"((num|n)_(hidden_|decoder_)?|decoder_)layers?\Z")
_BY_LAYER = re.compile(r"layer|block|intermediate_size|pattern|heads|types")
_INDICES = re.compile(r"(_(ids|idxs?|indices)|only_layers)\Z")
_FIRST = re.compile(r"first_k_dense|(num|n)_dense_layers|first_dense|dense_layers_first")


def text_of(config: Any) -> Any:
    """The part of a config that is the language model's own; of most models all of it."""
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config


def state_numbers(config: Any, stated: Sequence[Stated], before: int, after: int) -> None:
    """Write into a config that there are `after` units where there were `before`.

    Of a field with a number a layer, those of so many units change. Its constructor's checks come later.
    """
    text = text_of(config)
    for one in stated:
        new: Any = one.per_unit * after + one.constant
        value = getattr(text, one.field, None)
        if isinstance(value, list | tuple):
            new = [new if entry == one.per_unit * before + one.constant else entry for entry in value]
        setattr(text, one.field, new)


def with_numbers(config: Any, stated: Sequence[Stated], before: int, after: int) -> Any:
    """A copy of a config that states another number of units, checked again."""
    config = copy.deepcopy(config)
    state_numbers(config, stated, before, after)
    return type(config).from_dict(config.to_dict())


def with_blocks(config: Any, blocks: Sequence[int], count: int) -> Any:
    """A copy of a config for some of its `count` blocks: their number, lists with an entry a block, lists of their numbers.

    Not yet checked by its constructor: other numbers may follow.
    """
    config = copy.deepcopy(config)
    if list(blocks) == list(range(count)):
        return config
    text = text_of(config)
    for name, value in list(vars(text).items()):
        if name.startswith("_"):
            continue
        if _INDICES.search(name) and isinstance(value, list | tuple) and all(isinstance(i, int) for i in value):
            setattr(text, name, [new for new, old in enumerate(blocks) if old in value])
        elif isinstance(value, list | tuple) and len(value) == count and _BY_LAYER.search(name):
            setattr(text, name, [value[i] for i in blocks])
        elif isinstance(value, int) and not isinstance(value, bool):
            if _LAYERS.match(name) and value == count:
                setattr(text, name, len(blocks))
            elif _FIRST.search(name):
                setattr(text, name, sum(old < value for old in blocks))
    return config
