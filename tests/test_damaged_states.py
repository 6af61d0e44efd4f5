"""What a stopped run left, one byte changed anywhere: the same call ends in the same bytes, or refuses in one line."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tiny
from killing import contents

import topiarist as tp
from topiarist.pipelines.training import loop

TOKENS = tiny.tiny_tokens(8, 16)
POSITIONS = 5
"""Of every file: its first byte, its last, and some between."""
Run = Callable[[Path, Path], object]
TRAINING = {"held_out": 4, "seed": 3}


def learn(base: Path, out: Path) -> object:
    text = tp.text_files(out.parent / "text.txt")
    return tp.learn(base, out, data=text, preset="quick", steps=3, evaluate_every=1, prior="magnitude", **TRAINING)


def recover(base: Path, out: Path) -> object:
    text = tp.text_files(out.parent / "text.txt")
    return tp.recover(out.parent / "pruned", out, teacher=base, data=text, tokens=256, window=16, **TRAINING)


def shrink(base: Path, out: Path) -> object:
    return tp.shrink(base, out, target_params=30_000, search="values=2", data=TOKENS, method="magnitude")


def by_search(base: Path, out: Path) -> object:
    """The search's own folder stands in OUT, so that its files are tried too."""
    rule = "search:generations=3,children=2,finalists=1,sequences=2"
    done = tp.find_allocation(base, rule, data=TOKENS, pattern="2:4", method="wanda", work=out / "work")
    done.save(out / "found.json")
    return done


def results(out: Path) -> dict[str, str]:
    """What a run writes, without what a search keeps for the next one: a file there that was not read may be damaged still."""
    return {name: digest for name, digest in contents(out).items() if not name.startswith("work/")}


def prune(**options: object) -> Run:
    return lambda base, out: tp.prune(base, out, method="wanda", data=TOKENS, **options)


RUNS: dict[str, Run] = {
    "prune": prune(low_rank=2),
    "prune by rule": prune(allocation="owl"),
    "allocate by search": by_search,
    "learn": learn,
    "recover": recover,
    "shrink by search": shrink,
}
SHARE = 0.6
"""Of what a run writes, behind which it is stopped."""


def writes(monkeypatch: pytest.MonkeyPatch, work: Callable[[], object], limit: float = float("inf")) -> int:
    """How often the work waits for the disk, for no time here; a KeyboardInterrupt when that is more than `limit` times."""
    calls: list[int] = []

    def fsync(handle: int) -> None:
        calls.append(handle)
        if len(calls) > limit:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", fsync)
        work()
    return len(calls)


def flips(folder: Path) -> Iterator[tuple[Path, int]]:
    """Places of bytes to change: in every file, spread over it."""
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size):
        size = path.stat().st_size
        yield from ((path, place) for place in sorted({(size - 1) * n // (POSITIONS - 1) for n in range(POSITIONS)}))


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_changed_byte_of_an_unfinished_run(tmp_path: Path, monkeypatch, name: str):
    run = RUNS[name]
    base, out, kept = tiny.tiny_checkpoint(tmp_path / "base"), tmp_path / "out", tmp_path / "kept"
    tiny.tiny_text(tmp_path)
    tp.prune(base, tmp_path / "pruned", method="magnitude", pattern="2:4")
    monkeypatch.setattr(loop, "SAVED_AFTER", 0.0)  # a state after every step
    monkeypatch.setattr(loop, "SHARE", 1e9)
    number = writes(monkeypatch, lambda: run(base, tmp_path / "whole"))
    whole = results(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        writes(monkeypatch, lambda: run(base, out), SHARE * number)
    out.rename(kept)
    refused = 0
    for path, place in list(flips(kept)):
        shutil.copytree(kept, out)
        damaged = out / path.relative_to(kept)
        raw = bytearray(damaged.read_bytes())
        raw[place] ^= 1 << place % 7
        damaged.write_bytes(raw)
        try:
            writes(monkeypatch, lambda: run(base, out))
        except tp.TopiaristError as error:
            assert "delete" in str(error) and "\n" not in str(error)
            refused += 1
        else:
            assert results(out) == whole, f"byte {place} of {path.relative_to(kept)} led to another result"
        shutil.rmtree(out)
    assert refused, "no state was read"
