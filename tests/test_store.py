"""Reading and writing of checkpoints, apart from the pipeline."""

from __future__ import annotations

import json
from pathlib import Path

import huggingface_hub
import pytest
import tiny
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import topiarist as tp
from topiarist.checkpoints import reading
from topiarist.checkpoints.reading import Checkpoint, StoredTensor, file_digest, locate
from topiarist.checkpoints.streaming import tensor_bytes, write_tensors


def test_a_hub_id_is_fetched_without_pickles(tmp_path: Path, monkeypatch):
    tiny.tiny_checkpoint(tmp_path / "snapshot")
    asked = {}

    def snapshot(repo_id, ignore_patterns):
        asked.update(repo_id=repo_id, ignored=ignore_patterns)
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    tp.prune("org/model", tmp_path / "out", method="magnitude", calibration=tiny.tiny_tokens(4, 16))
    assert asked["repo_id"] == "org/model" and "*.bin" in asked["ignored"]
    provenance, _ = tp.audit(tmp_path / "out")
    assert provenance["base_model"] == "org/model"


def test_a_hub_that_does_not_answer_is_one_line(monkeypatch):
    def fails(*_, **__):
        raise ConnectionError("no network\nwith a second line")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fails)
    with pytest.raises(tp.CheckpointError, match=r"model folder org/model does not exist.*\(no network\)$"):
        locate("org/model")
    for path in ("./org/model", "/org/model", "a/b/c"):
        with pytest.raises(tp.CheckpointError, match=r"does not exist$"):
            locate(path)


@pytest.mark.parametrize(("offline", "why"), [("1", "HF_HUB_OFFLINE is set"), ("0", "there is no network")])
def test_a_model_that_is_nowhere_says_what_to_do(tmp_path: Path, monkeypatch, offline: str, why: str):
    def fails(*_, **__):
        raise LocalEntryNotFoundError("ConnectError\nCheck your internet connection")

    monkeypatch.setenv("HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fails)
    with pytest.raises(tp.CheckpointError) as refused:
        locate("org/model")
    said = str(refused.value)
    assert f"is in the cache of the hub, which cannot be asked ({why})" in said and "\n" not in said


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool])
def test_tensors_are_copied_byte_for_byte(tmp_path: Path, dtype: torch.dtype):
    (tmp_path / "model").mkdir()
    tensors = {"a": torch.arange(24).reshape(4, 6).to(dtype), "scalar": torch.ones((), dtype=dtype)}
    tensors["empty"] = torch.ones(0, 3, dtype=dtype)
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    (tmp_path / "model" / "config.json").write_text("{}")
    checkpoint = Checkpoint(tmp_path / "model")
    stored = {name: checkpoint.stored(name) for name in ("scalar", "a", "empty")}
    for number, chunks in enumerate(
        (lambda name: checkpoint.chunks(name, 7), lambda name: [tensor_bytes(tensors[name])])
    ):
        copy = tmp_path / f"{number}.safetensors"
        assert write_tensors(copy, stored, chunks) == file_digest(copy)
        with safe_open(copy, "pt") as reader:
            assert set(reader.keys()) == set(tensors)
            assert all(torch.equal(reader.get_tensor(name), tensor) for name, tensor in tensors.items())
    assert [checkpoint.nbytes(name) for name in tensors] == [t.numel() * t.element_size() for t in tensors.values()]


def test_mixed_tensors_are_aligned_and_wrong_sizes_refused(tmp_path: Path):
    tensors = {"a": torch.ones(3, dtype=torch.int8), "b": torch.ones(5), "c": torch.ones(3, dtype=torch.bfloat16)}
    stored = {"a": StoredTensor("I8", (3,), 3), "b": StoredTensor("F32", (5,), 20), "c": StoredTensor("BF16", (3,), 6)}
    write_tensors(tmp_path / "x.safetensors", stored, lambda name: [tensor_bytes(tensors[name])])
    assert all(torch.equal(value, tensors[key]) for key, value in load_file(tmp_path / "x.safetensors").items())
    with pytest.raises(ValueError, match="b has 3 bytes instead of 20"):
        write_tensors(tmp_path / "y.safetensors", stored, lambda name: [b"123"])
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def test_two_sets_of_weights_in_one_folder_are_refused(tmp_path: Path):
    tiny.tiny_checkpoint(tmp_path / "model")
    index = {"weight_map": {"a": "model-00001-of-00001.safetensors"}}
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(tp.CheckpointError, match="two sets of weights"):
        Checkpoint(tmp_path / "model")


@pytest.mark.parametrize("weight_map", [{"a": 5}, {"a": ["model.safetensors"]}, {"a": None}, {}, "model.safetensors"])
def test_an_index_that_names_no_files_is_refused(weight_map, tmp_path: Path):
    tiny.tiny_checkpoint(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(
        tp.CheckpointError, match=r"index\.json has no weight_map of tensors to files; download it again"
    ):
        Checkpoint(tmp_path / "model")


def test_a_file_is_opened_once_for_all_of_its_tensors(tmp_path: Path, monkeypatch):
    """To open a file is to parse the names of all its tensors: a mixture with thousands would take quadratic time."""
    tiny.tiny_checkpoint(tmp_path / "base", "mixtral")
    checkpoint, opens = Checkpoint(tmp_path / "base"), []
    plain = reading.safe_open
    monkeypatch.setattr(reading, "safe_open", lambda *args, **options: opens.append(args) or plain(*args, **options))
    first = {name: checkpoint.read(name) for name in checkpoint.files}
    assert len(opens) == 1
    monkeypatch.setattr(reading, "KEPT_OPEN", -1)
    assert all(torch.equal(checkpoint.read(name, mapped=True), tensor) for name, tensor in first.items())
    assert len(opens) == 1 + len(first)
