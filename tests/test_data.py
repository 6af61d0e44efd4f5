"""Windows depend on the text, the tokenizer and the seed, and on nothing else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

import topiarist as tp
from topiarist.data import calibration_windows, check_vocabulary, evaluation_windows, read_documents, start_tokens
from topiarist.data import draw as drawing
from topiarist.data.overlap import passage_hashes, shared
from topiarist.data.readers import good_cut
from topiarist.data.tokens import token_parts
from topiarist.models.opened import open_model
from topiarist.pipelines.training.text import training_text


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.tiny_tokenizer()


def words(count: int, seed: int = 0) -> str:
    letters = torch.randint(97, 123, (count, 5), generator=torch.Generator().manual_seed(seed)).tolist()
    return " ".join("".join(map(chr, word)) for word in letters)


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


def test_long_text_is_cut_where_its_tokens_stay_the_same(tokenizer, monkeypatch):
    """The stream of the parts is that of the whole, for a long document, for many, and for both."""
    monkeypatch.setattr("topiarist.data.tokens.MAX_PART", 300)
    for documents in ([words(400)], [words(20, seed=i) for i in range(30)], [words(5), words(300), "", "x"]):
        parts = [part for _, part in token_parts(((text, True) for text in documents), tokenizer)]
        assert len(parts) > 3
        whole = tokenizer("\n\n".join(documents), add_special_tokens=False)["input_ids"]
        assert np.concatenate(parts).tolist() == whole


def test_a_cut_never_splits_a_word():
    assert "one two three"[good_cut("one two three") :] == " three"
    assert "one two\nthree fo"[good_cut("one two\nthree fo") :] == "three fo"
    assert good_cut("oneword") == 7


def test_an_evaluation_reads_no_more_than_it_needs(tokenizer, monkeypatch):
    monkeypatch.setattr("topiarist.data.tokens.MAX_PART", 300)
    read = []

    def documents():
        for number in range(1000):
            read.append(number)
            yield words(20, seed=number)

    class Lazy(list):
        def __iter__(self):
            return documents()

    first = evaluation_windows(Lazy(), tokenizer, window=32, max_windows=4)
    assert len(read) < 10
    assert torch.equal(first.tokens, evaluation_windows(Lazy(), tokenizer, window=32).tokens[:4])


@pytest.mark.parametrize("wrapped", ["as it is", "re-wrapped", "one line", "inside other text"])
def test_the_same_text_is_seen_however_its_lines_are_wrapped(tokenizer, wrapped: str):
    text = words(2000)
    known = calibration_windows([text], tokenizer, num_samples=1, window=8).passages
    pieces = text.split()
    other = words(2000, seed=1)
    again, least, most = {
        "as it is": (text, 1.0, 1.0),
        "re-wrapped": ("\n".join(" ".join(pieces[i : i + 7]) for i in range(0, len(pieces), 7)), 1.0, 1.0),
        "one line": (" ".join(pieces), 1.0, 1.0),
        "inside other text": (f"{other}\n{text}\n{other}", 0.25, 0.42),
    }[wrapped]
    windows = evaluation_windows([again], tokenizer, window=8, calibration=known)
    assert least <= windows.overlap <= most
    assert evaluation_windows([other], tokenizer, window=8, calibration=known).overlap == 0.0


def test_short_texts_and_empty_ones_have_hashes_too():
    known = frozenset(passage_hashes(["a short line"]).tolist())
    assert len(known) == 1 and shared(passage_hashes(["a short\nline", "another"]), known) == 0.5
    assert len(passage_hashes(["", "   "])) == 0 and shared(passage_hashes([]), known) == 0.0


@pytest.mark.parametrize("shape", [(0, 4), (4,), (2, 2, 2)])
def test_token_windows_must_be_a_matrix(shape):
    with pytest.raises(tp.CalibrationError, match=r"\(num, window\)"):
        calibration_windows(torch.zeros(shape, dtype=torch.long), None, window=4)
    with pytest.raises(tp.CalibrationError):
        calibration_windows(torch.zeros(2, 4), None, window=4)  # no token ids but numbers


@pytest.mark.parametrize(
    ("arguments", "says"),
    [({"window": 1}, "2 is the least"), ({"window": 0}, "2 is the least"), ({"window": -8}, "2 is the least"),
     ({"window": 4, "max_windows": 0}, "1 is the least"), ({"window": 4, "max_windows": -1}, "1 is the least"),
     ({"window": 4096}, "less than one window")],
)  # fmt: skip
def test_windows_that_predict_nothing_are_refused(tokenizer, arguments, says: str):
    with pytest.raises(tp.CalibrationError, match=says):
        evaluation_windows(["some text"], tokenizer, **arguments)


def test_tokens_outside_the_vocabulary_are_refused():
    with pytest.raises(tp.CalibrationError, match="outside the model's vocabulary"):
        tp.prune(tiny.tiny_model(), calibration=torch.full((2, 8), 10_000))
    with pytest.raises(tp.CalibrationError, match="text token 9 is outside"):
        check_vocabulary(torch.tensor([[1, 9]]), 9, "text")
    with pytest.raises(tp.CalibrationError, match="text token -1 is outside"):
        check_vocabulary(torch.tensor([[5, -1]]), 9, "text")


def with_start(tokenizer, *names: str):
    """The tokenizer with special tokens before every text, as Gemma's and GLM's have them."""
    from tokenizers.processors import TemplateProcessing

    found = tiny.tiny_tokenizer()
    special = [(name, found.convert_tokens_to_ids(name)) for name in names]
    template = " ".join([f"{name}:0" for name in names] + ["$A:0"])
    found.backend_tokenizer.post_processor = TemplateProcessing(single=template, pair=None, special_tokens=special)
    return found


def test_start_tokens_follow_the_tokenizer(tokenizer):
    assert start_tokens(tokenizer, "auto") == [] and start_tokens(tokenizer, "always") == [1]
    one, two = with_start(tokenizer, "<s>"), with_start(tokenizer, "<pad>", "<s>")
    assert start_tokens(one, "auto") == [1] and start_tokens(one, "never") == []
    assert start_tokens(two, "auto") == [0, 1]
    tokenizer = tiny.tiny_tokenizer()
    tokenizer.bos_token = None
    with pytest.raises(tp.CalibrationError, match="no start token"):
        start_tokens(tokenizer, "always")


def test_every_window_begins_with_the_start_token():
    tokenizer, text = with_start(None, "<s>"), [words(100)]
    plain = evaluation_windows(text, tokenizer, window=15)
    begun = evaluation_windows(text, tokenizer, window=16, bos="auto")
    assert begun.start == 1 and plain.start == 0 and begun.digest != plain.digest
    assert torch.equal(begun.tokens[:, 1:], plain.tokens) and bool((begun.tokens[:, 0] == 1).all())
    drawn = calibration_windows(text, tokenizer, num_samples=4, window=16, bos="auto")
    assert drawn.tokens.shape == (4, 16) and bool((drawn.tokens[:, 0] == 1).all())
    with pytest.raises(tp.CalibrationError, match="no room for text"):
        evaluation_windows(text, with_start(None, "<pad>", "<s>"), window=2, bos="auto")


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("training", [False, True])
def test_token_windows_are_whole_numbers_on_any_device(training: bool, device: str):
    def of(tokens: torch.Tensor) -> tuple[torch.Tensor, str]:
        if not training:
            return (found := calibration_windows(tokens, None, window=8)).tokens, found.digest
        with training_text(open_model(tiny.tiny_model()), tokens, window_tokens=8, num_windows=2, seed=0) as text:
            return text.table[:], text.digest

    tokens = tiny.tiny_tokens(2, 8)
    found, digest = of(tokens.int().to(device))
    assert torch.equal(found, tokens) and digest == of(tokens)[1]
    for wrong, reason in ((torch.rand(2, 8), "whole numbers, got torch.float32"), (tokens[0], r"got shape \(8,\)")):
        with pytest.raises(tp.CalibrationError, match=reason):
            of(wrong.to(device))


@pytest.fixture
def long_text(monkeypatch):
    """Everything counts as long, and a text file has small blocks."""
    monkeypatch.setattr(drawing, "SMALL", 0)
    monkeypatch.setattr(drawing, "SPARSE", 0)
    monkeypatch.setattr("topiarist.data.readers.BLOCK", 1 << 10)


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.jsonl.gz", "a.json.zst", "a.csv", "a.parquet", "a.arrow", "a.txt", "a.txt.xz"]
)
def test_drawn_windows_are_text_of_the_files_and_share_none(long_text, tmp_path: Path, tokenizer, name: str):
    from test_readers import write_rows

    texts = [words(int(n), seed=i) for i, n in enumerate(np.random.default_rng(0).integers(1, 400, 60))]
    path = write_rows(tmp_path / name, ["\n\n".join(texts)] if ".txt" in name else texts)
    draw = lambda seed: calibration_windows(tp.text_files(path), tokenizer, num_samples=40, window=128, seed=seed)  # noqa: E731
    first = draw(0)
    assert torch.equal(first.tokens, draw(0).tokens) and not torch.equal(first.tokens, draw(1).tokens)
    whole = "\n\n".join(texts)
    places = sorted(whole.index(tokenizer.decode(row)) for row in first.tokens)
    assert min(np.diff(places)) >= 128, "one token a byte: windows stand side by side at the nearest"
    assert places[0] < len(whole) / 5 and places[-1] > len(whole) * 4 / 5, "from all of the text"
    # The record tells this text from other text.
    overlap = lambda text: evaluation_windows([text], tokenizer, window=8, calibration=first.passages).overlap  # noqa: E731
    assert overlap(whole) > 0.02 and overlap(words(900, seed=99)) == 0.0


def test_the_same_text_is_drawn_alike_from_files_of_one_layout(long_text, tmp_path: Path, tokenizer):
    from test_readers import write_rows

    texts = [words(50, seed=i) for i in range(40)]
    plain, packed = write_rows(tmp_path / "a.jsonl", texts), write_rows(tmp_path / "b.jsonl.gz", texts)
    drawn = [calibration_windows(tp.text_files(p), tokenizer, num_samples=9, window=64).digest for p in (plain, packed)]
    assert drawn[0] == drawn[1]


def test_too_little_long_text_is_refused(long_text, tmp_path: Path, tokenizer):
    from test_readers import write_rows

    path = write_rows(tmp_path / "a.jsonl", [words(10)])
    with pytest.raises(tp.CalibrationError, match="too few separate windows of 32 tokens: 10 were asked for"):
        calibration_windows(tp.text_files(path), tokenizer, num_samples=10, window=32)


def test_a_drawn_text_file_may_be_of_any_script(long_text, tmp_path: Path, tokenizer):
    """Blocks end inside characters, and no word ends anywhere."""
    text = "".join(chr(0x4E00 + i % 500) for i in range(20_000))
    (tmp_path / "long.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    found = calibration_windows(tp.text_files(tmp_path / "long.txt"), tokenizer, num_samples=30, window=96)
    assert all(tokenizer.decode(row) in text for row in found.tokens)


def test_what_is_long(tmp_path: Path):
    from topiarist.data.text import readers

    path = tmp_path / "a.txt"
    path.write_text("x" * (1 << 20))
    files = readers(tp.text_files(path), ())
    assert not drawing.is_long(files, 100)
    path.write_text("x" * (9 << 20))
    assert drawing.is_long(files, 100) and not drawing.is_long(files, 200_000)


def test_documents_of_memory_skip_what_is_empty():
    with pytest.warns(UserWarning, match=r"2 of 4 rows hold no text"):
        assert list(read_documents(["a", "", " ", "b"])) == ["a", "b"]
    with pytest.raises(tp.CalibrationError, match="holds int where text is expected"):
        list(read_documents([3]))
    with pytest.raises(tp.CalibrationError, match="calibration text 2 holds null where text is expected"):
        list(read_documents(["a", None]))
