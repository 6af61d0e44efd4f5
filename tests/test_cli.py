"""The command line, called as a person would: results on success; on bad input one line, exit code 2, nothing written."""

from __future__ import annotations

import gzip
import json
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

import topiarist as tp
from topiarist import cli
from topiarist.pipelines.pruning.sparsellm import METHODS


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny.tiny_checkpoint(tmp_path / "model")
    tiny.tiny_text(tmp_path, "calibration.txt")
    tiny.tiny_text(tmp_path, "other.txt", seed=1)
    return tmp_path


@pytest.fixture
def call(folder: Path, command, monkeypatch):
    monkeypatch.chdir(folder)
    return command


PRUNE = ("prune", "model", "out", "--calibration", "calibration.txt", "--samples", "8", "--window", "32")


def test_prune_eval_inspect(call, folder: Path):
    code, printed, _ = call(*PRUNE, "--method", "sparsegpt", "--pattern", "2:4")
    assert code == 0 and "14 matrices, 50.00% zeros" in printed
    code, printed, _ = call("inspect", "out")
    assert code == 0 and "50.00% zeros in 14 matrices" in printed and "sparsegpt 2:4" in printed
    code, printed, _ = call("inspect", "out", "--json")
    assert all(matrix["holds"] for matrix in json.loads(printed)["matrices"])
    code, printed, _ = call("eval", "out", "--text", "other.txt", "--window", "32", "--json")
    rows = json.loads(printed)
    assert [row["dense"] for row in rows] == [True, False], "the dense base joins, first"
    assert rows[0]["results"][0]["window"] == 32 and rows[0]["results"][0]["value"] > 1
    code, printed, _ = call("eval", "out", "model", "--text", "other.txt", "--window", "32")
    assert code == 0 and printed.index("(dense)") < printed.index(" out ")


def test_unstructured_with_options(call, folder: Path):
    code, printed, _ = call(*PRUNE, "--method", "wanda:refit=true", "--pattern", "0.7", "--skip", "down_proj")
    assert code == 0 and "12 matrices" in printed
    config = json.loads((folder / "out" / "config.json").read_text())
    assert config["pruning_config"]["settings"]["refit"] is True
    assert "quantization_config" not in config
    assert abs(config["pruning_config"]["sparsity"] - 0.7) < 1e-3


def test_a_warning_of_every_block_is_shown_once_and_kept_whole(call, folder: Path):
    code, _, error = call(
        "prune", "model", "out", "--calibration", "calibration.txt", "--samples", "1", "--window", "16"
    )
    assert code == 0 and error.count("fewer calibration tokens than inputs") == 1 and "1 more, which differ" in error
    assert "without any token" not in error and "calibration tokens for" not in error
    report = json.loads((folder / "out" / "pruning_report.json").read_text())
    assert [warning[:14] for warning in report["warnings"]] == ["model.layers.0", "model.layers.1"]


def test_the_help_names_every_method(command):
    code, printed, _ = command("prune", "--help")
    assert code == 0 and not [name for name in METHODS if not re.search(rf"\b{name}\b", printed)]


def test_without_text(call, folder: Path):
    bare = ("prune", "model", "out")
    code, printed, _ = call(*bare, "--method", "magnitude", "--plan")
    assert code == 0 and "2 x 7" in printed and not (folder / "out").exists()
    for refused in (["--method", "wanda"], ["--method", "sparsellm"], ["--method", "magnitude:refit=true"],
                    ["--method", "magnitude", "--refine"], ["--method", "magnitude", "--correct"],
                    ["--method", "magnitude", "--allocation", "owl"], ["--method", "magnitude", "--bits", "4"]):  # fmt: skip
        code, _, error = call(*bare, *refused)
        assert code == 2 and "give calibration text" in error and not (folder / "out").exists()
        assert ("only magnitude does without" in error) == (refused[1] in ("wanda", "sparsellm"))
        assert ("only 8 bits do without" in error) == ("--bits" in refused)
    code, printed, _ = call(*bare, "--method", "magnitude", "--pattern", "0.5")
    assert code == 0 and "14 matrices, 50.00% zeros" in printed
    report = json.loads((folder / "out" / "pruning_report.json").read_text())
    assert "--calibration" not in report["command"]
    assert "no calibration text" in (folder / "out" / "pruning_report.html").read_text()
    assert "none: by the weights alone" in (folder / "out" / "README.md").read_text()
    assert call("eval", "out", "--text", "other.txt", "--window", "32")[0] == 0


def test_allocation_file(call, folder: Path):
    from topiarist.evaluation.audit import audit

    _, matrices = audit("model")
    chosen = {m.name: ("4:8" if "mlp" in m.name else None) for m in matrices}
    (folder / "allocation.json").write_text(json.dumps(chosen))
    code, _, _ = call(*PRUNE, "--method", "magnitude", "--allocation", "allocation.json")
    assert code == 0
    _, matrices = audit("out")
    assert {m.name for m in matrices if m.holds} == {name for name, pattern in chosen.items() if pattern}
    chosen["no.such.layer"] = "2:4"
    (folder / "allocation.json").write_text(json.dumps(chosen))
    code, _, error = call(*PRUNE, "--allocation", "allocation.json")
    assert code == 2 and "no.such.layer" in error


def test_plan_writes_nothing(call, folder: Path):
    code, printed, _ = call(*PRUNE, "--plan")
    assert code == 0 and "peak memory" in printed and "disk" in printed and not (folder / "out").exists()


def test_packing_a_dense_model_says_that_nothing_got_smaller(call):
    code, printed, _ = call("pack", "model", "packed")
    assert code == 0 and printed.startswith("0 of 21 tensors packed") and "Prune it first" in printed


def test_module_and_version_in_a_process_of_its_own():
    done = subprocess.run([sys.executable, "-m", "topiarist", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "0.2.0"


def damage(name: str):
    """Ways to spoil the inputs; each takes the folder."""

    def truncate(folder: Path) -> None:
        path = folder / "model" / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-100])

    def flip_header(folder: Path) -> None:
        path = folder / "model" / "model.safetensors"
        raw = bytearray(path.read_bytes())
        raw[20] ^= 0xFF
        path.write_bytes(raw)

    def nan_weight(folder: Path) -> None:
        path = folder / "model" / "model.safetensors"
        tensors = load_file(path)
        tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
        save_file(tensors, path, metadata={"format": "pt"})

    def huge_activations(folder: Path) -> None:
        path = folder / "model" / "model.safetensors"
        tensors = load_file(path)
        tensors["model.layers.0.mlp.up_proj.weight"] *= 1e30
        tensors["model.layers.0.mlp.gate_proj.weight"] *= 1e30
        save_file(tensors, path, metadata={"format": "pt"})

    def missing_tensor(folder: Path) -> None:
        path = folder / "model" / "model.safetensors"
        tensors = load_file(path)
        del tensors["model.layers.1.mlp.up_proj.weight"]
        save_file(tensors, path, metadata={"format": "pt"})

    def wrong_shape(folder: Path) -> None:
        path = folder / "model" / "model.safetensors"
        tensors = load_file(path)
        tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(8, 8)
        save_file(tensors, path, metadata={"format": "pt"})

    def outside_shard(folder: Path) -> None:
        shutil.move(folder / "model" / "model.safetensors", folder / "stolen.safetensors")
        index = {"weight_map": {"model.embed_tokens.weight": "../stolen.safetensors"}}
        (folder / "model" / "model.safetensors.index.json").write_text(json.dumps(index))

    def pickled(folder: Path) -> None:
        (folder / "model" / "model.safetensors").rename(folder / "model" / "pytorch_model.bin")

    def empty(folder: Path) -> None:
        shutil.rmtree(folder / "model")
        (folder / "model").mkdir()

    def no_weights(folder: Path) -> None:
        (folder / "model" / "model.safetensors").unlink()

    def packed(folder: Path) -> None:
        (folder / "model" / "model.safetensors").rename(folder / "model" / "packed-00001.safetensors")
        (folder / "model" / "packed.json").write_text("{}")

    def missing(folder: Path) -> None:
        shutil.rmtree(folder / "model")

    def broken_config(folder: Path) -> None:
        (folder / "model" / "config.json").write_text("{")

    def in_config(folder: Path, **changes: Any) -> None:
        path = folder / "model" / "config.json"
        config = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))

    def unknown_type(folder: Path) -> None:
        in_config(folder, model_type="brand_new")

    def two_types(folder: Path) -> None:
        in_config(folder, model_type="gpt2")

    def encoder_decoder(folder: Path) -> None:
        in_config(folder, model_type="t5", architectures=None)

    def no_blocks(folder: Path) -> None:
        in_config(folder, num_hidden_layers=0)

    def in_another_shard(folder: Path) -> None:
        model = folder / "model"
        names = list(load_file(model / "model.safetensors"))
        (model / "model.safetensors").rename(model / "one.safetensors")
        save_file({"more": torch.ones(1)}, model / "two.safetensors")
        places = dict.fromkeys(names[1:], "one.safetensors") | {names[0]: "two.safetensors", "more": "two.safetensors"}
        (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))

    def quantised(folder: Path) -> None:
        in_config(folder, quantization_config={"bits": 4})

    def empty_text(folder: Path) -> None:
        (folder / "calibration.txt").write_text("")

    def short_text(folder: Path) -> None:
        (folder / "calibration.txt").write_text("too short")

    def no_text(folder: Path) -> None:
        (folder / "calibration.txt").unlink()

    def binary_text(folder: Path) -> None:
        (folder / "calibration.txt").write_bytes(b"\xff\xfe\x00\x80" * 50)

    def output_is_a_file(folder: Path) -> None:
        (folder / "out").write_text("mine")

    def output_is_something_else(folder: Path) -> None:
        (folder / "out").mkdir()
        (folder / "out" / "thesis.txt").write_text("mine")

    return locals()[name]


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        ("missing", "does not exist"),
        ("empty", "no config.json"),
        ("no_weights", "no weights to prune"),
        ("packed", "topiarist unpack model OUT"),
        ("broken_config", "not valid JSON"),
        ("truncate", "truncated or damaged"),
        ("flip_header", "truncated or damaged"),
        ("missing_tensor", "model lacks model.layers.1.mlp.up_proj.weight"),
        ("wrong_shape", "config.json asks for"),
        ("outside_shard", "only .safetensors files inside the folder"),
        ("pickled", "unpickling can run any code"),
        ("nan_weight", "NaN or Inf in model.layers.1.mlp.up_proj.weight"),
        ("huge_activations", "NaN or Inf in the Gram"),
        ("unknown_type", "it knows no model type 'brand_new'; upgrade transformers"),
        ("two_types", "says model_type 'gpt2' and the architecture LlamaForCausalLM"),
        ("encoder_decoder", "no causal language model of type 't5', it is an encoder-decoder: prune its modules"),
        ("no_blocks", "its config says num_hidden_layers 0"),
        ("in_another_shard", "but in another shard: download it again"),
        ("quantised", "quantised"),
        ("empty_text", "hold no tokens; name another file"),
        ("short_text", "add text"),
        ("no_text", "does not exist"),
        ("binary_text", "cannot read text"),
        ("output_is_a_file", "not a folder"),
        ("output_is_something_else", "not a topiarist run"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(call, folder: Path, spoil: str, said: str):
    damage(spoil)(folder)
    before = sorted(str(p) for p in folder.rglob("*"))
    code, _, error = call(*PRUNE, "--method", "wanda")
    message = " ".join(error.split())
    assert code == 2 and said in message and "Traceback" not in message, message
    assert error.count("error ") == 1
    finished = (folder / "out" / "config.json").exists()
    assert not finished
    if spoil not in ("nan_weight", "huge_activations", "missing_tensor", "wrong_shape"):  # found in the middle of a run
        assert sorted(str(p) for p in folder.rglob("*")) == before, "something was written"


@pytest.mark.parametrize("pattern", ["4:2", "0:4", "1.5", "2:", "nonsense", "-0.5", "2:64"])
def test_nonsense_patterns(call, folder: Path, pattern: str):
    code, _, error = call(*PRUNE, "--pattern", pattern)
    assert code == 2 and not (folder / "out").exists()
    assert pattern.strip("-") in error or "not in [0, 1)" in error


def test_pattern_that_does_not_fit_names_the_layer(call, folder: Path):
    code, _, error = call(*PRUNE, "--pattern", "3:7")
    assert code == 2 and "layer model.layers.0.self_attn.q_proj" in error and "divisible by 7" in error


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--method", "nonsense"], "unknown method"),
        (["--method", "alps:nonsense=1"], "has no field"),
        (["--method", "alps:ridge=much"], "ALPS: ridge is 'much'"),
        (["--method", "alps:preset"], "write it as in alps:preset=best"),
        (["--window", "4096"], "longer than the model's limit of 64 tokens; ask for 64 or fewer"),
        (["--samples", "many"], "--samples is 'many', should be a valid integer"),
        (["--nonsense"], "No such option"),
        (["--skip", "("], "regular expressions"),
    ],
)
def test_bad_options(call, folder: Path, arguments, said: str):
    code, _, error = call(*PRUNE, *arguments)
    assert code == 2 and said in error and not (folder / "out").exists()


def test_evaluating_on_the_calibration_text_is_refused(call, folder: Path):
    assert call(*PRUNE, "--method", "magnitude")[0] == 0
    code, _, error = call("eval", "out", "--text", "calibration.txt", "--window", "32")
    assert code == 2 and "is calibration text" in error
    # Also when it stands inside a larger file of another format.
    rows = [{"text": (folder / name).read_text()} for name in ("other.txt", "calibration.txt")]
    with gzip.open(folder / "both.jsonl.gz", "wt") as stream:
        stream.write("\n".join(map(json.dumps, rows)))
    assert call("eval", "out", "--text", "both.jsonl.gz", "--window", "32")[0] == 2
    assert call("eval", "out", "--text", "calibration.txt", "--window", "32", "--allow-overlap")[0] == 0
    code, _, error = call("eval", "out", "--text", "calibration.txt", "--window", "32", "--allow-overlap", "--save")
    assert code == 2 and "leave --save out" in error and not (folder / "out" / "pruning_evaluation.json").exists()


def test_a_full_disk_keeps_what_is_done(call, folder: Path, monkeypatch):
    import errno

    import topiarist.checkpoints.atomic

    real, written = topiarist.checkpoints.atomic.save_file, []

    def fails_on_the_second(tensors, path, **options):
        if len(written) == 1:
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(path)
        real(tensors, path, **options)

    monkeypatch.setattr(topiarist.checkpoints.atomic, "save_file", fails_on_the_second)
    code, _, error = call(*PRUNE, "--method", "wanda")
    assert code == 2 and "the disk is full" in error and "same command" in error
    assert len(list((folder / "out").rglob("*.safetensors"))) == 1 and not list((folder / "out").rglob("*.tmp"))
    monkeypatch.setattr(topiarist.checkpoints.atomic, "save_file", real)
    assert call(*PRUNE, "--method", "wanda")[0] == 0


def test_too_little_room_is_seen_before_work(call, folder: Path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6, 100))
    code, _, error = call(*PRUNE, "--method", "wanda")
    assert code == 2 and "are free" in error and not (folder / "out").exists()


def test_interrupted_says_how_to_go_on(call, folder: Path, monkeypatch):
    import topiarist.pipelines.pruning.block as block

    real, blocks = block.BlockPruner.prune, []

    def interrupted(self, *args, **kwargs):
        blocks.append(1)
        if len(blocks) == 2:
            raise KeyboardInterrupt
        return real(self, *args, **kwargs)

    monkeypatch.setattr(block.BlockPruner, "prune", interrupted)
    code, _, error = call(*PRUNE, "--method", "wanda")
    assert code == 130 and "same command resumes" in error
    monkeypatch.setattr(block.BlockPruner, "prune", real)
    assert call(*PRUNE, "--method", "wanda")[0] == 0


def test_a_huge_header_is_refused(call, folder: Path):
    (folder / "model" / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    code, _, error = call(*PRUNE)
    assert code == 2 and "truncated or damaged" in error


def test_learn_and_apply(tmp_path: Path, monkeypatch, capsys):
    import tiny

    base = tiny.tiny_checkpoint(tmp_path / "base")
    text = tiny.tiny_text(tmp_path, paragraphs=60)
    command = ["learn", str(base), str(tmp_path / "out"), "--data", str(text), "--steps", "3", "--prior", "magnitude"]
    for extra, wanted in ((["--plan"], "masked weights"), ([], "changed")):
        monkeypatch.setattr(sys, "argv", ["topiarist", *command, *extra])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert not stop.value.code and wanted in capsys.readouterr().out
    masks = tmp_path / "out" / "masks.safetensors"
    monkeypatch.setattr(sys, "argv", ["topiarist", "apply", str(base), str(masks), str(tmp_path / "again")])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code and (tmp_path / "again" / "config.json").is_file()
    other = tiny.tiny_checkpoint(tmp_path / "other", seed=3)
    monkeypatch.setattr(sys, "argv", ["topiarist", "apply", str(other), str(masks), str(tmp_path / "refused")])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2 and "made for another base model" in capsys.readouterr().err


def test_a_method_and_its_additions_from_one_text():
    from said import method_from_text

    from topiarist.pipelines.pruning.correct import Correct
    from topiarist.pipelines.pruning.refine import Refine

    solver, additions = method_from_text("alps:preset=best,iterations=9+correct:share=0.5+refine")
    assert solver == tp.solvers.ALPS(preset="best", iterations=9)
    assert additions == {"correct": Correct(share=0.5), "refine": Refine()}
    with pytest.raises(tp.TopiaristError, match="unknown addition 'refit'"):
        method_from_text("alps+refit")
    with pytest.raises(tp.TopiaristError, match="Correct: share is 'much'"):
        method_from_text("alps+correct:share=much")


def test_progress_is_lines_where_no_terminal_shows_a_bar(capsys, monkeypatch):
    from topiarist.cli import common

    monkeypatch.setattr(common.err, "width", 200)
    times = iter([0.0, 4.0, 11.0, 13.0, 22.0])
    lines = common.ProgressLines(lambda: next(times))
    for done in range(4):
        lines("pruning [1/2]", done, 4)
    assert capsys.readouterr().err.splitlines() == ["pruning [1/2] 1/4, 11 s", "pruning [1/2] 3/4, 22 s"]
