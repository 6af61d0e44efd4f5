"""What a result keeps of the texts that made it: hashes of their passages, so that an evaluation on one of them is noticed."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable
from pathlib import Path

from topiarist.checkpoints.access import check_readable
from topiarist.core.errors import CheckpointError

RECORD = "pruning_calibration.json"


def record(digest: str, passages: Iterable[int]) -> str:
    """The JSON text of a record. digest: of the tokens that were read."""
    return json.dumps({"digest": digest, "passages": [f"{h:016x}" for h in sorted(passages)]}) + "\n"


def recorded_passages(path: Path | None) -> frozenset[int]:
    """The passages of a record; none if there is no file. A warning says if it is one that cannot be compared.

    Raises CheckpointError for a damaged one.
    """
    if path is None or not path.is_file():
        return frozenset()
    try:
        passages = json.loads(path.read_text(encoding="utf-8")).get("passages")
        if passages is None:
            warnings.warn(f"{path} is of version 0.1: overlap with it cannot be seen", UserWarning, stacklevel=4)
        return frozenset(int(found, 16) for found in passages or ())
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        check_readable(path)
        raise CheckpointError(f"{path} is damaged ({error}); copy it again, or remove it") from error
