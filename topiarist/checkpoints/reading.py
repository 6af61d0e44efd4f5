"""Checkpoints on disk, read tensor by tensor: a local folder, or what the hub has of that name."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Shaped
from safetensors import SafetensorError, safe_open
from torch import Tensor

from topiarist.checkpoints.access import check_name, check_readable
from topiarist.checkpoints.hub import snapshot
from topiarist.core.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PACKED = "packed.json"
"""What a packed folder has in their place; topiarist.runtime reads it."""

KEPT_OPEN = 1 << 28
"""Bytes read through one open file before it is opened anew: until then what was read stays mapped."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as a safetensors header describes it."""

    dtype: str
    """In the format's own terms: BF16, F32, I8, ..."""
    shape: tuple[int, ...]
    nbytes: int

    @property
    def itemsize(self) -> int:
        """Bytes an element; 0 if there is none."""
        return self.nbytes // max(1, math.prod(self.shape))


class Checkpoint:
    """A model folder with safetensors weights, read lazily. Raises CheckpointError for everything unsafe or broken."""

    _reader: tuple[Path, Any, int] | None = None
    """The file that was read last, open, and the bytes read through it."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        check_name(self.folder)
        if not self.folder.is_dir():
            raise CheckpointError(f"model folder {folder} does not exist")
        self._headers: dict[Path, tuple[dict[str, Any], int]] = {}
        self.config = self._read_json("config.json")
        if not _is_provenance(self.config.get("pruning_config") or {}):
            raise CheckpointError(f"pruning_config in {folder}/config.json is damaged; copy it again")
        self.files = self._locate_tensors()

    @property
    def as_stored(self) -> Checkpoint:
        """The folder with its tensors and its config as they are: itself, unless it answers for them in another way."""
        return self

    @classmethod
    def of_shard(cls, path: Path) -> Checkpoint:
        """A single finished shard, read by the same names."""
        shard = cls.__new__(cls)
        shard.folder, shard.config, shard._headers = path.parent, {}, {}
        with opened(path) as reader:
            shard.files = dict.fromkeys(reader.keys(), path)
        return shard

    def _read_json(self, name: str) -> dict[str, Any]:
        if not (self.folder / name).is_file():
            raise CheckpointError(
                f"{self.folder} has no {name}: name a folder that save_pretrained wrote or the hub gave"
            )
        return read_json(self.folder / name, cure="download it again")

    def _locate_tensors(self) -> dict[str, Path]:
        """Tensor name -> file."""
        if (self.folder / INDEX).is_file():
            weight_map = self._read_json(INDEX).get("weight_map")
            named = isinstance(weight_map, dict) and all(isinstance(shard, str) for shard in weight_map.values())
            if not weight_map or not named:
                raise CheckpointError(f"{self.folder / INDEX} has no weight_map of tensors to files; download it again")
            if (self.folder / SINGLE).is_file() and SINGLE not in weight_map.values():
                raise CheckpointError(
                    f"{self.folder} holds two sets of weights, {SINGLE} and what {INDEX} names: remove one of them"
                )
            for shard in set(weight_map.values()):
                if Path(shard).name != shard or not shard.endswith(".safetensors"):
                    raise CheckpointError(
                        f"{self.folder / INDEX} names the shard {shard!r}: only .safetensors files inside the folder are read"
                    )
            files = {name: self.folder / shard for name, shard in weight_map.items()}
        elif (self.folder / SINGLE).is_file():
            path = self.folder / SINGLE
            with opened(path) as reader:
                files = dict.fromkeys(reader.keys(), path)
        elif pickles := sorted(p.name for p in self.folder.iterdir() if p.suffix in (".bin", ".pt", ".pth")):
            raise CheckpointError(
                f"{self.folder} holds only pickled weights ({pickles[0]}); unpickling can run any code, so it is refused: "
                "convert it with from_pretrained(...).save_pretrained(...)"
            )
        elif (self.folder / PACKED).is_file():
            raise CheckpointError(f"{self.folder} is packed: write it back with `topiarist unpack {self.folder} OUT`")
        else:
            raise CheckpointError(
                f"{self.folder} has no {SINGLE} and no {INDEX}: no weights to prune; download it again, or name another folder"
            )
        held: dict[Path, set[str]] = {}
        for path in sorted(set(files.values())):
            if not path.is_file():
                raise CheckpointError(
                    f"shard {path.name} is named in the index but missing in {self.folder}: download it again"
                )
            with opened(path) as reader:
                held[path] = set(reader.keys())
        if missing := sorted(name for name, path in files.items() if name not in held[path]):
            where = "in another shard" if any(missing[0] in names for names in held.values()) else "in no shard"
            raise CheckpointError(
                f"tensor {missing[0]} is in the index of {self.folder} but {where}: download it again"
            )
        return files

    def __contains__(self, name: str) -> bool:
        return name in self.files

    def read(self, name: str, *, mapped: bool = False) -> Tensor:
        """One tensor: its own memory, or (`mapped`) a read-only view of the file that costs only the pages touched."""
        path = self.files[name]
        with whole(path):
            # To open a file is to parse its header, and a mixture's names thousands of tensors.
            if self._reader is None or self._reader[0] != path or self._reader[2] > KEPT_OPEN:
                self._reader = path, safe_open(path, framework="pt"), 0
            _, reader, touched = self._reader
            tensor = reader.get_tensor(name)
            self._reader = path, reader, touched + tensor.nbytes
            return tensor if mapped else tensor.clone()

    def close(self) -> None:
        """Let go of the file that was read last: as long as it is open, what was read of it stays mapped."""
        self._reader = None

    def stored(self, name: str) -> StoredTensor:
        """What the file says of a tensor, without reading it."""
        about = self._header(self.files[name])[0][name]
        begin, end = about["data_offsets"]
        return StoredTensor(about["dtype"], tuple(about["shape"]), end - begin)

    def nbytes(self, name: str) -> int:
        """Bytes of a tensor as it is stored, without reading it."""
        return self.stored(name).nbytes

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor as it is stored, without reading it."""
        return self.stored(name).shape

    def numel(self, name: str) -> int:
        """Number of elements of a tensor, without reading it."""
        return math.prod(self.shape(name))

    def _header(self, path: Path) -> tuple[dict[str, Any], int]:
        """A file's header and where its data begins. The format: 8 bytes of length, JSON, data."""
        if path not in self._headers:
            with whole(path), path.open("rb") as stream:
                length = int.from_bytes(stream.read(8), "little")
                self._headers[path] = json.loads(stream.read(length)), 8 + length
        return self._headers[path]

    def chunks(self, name: str, size: int = 1 << 24) -> Iterator[bytes]:
        """The bytes of a tensor as they are stored, in pieces of at most `size` bytes."""
        header, data = self._header(self.files[name])
        begin, end = header[name]["data_offsets"]
        with whole(self.files[name]), self.files[name].open("rb") as source:
            source.seek(data + begin)
            for place in range(begin, end, size):
                yield source.read(min(size, end - place))

    def claims(self) -> dict[str, str]:
        """The pattern that `pruning_config` claims for every matrix; {} if there is none."""
        return claimed_patterns(self.config.get("pruning_config") or {}, f"{self.folder}/config.json")

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
        """Bytes of all weight files, headers included."""
        return sum(path.stat().st_size for path in set(self.files.values()))


_PROVENANCE: dict[type, tuple[str, ...]] = {
    dict: ("settings", "calibration", "modules", "patterns", "structured", "quantized", "recovery"),
    str: ("version", "pipeline", "method", "pattern", "base_model", "base_digest"),
}
"""What `pruning_config` holds, as far as it is read; any of it may be missing."""


def _is_provenance(stated: Any) -> bool:
    return isinstance(stated, dict) and all(
        isinstance(stated.get(name), kind | None) for kind, names in _PROVENANCE.items() for name in names
    )


def claimed_patterns(provenance: Mapping[str, Any], file: str = "config.json") -> dict[str, str]:
    """The pattern that a `pruning_config` claims for every matrix, by the matrix' full name.

    file: that it stands in, for the message. Raises CheckpointError for a matrix without a pattern.
    """
    claims: dict[str, str] = {}
    stated = provenance.get("patterns") or {}
    for name, about in (provenance.get("modules") or {}).items():
        own = about.get("pattern") if isinstance(about, dict) else None
        pattern = own or stated.get(name, provenance.get("pattern"))
        if not isinstance(pattern, str):
            raise CheckpointError(f"pruning_config in {file} claims no pattern; copy it again")
        claims[name] = pattern
    return claims


def read_json(path: Path, *, cure: str = "delete it, or make it again") -> dict[str, Any]:
    """The JSON object in a file. Raises CheckpointError, with the cure, for everything else."""
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        check_readable(path)
        raise CheckpointError(f"{path} is not valid JSON: {error}; {cure}") from error
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{path} does not hold a JSON object; {cure}")
    return loaded


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """Open a safetensors file. Raises CheckpointError that names the file if it is truncated or damaged."""
    with whole(path), safe_open(path, framework="pt") as reader:
        yield reader


@contextmanager
def whole(path: Path) -> Iterator[None]:
    """What is read inside comes from a whole file. Raises CheckpointError that names it if it cannot be read, or is damaged."""
    try:
        yield
    except (SafetensorError, OSError) as error:
        check_readable(path)
        raise CheckpointError(f"{path} is truncated or damaged ({error}); download or copy it again") from error


def file_digest(path: Path) -> str:
    """sha256 of a file's bytes, in hexadecimal. Raises CheckpointError if it cannot be read."""
    with whole(path), path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def weight_digest(weight: Shaped[Tensor, "..."]) -> str:
    """sha256 of a tensor's bytes in row order, little-endian."""
    raw = weight.detach().cpu().contiguous().view(-1).view(torch.uint8)
    return hashlib.sha256(raw.numpy().data).hexdigest()


def locate(model: str | Path) -> Path:
    """A local folder, or a hub id's snapshot. Raises CheckpointError if neither can be had."""
    if not isinstance(model, str | os.PathLike):
        raise CheckpointError(f"a {type(model).__name__} is no model folder: give a folder, or a hub id")
    path = Path(model)
    check_name(path)
    if path.exists():
        return path
    text = str(model)
    if text.startswith((".", "/", "~")) or text.count("/") > 1 or text.endswith("/"):
        raise CheckpointError(f"model folder {model} does not exist")
    return snapshot(text)
