"""A file's kind by its name, and its bytes without their compression."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from pathlib import Path
from typing import Any

import pyarrow as pa


class _Zstandard(io.RawIOBase):
    """A .zst file as a stream that seeks: forwards by reading on, backwards by beginning again."""

    def __init__(self, path: Path) -> None:
        self.path, self.position = path, 0
        self._inner = self._begin()

    def _begin(self) -> Any:
        return pa.CompressedInputStream(pa.OSFile(str(self.path)), "zstd")

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        found = self._inner.read(len(buffer))
        buffer[: len(found)] = found
        self.position += len(found)
        return len(found)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence != io.SEEK_SET:
            raise io.UnsupportedOperation("a .zst file seeks from its beginning alone")
        if offset < self.position:
            self._inner, self.position = self._begin(), 0
        while self.position < offset and self.read(min(offset - self.position, 1 << 20)):
            pass
        return self.position

    def tell(self) -> int:
        return self.position


_OPENERS: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": _Zstandard}
COMPRESSIONS = tuple(_OPENERS)
DAMAGE = (OSError, EOFError, lzma.LZMAError, zlib.error, pa.ArrowException, UnicodeDecodeError)
"""What reading a file raises that is truncated, or is not what its name says."""


def kind_of(path: Path) -> tuple[str, str]:
    """(kind, compression) of a file, as lower-case suffixes: (".json", ".gz") of c4.JSON.gz; "" where there is none."""
    name, last = Path(path.name.lower()), path.suffix.lower()
    return (Path(name.stem).suffix, last) if last in _OPENERS else (last, "")


def open_bytes(path: Path) -> io.BufferedIOBase:
    """The uncompressed bytes of a file, as a stream that seeks."""
    compression = kind_of(path)[1]
    raw = _OPENERS[compression](path) if compression else path.open("rb")
    return io.BufferedReader(raw, 1 << 20) if isinstance(raw, io.RawIOBase) else raw
