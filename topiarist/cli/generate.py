"""The command that writes text with a model."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from topiarist.cli.common import err, literal, set_threads


def generate(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="checkpoint, ordinary or packed")],
    prompt: Annotated[str, typer.Option(help="text to go on with")],
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", min=1, help="tokens to write")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token, more draws")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, max=(1 << 32) - 1, help="chooses what is drawn")] = 0,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; default: torch's choice")] = None,
) -> None:
    """Continue a prompt on the CPU, sparse and quantised layers running packed. Speed goes to the standard error."""
    from topiarist.core.errors import TopiaristError
    from topiarist.data import load_tokenizer
    from topiarist.runtime import Generator, accelerate, load_model

    set_threads(threads)
    model = load_model(folder)
    tokenizer = load_tokenizer(folder)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    if not ids.numel():
        raise TopiaristError("the prompt is empty; give at least one word")
    accelerate(model)
    generator = Generator(model)
    if generator.reason:
        err.print(literal(f"transformers' own loop: {generator.reason}"), highlight=False)
    written, times, text, printed = [], [time.perf_counter()], "", 0
    for token in generator.stream(ids, max_new_tokens, temperature=temperature, seed=seed):
        times.append(time.perf_counter())
        written.append(int(token))
        text = tokenizer.decode(written, skip_special_tokens=True)
        # Half a character at the end waits for its other half, which may come with the next token.
        whole = len(text.rstrip("\N{REPLACEMENT CHARACTER}"))
        sys.stdout.write(text[printed:whole])
        sys.stdout.flush()
        printed = max(printed, whole)
    sys.stdout.write(text[printed:] + "\n")
    if generator.reason:  # all tokens come at once, when the last is there
        speed = f", {len(written) / (times[-1] - times[0]):.1f} a second, the prompt's {ids.shape[1]} tokens included"
    else:
        err.print(f"{ids.shape[1]} tokens of prompt in {times[1] - times[0]:.2f} s", highlight=False)
        speed = f", {(len(times) - 2) / (times[-1] - times[1]):.1f} a second" if len(times) > 2 else ""
    err.print(f"{len(written)} tokens written{speed}", highlight=False)


COMMANDS = {"generate": generate}
