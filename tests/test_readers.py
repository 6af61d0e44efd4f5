"""Every kind of file gives the same documents, or is refused by name; no kind is ever read as another."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
import tiny

import topiarist as tp
from topiarist.data import calibration_windows, read_documents
from topiarist.data.readers import TextReader
from topiarist.data.text import readers

TEXTS = ["first\ndocument", 'the "second", with ünïcode', "third"]
PACK = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda raw: pa.Codec("zstd").compress(raw, asbytes=True),
}


def raw_rows(kind: str, texts: list[str | None]) -> bytes:
    rows = [json.dumps({"id": i, "text": text}) for i, text in enumerate(texts)]
    if kind in (".jsonl", ".ndjson", ".json"):
        return "\n".join(rows).encode()
    if kind == ".array":
        return f"[{', '.join(rows)}]".encode()
    if kind in (".csv", ".tsv"):
        out = io.StringIO()
        writer = csv.writer(out, delimiter="\t" if kind == ".tsv" else ",")
        writer.writerows([["id", "text"], *([i, text] for i, text in enumerate(texts))])
        return out.getvalue().encode()
    if kind in (".parquet", ".arrow"):
        table, out = pa.table({"id": list(range(len(texts))), "text": texts}), io.BytesIO()
        if kind == ".parquet":
            pyarrow.parquet.write_table(table, out, row_group_size=2)
        else:
            with pa.ipc.new_stream(out, table.schema) as stream:
                stream.write_table(table, max_chunksize=2)
        return out.getvalue()
    return "".join(text or "" for text in texts).encode()


def write_rows(path: Path, texts: list[str]) -> Path:
    """A file of the kind and compression that its name says."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    packed = suffixes[-1] in PACK
    raw = raw_rows(suffixes[-2] if packed else suffixes[-1], list(texts))
    path.write_bytes(PACK[suffixes[-1]](raw) if packed else raw)
    return path


@pytest.mark.parametrize("compression", ["", *PACK])
@pytest.mark.parametrize("kind", [".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow"])
def test_every_kind_reads_as_the_same_documents(tmp_path: Path, kind: str, compression: str):
    for name in (f"rows{kind}{compression}", f"c4.00000-of-01024{kind}{compression}".upper()):
        path = write_rows(tmp_path / name, TEXTS)
        assert list(read_documents(tp.text_files(path))) == TEXTS, name


@pytest.mark.parametrize("compression", ["", *PACK])
def test_text_is_one_document(tmp_path: Path, compression: str):
    for name in (f"a.txt{compression}", f"WIKI.RAW{compression}"):
        assert list(read_documents(tp.text_files(write_rows(tmp_path / name, TEXTS)))) == ["".join(TEXTS)]


def test_a_long_text_file_is_one_document_too(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("topiarist.data.readers.LONG_TEXT", 100)
    text = "some words of a text\n" * 40
    (tmp_path / "a.txt").write_text(text)
    assert list(read_documents(tp.text_files(tmp_path / "a.txt"))) == [text]


def test_a_long_text_file_ends_with_its_last_piece_though_it_is_blank(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("topiarist.data.readers.LONG_TEXT", 100)
    (tmp_path / "a.txt").write_text("x" * 100 + "\n")
    (tmp_path / "b.txt").write_text("y")
    (tmp_path / "blank.txt").write_text("\n")
    names = [tmp_path / name for name in ("a.txt", "blank.txt", "b.txt")]
    assert list(read_documents(tp.text_files(names))) == ["x" * 100 + "\n", "y"]
    assert list(read_documents(tp.text_files(names[0]))) == ["x" * 100 + "\n"]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_line_ends_are_one_character_wherever_a_block_ends(tmp_path: Path, monkeypatch, end: str):
    monkeypatch.setattr("topiarist.data.readers.BLOCK", 5)  # ends after, before and inside line ends
    lines = ["", "ab", "", "\u00e9", "c", "", ""]
    (tmp_path / "a.txt").write_bytes(end.join(lines).encode())
    (reader,) = readers(tp.text_files(tmp_path / "a.txt"), ())
    assert isinstance(reader, TextReader)
    blocks = [reader.value(row) for row in range(len(reader.sizes))]
    assert "".join(blocks) == "".join(reader.values()) == "\n".join(lines)
    reader.close()


@pytest.mark.parametrize("blank", [" ", ""], ids=["words", "not even a blank"])
def test_a_long_text_file_may_be_one_line(tmp_path: Path, monkeypatch, blank: str):
    monkeypatch.setattr("topiarist.data.readers.LONG_TEXT", 100)
    monkeypatch.setattr("topiarist.data.draw.SMALL", 0)
    monkeypatch.setattr("topiarist.data.draw.SPARSE", 0)
    text = blank.join(["word", "wörd", "文字"] * 3000)
    (tmp_path / "a.txt").write_text(text)
    assert "".join(read_documents(tp.text_files(tmp_path / "a.txt"))) == text
    tokenizer = tiny.tiny_tokenizer()
    drawn = calibration_windows(tp.text_files(tmp_path / "a.txt"), tokenizer, num_samples=5, window=64).tokens
    assert drawn.shape == (5, 64)
    assert all(bytes(text, "utf-8").find(tokenizer.decode(row).strip("\ufffd").encode()) >= 0 for row in drawn)


def test_rows_may_stand_in_an_array_or_after_a_byte_order_mark(tmp_path: Path):
    mark = b"\xef\xbb\xbf"
    (tmp_path / "array.json").write_bytes(raw_rows(".array", list(TEXTS)))
    for kind in (".json", ".jsonl", ".csv", ".array"):
        name = f"marked{kind}".replace(".array", "-array.json")
        (tmp_path / name).write_bytes(mark + raw_rows(kind, list(TEXTS)))
        assert list(read_documents(tp.text_files(tmp_path / name))) == TEXTS, name
    assert list(read_documents(tp.text_files(tmp_path / "array.json"))) == TEXTS
    (tmp_path / "marked.txt").write_bytes(mark + b"text")
    assert list(read_documents(tp.text_files(tmp_path / "marked.txt"))) == ["text"]


def test_arrow_s_file_format_and_several_files(tmp_path: Path):
    table = pa.table({"text": TEXTS})
    with pa.ipc.new_file(tmp_path / "a.arrow", table.schema) as stream:
        stream.write_table(table)
    (tmp_path / "b.txt").write_text("last")
    assert list(read_documents(tp.text_files([tmp_path / "a.arrow", tmp_path / "b.txt"]))) == [*TEXTS, "last"]


@pytest.mark.parametrize("name", ["a.pdf", "a", "a.jsonl.zip", "a.bin", "a.gz", "a.pt"])
def test_other_kinds_are_refused_with_those_that_are_known(tmp_path: Path, name: str):
    (tmp_path / name).write_text("text")
    with pytest.raises(tp.CalibrationError, match=r"kind is not known; known are \.txt.*\.parquet.*\.zst.*hub:NAME"):
        tp.text_files(tmp_path / name)


@pytest.mark.parametrize("content", ["not json", '{"txt": "x"}', "[1]", '{"text": 3}', "[" * 100_000, "1" * 5000])
def test_bad_rows_are_named(tmp_path: Path, content: str):
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n' + content)
    with pytest.raises(tp.CalibrationError, match=r"bad\.jsonl line 2"):
        list(read_documents(tp.text_files(tmp_path / "bad.jsonl")))


@pytest.mark.parametrize(
    ("name", "raw"),
    [("a.jsonl.gz", b"no gzip"), ("a.txt.xz", b"no xz"), ("a.txt.zst", b"no zstd"), ("a.txt.bz2", b"no bz2"),
     ("a.parquet", b"PAR1"), ("a.arrow", b"ARROW1"), ("a.txt", "ümlaut".encode("utf-16")), ("a.jsonl", b"\xff\xfe{"),
     ("a.csv", b"text\n\"open"), ("a.csv", b"text,\"open\n1,2\n"), ("a.csv", b"text,b\r1,2\r"),
     ("a.csv", b"text\n\xff"), ("a.json", b"["),
     ("a.jsonl.gz", gzip.compress(b"x" * 99, mtime=0)[:-9]),
     ("a.jsonl.gz", gzip.compress(bytes(range(256)), mtime=0)[:10] + b"\xff" * 40)],
)  # fmt: skip
def test_a_damaged_file_is_one_line_that_names_it(tmp_path: Path, name: str, raw: bytes):
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(tp.CalibrationError, match=f"cannot read text from .*{name}") as refused:
        list(read_documents(tp.text_files(tmp_path / name)))
    assert "\n" not in str(refused.value)
    assert ("convert it to UTF-8" in str(refused.value)) == ("codec" in str(refused.value))


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.csv"])
def test_two_columns_of_one_name_are_refused(tmp_path: Path, name: str):
    table = pa.Table.from_arrays([pa.array(["one"]), pa.array(["two"])], names=["text", "text"])
    if name == "a.csv":
        (tmp_path / name).write_text("text,text\none,two\n")
    elif name == "a.parquet":
        pa.parquet.write_table(table, tmp_path / name)
    else:
        with pa.ipc.new_file(tmp_path / name, table.schema) as file:
            file.write_table(table)
    with pytest.raises(tp.CalibrationError, match=f"{name} has several columns `text`: rename all but one"):
        list(read_documents(tp.text_files(tmp_path / name)))


def test_a_name_that_is_no_utf_8_is_refused(tmp_path: Path):
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/a\xff.txt"))
    path.write_text("text")
    with pytest.raises(tp.CalibrationError, match="bytes in its name that are no UTF-8: rename it"):
        tp.text_files(path)


@pytest.mark.parametrize("kind", [".jsonl", ".csv", ".tsv", ".parquet", ".arrow", ".json"])
def test_empty_rows_are_skipped_and_counted(tmp_path: Path, kind: str):
    (tmp_path / f"a{kind}").write_bytes(raw_rows(kind, ["one", "", "  ", "two"]))
    with pytest.warns(UserWarning, match=r"2 of 4 rows hold no text and were skipped"):
        assert list(read_documents(tp.text_files(tmp_path / f"a{kind}"))) == ["one", "two"]


@pytest.mark.parametrize("kind", [".jsonl", ".parquet", ".arrow", ".array"])
def test_null_is_refused_with_its_file_and_row(tmp_path: Path, kind: str):
    path = tmp_path / f"a{kind.replace('.array', '.json')}"
    path.write_bytes(raw_rows(kind, ["one", "two", None, "four"]))
    refused = pytest.raises(tp.CalibrationError, match=rf"{path.name} (row|line) 3 holds null where text is expected")
    with refused:
        list(read_documents(tp.text_files(path)))
    (reader,) = readers(tp.text_files(path), ())
    assert reader.value(2) is None  # a draw from a long file sees the same
    getattr(reader, "close", lambda: None)()


@pytest.mark.parametrize("kind", [".jsonl", ".csv", ".parquet", ".arrow"])
def test_the_field_has_any_name(tmp_path: Path, kind: str):
    (tmp_path / f"a{kind}").write_bytes(raw_rows(kind, list(TEXTS)).replace(b"text", b"body"))
    source = tp.text_files(tmp_path / f"a{kind}", field="body")
    assert list(read_documents(source)) == TEXTS
    with pytest.raises(tp.CalibrationError, match=r"no field `text`; it has id, body: name one with --text-field"):
        list(read_documents(tp.text_files(tmp_path / f"a{kind}")))


def test_half_a_surrogate_pair_is_no_character(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('{"text": "a\\ud800b"}')
    assert list(read_documents(tp.text_files(tmp_path / "a.jsonl"))) == ["a?b"]


def test_chat_messages_go_through_the_tokenizer_s_template(tmp_path: Path):
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": messages}))
    source, tokenizer = tp.text_files(tmp_path / "a.jsonl", field="messages"), tiny.tiny_tokenizer()
    with pytest.raises(tp.CalibrationError, match="no chat template"):
        list(read_documents(source, tokenizer=tokenizer))
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    assert list(read_documents(source, tokenizer=tokenizer)) == ["<user>hi<assistant>hello"]
    (tmp_path / "a.jsonl").write_text('{"messages": [{"from": "user"}]}')
    tokenizer.chat_template = "{{ raise_exception('what is this') }}"
    with pytest.raises(tp.CalibrationError, match=r"line 1.*what is this"):
        list(read_documents(source, tokenizer=tokenizer))


@pytest.fixture
def splits(tmp_path: Path) -> Path:
    import datasets

    one = lambda text: datasets.Dataset.from_dict({"text": [text] * 3})  # noqa: E731
    saved = {"train": one("t"), "validation": one("v"), "test": one("x"), "extra": one("e")}
    datasets.DatasetDict(saved).save_to_disk(tmp_path / "saved")
    (tmp_path / "files").mkdir()
    for name, text in (("train", "t"), ("validation", "v"), ("test", "x")):
        write_rows(tmp_path / "files" / f"{name}.jsonl", [text] * 3)
    return tmp_path


@pytest.mark.parametrize("folder", ["saved", "files"])
def test_one_split_is_read_and_never_all(splits: Path, folder: str):
    source = tp.text_files(splits / folder)
    assert set(read_documents(source)) == {"t"}
    assert set(read_documents(source, usual=("test", "validation"))) == {"x"}
    assert set(read_documents(tp.text_files(splits / folder, split="validation"))) == {"v"}
    with pytest.raises(tp.CalibrationError, match=r"no split dev; it has .*train.*: name one with --split"):
        list(read_documents(tp.text_files(splits / folder, split="dev")))


def test_a_field_that_no_file_of_a_folder_has_is_refused(tmp_path: Path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "train.txt").write_text("text")
    with pytest.raises(tp.CalibrationError, match=r"--text-field body is for rows with fields, and .*folder has none"):
        list(read_documents(tp.text_files(tmp_path / "folder", field="body")))
    (tmp_path / "rows.jsonl").write_text('{"body": "row"}')
    mixed = tp.text_files([tmp_path / "folder", tmp_path / "rows.jsonl"], field="body")
    assert list(read_documents(mixed)) == ["text", "row"]


def test_a_dataset_without_the_usual_splits(tmp_path: Path):
    import datasets

    one = datasets.Dataset.from_dict({"text": ["a"]})
    one.save_to_disk(tmp_path / "plain")
    datasets.DatasetDict(left=one, right=one).save_to_disk(tmp_path / "two")
    (tmp_path / "folder").mkdir()
    write_rows(tmp_path / "folder" / "data.jsonl", ["a"])
    for name in ("plain", "folder"):
        assert list(read_documents(tp.text_files(tmp_path / name), usual=("test",))) == ["a"], "there is no other"
    with pytest.raises(tp.CalibrationError, match="no split test or validation; it has left, right"):
        list(read_documents(tp.text_files(tmp_path / "two"), usual=("test", "validation")))
    (tmp_path / "empty").mkdir()
    with pytest.raises(tp.CalibrationError, match="is not a datasets folder"):
        list(read_documents(tp.text_files(tmp_path / "empty")))


def test_hub_datasets_are_streamed(tmp_path: Path, monkeypatch):
    import datasets
    from test_data import words

    from topiarist.data import calibration_windows

    rows = datasets.Dataset.from_dict({"text": [words(200, seed=i) for i in range(60)]}).to_iterable_dataset()
    asked = []

    def load(name, config, *, split, streaming):
        asked.append((name, config, split, streaming))
        return rows

    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda name, config: ["train", "validation"])
    monkeypatch.setattr(datasets, "load_dataset", load)
    source, tokenizer = tp.text_files("hub:allenai/c4:en"), tiny.tiny_tokenizer()
    assert len(list(read_documents(source))) == 60 and asked == [("allenai/c4", "en", "train", True)]
    draw = lambda seed: calibration_windows(source, tokenizer, num_samples=20, window=64, seed=seed)  # noqa: E731
    first = draw(0)
    assert first.tokens.shape == (20, 64) and first.digest == draw(0).digest != draw(1).digest
    texts = list(read_documents(source))
    assert sum(any(tokenizer.decode(row) in text for text in texts) for row in first.tokens) > 15
    with pytest.raises(tp.CalibrationError, match="holds too few windows of 2048 tokens"):
        calibration_windows(source, tokenizer, num_samples=40, window=2048)
    (tmp_path / "a.txt").write_text(words(200))
    for mixed in ([tmp_path / "a.txt", "hub:a/b"], ["hub:a/b", tmp_path / "a.txt"]):
        with pytest.raises(tp.CalibrationError, match=r"hub:a/b .*a\.txt .*: name datasets of the hub alone"):
            calibration_windows(tp.text_files(mixed), tokenizer, num_samples=4, window=16)


def test_a_hub_dataset_that_cannot_be_had_is_one_line(monkeypatch):
    import datasets

    def fails(*_):
        raise ConnectionError("no network\nand more")

    monkeypatch.setattr(datasets, "get_dataset_split_names", fails)
    with pytest.raises(tp.CalibrationError, match=r"^cannot read hub:a/b: no network$"):
        list(read_documents(tp.text_files("hub:a/b")))
    for source, message in (("hub:", "names no dataset"), ("", "a text file without a name")):
        with pytest.raises(tp.CalibrationError, match=message):
            list(read_documents(tp.text_files(source)))
