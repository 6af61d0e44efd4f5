"""What stands beside the weights: what is copied, what is not, what others can read, what is never overwritten."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch

import topiarist as tp
from topiarist.checkpoints.side_files import side_files

TOKENS = tiny.tiny_tokens(8, 32)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tiny.tiny_checkpoint(tmp_path / "base")


def shrink(base, out: Path, **options) -> tp.ShrinkReport:
    return tp.shrink(base, out, **({"method": "magnitude", "keep": 0.6, "refit": False} | options))


def test_chat_templates_go_along_and_adapters_stay_behind(base: Path, tmp_path: Path):
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tool_use.jinja").write_text("{{ messages }}")
    for name in ("adapter_config.json", "adapter_model.safetensors", ".git", "pruning_notes.json", "optimizer.pt"):
        (base / name).write_text("{}")
    (base / "elsewhere").mkdir()
    (base / "elsewhere" / "file.txt").touch()
    tp.prune(base, tmp_path / "out", method="magnitude")
    shrink(base, tmp_path / "small")
    for out in ("out", "small"):
        assert (tmp_path / out / "additional_chat_templates" / "tool_use.jinja").read_text() == "{{ messages }}"
        found = {path.name for path in (tmp_path / out).iterdir()}
        assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= found
        assert not found & {
            "adapter_config.json",
            "adapter_model.safetensors",
            ".git",
            "pruning_notes.json",
            "elsewhere",
        }


def test_links_that_lead_out_of_the_folder_are_refused(base: Path, tmp_path: Path):
    (tmp_path / "secret.txt").write_text("secret")
    (base / "notes.txt").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(tp.CheckpointError, match=r"symbolic link to .*secret.txt, outside"):
        tp.prune(base, tmp_path / "out", method="magnitude")
    assert not (tmp_path / "out").exists()
    (base / "notes.txt").unlink()
    (base / "notes.txt").symlink_to(base / "tokenizer.json")
    tp.prune(base, tmp_path / "inside", method="magnitude")
    assert not (tmp_path / "inside" / "notes.txt").is_symlink()


def test_snapshots_of_the_hub_are_links_to_their_own_blobs(tmp_path: Path):
    home = tmp_path / "models--org--name"
    (home / "blobs").mkdir(parents=True)
    (home / "snapshots" / "1").mkdir(parents=True)
    (home / "blobs" / "abc").write_text("{}")
    (home / "snapshots" / "1" / "tokenizer.json").symlink_to("../../blobs/abc")
    assert [str(path) for path in side_files(home / "snapshots" / "1")] == ["tokenizer.json"]


def test_a_link_that_leads_nowhere_is_refused(tmp_path: Path):
    """What was fetched in part: a result of it would lack its tokenizer, without a word."""
    home = tmp_path / "models--org--name"
    (home / "snapshots" / "1").mkdir(parents=True)
    (home / "snapshots" / "1" / "tokenizer.json").symlink_to("../../blobs/abc")
    with pytest.raises(tp.CheckpointError, match=r"tokenizer.json is a symbolic link that leads nowhere: download"):
        list(side_files(home / "snapshots" / "1"))


def test_a_model_object_is_saved_with_the_tokenizer_that_read_its_text(base: Path, tmp_path: Path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    text = tiny.tiny_text(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(base)
    tp.prune(model, tmp_path / "out", method="wanda", data=tp.text_files(text), num_windows=4, window_tokens=16)
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "out")("ab")["input_ids"] == tiny.tiny_tokenizer()("ab")["input_ids"]
    )
    config = json.loads((tmp_path / "out" / "config.json").read_text())["pruning_config"]
    assert config["base_model"] == "../base"


def test_a_shrunk_config_keeps_what_other_readers_know(base: Path, tmp_path: Path):
    config = json.loads((base / "config.json").read_text())
    for key in ("rope_parameters", "dtype"):
        config.pop(key, None)
    old = {"rope_theta": 1e6, "rope_scaling": None, "torch_dtype": "float32", "attention_bias": False}
    (base / "config.json").write_text(json.dumps({**config, **old, "num_hidden_layers": 2}))
    shrink(base, tmp_path / "out")
    found = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {key: found[key] for key in old} == old
    assert found["rope_parameters"]["rope_theta"] == 1e6 and found["intermediate_size"] < config["intermediate_size"]


def test_what_the_smaller_model_has_goes_before_what_the_dense_one_had(base: Path, tmp_path: Path):
    tiny.tiny_checkpoint(tmp_path / "deep", num_hidden_layers=3)
    shrink(tmp_path / "deep", tmp_path / "out", units=["block"], keep=0.7)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_hidden_layers"] == 2


def test_uneven_layers_can_be_saved_again(base: Path, tmp_path: Path):
    shrink(base, tmp_path / "out", layout="hetero", units=["channels"], method="random", seed=1)
    model = tp.load_pruned(tmp_path / "out")
    model.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "modeling_pruned.py").read_text() == (
        tmp_path / "out" / "modeling_pruned.py"
    ).read_text()
    torch.save(model(TOKENS[:1]).logits, tmp_path / "expected.pt")
    code = f"""
import sys, torch
sys.modules["topiarist"] = None
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "again")!r}, trust_remote_code=True).eval()
torch.testing.assert_close(model(torch.tensor({TOKENS[:1].tolist()})).logits, torch.load({str(tmp_path / "expected.pt")!r}))
model.save_pretrained({str(tmp_path / "third")!r})
"""
    subprocess.run([sys.executable, "-c", code], check=True, env={"HF_HOME": str(tmp_path / "home"), "PATH": ""})
    assert (tmp_path / "third" / "modeling_pruned.py").is_file()


def test_files_of_others_are_never_overwritten(base: Path, tmp_path: Path, command, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tp.prune(base, tmp_path / "out", method="magnitude")
    (tmp_path / "mine.html").write_text("<p>mine</p>")
    (tmp_path / "mine.json").write_text("{}")
    text = tiny.tiny_text(tmp_path)
    words = ("allocate", "base", "mine.json", "--rule", "linear", "--data", text, "--num-windows", "4")
    for line in (("report", "out", "--out", "mine.html"), ("report", "out", "--out", "out"), words):
        code, _, error = command(*line)
        assert code == 2 and "not topiarist's own file" in error, error
    assert (tmp_path / "mine.html").read_text() == "<p>mine</p>" and (tmp_path / "mine.json").read_text() == "{}"
    assert command("report", "out", "--out", "ours.html")[0] == 0 == command("report", "out", "--out", "ours.html")[0]
