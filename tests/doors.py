"""The doors, every command and its forms, and the checks: what is spoiled, what the line about it says, who refuses it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import tiny
import torch
from safetensors.torch import load_file, save_file

TEXT = ("--data", "text.txt", "--samples", "4", "--window", "32")
TRAINING = ("--data", "text.txt", "--held-out", "4")
DOORS: dict[str, tuple[str, ...]] = {
    "prune": ("prune", "base", "out", "--method", "wanda", *TEXT),
    "learn": ("learn", "base", "out", *TRAINING, "--preset", "quick", "--steps", "1"),
    "apply": ("apply", "base", "masks.safetensors", "out"),
    "shrink": ("shrink", "base", "out", "--method", "magnitude", *TEXT),
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
FORMS: dict[str, tuple[str, tuple[str, ...]]] = {
    "prune --bits": ("prune", ("--bits", "8", "--group", "32")),
    "prune --low-rank": ("prune", ("--low-rank", "2")),
    "prune --plan": ("prune", ("--plan",)),
    "quantize --plan": ("quantize", ("--plan",)),
    "shrink --units hidden": ("shrink", ("--units", "hidden", "--method", "taylor")),
    "shrink --rotate": ("shrink", ("--units", "hidden", "--method", "taylor", "--rotate")),
    "shrink --target-params": ("shrink", ("--target-params", "30k", "--search", "values=2", "--method", "taylor")),
}
"""Forms of a door that go another way through the code: (door, more words). They refuse what the door refuses, and are tried
with `MET_BY_FORMS`: what stands before that way is the door's own."""
MET_BY_FORMS = {
    "a truncated file", "a missing tensor", "a wrong shape", "not finite", "not finite beside the blocks",
    "weights that are whole numbers", "an adapter", "quantised by others", "code of its own", "no tokenizer",
    "a tokenizer that knows more than the embedding", "no text", "a text of NUL bytes", "a text shorter than a window",
    "a window of nothing", "no device", "an output that is a file", "an output of something else",
    "an output that is the model",
}  # fmt: skip
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
PLANNING = frozenset({"prune --plan", "quantize --plan"})
"""Forms that write nothing."""
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

    working: bool = False
    """Whether only the work meets it, and no plan of the work."""


def at(name: str, doors: frozenset[str]) -> bool:
    """Whether a door, or the door that a form belongs to, is among these."""
    return FORMS.get(name, (name,))[0] in doors


def tried(name: str) -> list[str]:
    """The checks that a door, or a form of one, is tried with."""
    known = {check: about for check, about in CHECKS.items() if name not in FORMS or check in MET_BY_FORMS}
    return [c for c, about in known.items() if at(name, about.doors) and not (about.working and name in PLANNING)]


def words_of(name: str) -> tuple[str, ...]:
    """The words of the call of a door or a form."""
    door, more = FORMS.get(name, (name, ()))
    return (*DOORS[door], *more)


def opened(name: str) -> Path:
    """The folder that a door opens."""
    return Path("base" if name == "run" else words_of(name)[1])


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


def output_below_a_file(_: Path) -> None:
    """OUT is a folder of a file, as a path with a slipped name has it."""
    Path("note").write_text("mine")
    Path("out").symlink_to("note/out")


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
        with_tensors(lambda tensors: tensors[UP].fill_(float("nan"))),
        "NaN|finite|another base",
        COMPUTING | {"apply", "pack", "export"},
        working=True,
    ),
    "not finite beside the blocks": Check(
        with_tensors(lambda tensors: tensors["lm_head.weight"][7:8].fill_(float("inf"))),
        "NaN|finite",
        COMPUTING - {"allocate"} | {"pack", "export"},
        working=True,
    ),
    "weights that are whole numbers": Check(
        with_tensors(lambda tensors: tensors.update({UP: tensors[UP].to(torch.int8)})),
        "stored as I8|another base",
        COMPUTING | {"apply", "export", "pack"},
    ),
    "weights in 8 bits without scales": Check(
        with_tensors(lambda tensors: tensors.update({UP: tensors[UP].to(torch.float8_e4m3fn)})),
        "stored as F8|another base",
        COMPUTING | {"apply", "export", "pack"},
    ),
    "weights that are complex numbers": Check(
        with_tensors(lambda tensors: tensors.update({UP: tensors[UP].to(torch.complex64)})),
        "stored as C64",
        COMPUTING | {"export", "pack"},
    ),
    "an adapter": Check(adapter, "adapter|no config", READING),
    "quantised by others": Check(
        with_config(quantization_config={"quant_method": "awq", "bits": 4}), "quantised|awq", COMPUTING
    ),
    "claims that are a list": Check(with_config(pruning_config=[1]), "damaged", CLAIMING),
    "claims without a pattern": Check(with_config(pruning_config={"modules": {"a": 1}}), "claims no pattern", CLAIMING),
    "an unknown type": Check(with_config(model_type="brand_new"), "brand_new|cannot build", BUILDING),
    "no type": Check(with_config(model_type=None), "names no model_type; copy", BUILDING),
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
    "an empty text": Check(text_of(" "), "is empty|no tokens", TEXTS),
    "a text of NUL bytes": Check(text_of("\0" * 5000), "NUL bytes", TEXTS),
    "a split of a file": Check(as_it_is, "--split", TEXTS - {"run"}, ("--split", "train")),
    "a field of plain text": Check(as_it_is, "--text-field", TEXTS - {"run"}, ("--text-field", "body")),
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
    "an output that is a file": Check(lambda _: Path("out").write_text("mine"), "out", FOLDERS, working=True),
    "an output of something else": Check(foreign_output, "out", FOLDERS, working=True),
    "an output that is the model": Check(
        lambda model: Path("out").symlink_to(model), "the model itself|exists|holds another run", FOLDERS, working=True
    ),
    "an output below a file": Check(output_below_a_file, "out", FOLDERS, working=True),
    "an output that is a pipe": Check(lambda _: os.mkfifo("out"), "out", FOLDERS, working=True),
    "an output that leads nowhere": Check(lambda _: Path("out").symlink_to("gone"), "out", FOLDERS, working=True),
}

PLACES: dict[str, Callable[[Path], Path]] = {
    "in the model's folder": lambda model: model / "out",
    "in folders that are made": lambda _: Path("not/yet/there"),
    "a link to an empty folder": lambda _: linked(Path("elsewhere")),
    "with brackets": lambda _: Path("[red]out[/blue]"),
    "with a line break": lambda _: Path("out\nside"),
}
"""Where OUT may be, strange as it is."""


def linked(target: Path) -> Path:
    target.mkdir()
    Path("link").symlink_to(target)
    return Path("link")
