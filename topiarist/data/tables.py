"""Readers of tables: comma-separated values, Arrow and Parquet. Only the column that holds the text is read."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from topiarist.core.errors import CalibrationError
from topiarist.data.compressed import kind_of, open_bytes
from topiarist.data.readers import ByteReader, Reader

_MAX_CELL = 1 << 30


class TableReader(ByteReader):
    """Comma- or tab-separated values under a line of names."""

    def values(self) -> Iterator[Any]:
        """The cell of every record that is not empty. Raises CalibrationError for a record that is too short."""
        return (value for _, value in self._records())

    @cached_property
    def _ends(self) -> np.ndarray:
        """Where every record ends, in bytes; a quoted cell may hold line breaks."""
        return np.fromiter((end for end, _ in self._records()), np.int64)

    @cached_property
    def _begin(self) -> int:
        """Where the first record begins."""
        with open_bytes(self.path) as stream:
            return next(self._table(stream), (0, []))[0]

    @cached_property
    def sizes(self) -> np.ndarray:
        """Bytes of every record, all cells together, int64 (records,)."""
        return np.diff(self._ends, prepend=self._begin)

    def value(self, row: int) -> Any:
        """The cell of one record, read from where the record begins."""
        begin = int(self._ends[row - 1]) if row else self._begin
        self.stream.seek(begin)
        record = io.BytesIO(self.stream.read(int(self._ends[row]) - begin))
        return self._cell(row, next(cells for _, cells in self._table(record) if cells))

    def _table(self, stream: io.BufferedIOBase) -> Iterator[tuple[int, list[str]]]:
        """(bytes read so far, cells) of every record, the names first. Raises CalibrationError for what is no such table."""
        csv.field_size_limit(_MAX_CELL)
        delimiter = "\t" if kind_of(self.path)[0] == ".tsv" else ","
        position = number = 0

        def lines() -> Iterator[str]:
            nonlocal position
            for line in stream:
                text = line.decode("utf-8-sig" if position == 0 else "utf-8")
                position += len(line)
                yield text

        try:
            for record in csv.reader(lines(), delimiter=delimiter, strict=True):
                yield position, record
                number += 1
        except csv.Error as error:
            where = self.where(number - 1) if number else f"the names of {self.path}"
            cure = "close its quotes, and end its lines with \\n"
            raise CalibrationError(f"cannot read text from {where}: {error}; {cure}") from None

    @cached_property
    def _column(self) -> int:
        with open_bytes(self.path) as stream:
            _, names = next(self._table(stream), (0, []))
        self.check_field(names)
        return names.index(self.field)

    def _records(self) -> Iterator[tuple[int, Any]]:
        """(end in bytes, value) of every record after the names."""
        _ = self._column  # the names are checked first
        with open_bytes(self.path) as stream:
            for row, (end, record) in enumerate(self._table(stream), -1):
                if row >= 0 and record:
                    yield end, self._cell(row, record)

    def _cell(self, row: int, record: Sequence[str]) -> str:
        if len(record) <= self._column:
            raise CalibrationError(
                f"{self.where(row)} has {len(record)} cells, `{self.field}` is cell {self._column + 1}"
            )
        return record[self._column]


class ColumnReader(Reader):
    """One column of an Arrow table: a .arrow file, or a dataset that was saved to disk."""

    def __init__(self, path: Path, field: str, table: pa.Table | None = None) -> None:
        super().__init__(path, field)
        self._given = table

    @cached_property
    def column(self) -> Any:
        """The column of the field. Raises CalibrationError that names the columns there are, if it is missing."""
        table = self._given if self._given is not None else _arrow_table(self.path)
        self.check_field(table.column_names)
        return table.column(self.field)

    def values(self) -> Iterator[Any]:
        """Every cell, in order."""
        for chunk in self.column.chunks:
            for value in chunk:
                yield value.as_py()

    def size(self, limit: int) -> int:
        """Bytes of the column in Arrow's format; `limit` plays no part, for nothing is read to know them."""
        return self.column.nbytes

    @cached_property
    def sizes(self) -> np.ndarray:
        """Size of every cell, int64 (rows,)."""
        return _cell_sizes(self.column)

    def value(self, row: int) -> Any:
        """One cell."""
        return self.column[row].as_py()


class ParquetReader(Reader):
    """One column of a .parquet file; a row group is in memory at a time."""

    @cached_property
    def _file(self) -> pq.ParquetFile:
        compressed = kind_of(self.path)[1]
        source = pa.BufferReader(open_bytes(self.path).read()) if compressed else self.path
        file = pq.ParquetFile(source)
        self.check_field(file.schema_arrow.names)
        self._group: tuple[int, Any] = (-1, None)
        return file

    def _column(self, group: int) -> Any:
        if self._file and self._group[0] != group:
            self._group = group, self._file.read_row_group(group, columns=[self.field]).column(self.field)
        return self._group[1]

    def values(self) -> Iterator[Any]:
        """Every cell, in order, with one row group in memory."""
        for group in range(self._file.num_row_groups):
            for value in self._column(group):
                yield value.as_py()

    def size(self, limit: int) -> int:
        """Bytes of all row groups without compression, all columns; `limit` plays no part, the footer knows them."""
        return sum(self._file.metadata.row_group(i).total_byte_size for i in range(self._file.num_row_groups))

    @cached_property
    def _starts(self) -> np.ndarray:
        counts = [self._file.metadata.row_group(i).num_rows for i in range(self._file.num_row_groups)]
        return np.cumsum([0, *counts])

    @cached_property
    def sizes(self) -> np.ndarray:
        """Size of every cell, int64 (rows,). Reads the column once."""
        found = [_cell_sizes(self._column(group)) for group in range(self._file.num_row_groups)]
        return np.concatenate(found) if found else np.empty(0, np.int64)

    def value(self, row: int) -> Any:
        """One cell; its row group stays in memory until a row of another is asked for."""
        group = int(np.searchsorted(self._starts, row, side="right")) - 1
        return self._column(group)[row - int(self._starts[group])].as_py()


def _arrow_table(path: Path) -> pa.Table:
    """A table in Arrow's stream format, as datasets writes it, or in its file format; mapped, not read."""
    compressed = kind_of(path)[1]
    source = pa.BufferReader(open_bytes(path).read()) if compressed else pa.memory_map(str(path))
    try:
        return pa.ipc.open_stream(source).read_all()
    except pa.ArrowInvalid:
        source.seek(0)
        return pa.ipc.open_file(source).read_all()


def _cell_sizes(column: Any) -> np.ndarray:
    """Bytes of every cell of a column; of chat messages the mean, since nothing else is known without reading them."""
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        return pc.fill_null(pc.call_function("binary_length", [column]), 0).to_numpy().astype(np.int64)
    return np.full(len(column), max(1, column.nbytes // max(len(column), 1)), dtype=np.int64)
