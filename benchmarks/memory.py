"""Peak resident memory of `prune` on a synthetic checkpoint that is larger than the memory it gets.

    python -m benchmarks.memory --folder /tmp/three-billion [--blocks 26] [--stop-after 6] [--method wanda]
    python -m benchmarks.memory --folder /tmp/mixture --shape mixture --blocks 4 --windows 4 --window 64

Writes random weights block by block in bf16: a Llama of 3B parameters (6 GB), or blocks of Qwen3-30B-A3B (1.2 GB each,
128 experts of which a token goes to 8). Prunes them in a process of its own and prints that process' peak after every
block, and at the end the calibration tokens of the experts. `--stop-after N` ends the run after N blocks.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

COMMON = {"max_position_embeddings": 8192, "dtype": "bfloat16"}
LLAMA = COMMON | {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "tie_word_embeddings": True,
}
MIXTURE = COMMON | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 151936,
    "tie_word_embeddings": False,
}
SHAPES = {"llama": LLAMA, "mixture": MIXTURE}


def shapes_of(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Tensors of one block on disk, by name in the block."""
    hidden, dim = config["hidden_size"], config["head_dim"]
    query, kv = config["num_attention_heads"] * dim, config["num_key_value_heads"] * dim
    shapes: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj": (query, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, query),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    if "num_experts" not in config:
        networks, width = ["mlp"], config["intermediate_size"]
    else:
        networks, width = [f"mlp.experts.{e}" for e in range(config["num_experts"])], config["moe_intermediate_size"]
        shapes |= {"mlp.gate": (config["num_experts"], hidden)}
        shapes |= {"self_attn.q_norm": (dim,), "self_attn.k_norm": (dim,)}
    for network in networks:
        shapes |= {f"{network}.{name}": (width, hidden) for name in ("gate_proj", "up_proj")}
        shapes[f"{network}.down_proj"] = (hidden, width)
    return shapes


def make_checkpoint(folder: Path, config: dict[str, Any], blocks: int) -> int:
    """Weights of one block at a time; returns the bytes written."""
    folder.mkdir(parents=True, exist_ok=True)
    weight_map: dict[str, str] = {}
    pool = (0.02 * torch.randn(1 << 22, generator=torch.Generator().manual_seed(0))).bfloat16()

    def tensor(*shape: int) -> torch.Tensor:
        """Ones for a norm; for a matrix, the same random numbers again and again."""
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.bfloat16)
        count = math.prod(shape)
        return pool.repeat(-(-count // len(pool)))[:count].view(shape).clone()

    def write(name: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))

    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    write(
        "model-embed.safetensors",
        {"model.embed_tokens.weight": tensor(vocabulary, hidden), "model.norm.weight": tensor(hidden)},
    )
    if not config["tie_word_embeddings"]:
        write("model-head.safetensors", {"lm_head.weight": tensor(vocabulary, hidden)})
    for i in range(blocks):
        tensors = {f"model.layers.{i}.{name}.weight": tensor(*shape) for name, shape in shapes_of(config).items()}
        write(f"model-{i:03d}.safetensors", tensors)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": blocks}))
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


RUN = """
import sys, torch, topiarist as tp
folder, out, method, threads, vocabulary, windows, window = sys.argv[1:]
torch.set_num_threads(int(threads))
generator = torch.Generator().manual_seed(0)
tokens = torch.randint(0, int(vocabulary), (int(windows), int(window)), generator=generator)
report = tp.prune(folder, out, method=method, pattern="2:4", calibration=tokens, batch_size=4,
                  progress=lambda what, done, total: print(f"{done}/{total}", flush=True))
experts = sorted(layer.tokens for layer in report.layers if ".experts." in layer.name)
if experts:
    print(f"tokens of an expert: fewest {experts[0]}, median {experts[len(experts) // 2]}, most {experts[-1]}")
print(report.run)
"""


def peak_of(pid: int) -> float:
    """Peak resident size of a process in GB (Linux)."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next((int(line.split()[1]) * 1024 / 1e9 for line in lines if line.startswith("VmHWM")), 0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the checkpoint and the result go")
    parser.add_argument("--shape", choices=list(SHAPES), default="llama")
    parser.add_argument("--blocks", type=int, default=26)
    parser.add_argument("--stop-after", type=int, default=10**6)
    parser.add_argument("--method", default="wanda")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--windows", type=int, default=32, help="of calibration")
    parser.add_argument("--window", type=int, default=512, help="tokens of each")
    options = parser.parse_args()
    base, config = options.folder / "base", SHAPES[options.shape]
    if not (base / "config.json").exists():
        size = make_checkpoint(base, config, options.blocks)
        print(f"made {size / 1e9:.2f} GB, {options.blocks} blocks")
    command = [
        sys.executable,
        "-c",
        RUN,
        base,
        options.folder / "out",
        options.method,
        options.threads,
        config["vocab_size"],
        options.windows,
        options.window,
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
    print(f"peak {peak:.2f} GB with {options.method}, {options.blocks} blocks")


if __name__ == "__main__":
    main()
