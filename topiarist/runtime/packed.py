"""Packed checkpoints: a model folder whose sparse tensors are stored without their zeros, and the way back.

    packed-00001.safetensors ...   `NAME:values`, `NAME:index`, `NAME:scales` (see entries.py); other tensors unchanged
    packed.json                    format version, the shards and their tensors, sizes
    config.json, tokenizer ...     copied as they are, but for the words on quantisation in a config

Version 2 has integers and a smaller index of 2:4; version 1 is still read.

Every tensor has a SHA-256 over its stored bytes, name, form, dtype and shape, verified before it is given out. The
files are named so that a loader which knows nothing of them finds no weights, instead of wrong ones. Memory: one shard.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from jaxtyping import Shaped
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from topiarist.checkpoints.access import check_name
from topiarist.checkpoints.dequantised import QUANTIZATION, DequantisedCheckpoint
from topiarist.checkpoints.finished import describe_again
from topiarist.checkpoints.reading import Checkpoint, opened
from topiarist.checkpoints.side_files import OWN, check_inside, copy_side_files
from topiarist.checkpoints.writing import ADAPTER, MASKS, REPORT
from topiarist.core.errors import CheckpointError, TopiaristError
from topiarist.models.checks import check_finite_tensor, check_floating
from topiarist.quantization.grid import Grid, QuantizedWeight, round_to_nearest
from topiarist.results.pages import refresh
from topiarist.results.result import BENCHMARK, EVALUATION
from topiarist.results.saved import renewed_papers
from topiarist.runtime.entries import Content, read_entry, restore, store
from topiarist.runtime.manifest import KEY, MANIFEST, VERSIONS, new_folder, read_manifest
from topiarist.runtime.skeleton import Roles, roles

Values = Literal["int8", "int4"]
Head = Literal["int8"]
SHARD_BYTES = 2 << 30
GROUP = 64
"""Columns that share a scale where values are rounded, unless another number is asked for."""
_DAMAGE = (SafetensorError, ValueError, TypeError, KeyError, IndexError, RuntimeError, OverflowError, MemoryError)
"""What reading parts raises that do not belong together."""


@dataclass(frozen=True)
class PackReport:
    """Bytes before and after: of the whole model, and of those tensors that have a packed form."""

    num_tensors: int
    num_packed: int
    dense_bytes: int
    packed_bytes: int
    sparse_dense_bytes: int
    sparse_packed_bytes: int

    @property
    def ratio(self) -> float:
        """Packed over dense size of the sparse tensors; 1 if there are none."""
        return self.sparse_packed_bytes / self.sparse_dense_bytes if self.num_packed else 1.0


def pack_folder(
    src: Path | str,
    out: Path | str,
    *,
    values: Values | None = None,
    group: int = GROUP,
    head: Head | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> PackReport:
    """Write a packed copy of the model folder `src` to `out`, which must not exist.

    A folder whose matrices are quantised (compressed-tensors, symmetric) keeps its integers and scales as they are.

    values: rounds the linears of a floating-point folder to the nearest such integers, with a scale for every `group` columns
    (fewer, or a row, where these do not divide it); 4 bits are better calibrated, by `topiarist quantize`, than rounded.
    head: rounds the head and the embeddings to int8 with a scale a row.
    What was measured of `src` goes with the weights if they stay what they are, and is left out if they are rounded.
    Raises CheckpointError if `src` is no readable checkpoint or is packed already, if its report is damaged, or if `out`
    exists, DamagedWeights for NaN or Inf, TopiaristError as `check_rounding`.
    """
    check_rounding(values, group, head)
    src = Path(src)
    check_name(src)
    is_result = (src / REPORT).is_file()
    if is_result:
        renewed_papers(src)  # what cannot be read is refused before any work
    if (src / MANIFEST).exists():
        raise CheckpointError(f"{src} is packed already; unpack it first")
    checkpoint = Checkpoint(src)
    if QUANTIZATION in checkpoint.config:
        checkpoint = DequantisedCheckpoint(src)
    check_floating(checkpoint, [name for name in checkpoint.files if name.endswith(".weight")])
    known = roles(checkpoint.config) if values or head else Roles()
    sizes: list[tuple[str, int, int]] = []
    with new_folder(out) as partial:
        shards = _ShardWriter(partial, "packed-{:05d}.safetensors", shard_bytes)
        for name in checkpoint.files:
            content = _content(checkpoint, name, known, values, group, head)
            stored, entry = store(name, content)
            kind = "dense" if not entry.parts else "packed"
            sizes.append((kind, checkpoint.nbytes(name), sum(part.nbytes for part in stored.values())))
            shards.add(name, stored, asdict(entry))
        shards.flush()
        copy_other_files(src, partial, measured=not rounds(values, head))
        if isinstance(checkpoint, DequantisedCheckpoint):
            (partial / "config.json").write_text(json.dumps(checkpoint.config, indent=2) + "\n")
        sparse = [size for size in sizes if size[0] != "dense"]
        report = PackReport(
            num_tensors=len(sizes),
            num_packed=len(sparse),
            dense_bytes=sum(dense for _, dense, _ in sizes),
            packed_bytes=sum(packed for _, _, packed in sizes),
            sparse_dense_bytes=sum(dense for _, dense, _ in sparse),
            sparse_packed_bytes=sum(packed for _, _, packed in sparse),
        )
        manifest = {"format": KEY, "version": VERSIONS[-1], "shards": shards.names, **asdict(report)}
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
        describe_again(src, partial)
        if is_result:
            refresh(partial)
    return report


def rounds(values: str | None, head: str | None) -> bool:
    """Whether such a packed model computes something else than the folder that it is made of."""
    return values is not None or head is not None


def check_rounding(values: str | None, group: int, head: str | None = None) -> None:
    """Raise TopiaristError for integers that there are not, for a group below 1, or for one where no values are rounded."""
    for name, asked, known in (("values", values, get_args(Values)), ("head", head, get_args(Head))):
        if asked is not None and asked not in known:
            raise TopiaristError(f"{name} cannot be rounded to {asked!r}: take {' or '.join(known)}")
    if group < 1:
        raise TopiaristError(f"group is {group}: a scale needs at least one column; leave it out for {GROUP}")
    if values is None and group != GROUP:
        raise TopiaristError(
            f"group {group} is of rounded values, and none are asked for: name values, or leave group out"
        )


def _content(
    checkpoint: Checkpoint, name: str, known: Roles, values: str | None, group: int, head: str | None
) -> Content:
    """A tensor as it is to be stored: as integers where it has or shall have them."""
    if isinstance(checkpoint, DequantisedCheckpoint) and (integers := checkpoint.quantized(name)) is not None:
        check_finite_tensor(name, integers.scale)
        return integers
    tensor = checkpoint.read(name)
    check_finite_tensor(name, tensor)
    return rounded(name, tensor, known, values, group, head)


def rounded(
    name: str, tensor: Shaped[Tensor, "..."], known: Roles, values: str | None, group: int, head: str | None
) -> Content:
    """A tensor on the grid that its role asks for, if it asks for one."""
    if head and name in known.heads:
        return round_to_nearest(tensor, Grid(bits=8, group=None), search=False)
    if values and name in known.linears:
        fitting = next((g for g in (group, 128, 64, 32) if g <= group and tensor.shape[1] % g == 0), None)
        bits = 8 if values == "int8" else 4
        return round_to_nearest(tensor, Grid(bits=bits, group=fitting), search=bits == 4)  # 8 bits have room to spare
    return tensor


def unpack_folder(src: Path | str, out: Path | str, *, shard_bytes: int = SHARD_BYTES) -> None:
    """Write the ordinary model folder that the packed folder `src` was made from: the same tensors, bit for bit.

    Integers come out as code times scale, in the model's dtype, which is what other programs compute with them.

    Raises CheckpointError if a shard is missing, truncated, altered or of another version, or if `out` exists.
    """
    src = Path(src)
    with new_folder(out) as partial:
        write_dense(read_packed(src), partial, shard_bytes=shard_bytes)
        copy_other_files(src, partial)
        describe_again(src, partial)
        if (partial / REPORT).is_file():
            refresh(partial)


def read_packed(folder: Path | str) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a packed folder, dense and verified, one at a time. Raises CheckpointError as `unpack_folder`."""
    for name, content in read_contents(folder):
        yield name, content.dequantized() if isinstance(content, QuantizedWeight) else content


def read_contents(folder: Path | str) -> Iterator[tuple[str, Content]]:
    """As `read_packed`, with integers as they are."""
    folder = Path(folder)
    for shard, names in read_manifest(folder).items():
        yield from _read_shard(folder / shard, names)


def write_dense(tensors: Iterator[tuple[str, Tensor]], folder: Path, *, shard_bytes: int = SHARD_BYTES) -> None:
    """Write tensors as `model*.safetensors`, with the index that transformers wants if there are several files."""
    shards = _ShardWriter(folder, "model-{:05d}.safetensors", shard_bytes)
    for name, tensor in tensors:
        shards.add(name, {name: tensor})
    shards.flush()
    weight_map = {}
    for number, (file, names) in enumerate(shards.names.items(), 1):
        final = f"model-{number:05d}-of-{len(shards.names):05d}.safetensors"
        if len(shards.names) == 1:
            final = "model.safetensors"
        (folder / file).rename(folder / final)
        weight_map |= dict.fromkeys(names, final)
    if len(shards.names) > 1:
        index = {"metadata": {"total_size": shards.total_bytes}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def copy_other_files(src: Path, out: Path, *, measured: bool = True) -> None:
    """Copy config, tokenizer, masks, companion, reports and the like: everything that a model folder has beside its weights.

    measured: whether what was measured of `src` holds for `out`.
    Raises CheckpointError for a symbolic link that leads out of the folder.
    """
    copy_side_files(src, out)
    (out / MANIFEST).unlink(missing_ok=True)
    own = [path for path in src.iterdir() if path.name in (*OWN, MASKS) or path.name.startswith("pruning_")]
    for path in sorted([*own, *(src / ADAPTER).glob("*")]):
        if path.is_file() and (measured or path.name not in (EVALUATION, BENCHMARK)):
            check_inside(path, src)
            (out / path.relative_to(src)).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, out / path.relative_to(src))


class _ShardWriter:
    """Gathers tensors and saves a file whenever `shard_bytes` would be passed."""

    def __init__(self, folder: Path, template: str, shard_bytes: int) -> None:
        self.folder, self.template, self.shard_bytes = folder, template, shard_bytes
        self.names: dict[str, list[str]] = {}
        self.total_bytes = 0
        self._start()

    def _start(self) -> None:
        self._stored: dict[str, Tensor] = {}
        self._entries: dict[str, Any] = {}
        self._bytes = 0

    def add(self, name: str, stored: dict[str, Tensor], entry: dict[str, Any] | None = None) -> None:
        size = sum(part.nbytes for part in stored.values())
        if self._entries and self._bytes + size > self.shard_bytes:
            self.flush()
        self._stored |= {key: part.contiguous() for key, part in stored.items()}
        self._entries[name] = entry
        self._bytes += size
        self.total_bytes += size

    def flush(self) -> None:
        file = self.template.format(len(self.names) + 1)
        header = {"format": "pt"}
        if any(self._entries.values()):  # one value alone, because safetensors writes several in no fixed order
            header = {KEY: json.dumps({"version": VERSIONS[-1], "tensors": self._entries})}
        save_file(self._stored, self.folder / file, metadata=header)
        self.names[file] = list(self._entries)
        self._start()


def _read_shard(file: Path, names: Sequence[str]) -> Iterator[tuple[str, Content]]:
    with opened(file) as handle:
        try:
            header = json.loads(handle.metadata()[KEY])
            version = header["version"]
            known = version in VERSIONS
            entries = {name: read_entry(entry) for name, entry in header["tensors"].items()} if known else {}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            reason = " ".join(str(error).split())[:200]
            raise CheckpointError(f"the header of {file} is damaged ({reason}); copy the file again") from None
        if not known:
            raise CheckpointError(f"{file} is of packed version {version}, this topiarist reads versions 1 and 2")
        if set(entries) != set(names):
            raise CheckpointError(f"{file} does not hold the tensors that {MANIFEST} lists; copy the folder again")
        for name, entry in entries.items():
            try:
                yield name, restore(handle, name, entry)
            except _DAMAGE as error:
                raise CheckpointError(f"{name} in {file} is damaged ({error}); copy the file again") from None
