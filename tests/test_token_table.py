"""Training text in a file: the tokens that windows in memory have, whatever is killed, removed when the run is over."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

import topiarist as tp
from topiarist.data import evaluation_windows, text_files, tokens
from topiarist.models.opened import open_model
from topiarist.pipelines.training import token_table
from topiarist.pipelines.training.processes import Processes
from topiarist.pipelines.training.text import training_text
from topiarist.pipelines.training.token_table import STATE, tokenised

ALONE = Processes()


@pytest.fixture
def texts(tmp_path: Path, monkeypatch) -> Any:
    monkeypatch.setattr(tokens, "MAX_PART", 2000)  # many parts
    paths = [tiny.tiny_text(tmp_path, f"{seed}.txt", paragraphs=60, seed=seed) for seed in range(3)]
    return text_files(paths)


@pytest.mark.parametrize("item", [2, 4])
def test_a_table_is_the_windows_of_the_text(item: int, texts: Any, tmp_path: Path, monkeypatch):
    tokenizer = tiny.tiny_tokenizer()
    if item == 4:  # with a hole below its last id
        monkeypatch.setattr(tokenizer, "get_vocab", lambda: {"a": 3, "b": 1 << 16})
    expected = evaluation_windows(texts, tokenizer, window=32, usual=("train",))
    with tokenised(texts, tokenizer, tmp_path / "out", window=32, processes=ALONE) as found:
        assert len(found.table) == len(expected.tokens) and found.table.item == item
        assert torch.equal(found.table[range(len(found.table))], expected.tokens)
        assert torch.equal(found.table[torch.tensor([5, 2])], expected.tokens[[5, 2]])
        assert (found.digest, found.passages) == (expected.digest, expected.passages)
        assert found.highest == int(expected.tokens.max())


def test_a_killed_tokenising_goes_on_behind_the_last_whole_part(texts: Any, tmp_path: Path):
    tokenizer, out, folder = tiny.tiny_tokenizer(), tmp_path / "out", tmp_path / "out.tokens"
    seen: list[int] = []

    def kill(what: str, done: int, total: int) -> None:
        seen.append(done)
        if len(seen) == 7:
            with (folder / "tokens.bin").open("ab") as file:
                file.write(b"half a part")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), tokenised(texts, tokenizer, out, window=32, processes=ALONE, progress=kill):
        pass
    assert json.loads((folder / STATE).read_text())["parts"] == 7
    calls: list[str] = []

    class Counting:
        backend_tokenizer = tokenizer.backend_tokenizer

        def get_vocab(self) -> dict[str, int]:
            return tokenizer.get_vocab()

        def __call__(self, text: str, **options: Any) -> Any:
            calls.append(text)
            return tokenizer(text, **options)

    expected = evaluation_windows(texts, tokenizer, window=32, usual=("train",))
    with pytest.raises(KeyboardInterrupt), tokenised(texts, Counting(), out, window=32, processes=ALONE) as found:
        assert torch.equal(found.table[range(len(found.table))], expected.tokens)
        raise KeyboardInterrupt  # in the middle of the training
    whole = evaluation_windows(texts, (first := Counting()), window=32, usual=("train",)), first
    assert whole[0].digest == expected.digest
    parts = len(calls)
    assert parts > 7
    calls.clear()
    with tokenised(texts, Counting(), out, window=32, processes=ALONE) as found:
        assert not calls and (found.digest, found.passages) == (expected.digest, expected.passages)
    assert not folder.exists()


def test_other_text_or_another_tokenizer_begins_anew(texts: Any, tmp_path: Path):
    tokenizer, out = tiny.tiny_tokenizer(), tmp_path / "out"
    with pytest.raises(KeyboardInterrupt), tokenised(texts, tokenizer, out, window=32, processes=ALONE):
        raise KeyboardInterrupt
    texts.paths[0].write_text("other words " * 400)
    expected = evaluation_windows(texts, tokenizer, window=32, usual=("train",))
    with tokenised(texts, tokenizer, out, window=32, processes=ALONE) as found:
        assert found.digest == expected.digest


def test_a_file_of_a_folder_written_anew_or_another_chat_template_begins_anew(tmp_path: Path):
    def of(text: str, tokenizer: Any) -> str:
        """The digest of the tokens, of a folder whose own time stays, by a run that is then killed."""
        (folder / "train.jsonl").write_text(text)
        with pytest.raises(KeyboardInterrupt), tokenised(source, tokenizer, out, window=32, processes=ALONE) as found:
            digests.append(found.digest)
            raise KeyboardInterrupt
        expected = evaluation_windows(source, tokenizer, window=32, usual=("train",))
        assert digests[-1] == expected.digest
        return expected.digest

    folder, out, digests = tmp_path / "data", tmp_path / "out", []
    folder.mkdir()
    source, tokenizer = text_files(folder), tiny.tiny_tokenizer()
    old = of(json.dumps({"text": "old words " * 40}), tokenizer)
    assert of(json.dumps({"text": "new words of another length " * 40}), tokenizer) != old
    turns = json.dumps({"text": [{"role": "user", "content": "some words " * 40}]})
    tokenizer.chat_template = "{% for m in messages %}Q {{ m.content }}{% endfor %}"
    asked = of(turns, tokenizer)
    tokenizer.chat_template = "{% for m in messages %}A {{ m.content }}{% endfor %}"
    assert of(turns, tokenizer) != asked


def test_a_refusal_leaves_nothing(texts: Any, tmp_path: Path):
    base = tiny.tiny_checkpoint(tmp_path / "base")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(tp.CalibrationError, match="below one step"):
        tp.recover(base, tmp_path / "out", loss="lm", data=texts, tokens=10, window_tokens=32)
    short = text_files(tiny.tiny_text(tmp_path, "0.txt", paragraphs=1))
    with (
        pytest.raises(tp.CalibrationError, match="less than one sequence of 4096"),
        tokenised(short, tiny.tiny_tokenizer(), tmp_path / "out", window=4096, processes=ALONE),
    ):
        pass
    assert sorted(tmp_path.iterdir()) == before


def test_a_folder_with_files_of_others_is_refused_and_left_as_it_is(texts: Any, tmp_path: Path):
    folder = tmp_path / "out.tokens"
    folder.mkdir()
    (folder / "mine.txt").write_text("mine")
    with (
        pytest.raises(tp.CheckpointError, match=r"out\.tokens .* holds mine.txt, .* choose another output"),
        tokenised(texts, tiny.tiny_tokenizer(), tmp_path / "out", window=32, processes=ALONE),
    ):
        pass
    assert [path.name for path in folder.iterdir()] == ["mine.txt"]
    (folder / "mine.txt").unlink()
    with tokenised(texts, tiny.tiny_tokenizer(), tmp_path / "out", window=32, processes=ALONE):
        (folder / "late.txt").write_text("mine")
    assert [path.name for path in folder.iterdir()] == ["late.txt"]


def test_passages_of_long_text_are_a_sample(texts: Any, tmp_path: Path, monkeypatch):
    tokenizer = tiny.tiny_tokenizer()
    expected = evaluation_windows(texts, tokenizer, window=32, usual=("train",)).passages
    monkeypatch.setattr(token_table, "MOST_PASSAGES", len(expected) // 3)
    with tokenised(texts, tokenizer, tmp_path / "out", window=32, processes=ALONE) as found:
        assert found.passages < expected and 0 < len(found.passages) <= len(expected) // 3


def test_text_far_longer_than_the_run_is_drawn_from(texts: Any, tmp_path: Path, monkeypatch):
    from topiarist.data import draw

    monkeypatch.setattr(draw, "SMALL", 100)
    model = open_model(tiny.tiny_checkpoint(tmp_path / "base"))
    with training_text(model, texts, window_tokens=32, num_windows=4, seed=0, out=tmp_path / "out") as text:
        assert len(text.table) == 4 and not (tmp_path / "out.tokens").exists()


@pytest.mark.parametrize("way", ["beside the result", "in memory", "drawn"])
def test_every_sequence_begins_with_the_start_token_if_asked(texts: Any, tmp_path: Path, monkeypatch, way: str):
    from topiarist.data import draw

    if way == "drawn":
        monkeypatch.setattr(draw, "SMALL", 100)
    model = open_model(tiny.tiny_checkpoint(tmp_path / "base"))
    out = None if way == "in memory" else tmp_path / "out"
    digests = set()
    for bos in ("never", "always"):
        with training_text(model, texts, window_tokens=32, num_windows=4, seed=0, out=out, bos=bos) as text:
            trained, held_out = text.split(1)
            digests.add(text.digest)
            assert text.window == 32 == held_out.shape[1]
            for rows in (trained[[0, 1]], held_out):
                assert rows.shape[1] == 32 and bool((rows[:, 0] == 1).all()) == (bos == "always")
                assert not bool((rows[:, 1:] == 1).any())
    assert len(digests) == 2


def test_a_window_of_start_tokens_alone_is_refused(texts: Any, tmp_path: Path):
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny.tiny_tokenizer()
    begin: Any = TemplateProcessing(single="<s> </s> $A", special_tokens=[("<s>", 1), ("</s>", 2)])
    tokenizer.backend_tokenizer.post_processor = begin
    given: Any = {"tokenizer": tokenizer, "bos": "auto", "num_windows": 4, "seed": 0, "out": tmp_path / "out"}
    with (
        pytest.raises(tp.CalibrationError, match="a window of 2 tokens has no room for text beside 2 start tokens"),
        training_text(open_model(tiny.tiny_model()), texts, window_tokens=2, **given),
    ):
        pass
    assert not (tmp_path / "out.tokens").exists()


def test_a_refused_rerun_of_a_finished_result_leaves_nothing(texts: Any, tmp_path: Path):
    base = tiny.tiny_checkpoint(tmp_path / "base")
    settings = {"loss": "lm", "data": texts, "window_tokens": 16, "sequences": 1, "held_out": 1}
    tp.recover(base, tmp_path / "out", tokens=32, **settings)
    with pytest.raises(tp.CheckpointError, match="tokens was"):
        tp.recover(base, tmp_path / "out", tokens=48, **settings)
    assert (tmp_path / "out" / "config.json").is_file() and not (tmp_path / "out.tokens").exists()
