"""The folder that a run writes: who may write there, what a kill leaves, what a finished run is held against."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
from pathlib import Path

import pytest
import tiny
import torch
from killing import Killed, contents
from safetensors.torch import load_file

import topiarist as tp
from topiarist.checkpoints import streaming
from topiarist.checkpoints.locking import LOCK
from topiarist.checkpoints.writing import JOURNAL, REPORT, STATES, OutputFolder

TOKENS = tiny.tiny_tokens(8, 32)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tiny.tiny_checkpoint(tmp_path / "base", num_hidden_layers=4)


def prune(base: Path, out: Path, **options) -> tp.Report:
    return tp.prune(base, out, **({"method": "wanda", "calibration": TOKENS} | options))


def test_a_small_model_is_one_file_and_a_large_one_is_cut(base: Path, tmp_path: Path, monkeypatch):
    prune(base, tmp_path / "one")
    assert [path.name for path in (tmp_path / "one").glob("*.safetensors*")] == ["model.safetensors"]
    monkeypatch.setattr(streaming, "SHARD_BYTES", 40_000)
    prune(base, tmp_path / "cut")
    index = json.loads((tmp_path / "cut" / "model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "cut").glob("*.safetensors"))
    assert len(files) > 2 and {path.name for path in files} == set(index["weight_map"].values())
    assert all(path.stat().st_size < 42_000 for path in files)
    whole = load_file(tmp_path / "one" / "model.safetensors")
    pieces = {key: value for path in files for key, value in load_file(path).items()}
    assert pieces.keys() == whole.keys() and all(torch.equal(pieces[key], whole[key]) for key in whole)
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in whole.values())


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("number", [0, 1, 3])
def test_a_kill_while_blocks_are_gathered_changes_nothing(base: Path, tmp_path: Path, monkeypatch, when, number):
    monkeypatch.setattr(streaming, "SHARD_BYTES", 40_000)
    prune(base, tmp_path / "whole")
    add_file = OutputFolder._add_file

    def killed(self: OutputFolder, *arguments) -> None:
        if len(self.files) == number and when == "before":
            raise Killed
        add_file(self, *arguments)
        if len(self.files) == number + 1 and when == "after":
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(OutputFolder, "_add_file", killed)
        prune(base, tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").exists()
    again = prune(base, tmp_path / "out", progress=lambda what, *_: what == "pruning" and pytest.fail("pruned again"))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole") and len(again.layers) == 28


def test_gathered_blocks_go_at_once_and_a_damaged_file_begins_anew(base: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(streaming, "SHARD_BYTES", 40_000)
    prune(base, tmp_path / "whole")
    seen: list[int] = []
    write_files = OutputFolder.write_files

    def watched(self: OutputFolder, tensors, chunks, *, after) -> None:
        def then() -> None:
            after()
            seen.append(len(list((self.states / "blocks").iterdir())))
            if len(self.files) == 3:
                raise Killed

        write_files(self, tensors, chunks, after=then)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(OutputFolder, "write_files", watched)
        prune(base, tmp_path / "out")
    assert seen[-1] < seen[0]
    file = next((tmp_path / "out").glob("model-*"))
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    prune(base, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def hold(out: Path, ready, done) -> None:
    with OutputFolder(out, {"recipe": 1}) as output:
        output.begin(0)
        ready.set()
        done.wait()


def test_two_runs_at_once_are_refused_and_the_holder_is_named(tmp_path: Path):
    fork = multiprocessing.get_context("fork")
    ready, done = fork.Event(), fork.Event()
    other = fork.Process(target=hold, args=(tmp_path / "out", ready, done))
    other.start()
    ready.wait()
    with pytest.raises(tp.CheckpointError, match=rf"written by process {other.pid} on {socket.gethostname()}"):
        OutputFolder(tmp_path / "out", {"recipe": 1}).__enter__()
    assert (tmp_path / "out" / JOURNAL).exists()
    other.kill()
    other.join()
    assert (tmp_path / "out" / LOCK).exists(), "the file stays, but nobody holds it"
    with OutputFolder(tmp_path / "out", {"recipe": 1}) as output:
        output.begin(0)
    assert not (tmp_path / "out" / LOCK).exists()


def test_a_run_that_came_in_between_is_seen_when_work_begins(base: Path, tmp_path: Path):
    early = OutputFolder(tmp_path / "out", {"recipe": 1})
    prune(base, tmp_path / "out")
    with pytest.raises(tp.CheckpointError, match="holds another run"), early:
        pass
    assert not (tmp_path / "out" / LOCK).exists()


def test_refusals_leave_no_folder(base: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr("topiarist.models.folder.bytes_to_write", lambda weights: 10**18)
    with pytest.raises(tp.CheckpointError, match="GB are free"):
        prune(base, tmp_path / "deep" / "er" / "out")
    assert not (tmp_path / "deep").exists()
    (tmp_path / "file").touch()
    for out, message in (
        (tmp_path / "file", "is not a folder"),
        (base, "the model itself"),
        (tmp_path, "not a topiarist"),
    ):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(tp.CheckpointError, match=message):
            prune(base, out)
        assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_made_is_one_line(base: Path, tmp_path: Path):
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(tp.CheckpointError, match="cannot create"):
        prune(base, tmp_path / "closed" / "out")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
@pytest.mark.parametrize("damage", ["gone", "shorter", "flipped"])
def test_a_finished_run_is_held_against_its_report(base: Path, tmp_path: Path, name: str, damage: str):
    out = tmp_path / "out"
    prune(base, out)
    raw = (out / name).read_bytes()
    if damage == "gone":
        (out / name).unlink()
    else:
        (out / name).write_bytes(raw[:-1] if damage == "shorter" else raw[:-2] + bytes([raw[-2] ^ 1]) + raw[-1:])
    with pytest.raises(tp.CheckpointError, match=rf"finished, but {name} .*: delete the folder and run"):
        prune(base, out)


def test_what_a_kill_after_the_last_file_left_goes(base: Path, tmp_path: Path):
    prune(base, tmp_path / "out")
    before = contents(tmp_path / "out")
    (tmp_path / "out" / STATES).mkdir()
    (tmp_path / "out" / STATES / "kept.safetensors").touch()
    prune(base, tmp_path / "out")
    assert contents(tmp_path / "out") == before
    (tmp_path / "out" / LOCK).touch()
    prune(base, tmp_path / "out")
    assert contents(tmp_path / "out") == before


def test_a_kill_at_the_very_first_line_leaves_a_folder_that_can_be_used(tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / f"{JOURNAL}.tmp").write_text("{")
    (tmp_path / "out" / LOCK).touch()
    with OutputFolder(tmp_path / "out", {"recipe": 1}) as output:
        output.begin(0)
    assert OutputFolder(tmp_path / "out", {"recipe": 1}).blocks == []


def test_a_journal_line_cut_off_by_a_kill_does_not_count(tmp_path: Path):
    with OutputFolder(tmp_path / "out", {"recipe": 1}) as output:
        output.begin(0)
        output.write_block({"a": torch.ones(3)}, {"layers": []})
        with (tmp_path / "out" / JOURNAL).open("a") as journal:
            journal.write('{"block": "model-00002')
    with OutputFolder(tmp_path / "out", {"recipe": 1}) as again:
        again.begin(0)
        assert len(again.done()) == 1
        again.write_block({"b": torch.ones(3)}, {"layers": []})
    assert len(OutputFolder(tmp_path / "out", {"recipe": 1}).blocks) == 2


@pytest.mark.parametrize("line", ["[]", "{}", "nonsense", '{"block": "../x", "sha256": "", "tensors": []}'])
def test_a_damaged_journal_is_one_line(tmp_path: Path, line: str):
    with OutputFolder(tmp_path / "out", {"recipe": 1}) as output:
        output.begin(0)
    with (tmp_path / "out" / JOURNAL).open("a") as journal:
        journal.write(f"{line}\n")
    with pytest.raises(tp.CheckpointError, match=r"line 2 of .* is damaged: delete"):
        OutputFolder(tmp_path / "out", {"recipe": 1})


def test_a_damaged_report_is_one_line(base: Path, tmp_path: Path):
    prune(base, tmp_path / "out")
    (tmp_path / "out" / REPORT).write_text("{")
    with pytest.raises(tp.CheckpointError, match="not valid JSON"):
        prune(base, tmp_path / "out")


def test_folders_of_the_first_version_are_not_resumed(base: Path, tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / JOURNAL).write_text('{"model": "1"}\n{"file": "a", "sha256": "", "tensors": {"a": 1}}\n')
    with pytest.raises(tp.CheckpointError, match="another version of topiarist"):
        prune(base, tmp_path / "out")
