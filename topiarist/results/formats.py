"""Numbers and names as a person reads them, and text that stands safely in Markdown."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Iterable, Sequence

_SPECIAL = re.compile(r"([\\`*\[\]|])")


def percent(value: float) -> str:
    """A share with as many digits as it has."""
    text = f"{100 * value:.1f}" if abs(value) < 1 else f"{100 * value:.0f}"
    return text.removesuffix(".0") + " %"


def short(value: float) -> str:
    """A measured number in about four digits: 12.34, 123.4, 1,234, 1.2e+09."""
    if not math.isfinite(value):
        return "∞" if value > 0 else "not a number"
    if value >= 1e6:
        return f"{value:.1e}"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def error_text(value: float) -> str:
    """A relative error in three digits."""
    return f"{value:.3g}" if math.isfinite(value) else "not a number"


def start_text(starts: Iterable[int]) -> str:
    """How the windows of perplexities begin, from how many start tokens each has."""
    counts = set(starts)
    return "no start token" if counts == {0} else "start tokens differ" if 0 in counts else "start token first"


def size_text(value: int | float) -> str:
    """Bytes in the unit a person would use."""
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:,.2f} GB"


def command_text(words: Sequence[str]) -> str:
    """A command for a shell, an option a line; all on one line if it is short."""
    text = shlex.join(words)
    return text if len(text) < 80 else text.replace(" --", " \\\n  --")


def escaped(text: object) -> str:
    """Text that Markdown shows as it is, in a paragraph or a table's cell: no markup, no HTML, one line."""
    line = " ".join(str(text).split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _SPECIAL.sub(r"\\\1", line)


def code(text: object) -> str:
    """Text as a Markdown code span, in a paragraph or a table's cell."""
    line = " ".join(str(text).split()).replace("|", "\\|")
    fence = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    space = " " if len(fence) > 1 else ""
    return f"{fence}{space}{line}{space}{fence}"


def code_block(text: str) -> str:
    """Text as a Markdown code block that nothing in it can end."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}\n{text}\n{fence}"
