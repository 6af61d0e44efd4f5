"""What the system does not let be read, told in its own words: no damage, and no missing file."""

from __future__ import annotations

import os
from pathlib import Path

from topiarist.core.errors import CheckpointError


def check_name(path: Path) -> None:
    """Raise CheckpointError for a path that can be no model, text or result, whether something is there or not.

    Such are names with bytes that are no UTF-8 (safetensors opens no such path, no report says it), names that are too long,
    and what lies in or is a folder that may not be looked into.
    """
    try:
        os.fsencode(path).decode()
    except UnicodeDecodeError:
        raise CheckpointError(f"{path} has bytes in its name that are no UTF-8: rename it, or choose another") from None
    try:
        os.stat(os.path.join(path, "."))  # of a folder, whose files can then be reached
        os.scandir(path).close()  # and listed
    except (FileNotFoundError, NotADirectoryError):
        return
    except ValueError:
        raise CheckpointError(f"{str(path)!r} has a character in it that no name may have: choose another") from None
    except OSError as error:
        raise _refused(path, error) from error


def check_readable(path: Path) -> None:
    """Raise CheckpointError, with the system's reason, if a file cannot be opened: what libraries say of it is often wrong."""
    try:
        with path.open("rb"):
            return
    except OSError as error:
        raise _refused(path, error) from error


def _refused(path: Path, error: OSError) -> CheckpointError:
    cure = "give the rights to read it" if isinstance(error, PermissionError) else "name another"
    return CheckpointError(f"{path} is not readable: {(error.strerror or str(error)).lower()}; {cure}")
