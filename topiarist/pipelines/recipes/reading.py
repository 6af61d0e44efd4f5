"""YAML that people and strangers write, read so that it takes a moment at most and every key means one thing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from topiarist.core.errors import TopiaristError
from topiarist.core.grammar import OptionError

MOST_BYTES = 1 << 20
MOST_NODES = 1 << 16
"""Values of a file once its aliases are written out: nested ones double with every line."""


def read_text(path: Path) -> str:
    """The text of a file. Raises TopiaristError if it cannot be read, OptionError if it is longer than `MOST_BYTES`."""
    try:
        if (size := path.stat().st_size) > MOST_BYTES:
            raise OptionError(f"{path} has {size:,} bytes, and a recipe at most {MOST_BYTES:,}: it is something else")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TopiaristError(f"cannot read recipe {path}: {error}") from error


def parse(text: str, source: str) -> tuple[Any, Any]:
    """(value, tree of its nodes, which know their lines) of a YAML text; (None, None) of an empty one.

    source: the file, for messages. Raises OptionError for what is no plain YAML, for a key that a mapping has twice, for
    aliases that contain themselves or grow beyond `MOST_NODES`.
    """
    loader = _Loader(text)
    try:
        tree = loader.get_single_node()
        if tree is None:
            return None, None
        _size(tree, source, {})
        return loader.construct_document(tree), tree
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        if isinstance(error, OptionError):
            raise
        reason = " ".join(str(error).split())
        raise OptionError(f"{source} is no YAML: {reason[:200]}") from error
    finally:
        loader.dispose()


class _Loader(yaml.SafeLoader):
    """Without YAML's numbers to the base 60, of which the pattern 2:4 is one (124)."""

    def resolve(self, kind: Any, value: Any, implicit: Any) -> Any:
        tag = super().resolve(kind, value, implicit)
        based = kind is yaml.ScalarNode and ":" in value and tag.rpartition(":")[2] in ("int", "float")
        return "tag:yaml.org,2002:str" if based else tag


def _size(node: Any, source: str, known: dict[int, int]) -> int:
    """Nodes below and with this one, every alias counted as what it stands for. known: sizes so far; 0 of one that is open."""
    if id(node) in known:
        if not known[id(node)]:
            raise OptionError(f"{source} line {node.start_mark.line + 1}: an alias stands inside its own anchor")
        return known[id(node)]
    known[id(node)], size = 0, 1
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise OptionError(f"{source} line {key.start_mark.line + 1}: {key.value!r} stands there twice")
                seen.add(key.value)
            size += _size(key, source, known) + _size(value, source, known)
    elif isinstance(node, yaml.SequenceNode):
        size += sum(_size(entry, source, known) for entry in node.value)
    if size > MOST_NODES:
        raise OptionError(f"{source}: its aliases stand for more than {MOST_NODES:,} values: write out what is meant")
    known[id(node)] = size
    return size
