"""`topiarist shrink` as a person would call it: results on success; on bad input one line, exit code 2, nothing written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
from safetensors.torch import load_file


@pytest.fixture
def call(tmp_path: Path, command, monkeypatch):
    tiny.tiny_checkpoint(tmp_path / "model")
    tiny.tiny_text(tmp_path, "text.txt")
    tiny.tiny_text(tmp_path, "other.txt", seed=1)
    monkeypatch.chdir(tmp_path)
    return command


SHRINK = ("shrink", "model", "out", "--method", "magnitude", "--data", "text.txt", "--samples", "8", "--window", "32")


@pytest.mark.filterwarnings("ignore::topiarist.core.errors.CalibrationWarning")
def test_shrink_inspect_eval(call, tmp_path: Path):
    code, printed, err = call(*SHRINK, "--keep", "0.6", "--recover", "lora:steps=2")
    assert code == 0, err
    assert (
        "35,232 parameters -> 27,552" in printed and "refit of 2 matrices" in printed and "recovery, 2 steps" in printed
    )
    code, printed, _ = call("inspect", "out")
    assert (
        code == 0 and "27,552 parameters of 35,232, as stated" in printed and "magnitude keep 0.6, uniform" in printed
    )
    code, printed, _ = call("inspect", "out", "--json")
    found = json.loads(printed)["structured"]
    assert found["holds"] and found["parameters"] == found["claimed"]["stored"] == 27552
    code, printed, err = call("eval", "out", "--text", "other.txt", "--window", "32", "--save", "--json")
    assert code == 0, err
    assert [row["dense"] for row in json.loads(printed)] == [True, False]
    assert "of the parameters are left" in (tmp_path / "out" / "pruning_report.html").read_text()
    assert "27,552 parameters of 35,232" in (tmp_path / "out" / "README.md").read_text()


def test_the_command_in_the_report_repeats_the_run(call, tmp_path: Path):
    code, _, err = call(
        *SHRINK, "--layout", "hetero", "--units", "channels", "--round-to", "4", "--no-refit", "--seed", "3"
    )
    assert code == 0, err
    report = json.loads((tmp_path / "out" / "pruning_report.json").read_text())
    assert report["command"][:4] == ["topiarist", "shrink", "model", "OUT"] and not report["not_in_command"]
    code, _, err = call(*report["command"][1:3], "again", *report["command"][4:])
    assert code == 0, err
    again = json.loads((tmp_path / "again" / "pruning_report.json").read_text())
    assert again["fingerprint"] == report["fingerprint"] and again["blocks"] == report["blocks"]


@pytest.mark.parametrize("layout", ["hetero", "uniform", "masked"])
def test_zeros_and_added_biases_are_told_apart(call, tmp_path: Path, layout: str):
    """A channel of the tiny llama is 96 numbers; what it has of biases, the method added."""
    words = ("--method", "flap", "--units", "channels", "--no-refit", "--layout", layout)
    code, printed, err = call(*SHRINK, *words)
    assert code == 0, err
    rows = json.loads((tmp_path / "out" / "pruning_report.json").read_text())["blocks"]
    zeros = 96 * sum(row["slots"] - row["kept"] for row in rows)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    biases = sum(tensor.numel() for name, tensor in tensors.items() if name.endswith(".bias"))
    assert bool(zeros) == (layout == "masked") and biases >= 64
    among = f"{zeros:,} zeros and {biases:,} added biases" if zeros else f"{biases:,} added biases"
    assert f"{sum(t.numel() for t in tensors.values()):,}, of them {among}" in " ".join(printed.split())
    page = (tmp_path / "out" / "pruning_report.html").read_text()
    assert f"{biases:,} are biases that make up for what was cut" in page
    assert (f"{zeros:,} of the stored parameters are zeros that only fill up" in page) == bool(zeros)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--keep", "0"), "keep is '"),
        (("--keep", "1.01"), "keep is '"),
        (("--method", "oracle"), "choose one of"),
        (("--method", "hybrid"), "'hybrid' is called 'taylor' now"),
        (("--units", "query_heads"), "'query_heads' are called 'heads' now"),
        (("--units", "kv_groups,neurons"), "unknown units 'neurons'"),
        (("--units", "kv_groups,block"), "shrink twice"),
        (("--layout", "even"), "layout is 'even'"),
        (("--method", "magnitude:steps=3"), "has no field 'steps'"),
        (("--recover", "most"), "is 'most', should be 'lora' or 'full'"),
        (("--samples", "100000"), "add text"),
        (("--window", "128"), "longer than the model's limit"),
    ],
)
def test_bad_input_is_one_line(call, tmp_path: Path, arguments: tuple[str, ...], message: str):
    code, printed, err = call(*SHRINK, *arguments)
    assert code == 2 and message in err and len(err.strip().splitlines()) == 1 and not printed
    assert not (tmp_path / "out").exists()
