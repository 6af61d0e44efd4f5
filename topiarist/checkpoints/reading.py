"""Checkpoints on disk, read tensor by tensor: a local folder, or what the hub has of that name."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from topiarist.core.errors import CheckpointError

INDEX = "model.safetensors.index.json"


class Checkpoint:
    """A model folder with safetensors weights, read lazily. Raises CheckpointError for everything unsafe or broken."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise CheckpointError(f"model folder {folder} does not exist")
        self._headers: dict[Path, tuple[dict[str, Any], int]] = {}
        self.config = self._read_json("config.json")
        self.files = self._locate_tensors()

    @classmethod
    def of_shard(cls, path: Path) -> Checkpoint:
        """A single finished shard, read by the same names."""
        shard = cls.__new__(cls)
        shard.folder, shard.config, shard._headers = path.parent, {}, {}
        with opened(path) as reader:
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
            with opened(path) as reader:
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
            with opened(path) as reader:
                held.update(reader.keys())
        if missing := sorted(set(files) - held):
            raise CheckpointError(f"tensor {missing[0]} is in the index of {self.folder} but in no shard")
        return files

    def __contains__(self, name: str) -> bool:
        return name in self.files

    def read(self, name: str, *, mapped: bool = False) -> Tensor:
        """One tensor: its own memory, or (`mapped`) a read-only view of the file that costs only the pages touched."""
        with opened(self.files[name]) as reader:
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

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._header(self.files[name])[0][name]["shape"])

    def _header(self, path: Path) -> tuple[dict[str, Any], int]:
        """A shard's header and where its data begins. The format: 8 bytes of length, JSON, data."""
        if path not in self._headers:
            with path.open("rb") as stream:
                length = int.from_bytes(stream.read(8), "little")
                self._headers[path] = json.loads(stream.read(length)), 8 + length
        return self._headers[path]

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
        return claimed_patterns(self.config.get("pruning_config", {}))

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


def claimed_patterns(provenance: Mapping[str, Any]) -> dict[str, str]:
    """The pattern that a `pruning_config` claims for every matrix, by the matrix' full name."""
    claims: dict[str, str] = {}
    for name, about in provenance.get("modules", {}).items():
        own = about.get("pattern") if isinstance(about, dict) else None
        claims[name] = own or provenance.get("patterns", {}).get(name, provenance["pattern"])
    return claims


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as reader:
            yield reader
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is truncated or damaged ({error}); download or copy it again") from error


def file_digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def weight_digest(weight: Tensor) -> str:
    """sha256 of a tensor's bytes in row order, little-endian."""
    raw = weight.detach().cpu().contiguous().view(-1).view(torch.uint8)
    return hashlib.sha256(raw.numpy().data).hexdigest()


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
