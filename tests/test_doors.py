"""Every command against every kind of bad input: one line, exit code 2, nothing written; never a traceback."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
from safetensors.torch import load_file, save_file

import topiarist as tp

DOORS = {
    "eval": ("eval", "model", "--text", "text.txt", "--window", "32", "--max-windows", "1"),
    "inspect": ("inspect", "model"),
    "verify": ("inspect", "model", "--verify"),
    "report": ("report", "model"),
    "apply": ("apply", "model", "masks.safetensors", "out"),
    "pack": ("pack", "model", "out"),
    "unpack": ("unpack", "packed", "out"),
    "bench packed": ("bench", "packed", "--tokens", "1", "--prompt", "2", "--batch", "1"),
    "bench": ("bench", "model", "--tokens", "1", "--prompt", "2", "--batch", "1"),
}
"""Words of a call that works on the inputs as they are; `unpack` reads the packed form of the same model."""
WEIGHTS = "model.safetensors"
REPORT = "pruning_report.json"
UP = "model.layers.1.mlp.up_proj.weight"


def with_config(**changes: object) -> Callable[[Path], None]:
    def spoil(model: Path) -> None:
        path = model / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return spoil


def config_of(text: str) -> Callable[[Path], None]:
    return lambda model: (model / "config.json").write_text(text) and None


def with_tensors(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def spoil(model: Path) -> None:
        file = next(model.glob("*.safetensors"))
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, metadata={"format": "pt"})

    return spoil


def index_of(weight_map: object) -> Callable[[Path], None]:
    def spoil(model: Path) -> None:
        (model / WEIGHTS).rename(model / "model-00001-of-00001.safetensors")
        (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return spoil


def truncated(model: Path) -> None:
    file = next(model.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-100])


def adapter(model: Path) -> None:
    for path in list(model.iterdir()):
        path.unlink()
    (model / "adapter_config.json").write_text("{}")


PACKED = re.compile("no such folder|an empty folder|config|truncated|sizes|code|unknown")
"""Checks that a packed folder can fail too."""
REPORTS = re.compile("no such folder|an empty folder|report")
"""Checks of what `report` reads."""
ALL = frozenset(DOORS) - {
    "unpack",
    "report",
    "bench packed",
}  # `report` reads reports, `unpack` a manifest: neither opens a model
LOADING = frozenset({"eval", "bench"})
REPORTING, CLAIMING = frozenset({"report"}), frozenset({"inspect", "verify"})
BUILDING = LOADING | {"bench packed"}
CHECKS: dict[str, tuple[Callable[[Path], object], str, frozenset[str]]] = {
    "no such folder": (shutil.rmtree, "does not exist|is not a|no config|cannot read|exist", frozenset(DOORS)),
    "an empty folder": (lambda m: [p.unlink() for p in m.iterdir()], "no config|not a|cannot read", frozenset(DOORS)),
    "a config that is no JSON": (config_of("{"), "not valid JSON", ALL),
    "a config that is deep": (config_of("[" * 100_000), "not valid JSON", ALL),
    "a config of endless digits": (config_of('{"hidden_size": ' + "1" * 5000 + "}"), "not valid JSON", ALL),
    "a config that is a list": (config_of("[]"), "not hold a JSON object", ALL),
    "no weights": (lambda m: (m / WEIGHTS).unlink(missing_ok=True), "weights", ALL),
    "pickled weights": (lambda m: (m / WEIGHTS).rename(m / "pytorch_model.bin"), "unpickling can run any code", ALL),
    "a report that is no JSON": (lambda m: (m / REPORT).write_text("{"), "JSON|damaged", REPORTING),
    "a report that is a list": (lambda m: (m / REPORT).write_text("[]"), "JSON|no result|damaged", REPORTING),
    "a truncated file": (truncated, "truncated or damaged", ALL | {"unpack", "bench packed"}),
    "an index of no shard": (index_of({UP: "model-00009.safetensors"}), "missing in", ALL),
    "an index that leaves the folder": (index_of({UP: "../../x.safetensors"}), "inside the folder", ALL),
    "an index that is a list": (index_of([1]), "no weight_map", ALL),
    "an index that lies": (index_of({"nothing": "model-00001-of-00001.safetensors"}), "in no shard", ALL),
    "a missing tensor": (with_tensors(lambda t: t.pop(UP)), "lacks|has no|broken|missing", LOADING | {"apply"}),
    "a wrong shape": (with_tensors(lambda t: t.update({UP: t[UP][:8].clone()})), "shape", LOADING | {"apply"}),
    "not finite": (with_tensors(lambda t: t[UP].fill_(float("nan"))), "finite|another base", frozenset({"eval", "apply"})),
    "an adapter": (adapter, "adapter|no config", ALL),
    "quantised by others": (with_config(quantization_config={"quant_method": "gptq", "bits": 4}), "quantised", LOADING),
    "claims that are a list": (with_config(pruning_config=[1]), "damaged", CLAIMING),
    "claims without a pattern": (with_config(pruning_config={"modules": {"a": 1}}), "damaged", CLAIMING),
    "an unknown type": (with_config(model_type="brand_new"), "brand_new|cannot build", BUILDING),
    "sizes that cannot be": (with_config(hidden_size=-1), "cannot build|shape|not", BUILDING),
    "sizes that are text": (with_config(hidden_size="wide"), "cannot build", BUILDING),
    "code of its own": (
        with_config(model_type="own", auto_map={"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}),
        "trust.remote.code|Unrecognized model",
        BUILDING,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A pruned model without its report's page, its masks, and its packed form."""
    folder = tmp_path_factory.mktemp("doors")
    tiny.tiny_text(folder)
    tiny.tiny_checkpoint(folder / "base")
    tp.prune(folder / "base", folder / "model", method="magnitude", calibration=tiny.tiny_tokens(4, 16))
    weights = load_file(folder / "model" / WEIGHTS)
    names = [f"{name}.weight" for name in tp.audit(folder / "model")[0]["modules"]]
    made = {name: weights[name] != 0 for name in names}
    tp.masks.save_masks(folder / "masks.safetensors", made, weights=weights, pattern="2:4", base_model="model")
    tp.runtime.pack_folder(folder / "model", folder / "packed")
    return folder


def cells() -> list:
    """Every (door, check) that can meet; the fast tier has those of `eval`."""
    meeting = {"report": REPORTS, "unpack": PACKED, "bench packed": PACKED}
    found = [(door, check) for door in DOORS for check in CHECKS if meeting.get(door, re.compile("")).search(check)]
    return [
        pytest.param(*cell, marks=() if cell[0] == "eval" else pytest.mark.slow, id=" | ".join(cell)) for cell in found
    ]


@pytest.mark.parametrize(("door", "check"), cells())
def test_a_bad_input_at_a_door(made: Path, tmp_path: Path, monkeypatch, command, door: str, check: str):
    spoil, says, refusing = CHECKS[check]
    shutil.copytree(made, tmp_path / "inputs")
    monkeypatch.chdir(tmp_path / "inputs")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question was asked"))
    monkeypatch.setenv("TOPIARIST_NO_KERNELS", "1")
    monkeypatch.setattr("warnings.showwarning", lambda *_, **__: None)
    model = Path("packed" if "packed" in DOORS[door] else "model")
    spoil(model)
    before = sorted(Path().rglob("*"))
    code, _, error = command(*DOORS[door])
    assert code in (0, 1, 2)
    if door in refusing:
        line = next((line for line in error.splitlines() if line.startswith("error ")), "")
        assert code == 2 and re.search(says, line), (code, error)
        assert sorted(Path().rglob("*")) == before, "a refusal left something behind"
