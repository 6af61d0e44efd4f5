"""Perplexity against a plain loop; the audit against what was written."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch

import topiarist as tp
from topiarist.checkpoints.reading import Checkpoint
from topiarist.data import Windows
from topiarist.data.record import RECORD
from topiarist.evaluation import comparison, tasks
from topiarist.evaluation.comparison import compare, entries, held_out_windows, with_reference
from topiarist.masklearn import PRESETS
from topiarist.models.opened import ObjectModel


def test_perplexity_agrees_with_a_plain_loop():
    model, tokens = tiny.tiny_model(), tiny.tiny_tokens(5, 24)
    total, count = 0.0, 0
    with torch.no_grad():
        for row in tokens:
            log_probabilities = model(row[None]).logits[0].double().log_softmax(-1)
            for position in range(len(row) - 1):
                total -= float(log_probabilities[position, row[position + 1]])
                count += 1
    result = tp.perplexity(model, tokens, batch_size=2)
    assert result.value == pytest.approx(math.exp(total / count), rel=1e-5)
    assert (result.window, result.tokens, result.dtype) == (24, count, "float32")


def test_compare_puts_dense_first_and_finds_the_base(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny.tiny_checkpoint(Path("base"))
    text = tp.text_files(tiny.tiny_text(tmp_path))
    tp.prune("base", "out", method="magnitude", pattern="0.5", calibration=tiny.tiny_tokens(4, 16))
    rows = compare(["out"], [text], window=32, max_windows=3)
    assert [(row.model, row.dense) for row in rows] == [("base", True), ("out", False)]
    assert len(rows[0].results) == 1 and rows[0].results[0].tokens == 3 * 31
    assert [row.model for row in compare(["out"], [text], window=32, max_windows=1, reference=False)] == ["out"]
    assert [row.model for row in compare(["out", "base"], [text], window=32, max_windows=1)] == ["base", "out"]


def test_audit_sees_a_broken_pattern(tmp_path: Path):
    from safetensors.torch import load_file, save_file

    tiny.tiny_checkpoint(tmp_path / "base")
    tp.prune(tmp_path / "base", tmp_path / "out", method="magnitude", calibration=tiny.tiny_tokens(4, 16))
    name = "model.layers.1.mlp.up_proj.weight"
    shard = next(p for p in (tmp_path / "out").glob("*.safetensors") if name in load_file(p))
    tensors = load_file(shard)
    tensors[name][0] = 1.0
    save_file(tensors, shard, metadata={"format": "pt"})
    _, matrices = tp.audit(tmp_path / "out")
    assert [m.name for m in matrices if not m.holds] == [name.removesuffix(".weight")]
    _, dense = tp.audit(tmp_path / "base")
    assert all(m.holds is None and m.pattern is None and m.sparsity == 0 for m in dense)


@pytest.fixture
def base(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    tiny.tiny_text(tmp_path)
    return tiny.tiny_checkpoint(tmp_path / "base")


def edit_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_result_behind_a_link_is_made_of_what_its_own_folder_says(base: Path, tmp_path: Path):
    tp.prune("base", "out", method="magnitude")
    (tmp_path / "else" / "where").mkdir(parents=True)
    link = tmp_path / "else" / "where" / "link"
    link.symlink_to(tmp_path / "out")
    assert with_reference([str(link)])[0] == (str(tmp_path / "base"), True, None)
    assert with_reference(["out"])[0] == ("base", True, None)


def test_a_base_of_that_name_that_is_another_model_is_called_so(base: Path, tmp_path: Path, monkeypatch):
    """A hub id that was named, whose files are another revision's."""
    tp.prune("base", "out", method="magnitude")
    tiny.tiny_checkpoint(tmp_path / "later", seed=1)
    provenance = json.loads(Path("out/config.json").read_text())["pruning_config"]
    edit_config(Path("out"), pruning_config=provenance | {"base_model": "org/base"})
    monkeypatch.setattr(comparison, "locate", lambda name: Path("later" if str(name) == "org/base" else name))
    with pytest.warns(
        UserWarning, match="for out: org/base is not the model that was pruned; name that one as a MODEL"
    ):
        with_reference(["out", "org/base"])
    with pytest.warns(UserWarning, match="for out: org/base is not here; name it as a MODEL"):
        with_reference(["out"])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--window", "1"], "2 is the least"),
        (["--window", "0"], "2 is the least"),
        (["--window", "32", "--max-windows", "0"], "1 is the least"),
        (["--window", "32", "--batch-size", "0"], "batch size 0: 1 is the least"),
        (["--window", "32", "--batch-size", "-1"], "batch size -1: 1 is the least"),
        (["--window", "32", "--bos", "sometimes"], "auto, always, never"),
        (["--window", "32", "--tokenizer", "nowhere"], "no tokenizer in nowhere"),
        (["--window", "32", "--device", "gpu"], "device"),
        (["--window", "32", "--text-field", "body", "--text", "rows.jsonl"], "has no field `body`; it has text"),
    ],
)
def test_what_eval_refuses_is_one_line(base: Path, command, words: list[str], says: str):
    Path("rows.jsonl").write_text('{"text": "' + "words " * 100 + '"}')
    code, printed, error = command("eval", "base", "--text", "text.txt", *words)
    assert code == 2 and says in error and "Traceback" not in error and not printed
    assert error.count("error ") == 1


def test_eval_says_that_there_is_nothing_to_save(base: Path, command):
    words = ("--text", "text.txt", "--window", "32", "--max-windows", "1", "--save")
    code, printed, error = command("eval", "base", *words)
    assert code == 0 and "perplexity" in printed and error.count("nothing is saved: --save puts figures beside") == 1
    tp.prune("base", "out", method="magnitude")
    assert "nothing is saved" not in command("eval", "out", *words)[2] and Path("out/pruning_evaluation.json").is_file()


def test_learned_positions_are_a_limit_and_rotary_ones_a_warning(base: Path, tmp_path: Path, command):
    tiny.tiny_checkpoint(tmp_path / "learned", "gpt2")
    code, _, error = command("eval", "learned", "--text", "text.txt", "--window", "128")
    assert code == 2 and "longer than the 64 positions of learned: pass --window 64" in error
    code, printed, error = command("eval", "base", "--text", "text.txt", "--window", "128", "--max-windows", "2")
    assert code == 0 and "longer than the 64 that base was made for" in error and "254 tokens" in printed


def test_windows_of_tokens_longer_than_learned_positions_are_refused_too():
    tokens = tiny.tiny_tokens(2, 100)
    for family in ("gpt2", "opt"):
        with pytest.raises(tp.CalibrationError, match="longer than the 64 positions"):
            tp.perplexity(tiny.tiny_model(family), tokens)
        with pytest.raises(tp.CalibrationError, match="window 100 is longer than the model's limit of 64"):
            tp.prune(tiny.tiny_model(family), method="wanda", data=tokens)
    assert tp.perplexity(tiny.tiny_model(), tokens).window == 100


OLD = {"vocab_size": tiny.VOCAB, "n_head": 4, "n_layer": 2}
POSITIONS: dict[str, dict] = {
    "bloom": OLD | {"hidden_size": 32, "seq_length": 64},
    "falcon": tiny.CONFIGS["gpt_neox"] | {"alibi": True},
    "mpt": {"vocab_size": tiny.VOCAB, "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64},
    "gptj": OLD | {"n_embd": 32, "rotary_dim": 4, "n_positions": 64},
}


@pytest.mark.parametrize("family", POSITIONS)
def test_a_length_binds_where_the_model_has_a_table_of_positions(family: str, monkeypatch):
    """Biases that depend on distances alone end nowhere; MPT's, and GPT-J's rotary positions, stand in a table."""
    monkeypatch.setitem(tiny.CONFIGS, family, POSITIONS[family])
    model, tokens = tiny.tiny_model(family), tiny.tiny_tokens(2, 65)
    assert ObjectModel(model).window == 64
    if family in ("bloom", "falcon"):
        assert tp.perplexity(model, tokens).window == 65
        tp.prune(model, method="wanda", data=tokens)
        return
    with pytest.raises(tp.CalibrationError, match="longer than the 64 positions"):
        tp.perplexity(model, tokens)
    with pytest.raises(tp.CalibrationError, match="window 65 is longer than the model's limit of 64"):
        tp.prune(model, method="wanda", data=tokens)


def test_tokens_that_the_model_has_no_row_for_are_refused(base: Path, command):
    tokenizer = tiny.tiny_tokenizer()
    tokenizer.add_tokens(["<a>", "<b>", "zz"])
    tokenizer.save_pretrained(base)
    Path("added.txt").write_text("zz " * 200)
    code, _, error = command("eval", "base", "--text", "added.txt", "--window", "32")
    assert code == 2 and "text token 261 is outside the model's vocabulary of 260" in error
    with pytest.raises(tp.CalibrationError, match="outside the model's vocabulary"):
        tp.perplexity(tiny.tiny_model(), torch.full((1, 4), 300))


def test_a_config_that_asks_for_tuples(base: Path, command):
    words = ("eval", "base", "--text", "text.txt", "--window", "32", "--max-windows", "2", "--json")
    value = json.loads(command(*words)[1])[0]["results"][0]["value"]
    edit_config(base, return_dict=False)
    assert json.loads(command(*words)[1])[0]["results"][0]["value"] == value


def test_windows_begin_as_the_tokenizer_begins_a_text(base: Path, command):
    from test_data import with_start

    words = ("eval", "base", "--text", "text.txt", "--window", "32", "--max-windows", "2")
    code, printed, _ = command(*words)
    assert code == 0 and "no start token" in printed
    with_start(None, "<s>").save_pretrained(base)
    code, printed, _ = command(*words)
    assert code == 0 and "start token first" in printed
    begun = json.loads(command(*words, "--json")[1])[0]["results"][0]
    never = json.loads(command(*words, "--bos", "never", "--json")[1])[0]["results"][0]
    assert (begun["start_tokens"], never["start_tokens"]) == (1, 0) and begun["tokens"] == never["tokens"] == 62
    assert begun["text_digest"] != never["text_digest"] and begun["value"] != never["value"]


def test_the_table_says_where_tokens_differ(base: Path, tmp_path: Path, command):
    from test_data import with_start

    tiny.tiny_checkpoint(tmp_path / "same")
    tiny.tiny_checkpoint(tmp_path / "other")
    with_start(None, "<s>").save_pretrained(tmp_path / "other")
    words = ("--text", "text.txt", "--window", "32", "--max-windows", "2")
    code, printed, error = command("eval", "base", "same", *words)
    assert code == 0 and "62 tokens" in printed and "sha256" in printed and "tokens differ" not in printed, error
    code, printed, error = command("eval", "base", "other", *words)
    table = printed.partition("model")[2]  # behind the title
    assert code == 0 and "tokens differ" in table and "sha256" not in printed and "62 tokens" not in printed, error


def test_start_tokens_themselves_are_not_predicted():
    """Two start tokens: the second is given as well, so the figure is that of the text after both."""
    model, tokens = tiny.tiny_model(), tiny.tiny_tokens(3, 16)
    with torch.no_grad():
        losses = torch.stack([model(row[None], labels=row[None]).loss for row in tokens])
        first = torch.nn.functional.cross_entropy(model(tokens).logits[:, 0], tokens[:, 1])
    windows = Windows(tokens, "", frozenset(), start=2)
    found = tp.perplexity(model, windows)
    assert found.tokens == 3 * 14
    assert math.log(found.value) == pytest.approx(float((losses.mean() * 15 - first) / 14), rel=1e-4)


def test_another_tokenizer_can_be_named(base: Path, tmp_path: Path, command):
    tiny.tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    for path in base.glob("tokenizer*"):
        path.unlink()
    words = ("eval", "base", "--text", "text.txt", "--window", "32", "--max-windows", "1")
    code, _, error = command(*words)
    assert code == 2 and "no tokenizer in" in error and "--tokenizer" in error
    assert command(*words, "--tokenizer", "tokenizer")[0] == 0


def test_code_of_a_tokenizer_is_never_asked_about(base: Path, monkeypatch, command):
    for path in base.glob("tokenizer*"):
        path.unlink()
    (base / "tok.py").write_text(
        "import pathlib\nfrom transformers import PreTrainedTokenizer\npathlib.Path('ran').touch()\n"
        "class T(PreTrainedTokenizer): pass\n"
    )
    about = {"tokenizer_class": "T", "auto_map": {"AutoTokenizer": ["tok.T", None]}}
    (base / "tokenizer_config.json").write_text(json.dumps(about))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    words = ("eval", "base", "--text", "text.txt", "--window", "32")
    code, _, error = command(*words)
    assert code == 2 and "pass --trust-remote-code" in error and not Path("ran").exists()
    code, _, error = command(*words, "--trust-remote-code")
    assert code == 2 and Path("ran").exists(), "this code cannot tokenise, but it was let run"


def test_the_dense_reference_is_the_model_that_was_pruned(base: Path, tmp_path: Path, command):
    tp.prune("base", "out", method="magnitude", pattern="0.5", calibration=tiny.tiny_tokens(4, 16))
    tp.prune("out", "twice", method="magnitude", pattern="0.7", calibration=tiny.tiny_tokens(4, 16))
    text = [tp.text_files("text.txt")]
    options = {"window": 32, "max_windows": 1}
    assert [(r.model, r.dense) for r in compare(["twice"], text, **options)] == [("base", True), ("twice", False)]
    with pytest.warns(UserWarning, match=r"out-copy is no dense reference: \d+% of its weights are zero"):
        shutil.copytree("out", "out-copy")
        edit_config(Path("out-copy"), pruning_config=None)
        config = json.loads(Path("out-copy/config.json").read_text())
        del config["pruning_config"]
        Path("out-copy/config.json").write_text(json.dumps(config))
        assert [r.dense for r in compare(["out-copy"], text, **options)] == [False]
    tiny.tiny_checkpoint(tmp_path / "other", seed=3)
    Path("base").rename("moved")
    with pytest.warns(UserWarning, match="no dense reference for out: base is not here"):
        assert [r.model for r in compare(["out"], text, **options)] == ["out"]
    Path("other").rename("base")
    with pytest.warns(UserWarning, match="base is not the model that was pruned"):
        assert [r.model for r in compare(["out"], text, **options)] == ["out"]


def test_what_is_stored_names_the_dense_model_that_was_pruned(base: Path, tmp_path: Path, command):
    tiny.tiny_checkpoint(tmp_path / "another", seed=3)
    for name in ("base", "another"):
        tp.prune(name, f"{name}-pruned", method="magnitude", pattern="0.5")
    tp.prune("another-pruned", "twice", method="magnitude", pattern="0.7")
    text, options = [tp.text_files("text.txt")], {"window": 32, "max_windows": 1}
    rows = compare(["base-pruned", "twice", "another-pruned"], text, **options)
    assert [row.model for row in rows if row.dense] == ["base", "another"]
    value = {row.model: row.results[0].value for row in rows}
    stored = entries(rows, ["text.txt"])
    for name, dense in (("base-pruned", "base"), ("another-pruned", "another"), ("twice", "another")):
        assert stored[name][0]["dense"] == {"model": dense, "value": value[dense]}
    assert [row.model for row in compare(["base", "twice"], text, **options)] == ["another", "base", "twice"]
    rows = compare(["base", "twice"], text, reference=False, **options)
    assert entries(rows, ["text.txt"])["twice"][0]["dense"] is None
    Path("another").rename("moved")  # its digest says that it is the one
    found = with_reference(["base", "moved", "another-pruned"])
    assert found == [("base", True, None), ("moved", True, None), ("another-pruned", False, "moved")]
    score = tasks.Score("piqa", "acc", 0.5, None, 3, "digest")
    scores = [tasks.Scores(name, dense, "float32", "", [score], own) for name, dense, own in found]
    assert tasks.entries(scores)["another-pruned"][0]["dense"]["model"] == "moved"
    with pytest.warns(UserWarning, match="no dense reference for another-pruned: another is not here; name it"):
        assert with_reference(["base", "another-pruned"])[1] == ("another-pruned", False, None)


def test_the_text_of_every_run_before_is_refused(base: Path):
    """Of shrinking, then of pruning without text or learning on another; of masks, whose record stands beside them."""
    first = tp.text_files("text.txt")
    other = tp.text_files(tiny.tiny_text(Path(), "other.txt", seed=5))
    tp.shrink("base", "small", method="wanda-sp", keep=0.8, data=first, num_windows=4, window_tokens=32)
    tp.prune("small", "pruned", method="magnitude")
    once = replace(PRESETS["quick"], steps=1, sequences=2, length=32, prior_samples=2)
    tp.learn("small", "learned", data=other, preset=once)
    tp.masks.apply("small", "learned/masks.safetensors", "masked")
    tp.quantize("pruned", "quantised", bits=8, group="channel")
    for folder, texts in (
        ("pruned", [first]),
        ("quantised", [first]),
        ("learned", [first, other]),
        ("masked", [first, other]),
    ):
        for text in texts:
            with pytest.raises(tp.CalibrationError, match=f"is calibration text of {folder}"):
                held_out_windows(folder, text, window=32)
    Path("small", RECORD).write_text('{"passages": [1]}')
    for call in (
        lambda: tp.masks.apply("small", "learned/masks.safetensors", "none"),
        lambda: tp.prune("small", "none", method="magnitude"),
    ):
        with pytest.raises(tp.CheckpointError, match=r"pruning_calibration.json is damaged .*copy it again"):
            call()
        assert not Path("none").exists()


def test_results_are_printed_before_they_are_saved(base: Path, monkeypatch, command):
    tp.prune("base", "out", method="magnitude", calibration=tiny.tiny_tokens(4, 16))

    def full(*_):
        raise tp.CheckpointError("cannot write: the disk is full")

    monkeypatch.setattr("topiarist.results.pages.save_evaluation", full)
    code, printed, error = command(
        "eval", "out", "--text", "text.txt", "--window", "32", "--max-windows", "1", "--save"
    )
    assert code == 2 and "disk is full" in error and "(dense)" in printed


def test_a_base_of_several_results_is_read_once(tmp_path: Path, monkeypatch):
    base = tiny.tiny_checkpoint(tmp_path / "base")
    outs = [str(tmp_path / name) for name in ("a", "b")]
    for out in outs:
        tp.prune(base, out, method="magnitude")
    read: list[Path] = []
    own = Checkpoint.digest
    monkeypatch.setattr(Checkpoint, "digest", lambda self: read.append(self.folder) or own(self))
    assert [(name, dense) for name, dense, _ in with_reference(outs)] == [
        (str(base), True),
        *((o, False) for o in outs),
    ]
    assert [path.name for path in read] == ["base"]
