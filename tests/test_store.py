"""Reading and writing of checkpoints, apart from the pipeline."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
import pytest
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import topiarist as tp
from topiarist.checkpoints.reading import Checkpoint, locate
from topiarist.checkpoints.writing import OutputFolder


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool])
def test_tensors_are_copied_byte_for_byte(tmp_path: Path, dtype: torch.dtype):
    (tmp_path / "model").mkdir()
    tensors = {"a": torch.arange(24).reshape(4, 6).to(dtype), "scalar": torch.ones((), dtype=dtype)}
    tensors["empty"] = torch.ones(0, 3, dtype=dtype)
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    (tmp_path / "model" / "config.json").write_text("{}")
    checkpoint = Checkpoint(tmp_path / "model")
    checkpoint.copy_bytes(["scalar", "a", "empty"], tmp_path / "copy.safetensors")
    with safe_open(tmp_path / "copy.safetensors", "pt") as reader:
        assert set(reader.keys()) == set(tensors)
        assert all(torch.equal(reader.get_tensor(name), tensor) for name, tensor in tensors.items())
    assert [checkpoint.nbytes(name) for name in tensors] == [t.numel() * t.element_size() for t in tensors.values()]


def test_tensors_are_grouped_by_size(tmp_path: Path):
    (tmp_path / "model").mkdir()
    save_file(
        {name: torch.zeros(n) for name, n in (("a", 10), ("b", 10), ("c", 90), ("d", 1))},
        tmp_path / "model/model.safetensors",
    )
    (tmp_path / "model" / "config.json").write_text("{}")
    assert Checkpoint(tmp_path / "model").grouped(["d", "c", "b", "a"], 80) == [["a", "b"], ["c"], ["d"]]


def test_a_kill_at_the_very_first_line_leaves_a_folder_that_can_be_used(tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "pruning_journal.jsonl.tmp").write_text("{")
    output = OutputFolder(tmp_path / "out", {"recipe": 1})
    output.begin(0)
    assert OutputFolder(tmp_path / "out", {"recipe": 1}).finished == []


def test_a_journal_line_cut_off_by_a_kill_does_not_count(tmp_path: Path):
    output = OutputFolder(tmp_path / "out", {"recipe": 1})
    output.begin(0)
    output.write_shard("model-00001-of-00002.safetensors", {"a": torch.ones(3)}, {"layers": []})
    with (tmp_path / "out" / "pruning_journal.jsonl").open("a") as journal:
        journal.write('{"file": "model-00002')
    again = OutputFolder(tmp_path / "out", {"recipe": 1})
    again.begin(0)
    assert len(again.finished) == 1 and again.shard_is_done(0) and again.shard_is_done(1) is None
    again.write_shard("model-00002-of-00002.safetensors", {"b": torch.ones(3)}, {"layers": []})
    assert len(OutputFolder(tmp_path / "out", {"recipe": 1}).finished) == 2
