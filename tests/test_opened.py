"""Opening a model: every tensor comes from the files, and what cannot be opened rightly is refused in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import topiarist as tp
from topiarist.core.errors import DeviceError
from topiarist.models.checks import device_or_default
from topiarist.models.opened import open_model


def rewrite(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors), folder / "model.safetensors", metadata={"format": "pt"})


def reconfigure(folder: Path, **values) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def without(*names: str):
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if name not in names}


def test_a_folder_and_an_object_answer_alike(tmp_path: Path):
    folder = open_model(tiny.tiny_checkpoint(tmp_path / "base"))
    whole = folder.whole()
    given = open_model(tiny.tiny_model())
    assert folder.shapes() == whole.shapes() == given.shapes()
    assert folder.block_names == given.block_names == ["model.layers.0", "model.layers.1"]
    assert (folder.limit, folder.window, folder.vocabulary) == (given.limit, given.window, given.vocabulary)
    assert (folder.dtype, folder.digest(), folder.nbytes) == (whole.dtype, whole.digest(), whole.nbytes)
    assert folder.load(1).mlp.up_proj.weight.equal(given.load(1).mlp.up_proj.weight)
    state = given.model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in whole.model.state_dict().items())


def test_the_digest_of_an_object_is_that_of_all_its_forward_depends_on(tmp_path: Path):
    model, other = tiny.tiny_model(), tiny.tiny_model()
    digest = open_model(model).digest()
    assert open_model(other).digest() == digest
    model.save_pretrained(tmp_path / "saved")  # notes in the config who it is
    assert digest == open_model(model).digest() == open_model(tp.load_pruned(tmp_path / "saved")).digest()
    other.config.rms_norm_eps = 0.5
    assert open_model(other).digest() != digest
    model.model.register_buffer("scale", torch.ones(1), persistent=False)
    assert open_model(model).digest() == digest
    model.model.register_buffer("scale", torch.ones(1))
    assert open_model(model).digest() not in (digest, open_model(other).digest())


def test_an_object_of_another_config_is_not_the_one_of_a_finished_result(tmp_path: Path):
    model, other = tiny.tiny_model(), tiny.tiny_model()
    other.config.rms_norm_eps = 0.5
    tp.prune(model, tmp_path / "out", method="magnitude")
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(tp.CheckpointError, match="model"):
        tp.prune(other, tmp_path / "out", method="magnitude")
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())
    tp.prune(model, tmp_path / "out", method="magnitude")


@pytest.mark.parametrize("missing", ["lm_head.weight", "model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_a_missing_tensor_is_named(missing: str, tmp_path: Path):
    base = tiny.tiny_checkpoint(tmp_path / "base")
    rewrite(base, without(missing, "model.layers.0.mlp.up_proj.weight"))
    for door in (open_model, tp.load_pruned, lambda path: tp.shrink(path, tmp_path / "out", method="magnitude")):
        with pytest.raises(tp.CheckpointError, match=r"lacks .* and 1 more: download it again"):
            door(base)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("prefix", "cure"), [("_orig_mod.", "compiled model"), ("base_model.model.", r"merge_and_unload\(\)")]
)
def test_names_of_a_wrapper_are_named_with_the_cure(prefix: str, cure: str, tmp_path: Path):
    base = tiny.tiny_checkpoint(tmp_path / "base")
    rewrite(base, lambda tensors: {prefix + name: tensor for name, tensor in tensors.items()})
    with pytest.raises(tp.CheckpointError, match=cure):
        open_model(base)


def test_a_wrong_shape_is_refused(tmp_path: Path):
    base = tiny.tiny_checkpoint(tmp_path / "base")
    reconfigure(base, intermediate_size=96)
    with pytest.raises(tp.CheckpointError, match=r"has shape \(32, 64\), config.json asks for \(32, 96\)"):
        open_model(base)


def test_a_tied_head_needs_no_tensor(tmp_path: Path):
    base = tiny.tiny_checkpoint(tmp_path / "base", tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(base / "model.safetensors")
    model = open_model(base).whole().model
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_head_that_differs_from_the_embedding_stays_though_the_config_says_tied(tmp_path: Path):
    base = tiny.tiny_checkpoint(tmp_path / "base")
    reconfigure(base, tie_word_embeddings=True)
    head = load_file(base / "model.safetensors")["lm_head.weight"]
    tp.prune(base, tmp_path / "pruned", method="magnitude")
    tp.shrink(base, tmp_path / "small", method="magnitude", refit=False)
    for out in (tmp_path / "pruned", tmp_path / "small"):
        assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
        assert torch.equal(open_model(out).whole().model.lm_head.weight, head)


def test_an_adapter_alone_and_an_adapter_beside_merged_weights(tmp_path: Path):
    base = tiny.tiny_checkpoint(tmp_path / "base")
    expected = open_model(base).whole().model.state_dict()
    for folder in (base, tmp_path / "alone"):
        folder.mkdir(exist_ok=True)
        (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "elsewhere"}))
    with pytest.raises(tp.UnsupportedModel, match="holds an adapter, not a model: merge the adapter first"):
        open_model(tmp_path / "alone")
    found = open_model(base).whole().model.state_dict()
    assert all(torch.equal(value, found[name]) for name, value in expected.items())


def test_objects_that_are_no_plain_model_are_refused():
    class LoraLayer(nn.Linear):
        pass

    LoraLayer.__module__ = "peft.tuners.lora.layer"
    adapted, offloaded = tiny.tiny_model(), tiny.tiny_model()
    adapted.model.layers[0].mlp.up_proj = LoraLayer(32, 64)
    offloaded.model.layers[1].to("meta")
    for model, reason in ((adapted, "merge the adapter first"), (offloaded, "give its folder instead")):
        with pytest.raises(tp.UnsupportedModel, match=reason):
            tp.prune(model, method="magnitude")


def test_quantised_weights_are_refused_before_any_work(tmp_path: Path):
    base = tiny.tiny_checkpoint(tmp_path / "base")
    reconfigure(base, quantization_config={"quant_method": "homemade"})
    with pytest.raises(tp.UnsupportedModel, match="is quantised by 'homemade', which is not read"):
        open_model(base)


def test_quantised_weights_of_a_known_format_are_pruned_as_what_they_stand_for(tmp_path: Path):
    base = tiny.tiny_checkpoint(tmp_path / "base", dtype=torch.bfloat16)
    dense, scales = load_file(base / "model.safetensors"), {}
    for name in [name for name in dense if name.endswith("_proj.weight")]:
        dense[name] = (dense[name].float() * 4).to(torch.float8_e4m3fn)
        scales[name + "_scale_inv"] = torch.full((1, 1), 0.25)
    save_file(dense | scales, base / "model.safetensors", metadata={"format": "pt"})
    reconfigure(base, quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    tp.prune(base, tmp_path / "out", method="wanda", calibration=tiny.tiny_tokens(16, 32))
    out = load_file(tmp_path / "out" / "model.safetensors")
    assert set(out) == set(dense)
    weight, stood_for = out["model.layers.1.mlp.up_proj.weight"], dense["model.layers.1.mlp.up_proj.weight"].float() / 4
    assert weight.dtype == torch.bfloat16 and tp.NM(2, 4).holds(weight != 0)
    assert torch.equal(weight.float(), stood_for.masked_fill(weight == 0, 0.0))
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_devices_that_are_not_here():
    with pytest.raises(DeviceError, match="'gpu' is no device: choose cpu"):
        device_or_default("gpu")
    with pytest.raises(DeviceError, match="cannot run a model"):
        device_or_default("meta")
    if not torch.cuda.is_available():
        with pytest.raises(DeviceError, match=r"no CUDA here \(torch .*\): choose device cpu"):
            device_or_default("cuda")
    if not torch.backends.mps.is_available():
        with pytest.raises(DeviceError, match="no MPS here"):
            device_or_default("mps")


def test_an_attention_that_is_not_installed_is_exchanged(tmp_path: Path):
    base = tiny.tiny_checkpoint(tmp_path / "base")
    reconfigure(base, _attn_implementation="flash_attention_3")
    with pytest.warns(UserWarning, match="'flash_attention_3' is not installed here"):
        opened = open_model(base)
    assert opened.whole().model.config._attn_implementation == "sdpa"


def test_code_of_the_folder_runs_only_when_it_may(tmp_path: Path, monkeypatch):
    base = tiny.tiny_checkpoint(tmp_path / "base")
    reconfigure(
        base,
        model_type="homemade",
        auto_map={"AutoConfig": "homemade.Homemade", "AutoModelForCausalLM": "homemade.HomemadeLM"},
    )
    (base / "homemade.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("the user was asked"))
    with pytest.raises(tp.UnsupportedModel, match="pass --trust-remote-code"):
        open_model(base)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("damaged", ["{", "[]", "null"])
def test_a_damaged_generation_config_is_told(damaged: str, tmp_path: Path):
    base = tiny.tiny_checkpoint(tmp_path / "base")
    (base / "generation_config.json").write_text(damaged)
    with pytest.raises(tp.CheckpointError, match=r"is damaged .* copy it again, or remove it"):
        tp.load_pruned(base)
