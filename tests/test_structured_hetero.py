"""Layers of different size, missing sublayers, fewer blocks: the smaller model computes what the masked one does."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from structured_checks import check, kinds_of, random_scores

from topiarist.models import FAMILIES
from topiarist.structured import choose, units_of


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_hetero(family: str, tmp_path: Path):
    model = tiny.tiny_model(family)
    groups = units_of(model, kinds_of(family, "hetero"))
    check(model, groups, choose(groups, random_scores(groups), 0.6), "hetero", tmp_path)


DEPTH = {"num_hidden_layers": 3}


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_fewer_blocks(family: str, tmp_path: Path):
    """Numbers, layer indices and lists of layers agree: cached generation would show one that is off."""
    depth = {"n_layer": 3} if family == "gpt2" else DEPTH
    if family == "gemma3_text":
        depth = {**depth, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
    model = tiny.tiny_model(family, **depth)
    groups = units_of(model, ("block",))
    kept = {group.key: torch.tensor([group.block != 0]) for group in groups}
    check(model, groups, kept, "uniform", tmp_path)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_sublayers_leave_without_a_trace(family: str, tmp_path: Path):
    """The first attention goes too: a cache that counts tokens there must still count."""
    model = tiny.tiny_model(family)
    groups = units_of(model, ("attention", "ffn"))
    kept = {group.key: torch.tensor([(group.kind == "attention") == (group.block == 1)]) for group in groups}
    check(model, groups, kept, "hetero", tmp_path)


def test_a_copy_of_the_code_opens_heterogeneous_layers_without_topiarist(tmp_path: Path):
    from topiarist import modeling_pruned

    imports = [
        line for line in Path(modeling_pruned.__file__).read_text().splitlines() if line.startswith(("import", "from"))
    ]
    assert not any("topiarist" in line for line in imports)
