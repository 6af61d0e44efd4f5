"""Every command against every kind of bad input: one line, exit code 2, nothing written; never a traceback."""

from __future__ import annotations

import errno
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

import topiarist as tp

TEXT = ("--data", "text.txt", "--samples", "4", "--window", "32")
TRAINING = ("--data", "text.txt", "--held-out", "4")
DOORS: dict[str, tuple[str, ...]] = {
    "prune": ("prune", "base", "out", "--method", "wanda", *TEXT),
    "learn": ("learn", "base", "out", *TRAINING, "--preset", "quick", "--steps", "1"),
    "apply": ("apply", "base", "masks.safetensors", "out"),
    "shrink": ("shrink", "base", "out", "--method", "magnitude", "--keep", "0.8", *TEXT),
    "recover": ("recover", "model", "out", *TRAINING, "--teacher", "base", "--tokens", "128", "--window", "16"),
    "quantize": ("quantize", "model", "out", "--bits", "8", "--group", "32", *TEXT),
    "allocate": ("allocate", "base", "out.json", "--rule", "owl", "--pattern", "0.5", *TEXT),
    "run": ("run", "recipe.yaml", "--out", "out"),
    "eval": ("eval", "model", "--text", "text.txt", "--window", "32", "--max-windows", "1"),
    "inspect": ("inspect", "model"),
    "verify": ("inspect", "model", "--verify"),
    "report": ("report", "model"),
    "pack": ("pack", "model", "out"),
    "unpack": ("unpack", "packed", "out"),
    "bench packed": ("bench", "packed", "--tokens", "1", "--prompt", "2", "--batch", "1"),
    "bench": ("bench", "model", "--tokens", "1", "--prompt", "2", "--batch", "1"),
    "generate": ("generate", "model", "--prompt", "abc", "--max-new-tokens", "1"),
    "export": ("export", "model", "out.gguf", "--type", "bf16"),
}
"""Words of a call that works on the inputs as they are; `unpack` reads the packed form of the same model."""
FAST = {"prune", "eval"}
"""Doors whose cells are in the fast tier."""
READING = frozenset(DOORS) - {"report", "unpack", "bench packed"}
"""Doors that open a model folder: `report` reads reports, the others the packed form."""
TEXTS = frozenset({"prune", "learn", "shrink", "recover", "quantize", "allocate", "run", "eval"})
WINDOWS = frozenset({"prune", "shrink", "recover", "quantize", "allocate", "eval"})
"""Doors with a window to choose; `learn` takes its preset's, `run` the recipe's."""
COMPUTING = TEXTS | {"bench", "generate"}
DEVICES = COMPUTING - {"run", "generate"} | {"bench packed"}
BUILDING = COMPUTING | {"bench packed"}
STORING = frozenset({"prune", "learn", "apply", "shrink", "recover", "quantize", "run", "pack", "unpack", "export"})
FOLDERS = STORING - {"export"}
RESUMING = frozenset({"prune", "learn", "shrink", "recover", "quantize", "run"})
REPORTING, CLAIMING = frozenset({"report"}), frozenset({"inspect", "verify"})
WEIGHTS = "model.safetensors"
REPORT = "pruning_report.json"
UP = "model.layers.1.mlp.up_proj.weight"


@dataclass(frozen=True)
class Check:
    """An input that is wrong, what the line about it says, and the doors that refuse it."""

    spoil: Callable[[Path], object]
    says: str
    doors: frozenset[str]
    words: tuple[str, ...] = ()
    """More words of the call."""


def as_it_is(_: Path) -> None:
    """For checks whose fault is in the words."""


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


def text_of(text: str) -> Callable[[Path], None]:
    return lambda _: Path("text.txt").write_text(text) and None


def no_tokenizer(model: Path) -> None:
    for path in model.glob("tokenizer*"):
        path.unlink()


def tokenizer_with_code(model: Path) -> None:
    no_tokenizer(model)
    (model / "tok.py").write_text("raise SystemExit('code of the folder was run')\n")
    said = {"tokenizer_class": "T", "auto_map": {"AutoTokenizer": ["tok.T", None]}}
    (model / "tokenizer_config.json").write_text(json.dumps(said))


def added_tokens(model: Path) -> None:
    """A tokenizer that knows more than the embedding, and a text of what it knows more."""
    tokenizer = tiny.tiny_tokenizer()
    tokenizer.add_tokens(["<a>", "<b>", "zz"])
    tokenizer.save_pretrained(model)
    Path("text.txt").write_text("zz " * 4000)


def both_forms(model: Path) -> None:
    """An index of shards beside the single file: two sets of weights."""
    shutil.copy(model / WEIGHTS, model / "model-00001-of-00001.safetensors")
    names = dict.fromkeys(load_file(model / WEIGHTS), "model-00001-of-00001.safetensors")
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def no_folder(model: Path) -> None:
    shutil.rmtree(model)


def empty_folder(model: Path) -> None:
    for path in model.iterdir():
        path.unlink()


def foreign_output(_: Path) -> None:
    Path("out").mkdir()
    Path("out/thesis.txt").write_text("mine")


CHECKS: dict[str, Check] = {
    "no such folder": Check(no_folder, "does not exist|is not a|no config|cannot read|exist", frozenset(DOORS)),
    "an empty folder": Check(empty_folder, "no config|not a|cannot read", frozenset(DOORS)),
    "a config that is no JSON": Check(config_of("{"), "not valid JSON", READING),
    "a config that is deep": Check(config_of("[" * 100_000), "not valid JSON", READING),
    "a config of endless digits": Check(config_of('{"hidden_size": ' + "1" * 5000 + "}"), "not valid JSON", READING),
    "a config that is a list": Check(config_of("[]"), "not hold a JSON object", READING),
    "no weights": Check(lambda model: (model / WEIGHTS).unlink(), "weights", READING),
    "pickled weights": Check(
        lambda model: (model / WEIGHTS).rename(model / "pytorch_model.bin"), "unpickling can run any code", READING
    ),
    "two sets of weights": Check(both_forms, "two sets|both|beside", READING),
    "a report that is no JSON": Check(lambda m: (m / REPORT).write_text("{"), "JSON|damaged", REPORTING),
    "a report that is a list": Check(lambda m: (m / REPORT).write_text("[]"), "JSON|no result|damaged", REPORTING),
    "a truncated file": Check(truncated, "truncated or damaged", READING | {"unpack", "bench packed"}),
    "an index of no shard": Check(index_of({UP: "model-00009.safetensors"}), "missing in", READING),
    "an index that leaves the folder": Check(index_of({UP: "../../x.safetensors"}), "inside the folder", READING),
    "an index that is a list": Check(index_of([1]), "no weight_map", READING),
    "an index that lies": Check(index_of({"nothing": "model-00001-of-00001.safetensors"}), "in no shard", READING),
    "a missing tensor": Check(
        with_tensors(lambda tensors: tensors.pop(UP)), "lacks|has no|broken|missing", COMPUTING | {"apply", "export"}
    ),
    "a wrong shape": Check(
        with_tensors(lambda tensors: tensors.update({UP: tensors[UP][:8].clone()})),
        "shape",
        COMPUTING | {"apply", "export"},
    ),
    "not finite": Check(
        with_tensors(lambda tensors: tensors[UP].fill_(float("nan"))), "NaN|finite|another base", TEXTS | {"apply"}
    ),
    "not finite beside the blocks": Check(
        with_tensors(lambda tensors: tensors["lm_head.weight"][7:8].fill_(float("inf"))),
        "NaN|finite",
        TEXTS - {"allocate"},
    ),
    "weights that are whole numbers": Check(
        with_tensors(lambda tensors: tensors.update({UP: tensors[UP].to(torch.int8)})),
        "stored as I8|another base",
        COMPUTING | {"apply", "export"},
    ),
    "weights that are complex numbers": Check(
        with_tensors(lambda tensors: tensors.update({UP: tensors[UP].to(torch.complex64)})),
        "stored as C64",
        COMPUTING | {"export"},
    ),
    "an adapter": Check(adapter, "adapter|no config", READING),
    "quantised by others": Check(
        with_config(quantization_config={"quant_method": "awq", "bits": 4}), "quantised|awq", COMPUTING
    ),
    "claims that are a list": Check(with_config(pruning_config=[1]), "damaged", CLAIMING),
    "claims without a pattern": Check(with_config(pruning_config={"modules": {"a": 1}}), "damaged", CLAIMING),
    "an unknown type": Check(with_config(model_type="brand_new"), "brand_new|cannot build", BUILDING),
    "sizes that cannot be": Check(with_config(hidden_size=-1), "cannot build|shape|not", BUILDING),
    "sizes that are text": Check(with_config(hidden_size="wide"), "cannot build", BUILDING),
    "code of its own": Check(
        with_config(model_type="own", auto_map={"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}),
        "trust.remote.code|Unrecognized model",
        BUILDING,
    ),
    "a tokenizer with code of its own": Check(tokenizer_with_code, "trust.remote.code", TEXTS | {"generate"}),
    "no tokenizer": Check(no_tokenizer, "tokenizer", TEXTS | {"generate"}),
    "a tokenizer that knows more than the embedding": Check(
        added_tokens, "vocabulary|embedding|another tokenizer", TEXTS
    ),
    "no text": Check(lambda _: Path("text.txt").unlink(), "text.txt", TEXTS),
    "an empty text": Check(text_of(" "), "text|token|document", TEXTS),
    "a text shorter than a window": Check(text_of("abc"), "token|text|short", TEXTS),
    "a window of nothing": Check(as_it_is, "window", WINDOWS, ("--window", "0")),
    "a window past the positions": Check(
        as_it_is, "window|positions|token", WINDOWS - {"eval", "recover"}, ("--window", "4096")
    ),
    "a batch of less than one": Check(as_it_is, "batch", WINDOWS, ("--batch-size", "-1")),
    "a seed of more than 32 bits": Check(
        as_it_is, "seed", TEXTS - {"run", "eval"} | {"generate"}, ("--seed", str(1 << 32))
    ),
    "CUDA where there is none": Check(as_it_is, "CUDA", DEVICES, ("--device", "cuda")),
    "Metal where there is none": Check(as_it_is, "mps|MPS", DEVICES, ("--device", "mps")),
    "no device": Check(as_it_is, "gpu", DEVICES, ("--device", "gpu")),
    "no threads": Check(as_it_is, "threads", COMPUTING - {"run"}, ("--threads", "0")),
    "too many threads": Check(as_it_is, "threads", COMPUTING - {"run"}, ("--threads", "100000")),
    "an output that is a file": Check(lambda _: Path("out").write_text("mine"), "out", FOLDERS),
    "an output of something else": Check(foreign_output, "out", FOLDERS),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A dense model, its pruned form, masks, the packed form, a text, and a recipe."""
    folder = tmp_path_factory.mktemp("doors")
    tiny.tiny_text(folder)
    tiny.tiny_checkpoint(folder / "base")
    tp.prune(folder / "base", folder / "model", method="magnitude", calibration=tiny.tiny_tokens(4, 16))
    dense, pruned = load_file(folder / "base" / WEIGHTS), load_file(folder / "model" / WEIGHTS)
    names = [f"{name}.weight" for name in tp.audit(folder / "model")[0]["modules"]]
    masks = {name: pruned[name] != 0 for name in names}
    tp.masks.save_masks(folder / "masks.safetensors", masks, weights=dense, pattern="2:4", base_model="base")
    tp.runtime.pack_folder(folder / "model", folder / "packed")
    (folder / "recipe.yaml").write_text(
        "topiarist: 1\nmodel: base\ndata: text.txt\n"
        "stages:\n- prune: {method: wanda, num_windows: 4, window_tokens: 32}\n"
    )
    return folder


@pytest.fixture
def inputs(made: Path, tmp_path: Path, monkeypatch) -> Path:
    """A copy of what was made, as the current folder, where nothing asks, compiles or warns."""
    shutil.copytree(made, tmp_path / "inputs")
    monkeypatch.chdir(tmp_path / "inputs")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question was asked"))
    monkeypatch.setenv("TOPIARIST_NO_KERNELS", "1")
    monkeypatch.setattr("warnings.showwarning", lambda *_, **__: None)
    return tmp_path / "inputs"


def marked(door: str, *rest: str):
    """A cell; those of the doors in FAST are in the fast tier."""
    return pytest.param(door, *rest, marks=() if door in FAST else pytest.mark.slow, id=" | ".join((door, *rest)))


def said(error: str) -> str:
    """The line of an error, or the parser's box."""
    return next((line for line in error.splitlines() if line.startswith("error ")), error)


def opened(door: str) -> Path:
    """The folder that a door opens."""
    return Path("base" if door == "run" else DOORS[door][1])


@pytest.mark.parametrize("door", [marked(door) for door in DOORS])
def test_a_good_input_passes(inputs: Path, command, door: str):
    """What the other tests spoil is right before."""
    code, _, error = command(*DOORS[door])
    assert code == 0, error


@pytest.mark.parametrize(
    ("door", "check"), [marked(door, name) for door in DOORS for name, check in CHECKS.items() if door in check.doors]
)
def test_a_bad_input_at_a_door(inputs: Path, command, door: str, check: str):
    CHECKS[check].spoil(opened(door))
    before = sorted(Path().rglob("*"))
    code, _, error = command(*DOORS[door], *CHECKS[check].words)
    assert code == 2 and re.search(CHECKS[check].says, said(error)), (code, error)
    assert sorted(Path().rglob("*")) == before, "a refusal left something behind"


def fail_writing(error: BaseException) -> Callable[[int], None]:
    def fsync(_: int) -> None:
        raise error

    return fsync


@pytest.mark.parametrize("door", [marked(door) for door in DOORS if door in STORING | {"allocate"}])
def test_a_full_disk(inputs: Path, command, monkeypatch, door: str):
    """The line names the reason, and the same command finishes once there is room."""
    with monkeypatch.context() as full:
        full.setattr("os.fsync", fail_writing(OSError(errno.ENOSPC, "No space left on device")))
        code, _, error = command(*DOORS[door])
        assert code == 2 and re.search("space|full", said(error)), (code, error)
    assert command(*DOORS[door])[0] == 0


@pytest.mark.parametrize("door", [marked(door) for door in DOORS if door in COMPUTING | STORING])
def test_an_interrupt(inputs: Path, command, monkeypatch, door: str):
    """The line says whether work is kept; a command that keeps none leaves nothing; the same command finishes."""
    before = sorted(Path().rglob("*"))
    with monkeypatch.context() as stopped:
        where = "torch.nn.functional.embedding" if door in COMPUTING else "os.fsync"
        stopped.setattr(where, lambda *_, **__: fail_writing(KeyboardInterrupt())(0))
        code, _, error = command(*DOORS[door])
    assert code == 130 and ("the same command resumes" in error) == (door in RESUMING), (code, error)
    assert door in RESUMING or sorted(Path().rglob("*")) == before
    assert command(*DOORS[door])[0] == 0


TABLE = Path(__file__).parents[1] / "docs/develop/doors.md"


def table() -> str:
    """The cells of the tests above as a table of Markdown: a row a check, a column a door."""
    rows = {name: check.doors for name, check in CHECKS.items()}
    rows |= {"a full disk": STORING | {"allocate"}, "an interrupt": COMPUTING | STORING}
    lines = ["| | " + " | ".join(DOORS) + " |", "|---" + "|:-:" * len(DOORS) + "|"]
    lines += [
        f"| {name} | " + " | ".join("●" if d in doors else "" for d in DOORS) + " |" for name, doors in rows.items()
    ]
    return "\n".join(lines)


def test_the_documents_have_the_table():
    """`python tests/test_doors.py` prints what to write there."""
    assert table() in TABLE.read_text()


if __name__ == "__main__":
    print(table())
