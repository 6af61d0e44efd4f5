"""Training text of any length as token sequences in a file: tokenised once, by one process, read by rows.

FOLDER/tokens.bin holds ids of two bytes, or four where the vocabulary has ids above 65,535, one after the other;
FOLDER/state.json says how much of it is whole, of what text and by which tokenizer, sealed with the digests of both files.
A killed run goes on behind the last whole part, and begins anew if a file is not what it wrote.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from topiarist.checkpoints.atomic import TEMPORARY, disk_errors, remove_empty, write_atomically
from topiarist.checkpoints.journal import read_sealed, sealed
from topiarist.checkpoints.locking import LOCK, FolderLock
from topiarist.checkpoints.reading import file_digest
from topiarist.checkpoints.writing import JOURNAL
from topiarist.core.errors import CalibrationError, CheckpointError
from topiarist.data.overlap import ONE_OF, passage_hashes
from topiarist.data.text import CALIBRATION, TextFiles, pieces
from topiarist.data.tokens import token_parts
from topiarist.data.windows import check_any
from topiarist.pipelines.training.loop import Progress
from topiarist.pipelines.training.processes import Processes

TOKENS, STATE, PASSAGES = "tokens.bin", "state.json", "passages.npy"
OWN = (TOKENS, STATE, STATE + TEMPORARY, PASSAGES)
"""All that is written into the folder, and all that is ever removed from it, beside the lock."""
TOLD_AFTER = 30.0
"""Seconds of tokenising after which the other processes hear from the main one: they would give it up for lost."""
MOST_PASSAGES = 1 << 20
"""Passages that are remembered, to tell this text from held-out text; of longer text a sample of them. It then understates
an overlap, but text that was trained on as a whole still shows."""
DIGESTED = 1 << 22


@dataclass(frozen=True)
class TokenTable:
    """Sequences of token ids in a file. Rows are read when they are asked for, and are no part of a process' memory."""

    path: Path
    num: int
    window: int
    item: int
    """Bytes an id."""

    def __len__(self) -> int:
        return self.num

    def __getitem__(self, rows: Sequence[int] | Tensor) -> Int[Tensor, "num window"]:
        """Read some rows. Plain reads: pages of a mapping would count as the process' own."""
        size = self.window * self.item
        with self.path.open("rb") as file:
            raw = [os.pread(file.fileno(), size, int(row) * size) for row in rows]
        ids = np.frombuffer(b"".join(raw), dtype=f"<u{self.item}").astype(np.int64)
        return torch.from_numpy(ids.reshape(len(raw), self.window))


@dataclass(frozen=True)
class TokenisedText:
    """A token table with what identifies it."""

    table: TokenTable
    digest: str
    """sha256 of all tokens as int64, as of windows in memory."""
    highest: int
    """The largest token id."""
    passages: frozenset[int]


@contextmanager
def tokenised(
    source: TextFiles,
    tokenizer: Any,
    out: Path,
    *,
    window: int,
    processes: Processes,
    progress: Progress = lambda *_: None,
) -> Iterator[TokenisedText]:
    """Tokenise text into OUT.tokens, or go on where a killed call stopped. Every process gets the same table.

    The folder is locked inside. It goes when the work inside is done, or refused before OUT was begun; what ends the
    work later leaves it for the call that resumes. window: tokens a sequence; what fills no sequence is dropped.
    Raises CalibrationError if there is not one sequence, CheckpointError if the disk is full or the folder holds files of
    others, ProcessError if not all processes see the folder.
    """
    work = _Work(source, tokenizer, out.absolute().with_name(out.absolute().name + ".tokens"), window, progress)
    done = False
    try:
        while not processes.on_main(work.go_on):
            pass
        text = processes.on_main(work.result)
        processes.check_shared((work.folder / STATE).read_text, str(work.folder))
        yield text
        done = True
    except Exception:
        done = not (out / JOURNAL).is_file()
        raise
    finally:
        if processes.is_main:
            work.close(remove=done)


class _Work:
    """The main process' part."""

    def __init__(self, source: TextFiles, tokenizer: Any, folder: Path, window: int, progress: Progress) -> None:
        self.source, self.tokenizer, self.folder, self.window = source, tokenizer, folder, window
        self.progress = progress
        # A vocabulary with holes has ids above its length.
        self.item = 2 if max(tokenizer.get_vocab().values()) < 1 << 16 else 4
        self.lock = FolderLock(folder)
        self.parts: Iterator[None] | None = None
        self.tokens = 0
        self.hashes = np.empty(0, np.uint64)
        self.sampled = ONE_OF

    def go_on(self) -> bool:
        """Tokenise for some seconds. True once all is done."""
        if self.parts is None:
            self._refuse_foreign()
            self.lock.acquire()
            self.parts = self._write()
        until = time.monotonic() + TOLD_AFTER
        return all(time.monotonic() < until for _ in self.parts)

    def _refuse_foreign(self) -> None:
        with disk_errors(f"cannot read {self.folder}"):
            names = sorted(p.name for p in self.folder.iterdir()) if self.folder.is_dir() else []
        if foreign := [name for name in names if name not in (*OWN, LOCK)]:
            raise CheckpointError(
                f"{self.folder} is where the tokens of this run would stand, and holds {foreign[0]}, which is not "
                "topiarist's: move it, or choose another output"
            )

    def _write(self) -> Iterator[None]:
        """Append part after part; yield after each."""
        identity = {"source": _identity(self.source), "tokenizer": _tokenizer_digest(self.tokenizer), "item": self.item}
        state = read_sealed(self.folder / STATE)
        path, digest = self.folder / TOKENS, hashlib.sha256()
        if state is None or state["identity"] != identity or not self._holds(state, path, digest):
            state, digest = {"parts": 0, "tokens": 0, "passages": None}, hashlib.sha256()
        done, self.tokens = state["parts"], state["tokens"]
        if state["passages"] is not None:
            self.hashes = np.load(self.folder / PASSAGES, allow_pickle=False)
            return
        parts, read = 0, 0
        size = max(1, sum(p.stat().st_size for p in self.source.paths if p.is_file()))

        def encode(text: str, **options: Any) -> Any:
            """Ids of a part; none of one that is in the file already."""
            return {"input_ids": []} if parts < done else self.tokenizer(text, **options)

        def save(passages: str | None = None) -> None:
            state = {"identity": identity, "parts": parts, "tokens": self.tokens, "sha256": digest.hexdigest()}
            write_atomically(self.folder / STATE, sealed({**state, "passages": passages}))

        with disk_errors(f"cannot write {path}"), path.open("r+b" if path.exists() else "w+b") as file:
            file.truncate(self.tokens * self.item)
            file.seek(0, os.SEEK_END)
            for text, ids in token_parts(pieces(self.source, tokenizer=self.tokenizer, usual=CALIBRATION), encode):
                self._remember(text)
                read += len(text)
                parts += 1
                if parts > done:
                    raw = ids.astype(f"<u{self.item}").tobytes()
                    digest.update(raw)
                    file.write(raw)
                    file.flush()
                    os.fsync(file.fileno())
                    self.tokens += len(ids)
                    save()
                self.progress(f"tokenised {self.tokens / 1e6:.1f}M", min(read, size), size)
                yield
            np.save(self.folder / PASSAGES, self.hashes)
            save(file_digest(self.folder / PASSAGES))

    def _holds(self, state: dict[str, Any], tokens: Path, digest: Any) -> bool:
        """Whether the files are what an earlier call wrote. digest: gets the tokens' bytes."""
        left = state["tokens"] * self.item
        passages = self.folder / PASSAGES
        if not tokens.is_file() or (state["passages"] is not None and not passages.is_file()):
            return False
        with tokens.open("rb") as file:
            while left and (raw := file.read(min(left, DIGESTED * self.item))):
                digest.update(raw)
                left -= len(raw)
        whole = state["passages"] is None or file_digest(passages) == state["passages"]
        return whole and digest.hexdigest() == state["sha256"]

    def _remember(self, text: str) -> None:
        self.hashes = np.union1d(self.hashes, passage_hashes([text]))
        while len(self.hashes) > MOST_PASSAGES:
            self.sampled *= 2
            self.hashes = self.hashes[self.hashes % np.uint64(self.sampled) == 0]

    def result(self) -> TokenisedText:
        check_any(self.tokens)
        num = self.tokens // self.window
        if num < 1:
            raise CalibrationError(
                f"training text holds {self.tokens:,} tokens, less than one sequence of {self.window}: add text, or shorten it"
            )
        table = TokenTable(self.folder / TOKENS, num, self.window, self.item)
        digest, highest, count = hashlib.sha256(), 0, num * self.window
        with table.path.open("rb") as file:
            while count:
                ids = np.frombuffer(file.read(min(count, DIGESTED) * self.item), dtype=f"<u{self.item}")
                digest.update(ids.astype("<i8").tobytes())
                highest = max(highest, int(ids.max()))
                count -= len(ids)
        return TokenisedText(table, digest.hexdigest(), highest, frozenset(self.hashes.tolist()))

    def close(self, *, remove: bool) -> None:
        if not self.lock.held:  # refused: what lies there is another run's
            return
        if remove:
            for name in OWN:
                (self.folder / name).unlink(missing_ok=True)
        self.lock.release()
        if remove:
            remove_empty([self.folder])


def _identity(source: TextFiles) -> dict[str, Any]:
    """What a resume compares: the files, those of folders too, their sizes and times, the field and split."""
    about = {key: value for key, value in asdict(source).items() if key != "paths"}
    stats = []
    for path in source.paths:
        # A folder's own time does not change with what is written into its files.
        for file in (path, *sorted(path.rglob("*"))) if path.is_dir() else (path,):
            known = file.stat() if file.is_file() else None
            stats.append((str(file), *((known.st_size, known.st_mtime_ns) if known else ())))
    return json.loads(json.dumps({**about, "paths": stats}))


def _tokenizer_digest(tokenizer: Any) -> str:
    """Of all that makes tokens of text, and text of chat messages."""
    spoken = getattr(tokenizer, "backend_tokenizer", None)
    text = spoken.to_str() if spoken is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    template = json.dumps(getattr(tokenizer, "chat_template", None), sort_keys=True)
    return hashlib.sha256(f"{text}{template}".encode()).hexdigest()
