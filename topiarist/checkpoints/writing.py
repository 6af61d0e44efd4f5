"""The folder a run writes: finished blocks one by one, each atomically, and the journal that a resume reads.

OUT while work goes on: `pruning_journal.jsonl` (first line: what the run is; then one line a finished shard) and the
shards themselves, and `run_state/`, what else the run needs to go on after a kill. The index, config and report come
last, so an unfinished folder never opens as a model.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from topiarist.checkpoints.reading import INDEX, Checkpoint, file_digest
from topiarist.core.errors import CheckpointError

JOURNAL = "pruning_journal.jsonl"
REPORT = "pruning_report.json"
SHOWN = 3
"""Differences between two runs that a refusal names."""
STATES = "run_state"
"""Folder of OUT, gone when the run is finished."""
MASKS = "masks.safetensors"
"""Beside a model whose masks were learned, or for another copy of its base."""
_NOT_COPIED = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".onnx", ".index.json")


class SavedState:
    """What a long computation needs to go on after a kill. This one forgets; that of an output folder does not."""

    def load(self) -> tuple[dict[str, Tensor], dict[str, str]] | None:
        """Tensors and metadata of the last `save`; None at a fresh start."""
        return None

    def save(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        """Replace the saved state."""


class OutputFolder:
    """Where a run writes. Opens an unfinished run of the same recipe again; refuses everything else that is there."""

    def __init__(self, folder: str | Path, fingerprint: Mapping[str, Any]) -> None:
        self.folder = Path(folder)
        self.fingerprint = json.loads(json.dumps(fingerprint))
        self.finished: list[dict[str, Any]] = []
        self.complete = False
        if self.folder.exists():
            self._reopen()

    @property
    def _journal(self) -> Path:
        return self.folder / JOURNAL

    def _reopen(self) -> None:
        if not self.folder.is_dir():
            raise CheckpointError(f"{self.folder} exists and is not a folder; choose another output")
        if self._journal.is_file():
            lines = _complete_lines(self._journal)
            if lines:
                self._compare(lines[0])
                self.finished = lines[1:]
            for pattern in ("*.tmp", ".tmp*"):  # ours, and those of the library while it writes
                for stray in self.folder.glob(pattern):
                    stray.unlink()
        elif (self.folder / REPORT).is_file():
            self._compare(json.loads((self.folder / REPORT).read_text())["fingerprint"])
            self.complete = True
            self._remove_states()  # killed between the last file and this
        elif any(path.name != f"{JOURNAL}.tmp" for path in self.folder.iterdir()):  # killed at its very first line
            raise CheckpointError(f"{self.folder} exists and is not a topiarist run; choose another output or empty it")

    def _compare(self, found: Mapping[str, Any]) -> None:
        differing = list(_differences(found, self.fingerprint))
        if differing:
            more = f" (and {len(differing) - SHOWN} more)" if len(differing) > SHOWN else ""
            raise CheckpointError(
                f"{self.folder} holds another run: {'; '.join(differing[:SHOWN])}{more}. Choose another output, or delete it"
            )

    def begin(self, expected_bytes: int) -> None:
        """Make the folder and the journal's first line. Raises CheckpointError if the disk cannot hold the result."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"cannot create {self.folder}: {error.strerror}") from error
        written = sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())
        free = shutil.disk_usage(self.folder).free
        if free + written < expected_bytes:
            if not any(self.folder.iterdir()):
                self.folder.rmdir()
            raise CheckpointError(
                f"{self.folder} needs {expected_bytes / 1e9:.2f} GB, only {free / 1e9:.2f} GB are free: make room and run "
                "the same command again"
            )
        self._write_journal()  # anew, for a kill may have left half a line at its end

    def shard_is_done(self, index: int) -> dict[str, Any] | None:
        """The journal line of shard `index` if its file is there and unchanged. Later lines are then trusted no more."""
        if index >= len(self.finished):
            return None
        line = self.finished[index]
        path = self.folder / line["file"]
        if path.is_file() and file_digest(path) == line["sha256"]:
            return line
        self.finished = self.finished[:index]
        self._write_journal()
        return None

    def _write_journal(self) -> None:
        lines = [self.fingerprint, *self.finished]
        self._write_text(self._journal, "".join(json.dumps(line) + "\n" for line in lines))

    def write_shard(self, name: str, tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> None:
        """Write a shard (temporary file, fsync, rename), then its journal line."""
        whole = {key: t.contiguous() for key, t in tensors.items()}
        sizes = {key: t.numel() * t.element_size() for key, t in tensors.items()}
        self._write_shard(name, lambda path: save_file(whole, path, metadata={"format": "pt"}), sizes, info)

    def copy_shard(self, name: str, source: Checkpoint, keys: Sequence[str]) -> None:
        """A shard of tensors that stay as they are."""
        sizes = {key: source.nbytes(key) for key in keys}
        self._write_shard(name, lambda path: source.copy_bytes(keys, path), sizes, {})

    def _write_shard(
        self, name: str, write: Callable[[Path], None], sizes: Mapping[str, int], info: Mapping[str, Any]
    ) -> None:
        path = self._write_file(name, write)
        with self._disk_errors():
            line = {"file": name, "sha256": file_digest(path), "tensors": sizes, **info}
            with self._journal.open("a") as journal:
                journal.write(json.dumps(line) + "\n")
                journal.flush()
                os.fsync(journal.fileno())
        self.finished.append(json.loads(json.dumps(line)))

    @property
    def states(self) -> Path:
        """A folder for what is no part of the model; the run's end removes it."""
        return self.folder / STATES

    def state(self, name: str) -> SavedState:
        """A file of tensors in `states`."""
        return _FileState(self, f"{STATES}/{name}.safetensors")

    def _remove_states(self) -> None:
        shutil.rmtree(self.states, ignore_errors=True)

    def _write_file(self, name: str, write: Callable[[Path], None]) -> Path:
        """Temporary file, fsync, rename: the old file or the new one, whenever the power fails."""
        path = self.folder / name
        temporary = path.with_suffix(".tmp")
        with self._disk_errors(temporary):
            write(temporary)
            temporary.chmod(0o644)  # the library creates private files
            _fsync(temporary)
            temporary.replace(path)
            _fsync(path.parent)
        return path

    def finish(self, source: Path, config: Mapping[str, Any], report: Mapping[str, Any]) -> None:
        """Write everything that makes the folder a model: index, side files, report, and config last."""
        weight_map = {key: line["file"] for line in self.finished for key in line["tensors"]}
        total = sum(size for line in self.finished for size in line["tensors"].values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        with self._disk_errors():
            for path in sorted(source.iterdir()):
                if path.is_file() and _is_side_file(path):
                    shutil.copyfile(path, self.folder / path.name)
        self._write_text(self.folder / INDEX, json.dumps(index, indent=2) + "\n")
        self._write_text(self.folder / REPORT, json.dumps({**report, "fingerprint": self.fingerprint}, indent=2) + "\n")
        self._write_text(self.folder / "config.json", json.dumps(config, indent=2) + "\n")
        self._journal.unlink()
        _fsync(self.folder)
        self._remove_states()
        self.complete = True

    def write_text(self, name: str, text: str) -> None:
        """Write a small side file atomically."""
        self._write_text(self.folder / name, text)

    def _write_text(self, path: Path, text: str) -> None:
        temporary = path.with_suffix(path.suffix + ".tmp")
        with self._disk_errors(temporary):
            with temporary.open("w", encoding="utf-8") as stream:
                stream.write(text)
                stream.flush()
                os.fsync(stream.fileno())
            temporary.replace(path)

    @contextmanager
    def _disk_errors(self, temporary: Path | None = None) -> Iterator[None]:
        try:
            yield
        except (OSError, SafetensorError) as error:
            if temporary is not None:
                temporary.unlink(missing_ok=True)
            full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
            cause = "the disk is full" if full else str(error)
            raise CheckpointError(
                f"cannot write to {self.folder}: {cause}; finished blocks are kept: mend it and run the same command again"
            ) from error


class _FileState(SavedState):
    def __init__(self, output: OutputFolder, name: str) -> None:
        self.output, self.name = output, name

    def load(self) -> tuple[dict[str, Tensor], dict[str, str]] | None:
        path = self.output.folder / self.name
        if not path.is_file():
            return None
        with safe_open(path, framework="pt") as reader:
            return {key: reader.get_tensor(key) for key in reader.keys()}, dict(reader.metadata() or {})  # noqa: SIM118

    def save(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        with self.output._disk_errors():
            self.output.states.mkdir(exist_ok=True)
        self.output._write_file(self.name, lambda path: save_file(dict(tensors), path, metadata=dict(metadata)))


def _differences(found: Mapping[str, Any], wanted: Mapping[str, Any], path: str = "") -> Iterator[str]:
    """What differs between two runs, a sentence each, down to single entries."""
    for key in sorted({*found, *wanted}):
        was, now = found.get(key), wanted.get(key)
        if isinstance(was, Mapping) and isinstance(now, Mapping):
            yield from _differences(was, now, f"{path}{key} ")
        elif was != now:
            yield f"{path}{key} was {was!r} and is {now!r}"


def write_atomically(path: Path, text: str) -> None:
    """The old file or the new one, never half of it. Raises CheckpointError if it cannot be written."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise CheckpointError(f"cannot write {path}: {error.strerror}") from error


def _is_side_file(path: Path) -> bool:
    """Tokenizer, generation config, custom code: all that is neither weights nor written by us."""
    return not (
        path.name.endswith(_NOT_COPIED)
        or path.name.startswith(".")
        or path.name in ("config.json", "README.md", REPORT, JOURNAL)
        or path.name.startswith("pruning_")
    )


def _complete_lines(path: Path) -> list[dict[str, Any]]:
    """Lines of the journal; a last line cut off by a kill does not count."""
    lines: list[dict[str, Any]] = []
    for raw in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if not raw.endswith("\n"):
            break
        try:
            lines.append(json.loads(raw))
        except json.JSONDecodeError:
            break
    return lines


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
