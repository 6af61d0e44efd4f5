"""Work that grows with the layers, not with their square."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny

import topiarist as tp
from topiarist.models import derive


@pytest.mark.parametrize("method", ["taylor", "magnitude"])
def test_shrink_looks_at_all_blocks_a_fixed_number_of_times(tmp_path: Path, monkeypatch, method: str):
    looks: list[int] = []
    few = derive._few
    monkeypatch.setattr(derive, "_few", lambda model: looks.append(1) or few(model))
    counts = []
    for layers in (2, 6):
        looks.clear()
        model = tiny.tiny_model("llama", num_hidden_layers=layers)
        tp.shrink(model, None, method=method, keep=0.8, data=tiny.tiny_tokens(4, 16))
        counts.append(len(looks))
    assert counts[0] == counts[1] < 40
