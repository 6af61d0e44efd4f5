"""What a stopped run left, one byte changed anywhere: the same call ends in the same bytes, or refuses in one line."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import tiny
from killing import contents

import topiarist as tp

TOKENS = tiny.tiny_tokens(8, 16)
POSITIONS = 7
"""Of every file: its first byte, its last, and some between."""
Run = Callable[[Path, Path], object]
TRAINING = {"held_out": 4, "seed": 3}


def learn(base: Path, out: Path) -> object:
    text = tp.text_files(out.parent / "text.txt")
    return tp.learn(base, out, data=text, preset="quick", steps=3, eval_every=1, prior="magnitude", **TRAINING)


def recover(base: Path, out: Path) -> object:
    if not (out.parent / "pruned").exists():
        tp.prune(base, out.parent / "pruned", method="magnitude", pattern="2:4")
    text = tp.text_files(out.parent / "text.txt")
    return tp.recover(out.parent / "pruned", out, teacher=base, data=text, tokens=256, window=16, **TRAINING)


def shrink(base: Path, out: Path) -> object:
    return tp.shrink(base, out, target_params=30_000, search="values=2", data=TOKENS, method="magnitude")


def by_search(base: Path, out: Path) -> object:
    """The search's own folder stands in OUT, so that its files are tried too."""
    rule = "search:generations=3,children=2,finalists=1,sequences=2"
    done = tp.find_allocation(base, rule, data=TOKENS, pattern="2:4", method="wanda", work=out / "work")
    done.save(out / "found.json")
    for path in (out / "work").glob("search-*.jsonl"):
        path.unlink()  # it holds seconds
    return done


def prune(**options: object) -> Run:
    return lambda base, out: tp.prune(base, out, method="wanda", data=TOKENS, **options)


RUNS: dict[str, tuple[Run, int]] = {
    "prune": (prune(low_rank=2), 16),
    "prune by rule": (prune(allocation="owl"), 16),
    "allocate by search": (by_search, 26),
    "learn": (learn, 12),
    "recover": (recover, 8),
    "shrink by search": (shrink, 30),
}
"""A run, and the fsync at which it is stopped."""


@contextmanager
def stopped(monkeypatch: pytest.MonkeyPatch, number: int) -> Iterator[None]:
    """The so many-th fsync inside interrupts."""
    calls = iter(range(number))

    def fsync(_: int) -> None:
        if next(calls, None) is None:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("os.fsync", fsync)
        yield


def flips(folder: Path) -> Iterator[tuple[Path, int]]:
    """Places of bytes to change: in every file, spread over it."""
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size):
        size = path.stat().st_size
        yield from ((path, place) for place in sorted({(size - 1) * n // (POSITIONS - 1) for n in range(POSITIONS)}))


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_changed_byte_of_an_unfinished_run(tmp_path: Path, monkeypatch, name: str):
    run, number = RUNS[name]
    base, out, kept = tiny.tiny_checkpoint(tmp_path / "base"), tmp_path / "out", tmp_path / "kept"
    tiny.tiny_text(tmp_path)
    run(base, tmp_path / "whole")
    whole = contents(tmp_path / "whole")
    with stopped(monkeypatch, number):
        run(base, out)
    out.rename(kept)
    refused = 0
    for path, place in list(flips(kept)):
        shutil.copytree(kept, out)
        damaged = out / path.relative_to(kept)
        raw = bytearray(damaged.read_bytes())
        raw[place] ^= 1 << place % 7
        damaged.write_bytes(raw)
        try:
            run(base, out)
        except tp.TopiaristError as error:
            assert "delete" in str(error) and "\n" not in str(error)
            refused += 1
        else:
            assert contents(out) == whole, f"byte {place} of {path.relative_to(kept)} led to another result"
        shutil.rmtree(out)
    assert refused, "no state was read"
