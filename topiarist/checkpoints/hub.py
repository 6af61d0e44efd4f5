"""A model of the hub, as its client keeps it on this machine."""

from __future__ import annotations

import os
from pathlib import Path

from topiarist.core.errors import CheckpointError, first_line

NOT_READ = ["*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.gguf"]
"""Weights of other kinds than safetensors, which are not fetched."""
LOG_IN = "log in with `hf auth login`"


def snapshot(name: str) -> Path:
    """The folder of a hub id, fetched if it is not here. Raises CheckpointError, which says why, if it cannot be had."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    nowhere = f"model folder {name} does not exist"
    try:
        return Path(snapshot_download(name, ignore_patterns=NOT_READ))
    except GatedRepoError as error:
        raise CheckpointError(f"{name} is gated on the hub: ask for access on its page there, and {LOG_IN}") from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{nowhere}, and the hub shows this login no model of that name: correct it, or, if it is private, {LOG_IN}"
        ) from error
    except LocalEntryNotFoundError as error:
        here = "no model of that name is in the cache of the hub"
        if getattr(error, "snapshot_path", None):
            here = "the model of that name in the cache of the hub is incomplete"
        raise CheckpointError(
            f"{nowhere}, and {here}, which cannot be asked ({_silence(error)}): give a folder, or run the same command where "
            "the hub can be reached"
        ) from error
    except Exception as error:  # the client raises many types: no such revision, no rights, no room
        raise CheckpointError(f"{nowhere}, and the hub gives no model of that name ({first_line(error)})") from error


def _silence(error: Exception) -> str:
    """Why the hub said nothing of a model."""
    from huggingface_hub.errors import HfHubHTTPError

    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
        return "HF_HUB_OFFLINE is set"
    return first_line(error.__cause__) if isinstance(error.__cause__, HfHubHTTPError) else "there is no network"
