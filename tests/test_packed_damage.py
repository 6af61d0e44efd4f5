"""Packed folders that are damaged, incomplete or hostile are refused in one line, and a refusal leaves nothing behind."""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from topiarist.core.errors import CheckpointError
from topiarist.core.patterns import NM
from topiarist.quantization.grid import Grid, round_to_nearest
from topiarist.runtime import entries, manifest, packed


@pytest.fixture
def packed_folder(tmp_path: Path) -> Path:
    """A packed folder of two shards."""
    src = tmp_path / "src"
    src.mkdir()
    weights = {f"w{i}": torch.randn(8, 16) * NM(2, 4).mask(torch.rand(8, 16)) for i in range(2)}
    save_file(weights, src / "model.safetensors", metadata={"format": "pt"})
    (src / "config.json").write_text("{}")
    packed.pack_folder(src, tmp_path / "packed", shard_bytes=1)
    return tmp_path / "packed"


def without_a_shard(manifest: dict, folder: Path) -> None:
    (folder / "packed-00002.safetensors").unlink()
    del manifest["shards"]["packed-00002.safetensors"]


@pytest.mark.parametrize(("change", "says"), [
    (without_a_shard, "lists 1 tensors and says that there are 2"),
    (lambda m, _: m.update(shards={}), "does not list"),
    (lambda m, f: m.update(shards={}) or [p.unlink() for p in f.glob("packed-*")], "lists 0 tensors"),
    (lambda m, _: m["shards"].update({"../secret.safetensors": []}), "only .safetensors files inside the folder"),
    (lambda m, _: m["shards"].update({"..": []}), "only .safetensors files inside the folder"),
    (lambda m, _: m["shards"].update({"packed-00001.safetensors": ["w1"]}), "lists 1 tensors"),
    (lambda m, _: m.update(shards=[1]), "no list of shards"), (lambda m, _: m.update(shards={"a": 3}), "no list of shards"),
    (lambda m, _: m.update(num_tensors=None), "says that there are None"), (lambda m, _: m.clear(), "packed format None"),
])  # fmt: skip
def test_a_manifest_that_does_not_fit_the_folder(packed_folder: Path, tmp_path: Path, change, says: str):
    path = packed_folder / "packed.json"
    manifest = json.loads(path.read_text())
    change(manifest, packed_folder)
    path.write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=says) as refused:
        packed.unpack_folder(packed_folder, tmp_path / "back")
    assert "\n" not in str(refused.value) and not (tmp_path / "back").exists()


@pytest.mark.parametrize("text", ["", "[", "[]", "[" * 100_000, '{"version": ' + "1" * 5000 + "}"])
def test_a_manifest_that_is_no_json_object(packed_folder: Path, tmp_path: Path, text: str):
    (packed_folder / "packed.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"packed\.json") as refused:
        packed.unpack_folder(packed_folder, tmp_path / "back")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("changes", [
    {"shape": [1 << 40, 1 << 10]}, {"shape": [8, -16]}, {"shape": "8"}, {"shape": [8.0, 16]}, {"form": "zip"}, {"form": 3},
    {"bits": 4, "form": "dense"}, {"bits": 3}, {"bits": True}, {"dtype": None}, {"more": 1},
    {"shape": [1 << 40, 1], "form": "dense"},
])  # fmt: skip
def test_an_entry_that_does_not_fit_its_bytes(packed_folder: Path, tmp_path: Path, changes: dict):
    """Nothing is allocated for what it claims: 2^50 elements would not be found anywhere."""
    file = packed_folder / "packed-00001.safetensors"
    with safe_open(file, "pt") as reader:
        header = json.loads(reader.metadata()["topiarist_packed"])
        tensors = {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118
    header["tensors"]["w0"].update(changes)
    save_file(tensors, file, metadata={"topiarist_packed": json.dumps(header)})
    with pytest.raises(CheckpointError, match=r"damaged.*copy the file again") as refused:
        packed.unpack_folder(packed_folder, tmp_path / "back")
    assert "\n" not in str(refused.value) and not (tmp_path / "back").exists()


@pytest.mark.parametrize("scales", [
    torch.ones(8, 0), torch.ones(8), torch.ones(7, 2), torch.ones(8, 3), torch.ones(8, 2, dtype=torch.int8),
], ids=lambda scales: f"{tuple(scales.shape)} {scales.dtype}")  # fmt: skip
def test_scales_that_agree_with_their_checksum_and_not_with_the_weight(packed_folder: Path, tmp_path: Path, scales):
    stored, entry = entries.store("w0", round_to_nearest(torch.randn(8, 16), Grid(bits=8, group=8)))
    stored["w0:scales"] = scales
    digest = entries._digest("w0", entry.form, entry.dtype, entry.shape, entry.bits, list(stored.values()))
    header = {"version": 2, "tensors": {"w0": asdict(replace(entry, sha256=digest))}}
    save_file(stored, packed_folder / "packed-00001.safetensors", metadata={"topiarist_packed": json.dumps(header)})
    with pytest.raises(CheckpointError, match=r"damaged.*copy the file again"):
        packed.unpack_folder(packed_folder, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_a_full_disk_is_one_line_and_leaves_nothing(packed_folder: Path, tmp_path: Path, monkeypatch):
    def full(*_, **__):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(packed, "save_file", full)
    before = sorted(tmp_path.iterdir())
    for act, source in ((packed.unpack_folder, packed_folder), (packed.pack_folder, tmp_path / "src")):
        with pytest.raises(CheckpointError, match=r"cannot write .*o: the disk is full"):
            act(source, tmp_path / "o")
    assert sorted(tmp_path.iterdir()) == before


def test_what_a_killed_run_left_is_removed(packed_folder: Path, tmp_path: Path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    here, elsewhere = (f".partial-{node}-" for node in (platform.node(), "another-machine"))
    left = [tmp_path / f"{name}{here}{gone.pid}" for name in (".back", ".beside", ".odd [name]")]
    stay = [
        f".back{here}{os.getppid()}",
        f".back{elsewhere}{gone.pid}",
        f"back{here}{gone.pid}",
        f".back{here}{gone.pid}x",
    ]
    for name in (*left, *(tmp_path / name for name in stay)):
        name.mkdir()
    (file := tmp_path / f".model.gguf{here}{gone.pid}").touch()
    packed.unpack_folder(packed_folder, tmp_path / "back")
    assert not any(place.exists() for place in (*left, file)) and all((tmp_path / name).exists() for name in stay)
    assert (tmp_path / "back" / "model.safetensors").is_file()


def test_a_killed_command_leaves_nothing_for_the_next(packed_folder: Path, tmp_path: Path):
    def killed(name: str) -> None:
        pid = os.fork()
        if pid == 0:
            with manifest.new_folder(tmp_path / name) as partial:
                (partial / "half").touch()
                os.kill(os.getpid(), signal.SIGKILL)
        os.waitpid(pid, 0)

    killed("a")
    killed("b")
    assert len(list(tmp_path.glob(".*.partial-*"))) == 1, "the second removed what the first left"
    packed.unpack_folder(packed_folder, tmp_path / "back")
    assert not list(tmp_path.glob(".*.partial-*"))


@pytest.mark.parametrize("name", ["notes.txt", "README.md", "config.json", "pruning_report.json"])
def test_links_out_of_the_folder_are_not_followed(packed_folder: Path, tmp_path: Path, name: str):
    (tmp_path / "secret").write_text("{}")
    (packed_folder / name).unlink(missing_ok=True)
    (packed_folder / name).symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match="symbolic link"):
        packed.unpack_folder(packed_folder, tmp_path / "back")
    assert not (tmp_path / "back").exists()
