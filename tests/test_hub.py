"""Uploads, against a stand-in for the hub on loopback."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import tiny
from hub_standin import Hub, running
from huggingface_hub.errors import LocalEntryNotFoundError

import topiarist as tp
from topiarist.checkpoints.reading import locate
from topiarist.checkpoints.writing import JOURNAL, STATES
from topiarist.results.hub import push
from topiarist.runtime import pack_folder, unpack_folder


@pytest.fixture(scope="module")
def result(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("hub")
    tiny.tiny_checkpoint(root / "base")
    tp.prune(root / "base", root / "out", method="magnitude")
    return root / "out"


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    with running() as hub:
        yield hub


def upload(folder: Path, name: str, hub: Hub, **options) -> str:
    return push(folder, name, token="hf_standin", endpoint=hub.url, **options)


def test_a_result_arrives_whole_and_without_the_run_s_own_files(result: Path, hub: Hub):
    (result / ".hidden").touch()
    (result / "x.tmp").touch()
    assert upload(result, "org/small", hub, private=True) == f"{hub.url}/org/small"
    found = hub.repositories["org/small"]
    sent = {path.name for path in result.iterdir()} - {".hidden", "x.tmp"}
    assert set(found) - {".gitattributes"} == sent and hub.private == {"org/small": True}
    assert all(found[name] == (result / name).read_bytes() for name in sent)
    upload(result, "org/small", hub)
    assert set(hub.repositories) == {"org/small"}


def test_what_the_hub_refuses_is_one_line(result: Path, hub: Hub):
    hub.refuse = 403
    with pytest.raises(tp.TopiaristError, match=r"the hub refuses org/small .*: log in"):
        upload(result, "org/small", hub)
    with pytest.raises(tp.TopiaristError, match="is no name for a repository"):
        upload(result, "a/b/c", hub)
    with pytest.raises(tp.TopiaristError, match="the hub does not take org/small"):
        push(result, "org/small", token="x", endpoint="http://127.0.0.1:9")


def test_offline_is_said(result: Path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(tp.TopiaristError, match="unset HF_HUB_OFFLINE"):
        push(result, "org/small")


def test_only_finished_undamaged_results_are_uploaded(result: Path, tmp_path: Path, hub: Hub):
    with pytest.raises(tp.CheckpointError, match="does not exist"):
        upload(tmp_path / "none", "a/b", hub)
    with pytest.raises(tp.CheckpointError, match="no finished result"):
        upload(result.parent / "base", "a/b", hub)
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in result.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    (copy / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(tp.CheckpointError, match=r"model\.safetensors is not what the run wrote"):
        upload(copy, "a/b", hub)
    (copy / JOURNAL).write_text(json.dumps({"format": 2}) + "\n")
    (copy / STATES).mkdir()
    with pytest.raises(tp.CheckpointError, match="is not finished"):
        upload(copy, "a/b", hub)
    assert not hub.repositories


@pytest.mark.parametrize("values", [None, "int4"])
def test_packed_and_unpacked_results_are_uploaded_unless_damaged(values, result: Path, tmp_path: Path, hub: Hub):
    packed, back = tmp_path / "packed", tmp_path / "back"
    pack_folder(result, packed, values=values)
    unpack_folder(packed, back)
    for folder, weights in ((packed, "packed-00001.safetensors"), (back, "model.safetensors")):
        upload(folder, f"org/{folder.name}", hub)
        assert hub.repositories[f"org/{folder.name}"][weights] == (folder / weights).read_bytes()
    reports = [(folder / "pruning_report.json").read_bytes() for folder in (result, back)]
    assert (reports[0] == reports[1]) is (values is None), "as it was where the weights are"
    for folder, weights in ((packed, "packed-00001.safetensors"), (back, "model.safetensors")):
        raw = bytearray((folder / weights).read_bytes())
        raw[-1] ^= 1
        (folder / weights).write_bytes(raw)
        with pytest.raises(tp.CheckpointError, match=f"{weights} is not what the run wrote"):
            upload(folder, "org/damaged", hub)
    assert "org/damaged" not in hub.repositories


def test_why_the_hub_gives_no_model_is_said(tmp_path: Path, hub: Hub, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    hub.gated.add("org/closed")
    for name, says in {
        "org/closed": "org/closed is gated on the hub: ask for access on its page there, and log in with `hf auth login`",
        "org/none": "org/none does not exist, and the hub shows this login no model of that name: correct it, or, if it is",
    }.items():
        with pytest.raises(tp.CheckpointError, match=says):
            locate(name)
    hub.refuse = 501
    with pytest.raises(
        tp.CheckpointError, match=r"in the cache of the hub, which cannot be asked \(.*501.*\): give a folder"
    ):
        locate("org/closed")


def test_a_copy_of_the_hub_s_that_is_incomplete_is_said(monkeypatch):
    class Incomplete(LocalEntryNotFoundError):  # as huggingface_hub has it since 2.0
        snapshot_path = "cache"

    def fails(*_, **__):
        raise Incomplete("The cached snapshot is incomplete: 1 file(s) are missing")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fails)
    with pytest.raises(
        tp.CheckpointError, match="that name in the cache of the hub is incomplete, which cannot be asked"
    ):
        locate("org/model")


def test_stages_that_a_recipe_kept_stay_here(result: Path, hub: Hub):
    kept = result / "stages" / "01-prune"
    kept.mkdir(parents=True)
    (kept / "model.safetensors").write_bytes(b"earlier")
    upload(result, "org/small", hub)
    assert not any(name.startswith("stages") for name in hub.repositories["org/small"])
    shutil.rmtree(result / "stages")


def test_the_command(result: Path, hub: Hub, command, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_standin")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
    code, printed, error = command("push", result, "org/small", "--private")
    assert code == 0 and f"uploaded to {hub.url}/org/small" in printed, error
    assert hub.private == {"org/small": True}


def test_a_command_uploads_what_it_wrote(tmp_path: Path, hub: Hub, command, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_standin")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
    tiny.tiny_checkpoint(tmp_path / "model")
    words = ("prune", tmp_path / "model", tmp_path / "out", "--method", "magnitude", "--push-to-hub", "org/sparse")
    code, printed, error = command(*words)
    assert code == 0 and f"uploaded to {hub.url}/org/sparse" in printed, error
    assert "model.safetensors" in hub.repositories["org/sparse"] and "recipe.yaml" in hub.repositories["org/sparse"]
