"""Datasets: folders that `datasets` saved or can load, and datasets of the hub, of which one split is read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from topiarist.core.errors import CalibrationError, first_line
from topiarist.data.kinds import reader_of
from topiarist.data.readers import Reader
from topiarist.data.tables import ColumnReader

HUB = "hub:"
SHUFFLE_BUFFER = 10_000
"""Rows of a hub dataset among which a draw mixes; its shards are mixed as well."""


class HubRows:
    """The rows of one split of a hub dataset, as they arrive. Nothing is known of those that have not been read."""

    def __init__(self, rows: Any, name: str, field: str) -> None:
        self.rows, self.path, self.field = rows, name, field

    def values(self) -> Iterator[Any]:
        """Every row's value in the field, in the dataset's order. Raises CalibrationError if it cannot be read."""
        return self._values(self.rows)

    def shuffled(self, seed: int) -> Iterator[Any]:
        """The values in an order that the seed decides."""
        return self._values(self.rows.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER))

    def where(self, row: int) -> str:
        """How messages name a row; `row` counts from 0, the message from 1."""
        return f"{self.path} row {row + 1}"

    def _values(self, rows: Any) -> Iterator[Any]:
        iterator = iter(rows)
        while True:
            try:
                row = next(iterator)
            except StopIteration:
                return
            except Exception as error:  # the library raises many types: network, rights, formats
                raise CalibrationError(f"cannot read {self.path}: {first_line(error)}") from error
            if self.field not in row:
                raise CalibrationError(
                    f"{self.path} has no field `{self.field}`; it has {', '.join(row)}: name one with --text-field"
                )
            yield row[self.field]


def folder_readers(path: Path, field: str, split: str | None, usual: Sequence[str]) -> list[Reader]:
    """Readers of one split of a datasets folder.

    usual: the splits that are taken, in this order, if `split` names none. Raises CalibrationError.
    """
    import datasets

    try:
        if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
            saved: Any = datasets.load_from_disk(str(path))
            tables = dict(saved) if isinstance(saved, datasets.DatasetDict) else {str(saved.split or "train"): saved}
            chosen = tables[choose_split(str(path), [str(name) for name in tables], split, usual)]
            return [ColumnReader(path, field, chosen.data.table)]
        files: Any = datasets.load_dataset_builder(str(path)).config.data_files
    except CalibrationError:
        raise
    except Exception as error:  # the library raises many types; all mean that the folder is not a dataset
        raise CalibrationError(f"{path} is not a datasets folder: {first_line(error)}") from error
    if not files:
        raise CalibrationError(f"{path} is not a datasets folder: it holds no data files")
    named = {str(name): [Path(file) for file in found] for name, found in files.items()}
    return [reader_of(file, field) for file in named[choose_split(str(path), list(named), split, usual)]]


def hub_rows(name: str, field: str, split: str | None, usual: Sequence[str]) -> HubRows:
    """The rows of `hub:NAME[:CONFIG]`, streamed. Raises CalibrationError if the hub does not give it."""
    import datasets

    repository, _, config = name.removeprefix(HUB).partition(":")
    if not repository:
        raise CalibrationError(f"{name} names no dataset: write {HUB}NAME or {HUB}NAME:CONFIG")
    try:
        known = list(map(str, datasets.get_dataset_split_names(repository, config or None)))
        chosen = choose_split(name, known, split, usual)
        return HubRows(datasets.load_dataset(repository, config or None, split=chosen, streaming=True), name, field)
    except CalibrationError:
        raise
    except Exception as error:  # network, rights, no such dataset or configuration
        raise CalibrationError(f"cannot read {name}: {first_line(error)}") from error


def choose_split(name: str, known: Sequence[str], split: str | None, usual: Sequence[str]) -> str:
    """The split that is asked for, else the first usual one, else the only one. Raises CalibrationError, naming those known."""
    wanted = [split] if split is not None else list(usual)
    found = next((one for one in wanted if one in known), known[0] if split is None and len(known) == 1 else None)
    if found is None:
        raise CalibrationError(
            f"{name} has no split {' or '.join(wanted)}; it has {', '.join(known)}: name one with --split"
        )
    return found
