"""Configs with one number changed, by which the units of a model type without a row are found."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from topiarist.core.errors import UnsupportedModel
from topiarist.structured.edits import text_of
from topiarist.structured.units import Stated

_WIDTH = re.compile(r"inter|ffn|ff_|_ff\b|inner|feed|mlp|(expert|moe|shared)\w*(dim|size)")
_NO_WIDTH = re.compile(
    r"vocab|head|layer|rank|window|token|capacity|mamba|ssm|conv|group|ratio|factor|freq|step|(^|_)(num|n)_(?!inner)"
)


@dataclass(frozen=True)
class Attempt:
    """A changed config: units before and after, and the fields that state them."""

    before: int
    after: int
    stated: tuple[Stated, ...]
    per_group: int = 1
    """Query heads of a KV group."""
    kv: int = 0
    """KV heads, where heads are meant."""
    known: bool = True
    """False where the config leaves the number of units to the code; it is read from the shapes."""

    @property
    def field(self) -> str:
        """The number of the config that is the number of units, or a multiple of it."""
        return min((s for s in self.stated if s.per_unit), key=lambda s: s.per_unit).field

    @property
    def said(self) -> str:
        """The numbers of the config that state the units, and how many there are."""
        return ", ".join(f"{s.field} {self.before or ''}".rstrip() for s in self.stated if s.per_unit)


def channels(model: Any) -> Iterator[Attempt]:
    """Numbers of the config that may be a width of a feed-forward network, by their names."""
    text = text_of(model.config)
    names = dict.fromkeys([*vars(text), *getattr(text, "attribute_map", {})])
    for name in sorted(names):
        if name.startswith("_") or not _WIDTH.search(name) or _NO_WIDTH.search(name):
            continue
        value = getattr(text, name, None)
        if getattr(text, "attribute_map", {}).get(name) in names:
            continue
        if value is None:
            yield Attempt(0, int(text.hidden_size), (Stated(name, 1),), known=False)
        counts = value if isinstance(value, list | tuple) else [value]
        for count in dict.fromkeys(c for c in counts if isinstance(c, int) and not isinstance(c, bool) and c > 1):
            yield Attempt(count, count // 2, (Stated(name, 1),))


def head_counts(model: Any) -> tuple[int, int]:
    """(query heads, KV heads) as the config states them. Raises UnsupportedModel if it states none."""
    text = text_of(model.config)
    query = getattr(text, "num_attention_heads", None)
    if not isinstance(query, int):
        raise UnsupportedModel("its config names no number of attention heads")
    if getattr(text, "multi_query", None) is True and not getattr(text, "new_decoder_architecture", False):
        return query, 1  # falcon says it so, whatever its num_kv_heads
    kv = getattr(text, "num_key_value_heads", None) or getattr(text, "num_kv_heads", None) or query
    return query, int(kv) if query % int(kv) == 0 else query


def _head_size(model: Any) -> tuple[Stated, ...]:
    """The size of a head, stated where the config leaves it to width / heads: it has to stay when heads go."""
    text = text_of(model.config)
    query = head_counts(model)[0]
    try:
        said = getattr(text, "head_dim", None) is not None
    except Exception:  # said layer by layer: such configs raise an error of their own for it
        said = True
    if said:
        return ()
    return (Stated("head_dim", 0, int(text.hidden_size) // query),)


def kv_groups(model: Any) -> Iterator[Attempt]:
    """Fewer KV heads, each with its query heads: half of them, or one less."""
    text = text_of(model.config)
    try:
        query, kv = head_counts(model)
    except UnsupportedModel:
        return
    if kv == 1:
        return
    stated = [Stated("num_attention_heads", query // kv)]
    if isinstance(getattr(text, "num_key_value_heads", None), int):
        stated.append(Stated("num_key_value_heads", 1))
    for after in dict.fromkeys((kv // 2, kv - 1)):
        yield Attempt(kv, after, (*stated, *_head_size(model)), per_group=query // kv)


def heads(model: Any) -> Iterator[Attempt]:
    """Fewer query heads for the same KV heads: half of them, or one less of each group."""
    try:
        query, kv = head_counts(model)
    except UnsupportedModel:
        return
    per_group = query // kv
    for after in dict.fromkeys((per_group // 2, per_group - 1)):
        if 0 < after < per_group:
            yield Attempt(per_group, after, (Stated("num_attention_heads", kv), *_head_size(model)), kv=kv)


def unstated(model: Any, kind: str) -> str:
    """Why there is no config to try."""
    unknown = "no number of its config states them"
    try:
        query, kv = head_counts(model)
    except UnsupportedModel as error:
        return unknown if kind == "channels" else str(error)
    if kind == "heads" and query == kv:
        return "every query head has its own KV head: they are kv_groups"
    if kind == "kv_groups" and kv == 1:
        return "one KV head serves all queries: they are heads"
    return unknown
