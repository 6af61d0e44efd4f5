"""Recipes of the tests, and a folder with what they name."""

from __future__ import annotations

from pathlib import Path

import tiny

STAGES = """topiarist: 1
model: model
out: out
data: [text.txt]
stages:
- prune:
    method: wanda
    pattern: "2:4"
    num_windows: 4
    window_tokens: 32
- recover: {tokens: 512, window_tokens: 32, sequences: 2, batch_size: 2, held_out: 2}
"""

ENDS = """topiarist: 1
model: model
out: out
stages:
- shrink: {method: magnitude, keep: 0.7, units: [channels], refit: false}
- prune: {method: magnitude, pattern: 2:4}
- eval: {text: [heldout.txt], window_tokens: 32, max_windows: 2}
- pack
"""


def recipe_folder(folder: Path, recipe: str) -> Path:
    """A model, its text, held-out text and a recipe."""
    tiny.tiny_checkpoint(folder / "model")
    tiny.tiny_text(folder, "text.txt", paragraphs=60)
    tiny.tiny_text(folder, "heldout.txt", paragraphs=20, seed=1)
    (folder / "recipe.yaml").write_text(recipe)
    return folder
