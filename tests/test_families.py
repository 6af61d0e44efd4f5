"""Every family: the files of a streamed run, opened by plain transformers, are the model pruned in memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import topiarist as tp
from topiarist.models.derive import family_of
from topiarist.models.families import FAMILIES


def test_every_family_has_a_tiny_model():
    assert set(tiny.CONFIGS) == set(FAMILIES)


@pytest.mark.filterwarnings("ignore::topiarist.core.errors.CalibrationWarning")
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_pruned_files_open_as_the_model_pruned_in_memory(family: str, tmp_path: Path):
    tiny.tiny_checkpoint(tmp_path / "base", family)
    tokens = tiny.tiny_tokens(16, 32)
    report = tp.prune(tmp_path / "base", tmp_path / "out", method="sparsegpt", pattern="2:4", calibration=tokens)

    in_memory = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    dense = {name: value.clone() for name, value in in_memory.state_dict().items()}
    same = tp.prune(in_memory, method="sparsegpt", pattern="2:4", calibration=tokens)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()

    assert [layer.name for layer in report.layers] == [layer.name for layer in same.layers]
    for name, value in in_memory.state_dict().items():
        assert torch.equal(value, reloaded.state_dict()[name]), name
        if value.ndim < 2 or "embed" in name or "lm_head" in name:
            assert torch.equal(value, dense[name]), f"{name} changed"
    probe = tiny.tiny_tokens(2, 32, seed=5)
    torch.testing.assert_close(reloaded(probe).logits, in_memory(probe).logits, rtol=0, atol=0)
    assert reloaded.config.model_type == family

    provenance, matrices = tp.audit(tmp_path / "out")
    assert provenance["pattern"] == "2:4"
    assert len(matrices) == len(report.layers) > 0
    assert all(matrix.holds and matrix.sparsity >= 0.5 for matrix in matrices)


@pytest.mark.filterwarnings("ignore::topiarist.core.errors.CalibrationWarning")
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt2"])
def test_names_and_dtypes_on_disk_stay(family: str, tmp_path: Path):
    tiny.tiny_checkpoint(tmp_path / "base", family, dtype=torch.bfloat16)
    tp.prune(tmp_path / "base", tmp_path / "out", method="wanda", calibration=tiny.tiny_tokens(8, 32))

    def described(folder: Path) -> dict[str, tuple]:
        found = {}
        for path in folder.glob("*.safetensors"):
            with safe_open(path, "pt") as reader:
                for name in reader.keys():  # noqa: SIM118 - a reader is no dict
                    tensor = reader.get_tensor(name)
                    found[name] = (tensor.dtype, tensor.shape)
                    if "weight" in name and tensor.ndim == 2:
                        negative_zero = (tensor == 0) & torch.signbit(tensor)
                        assert not negative_zero.any(), f"{name} holds -0.0"
        return found

    assert described(tmp_path / "base") == described(tmp_path / "out")


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_values_that_the_model_rounds_stay_as_the_files_have_them(family: str, tmp_path: Path):
    """fp32 files under a config that says float16, in which the smallest weights are zeros."""
    model = tiny.tiny_model(family)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.mul_(1e-7)
    model.save_pretrained(tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps(config | {"dtype": "float16"}))
    tp.prune(tmp_path / "base", tmp_path / "out", method="wanda", data=tiny.tiny_tokens(8, 32), skip=["up_proj"])
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "out"))
    for name, tensor in after.items():
        kept = tensor != 0
        assert torch.equal(tensor[kept], before[name][kept]), name
        if "up_proj" in name or tensor.ndim == 1:
            assert bool(kept.all()), name
    with torch.no_grad():
        q = after["model.layers.0.self_attn.q_proj.weight"]
        assert int((q.unflatten(1, (-1, 4)) != 0).sum(-1).max()) <= 2


def test_experts_are_pruned_on_their_own_tokens(tmp_path: Path):
    """The Gram of an expert is that of the tokens routed to it, recomputed here by hand."""
    model = tiny.tiny_model("mixtral")
    tokens = tiny.tiny_tokens(16, 32)
    block = model.model.layers[0]
    seen: dict[int, list[torch.Tensor]] = {}

    def note(_, args):
        hidden, index, _weights = args
        for expert in range(4):
            seen.setdefault(expert, []).append(hidden.reshape(-1, 32)[(index == expert).any(-1)])

    hook = block.mlp.experts.register_forward_pre_hook(note)
    with torch.no_grad():
        model(tokens)
    hook.remove()
    report = tp.prune(model, method="wanda", calibration=tokens, batch_size=16)
    counts = {layer.name: layer.tokens for layer in report.layers}
    for expert, parts in seen.items():
        assert counts[f"model.layers.0.mlp.experts.gate_up_proj.{expert}"] == sum(len(p) for p in parts)
    original = tiny.tiny_model("mixtral").model.layers[0].mlp.experts.gate_up_proj[1]
    gram = tp.Gram(32)
    gram.add(torch.cat(seen[1]))
    expected = tp.solvers.Wanda()(original, gram, tp.NM(2, 4))
    assert torch.equal(block.mlp.experts.gate_up_proj[1], expected.weight)


def test_experts_without_tokens_are_named(tmp_path: Path):
    model = tiny.tiny_model("mixtral")
    with torch.no_grad():  # the router never chooses expert 3
        model.model.layers[0].mlp.gate.weight[3] = 0
        model.model.layers[0].mlp.gate.weight[:3, :] *= 5
    with pytest.warns(tp.errors.CalibrationWarning, match=r"experts\.\w+\.\d \(\d+ tokens, 32 inputs\)"):
        tp.prune(model, method="sparsegpt", calibration=tiny.tiny_tokens(1, 8))


def test_a_model_without_blocks_says_what_to_do():
    model = torch.nn.Sequential(torch.nn.Linear(8, 8))
    with pytest.raises(tp.UnsupportedModel, match=r"no list of decoder blocks .* topiarist\.models\.FAMILIES"):
        family_of(model)
