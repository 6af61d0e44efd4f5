"""Checkpoints on disk: reading tensor by tensor, writing finished blocks atomically, the journal a resume reads.

OUT while work goes on: `pruning_journal.jsonl` (first line: what the run is; then one line a finished shard) and the
shards themselves. The index, config and report come last, so an unfinished folder never opens as a model.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from topiarist.errors import CheckpointError

INDEX = "model.safetensors.index.json"
JOURNAL = "pruning_journal.jsonl"
REPORT = "pruning_report.json"
_NOT_COPIED = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".onnx", ".index.json")


class Checkpoint:
    """A model folder with safetensors weights, read lazily. Raises CheckpointError for everything unsafe or broken."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise CheckpointError(f"model folder {folder} does not exist")
        self.config = self._read_json("config.json")
        self.files = self._locate_tensors()

    @classmethod
    def of_shard(cls, path: Path) -> Checkpoint:
        """A single finished shard, read by the same names."""
        shard = cls.__new__(cls)
        shard.folder, shard.config = path.parent, {}
        with _opened(path) as reader:
            shard.files = dict.fromkeys(reader.keys(), path)
        return shard

    def _read_json(self, name: str) -> dict[str, Any]:
        path = self.folder / name
        if not path.is_file():
            raise CheckpointError(f"{self.folder} has no {name}: not a Hugging Face model folder")
        try:
            loaded = json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{path} is not valid JSON: {error}; download it again") from error
        if not isinstance(loaded, dict):
            raise CheckpointError(f"{path} does not hold a JSON object; download it again")
        return loaded

    def _locate_tensors(self) -> dict[str, Path]:
        """Tensor name -> file."""
        if (self.folder / INDEX).is_file():
            weight_map = self._read_json(INDEX).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise CheckpointError(f"{self.folder / INDEX} has no weight_map; download it again")
            for shard in set(weight_map.values()):
                if Path(shard).name != shard or not shard.endswith(".safetensors"):
                    raise CheckpointError(
                        f"{self.folder / INDEX} names the shard {shard!r}: only .safetensors files inside the folder are read"
                    )
            files = {name: self.folder / shard for name, shard in weight_map.items()}
        elif (self.folder / "model.safetensors").is_file():
            path = self.folder / "model.safetensors"
            with _opened(path) as reader:
                files = dict.fromkeys(reader.keys(), path)
        elif pickles := sorted(p.name for p in self.folder.iterdir() if p.suffix in (".bin", ".pt", ".pth")):
            raise CheckpointError(
                f"{self.folder} holds only pickled weights ({pickles[0]}); unpickling can run any code, so it is refused: "
                "convert it with from_pretrained(...).save_pretrained(...)"
            )
        else:
            raise CheckpointError(f"{self.folder} has no model.safetensors and no {INDEX}: no weights to prune")
        held: set[str] = set()
        for path in sorted(set(files.values())):
            if not path.is_file():
                raise CheckpointError(f"shard {path.name} is named in the index but missing in {self.folder}")
            with _opened(path) as reader:
                held.update(reader.keys())
        if missing := sorted(set(files) - held):
            raise CheckpointError(f"tensor {missing[0]} is in the index of {self.folder} but in no shard")
        return files

    def __contains__(self, name: str) -> bool:
        return name in self.files

    def read(self, name: str, *, mapped: bool = False) -> Tensor:
        """One tensor: its own memory, or (`mapped`) a read-only view of the file that costs only the pages touched."""
        with _opened(self.files[name]) as reader:
            tensor = reader.get_tensor(name)
            return tensor if mapped else tensor.clone()

    def grouped(self, names: Sequence[str], limit: int) -> list[list[str]]:
        """The names in order, cut into groups of at most `limit` bytes (a larger tensor stands alone)."""
        groups: list[list[str]] = []
        room = 0
        for name in sorted(names):
            size = self.nbytes(name)
            if not groups or size > room:
                groups.append([])
                room = limit
            groups[-1].append(name)
            room -= size
        return groups

    def nbytes(self, name: str) -> int:
        begin, end = self._header(self.files[name])[0][name]["data_offsets"]
        return end - begin

    def numel(self, name: str) -> int:
        return math.prod(self._header(self.files[name])[0][name]["shape"])

    def _header(self, path: Path) -> tuple[dict[str, Any], int]:
        """A shard's header and where its data begins. The format: 8 bytes of length, JSON, data."""
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            return json.loads(stream.read(length)), 8 + length

    def copy_bytes(self, names: Sequence[str], target: Path) -> None:
        """Write a safetensors file of the named tensors as they are stored, through a small buffer."""
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        spans: list[tuple[Path, int, int]] = []
        offset = 0
        for name in names:
            shard, data = self._header(self.files[name])
            begin, end = shard[name]["data_offsets"]
            header[name] = {**shard[name], "data_offsets": [offset, offset + end - begin]}
            spans.append((self.files[name], data + begin, end - begin))
            offset += end - begin
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)  # data starts aligned
        with target.open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            for path, start, size in spans:
                with path.open("rb") as source:
                    source.seek(start)
                    while size:
                        size -= out.write(source.read(min(size, 1 << 24)))

    def claims(self) -> dict[str, str]:
        """The pattern that `pruning_config` claims for every matrix; {} if there is none."""
        provenance = self.config.get("pruning_config", {})
        claims: dict[str, str] = {}
        for name, about in provenance.get("modules", {}).items():
            own = about.get("pattern") if isinstance(about, dict) else None
            claims[name] = own or provenance.get("patterns", {}).get(name, provenance["pattern"])
        return claims

    def dtype(self) -> torch.dtype:
        """The dtype that the config states, else that of the first floating tensor."""
        stated = self.config.get("dtype", self.config.get("torch_dtype"))
        if isinstance(stated, str) and isinstance(getattr(torch, stated, None), torch.dtype):
            return getattr(torch, stated)
        return next((t.dtype for t in map(self.read, self.files) if t.is_floating_point()), torch.float32)

    def digest(self) -> str:
        """sha256 over config and weight files: what "the same model" means to a resume."""
        total = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for path in sorted(set(self.files.values())):
            total.update(path.name.encode())
            total.update(file_digest(path).encode())
        return total.hexdigest()

    def weight_bytes(self) -> int:
        return sum(path.stat().st_size for path in set(self.files.values()))


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as reader:
            yield reader
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is truncated or damaged ({error}); download it again") from error


def file_digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def locate(model: str | Path) -> Path:
    """A local folder, or a hub id's snapshot. Raises CheckpointError if neither can be had."""
    path = Path(model)
    if path.exists():
        return path
    text = str(model)
    if text.startswith((".", "/", "~")) or text.count("/") > 1 or text.endswith("/"):
        raise CheckpointError(f"model folder {model} does not exist")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(text, ignore_patterns=["*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.gguf"]))
    except Exception as error:  # the hub client raises many types: no network, no such repository, no rights
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"model folder {model} does not exist, and the hub gives no model of that name ({reason})"
        ) from error


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
        elif any(path.name != f"{JOURNAL}.tmp" for path in self.folder.iterdir()):  # killed at its very first line
            raise CheckpointError(f"{self.folder} exists and is not a topiarist run; choose another output or empty it")

    def _compare(self, found: Mapping[str, Any]) -> None:
        differing = [
            f"{key} was {found.get(key)!r} and is {self.fingerprint.get(key)!r}"
            for key in sorted({*found, *self.fingerprint})
            if found.get(key) != self.fingerprint.get(key)
        ]
        if differing:
            raise CheckpointError(
                f"{self.folder} holds another run: {'; '.join(differing)}. Choose another output, or delete it"
            )

    def begin(self, expected_bytes: int) -> None:
        """Make the folder and the journal's first line. Raises CheckpointError if the disk cannot hold the result."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"cannot create {self.folder}: {error.strerror}") from error
        written = sum(path.stat().st_size for path in self.folder.glob("*.safetensors"))
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

    def write_state(self, name: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        """Replace a file of tensors that is no part of the model: what a long run needs to go on."""
        self._write_file(name, lambda path: save_file(dict(tensors), path, metadata=dict(metadata)))

    def _write_file(self, name: str, write: Callable[[Path], None]) -> Path:
        """Temporary file, fsync, rename: the old file or the new one, whenever the power fails."""
        path = self.folder / name
        temporary = path.with_suffix(".tmp")
        with self._disk_errors(temporary):
            write(temporary)
            temporary.chmod(0o644)  # the library creates private files
            _fsync(temporary)
            temporary.replace(path)
            _fsync(self.folder)
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
