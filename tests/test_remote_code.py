"""Models whose code lies in their folder: pruned, evaluated and written like any other, where their code may run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers.dynamic_module_utils import get_class_from_dynamic_module

import topiarist as tp
from topiarist.evaluation.perplexity import load_model
from topiarist.models.opened import open_model

CODE = Path(__file__).parent / "data" / "modeling_fused.py"
CLASSES = {"AutoConfig": "modeling_fused.FusedConfig", "AutoModelForCausalLM": "modeling_fused.FusedForCausalLM"}
TOKENS = tiny.tiny_tokens(8, 32)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    folder.mkdir()
    shutil.copy(CODE, folder)
    model = built(folder)
    model.save_pretrained(folder)
    tiny.tiny_tokenizer().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": CLASSES}))
    return folder


def built(folder: Path) -> Any:
    """The model as its own constructor makes it, with random weights."""
    config, model = (get_class_from_dynamic_module(name, str(folder)) for name in CLASSES.values())
    torch.manual_seed(0)
    made = model(config()).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return made


@torch.no_grad()
def test_what_only_its_constructor_computes_is_there_after_loading(base: Path):
    wanted = built(base)(TOKENS).logits
    assert torch.equal(load_model(base, trust_remote_code=True)(TOKENS).logits, wanted)


def test_a_fused_projection_is_pruned_as_in_memory_and_its_code_goes_along(base: Path, tmp_path: Path):
    options: dict[str, Any] = {"method": "sparsegpt", "pattern": "2:4", "calibration": TOKENS}
    report = tp.prune(base, tmp_path / "out", **options, trust_remote_code=True)
    assert {layer.name.rpartition(".")[2] for layer in report.layers} == {
        "W_pack", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    pruned = built(base)
    tp.prune(pruned, **options)
    assert (tmp_path / "out" / CODE.name).read_bytes() == CODE.read_bytes()
    again = load_model(tmp_path / "out", trust_remote_code=True)
    assert all(torch.equal(p, again.get_parameter(name)) for name, p in pruned.named_parameters())
    opened = open_model(tmp_path / "out", trust_remote_code=True)
    assert all(tp.NM(2, 4).holds(m.weight != 0) for i in range(2) for m in _loaded(opened, i))


def _loaded(opened: Any, index: int) -> Any:
    opened.load(index)
    return opened.matrices(index)


def test_it_is_refused_where_its_code_may_not_run(base: Path, tmp_path: Path):
    with pytest.raises(tp.UnsupportedModel, match="needs code of its own to run: read it, then pass"):
        tp.prune(base, tmp_path / "out", method="magnitude")
    assert not (tmp_path / "out").exists()
