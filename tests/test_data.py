"""Windows depend on the text, the tokenizer and the seed, and on nothing else."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import tiny
import torch

import topiarist as tp
from topiarist.data.text import calibration_windows, evaluation_windows, read_documents


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.tiny_tokenizer()


def test_every_format_reads_as_the_same_documents(tmp_path: Path):
    import datasets

    texts = ["first\ndocument", "the second, with ünïcode"]
    rows = "\n".join(json.dumps({"text": t}) for t in texts)
    (tmp_path / "a.jsonl").write_text(rows + "\n\n")
    with gzip.open(tmp_path / "a.jsonl.gz", "wt", encoding="utf-8") as stream:
        stream.write(rows)
    datasets.Dataset.from_dict({"text": texts}).save_to_disk(tmp_path / "saved")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "data.jsonl").write_text(rows)
    for name in ("a.jsonl", "a.jsonl.gz", "saved", "folder"):
        assert list(read_documents(tp.text_files(tmp_path / name))) == texts, name
    (tmp_path / "one.txt").write_text(texts[0])
    assert list(read_documents(tp.text_files(tmp_path / "one.txt"))) == texts[:1]


@pytest.mark.parametrize("content", ["not json", '{"txt": "x"}', "[1]", '{"text": 3}'])
def test_bad_rows_are_named(tmp_path: Path, content: str):
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n' + content)
    with pytest.raises(tp.CalibrationError, match=r"bad\.jsonl"):
        list(read_documents(tp.text_files(tmp_path / "bad.jsonl")))


def test_documents_are_joined_by_a_blank_line_and_cut(tokenizer):
    windows = evaluation_windows(["abc", "defg"], tokenizer, window=3)
    stream = tokenizer("abc\n\ndefg", add_special_tokens=False)["input_ids"]
    assert windows.tokens.tolist() == [stream[0:3], stream[3:6], stream[6:9]]


def test_the_seed_alone_chooses_the_windows(tokenizer):
    text = ["".join(map(chr, torch.randint(97, 123, (4000,)).tolist()))]
    pick = lambda seed: calibration_windows(text, tokenizer, num_samples=10, window=32, seed=seed)  # noqa: E731
    first, again, other = pick(0), pick(0), pick(1)
    assert torch.equal(first.tokens, again.tokens) and first.digest == again.digest
    assert first.digest != other.digest
    pieces = torch.tensor(tokenizer(text[0])["input_ids"])[: 125 * 32].view(125, 32)
    assert torch.equal(first.tokens, pieces[torch.randperm(125, generator=torch.Generator().manual_seed(0))[:10]])


def test_overlap_is_measured_in_characters_of_long_lines(tokenizer):
    shared, own, short = "s" * 100, "o" * 300, "short line"
    known = calibration_windows([f"{shared}\n{short}"], tokenizer, num_samples=1, window=8).line_hashes
    windows = evaluation_windows([f"{own}\n{short}\n{shared}"], tokenizer, window=8, calibration_hashes=known)
    assert windows.overlap == pytest.approx(0.25)


@pytest.mark.parametrize("shape", [(0, 4), (4,), (2, 2, 2)])
def test_token_windows_must_be_a_matrix(shape):
    with pytest.raises(tp.CalibrationError, match=r"\(num, window\)"):
        calibration_windows(torch.zeros(shape, dtype=torch.long), None, window=4)


def test_tokens_outside_the_vocabulary_are_refused():
    with pytest.raises(tp.CalibrationError, match="outside the model's vocabulary"):
        tp.prune(tiny.tiny_model(), calibration=torch.full((2, 8), 10_000))
