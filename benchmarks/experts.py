"""Methods that cut experts, on a small mixture of experts that is trained first: perplexity after the cut.

    python -m benchmarks.experts --folder /tmp/toy-moe [--train FILE... --heldout FILE...] [--steps 500]

A random mixture has no experts worth more than others, so a toy of 1.5 million parameters (qwen3_moe: 3 layers of 16
experts, 2 a token) learns the bytes of English on one core first: minutes. What is measured says how the scores compare on
that toy, not on a model that people use. Its router is trained to use all of its experts, or half of them would be dead
and free to cut. Texts are any that `tp.text_files` reads; without any, the demo's. The trained model and finished cells
stay in the folder and are not made again.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Trainer,
    TrainingArguments,
)

import topiarist as tp
from benchmarks.quality import keep_cell, stored_cells
from demo.assets import text_dir
from topiarist.data.text import read_documents
from topiarist.runtime.bench import machine

WINDOW, BATCH = 128, 16
CALIBRATION = 64
"""Windows of 128 bytes that the methods see, the last ones of the training text."""
HELD_OUT = 512
METHODS = ("reap", "reap:merge=true", "reap:merge=true,group_size=1", "magnitude", "random")
KEEPS = (0.75, 0.5)
SEEDS = 3
"""Of `random`; the median is shown."""


def documents(paths: list[Path], limit: int) -> list[str]:
    """The first documents of the files, `limit` characters in all."""
    texts, size = [], 0
    for text in read_documents(tp.text_files(paths)):
        texts.append(text)
        size += len(text)
        if size > limit:
            break
    return texts


def bytes_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and an end of text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"</s>": 0} | {char: number for number, char in enumerate(alphabet, 1)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


def windows(tokenizer: Any, texts: list[str]) -> torch.Tensor:
    """The texts one after another, in windows (num, 128)."""
    ids = [i for text in texts for i in (*tokenizer(text)["input_ids"], tokenizer.eos_token_id)]
    return torch.tensor(ids[: len(ids) // WINDOW * WINDOW]).view(-1, WINDOW)


def train(folder: Path, tokens: torch.Tensor, steps: int) -> None:
    """Train the toy on random windows and save it."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=257, hidden_size=96, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=24, num_experts=16, num_experts_per_tok=2, moe_intermediate_size=96,
        max_position_embeddings=256, tie_word_embeddings=True, norm_topk_prob=True, output_router_logits=True,
        router_aux_loss_coef=0.1, eos_token_id=0, bos_token_id=0,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    rows = [{"input_ids": row, "labels": row} for row in tokens]
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"), max_steps=steps, per_device_train_batch_size=BATCH, learning_rate=3e-3,
        lr_scheduler_type="cosine", warmup_steps=steps // 20, weight_decay=0.01, use_cpu=True, seed=0,
        save_strategy="no", report_to=[], logging_steps=50, disable_tqdm=True,
    )  # fmt: skip
    Trainer(model=model, args=arguments, train_dataset=rows).train()  # pyright: ignore
    model.config.output_router_logits = False
    model.save_pretrained(folder / "model")


def measure(folder: Path, method: str, keep: float, seed: int, calibration: torch.Tensor, heldout: torch.Tensor) -> Any:
    """Cut, and the perplexity of the result."""
    started = time.process_time()
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    report = tp.shrink(
        model, method=method, units=["experts"], keep=keep, data=calibration, seed=seed, batch_size=16, device="cpu"
    )
    seconds = time.process_time() - started
    return {
        "perplexity": tp.perplexity(report.result, heldout, batch_size=16).value,
        "parameters": report.parameters["stored"],
        "cpu_s": round(seconds, 1),
        "warnings": report.warnings,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the trained model and the cells are kept")
    parser.add_argument("--train", type=Path, nargs="+", default=[text_dir() / "calibration.jsonl"])
    parser.add_argument("--heldout", type=Path, nargs="+", default=[text_dir() / "heldout_wikipedia.jsonl"])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--characters", type=int, default=1_500_000, help="of the training text")
    parser.add_argument("--methods", nargs="+", default=METHODS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    texts, folder = documents(options.train, options.characters), options.folder
    if not (folder / "model" / "tokenizer.json").exists():
        bytes_tokenizer().save_pretrained(folder / "model")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "model")
    if not (folder / "model" / "config.json").exists():
        started = time.process_time()
        train(folder, windows(tokenizer, texts)[:-CALIBRATION], options.steps)
        print(f"trained on {options.steps * BATCH * WINDOW:,} bytes in {time.process_time() - started:.0f} CPU s")
    calibration = windows(tokenizer, texts)[-CALIBRATION:]
    heldout = windows(tokenizer, documents(options.heldout, 2_000_000))[:HELD_OUT]
    dense = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    print(f"dense: {tp.perplexity(dense, heldout, batch_size=16).value:.2f} on {heldout.numel():,} bytes, {machine()}")
    done = stored_cells(folder / "cells.jsonl", [options.steps])
    for method in options.methods:
        for keep in KEEPS:
            for seed in range(SEEDS if method == "random" else 1):
                name = f"{method} {keep} {seed}"
                if name not in done:
                    cell = measure(folder, method, keep, seed, calibration, heldout)
                    keep_cell(folder / "cells.jsonl", name, [options.steps], cell)
                    done[name] = cell
                print(name, done[name], flush=True)


if __name__ == "__main__":
    main()
