"""Peak resident memory of `prune` on a synthetic Llama-shaped checkpoint that is larger than the memory it gets.

    python -m benchmarks.memory --folder /tmp/three-billion [--blocks 26] [--stop-after 6] [--method wanda]

Writes the checkpoint shard by shard (bf16, about 6 GB for 3B parameters), prunes it in a process of its own with 32 x 512
calibration tokens, and prints that process' peak after every block. `--stop-after N` ends the run after N blocks.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

HIDDEN, FFN, HEADS, KV_HEADS, VOCAB = 3072, 8192, 24, 8, 128256
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HIDDEN // HEADS,
    "vocab_size": VOCAB,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
}


def make_checkpoint(folder: Path, blocks: int) -> int:
    """Random weights, one block at a time; returns the bytes written."""
    folder.mkdir(parents=True, exist_ok=True)
    weight_map: dict[str, str] = {}
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)

    def write(name: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))

    ones = torch.ones(HIDDEN, dtype=torch.bfloat16)
    write("model-embed.safetensors", {"model.embed_tokens.weight": normal(VOCAB, HIDDEN), "model.norm.weight": ones})
    kv = KV_HEADS * HIDDEN // HEADS
    for i in range(blocks):
        stem = f"model.layers.{i}."
        shapes = {
            "self_attn.q_proj": (HIDDEN, HIDDEN),
            "self_attn.k_proj": (kv, HIDDEN),
            "self_attn.v_proj": (kv, HIDDEN),
            "self_attn.o_proj": (HIDDEN, HIDDEN),
            "mlp.gate_proj": (FFN, HIDDEN),
            "mlp.up_proj": (FFN, HIDDEN),
            "mlp.down_proj": (HIDDEN, FFN),
        }
        tensors = {f"{stem}{name}.weight": normal(*shape) for name, shape in shapes.items()}
        tensors |= {f"{stem}{name}.weight": ones.clone() for name in ("input_layernorm", "post_attention_layernorm")}
        write(f"model-{i:03d}.safetensors", tensors)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": blocks}))
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


RUN = """
import sys, torch, topiarist as tp
folder, out, method, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
tokens = torch.randint(0, {vocab}, (32, 512), generator=torch.Generator().manual_seed(0))
report = tp.prune(folder, out, method=method, pattern="2:4", calibration=tokens, batch_size=4,
                  progress=lambda what, done, total: print(f"{{done}}/{{total}}", flush=True))
print(report.run)
"""


def peak_of(pid: int) -> float:
    """Peak resident size of a process in GB (Linux)."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next((int(line.split()[1]) * 1024 / 1e9 for line in lines if line.startswith("VmHWM")), 0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the checkpoint and the result go")
    parser.add_argument("--blocks", type=int, default=26)
    parser.add_argument("--stop-after", type=int, default=10**6)
    parser.add_argument("--method", default="wanda")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    base = options.folder / "base"
    if not (base / "config.json").exists():
        size = make_checkpoint(base, options.blocks)
        print(f"made {size / 1e9:.2f} GB, {options.blocks} blocks")
    command = [
        sys.executable,
        "-c",
        RUN.format(vocab=VOCAB),
        base,
        options.folder / "out",
        options.method,
        str(options.threads),
    ]
    started = time.time()
    with subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        peak = 0.0
        for line in process.stdout:
            peak = max(peak, peak_of(process.pid)) if process.poll() is None else peak
            print(f"{time.time() - started:6.0f} s  {line.strip()[:200]}  peak {peak:.2f} GB", flush=True)
            if line.split("/")[0].isdigit() and int(line.split("/")[0]) >= options.stop_after:
                process.kill()
    print(f"peak {peak:.2f} GB with {options.method}")


if __name__ == "__main__":
    main()
