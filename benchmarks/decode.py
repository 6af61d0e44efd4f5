"""Decoding against llama.cpp: milliseconds of processor time a token of integer weights, in turns in one process.

    python -m benchmarks.decode                       the shape of Llama-3.2-1B (vocabulary 49,152), one thread
    python -m benchmarks.decode --shape demo          the shape of SmolLM2-135M

Weights are random integers, which take as long as others. Ours: dense, 2:4 and 70 % zeros in int8 and int4 with groups of 64,
by the C++ loop; llama.cpp: dense Q8_0 and Q4_0 files, by xllamacpp, whose wheel is built for AVX2, and by llama-cpp-python
where it is installed, built by pip for the processor at hand. Head and embeddings are tied and 8-bit everywhere. Blocks share
weights as soon as different ones take four times the last-level cache, so that each token still streams all of them. Of one
thread the processor's time counts, of several the time that passed.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import set_module_tensor_to_device
from torch import Tensor
from transformers import LlamaConfig

from topiarist.core.patterns import parse_pattern
from topiarist.pipelines.exporting import architecture, vocabulary
from topiarist.quantization.gguf_blocks import BLOCK, q4_0, q8_0
from topiarist.runtime.bench import machine
from topiarist.runtime.build import LEVELS, load_kernels
from topiarist.runtime.decoder import Decoder
from topiarist.runtime.linear import QuantisedEmbedding, QuantisedLinear
from topiarist.runtime.skeleton import skeleton

TOKENIZER = Path(".assets/smollm2-135m")
SHAPES = {"1b": (2048, 8192, 16, 32, 8), "demo": (576, 1536, 30, 9, 3)}
"""Width, channels of a feed-forward network, blocks, heads, key-value heads."""
ZEROS = ("none", "2:4", "0.7")
WHEEL, NATIVE = "llama.cpp, wheel", "llama.cpp, native"
RIVAL = {8: "q8_0", 4: "q4_0"}
GROUP = 64
SHARED_CACHE = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
START, WARM = 8, 4
"""Position of the first token that is timed; tokens before llama.cpp's timed ones, which pay for the prompt."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/decode.md"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    width, channels, blocks, heads, kv_heads = SHAPES[args.shape]
    config = LlamaConfig(
        hidden_size=width, intermediate_size=channels, num_hidden_layers=blocks, num_attention_heads=heads,
        num_key_value_heads=kv_heads, vocab_size=49152, tie_word_embeddings=True, max_position_embeddings=2048,
        dtype="bfloat16",
    )  # fmt: skip
    times: dict[tuple[int, str], list[float]] = {}
    sizes: dict[tuple[int, str], int] = {}
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        calls: dict[tuple[int, str], Callable[[], float]] = {}
        for bits, kind in RIVAL.items():
            path = Path(folder) / f"{kind}.gguf"
            write_gguf(path, config, kind)
            for name, rival in rivals().items():
                calls[bits, name], sizes[bits, name] = rival(path, args), path.stat().st_size
        for bits in RIVAL:
            for zeros in ZEROS:
                calls[bits, zeros], sizes[bits, zeros] = ours(config, bits, zeros, args)
        for _ in range(args.rounds):
            for key, call in calls.items():
                times.setdefault(key, []).append(call())
    text = table(times, sizes, args)
    print(text)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("a") as file:
        file.write(text)


def matrices(config: Any) -> dict[str, tuple[int, int]]:
    """(out, in) of the linears of a block."""
    width, kv = config.hidden_size, config.hidden_size // config.num_attention_heads * config.num_key_value_heads
    attention = {"self_attn.q_proj": (width, width), "self_attn.k_proj": (kv, width), "self_attn.v_proj": (kv, width)}
    ffn = config.intermediate_size
    networks = {"mlp.gate_proj": (ffn, width), "mlp.up_proj": (ffn, width), "mlp.down_proj": (width, ffn)}
    return attention | {"self_attn.o_proj": (width, width)} | networks


def distinct(config: Any, bytes_of_block: int) -> int:
    """Blocks with weights of their own: more than four times the last-level cache, or all."""
    if not SHARED_CACHE.exists():
        return config.num_hidden_layers
    kilobytes = int(SHARED_CACHE.read_text().strip().removesuffix("K"))
    return min(config.num_hidden_layers, -(-4 * 1024 * kilobytes // bytes_of_block))


def clock(args: Any) -> float:
    return time.process_time() if args.threads == 1 else time.perf_counter()


def codes_of(shape: tuple[int, int], bits: int, zeros: str = "none") -> Tensor:
    """Random integers (out, in), some of them zero."""
    limit = 1 << (bits - 1)
    codes = torch.randint(-limit, limit, shape, dtype=torch.int8)
    return codes if zeros == "none" else codes.masked_fill_(~parse_pattern(zeros).mask(torch.rand(shape)), 0)


def ours(config: Any, bits: int, zeros: str, args: Any) -> tuple[Callable[[], float], int]:
    """What times tokens of our loop, in milliseconds each, and the bytes that one reads."""
    model = skeleton(config.to_dict())
    made: list[dict[str, QuantisedLinear]] = []
    for index in range(config.num_hidden_layers):
        if not made or len(made) < distinct(config, sum(m.packed_bytes for m in made[0].values())):
            made.append({name: linear(shape, bits, zeros) for name, shape in matrices(config).items()})
        for name, module in made[index % len(made)].items():
            model.set_submodule(f"model.layers.{index}.{name}", module)
    head = linear((config.vocab_size, config.hidden_size), 8, "none")
    model.set_input_embeddings(QuantisedEmbedding(head))
    model.set_output_embeddings(head)
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            set_module_tensor_to_device(model, name, "cpu", value=torch.ones(parameter.shape, dtype=torch.bfloat16))
    decoder = Decoder(model, batch=1, max_tokens=256)

    def call() -> float:
        begin = clock(args)
        for token in range(args.tokens):
            decoder.step(torch.tensor([token + 100]), START + token)
        return 1e3 * (clock(args) - begin) / args.tokens

    blocks = (made[index % len(made)] for index in range(config.num_hidden_layers))
    return call, head.packed_bytes + sum(module.packed_bytes for block in blocks for module in block.values())


def linear(shape: tuple[int, int], bits: int, zeros: str) -> QuantisedLinear:
    """A packed linear with a scale for every group."""
    scales = (1e-3 * (1 + torch.rand(shape[0], shape[1] // GROUP))).bfloat16()
    return QuantisedLinear(codes_of(shape, bits, zeros), scales, bits)


def write_gguf(path: Path, config: Any, kind: str) -> None:
    """A dense model of random integers as a GGUF file."""
    import gguf

    row = architecture.ARCHITECTURES["llama"]
    writer, rename = gguf.GGUFWriter(path, row.name), architecture.name_map(row, config)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind.upper()}"])
    architecture.write_settings(writer, config, row)
    vocabulary.write_vocabulary(writer, TOKENIZER, vocabulary.read(TOKENIZER), config.vocab_size)
    block = {name: encoded(shape, kind) for name, shape in matrices(config).items()}
    count = distinct(config, sum(rows.nbytes for rows in block.values()))
    blocks = [
        block,
        *({name: encoded(shape, kind) for name, shape in matrices(config).items()} for _ in range(1, count)),
    ]
    norm = np.ones(config.hidden_size, np.float32)
    writer.add_tensor(
        rename("model.embed_tokens.weight"), encoded((config.vocab_size, config.hidden_size), "q8_0"),
        raw_dtype=gguf.GGMLQuantizationType.Q8_0,
    )  # fmt: skip
    writer.add_tensor(rename("model.norm.weight"), norm)
    for index in range(config.num_hidden_layers):
        for name, rows in blocks[index % count].items():
            raw = gguf.GGMLQuantizationType[kind.upper()]
            writer.add_tensor(rename(f"model.layers.{index}.{name}.weight"), rows, raw_dtype=raw)
        for name in ("input_layernorm", "post_attention_layernorm"):
            writer.add_tensor(rename(f"model.layers.{index}.{name}.weight"), norm)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def encoded(shape: tuple[int, int], kind: str) -> np.ndarray:
    """The rows of a Q8_0 or Q4_0 tensor of random integers."""
    scales = (1e-3 * (1 + torch.rand(shape[0], shape[1] // BLOCK))).half()
    if kind == "q8_0":
        return q8_0(codes_of(shape, 8), scales).numpy()
    return q4_0(codes_of(shape, 4), scales).numpy()


def llama_cpp(path: Path, args: Any) -> Callable[[], float]:
    """What times tokens of llama.cpp, in milliseconds each: those of a long text less those of a short one."""
    import xllamacpp

    about = xllamacpp.CommonParams()
    about.model.path, about.n_ctx, about.n_parallel, about.warmup = str(path), 256, 1, True
    about.cpuparams.n_threads = about.cpuparams_batch.n_threads = args.threads
    server = xllamacpp.Server(about)

    def seconds(tokens: int) -> float:
        begin = clock(args)
        found = server.handle_completions(
            {"prompt": list(range(100, 100 + START)), "n_predict": tokens, "ignore_eos": True, "temperature": -1.0}
        )
        taken = clock(args) - begin
        assert found["usage"]["completion_tokens"] == tokens, found
        return taken

    return lambda: 1e3 * (seconds(WARM + args.tokens) - seconds(WARM)) / args.tokens


def native(path: Path, args: Any) -> Callable[[], float]:
    """What times tokens of the llama.cpp that was built here, token by token as our loop is."""
    import llama_cpp

    model = llama_cpp.Llama(
        str(path), n_ctx=256, n_batch=64, n_threads=args.threads, n_threads_batch=args.threads, verbose=False
    )

    def call() -> float:
        model.reset()
        model.eval(list(range(100, 100 + START)))
        begin = clock(args)
        for token in range(args.tokens):
            model.eval([token + 100])
        return 1e3 * (clock(args) - begin) / args.tokens

    return call


def rivals() -> dict[str, Callable[[Path, Any], Callable[[], float]]]:
    found: dict[str, Callable[[Path, Any], Callable[[], float]]] = {WHEEL: llama_cpp}
    return found | ({NATIVE: native} if find_spec("llama_cpp") else {})


def table(times: dict[tuple[int, str], list[float]], sizes: dict[tuple[int, str], int], args: Any) -> str:
    """Medians, and how many times as fast each is as llama.cpp's dense file of as many bits."""
    known = f"kernels {LEVELS[load_kernels().level]}, xllamacpp {version('xllamacpp')}"
    if rival := (NATIVE if (8, NATIVE) in times else ""):
        known += f", llama-cpp-python {version('llama_cpp_python')}"
    lines = [
        f"## {args.shape}: {machine()}, {known}\n",
        "| bits | weights | MB | ms a token | least | x the wheel | x native |",
        "|---|---|---|---|---|---|---|",
    ]
    for (bits, name), taken in times.items():
        middle = statistics.median(taken)
        gains = [f"{statistics.median(times[bits, of]) / middle:.2f}" if of else "" for of in (WHEEL, rival)]
        what = f"{name} {RIVAL[bits].upper()}" if name in (WHEEL, NATIVE) else f"{name} zeros".replace("none", "no")
        cells = (str(bits), what, f"{sizes[bits, name] / 1e6:.0f}", f"{middle:.1f}", f"{min(taken):.1f}", *gains)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n\n"


if __name__ == "__main__":
    main()
