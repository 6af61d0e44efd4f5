"""A finished result on the Hugging Face hub, by the hub's own client."""

from __future__ import annotations

from pathlib import Path

from topiarist.checkpoints import finished
from topiarist.checkpoints.access import check_name
from topiarist.checkpoints.atomic import TEMPORARY
from topiarist.checkpoints.locking import LOCK
from topiarist.checkpoints.writing import JOURNAL, REPORT, STAGES, STATES
from topiarist.core.errors import CheckpointError, TopiaristError, first_line

NEVER = [JOURNAL, LOCK, f"{STATES}/*", f"{STAGES}/*", f"*{TEMPORARY}", ".*"]
"""What belongs to a run, not to its result."""


def push(
    folder: str | Path, name: str, *, private: bool | None = None, token: str | None = None, endpoint: str | None = None
) -> str:
    """Upload a finished result, all its files in one commit. Returns its address.

    name: ORG/NAME or NAME; the repository is made if it is not there.
    private: whether it is made private; by default as the account is set.
    token, endpoint: instead of those that the hub's client is set to.
    Raises CheckpointError for a folder that is no finished, undamaged result, TopiaristError if the hub refuses or does
    not answer.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    folder = Path(folder)
    check_finished(folder)
    api = HfApi(endpoint=endpoint, token=token)
    try:
        made = api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=made.repo_id,
            folder_path=folder,
            commit_message="Upload a model pruned with topiarist",
            ignore_patterns=NEVER,
        )
    except HFValidationError as error:
        raise TopiaristError(f"{name!r} is no name for a repository ({first_line(error)}): choose ORG/NAME") from error
    except OfflineModeIsEnabled as error:
        raise TopiaristError("the hub's client is told to stay offline: unset HF_HUB_OFFLINE") from error
    except HfHubHTTPError as error:
        cure = "log in with `hf auth login`, or check the name"
        raise TopiaristError(f"the hub refuses {name} ({first_line(error)}): {cure}") from error
    except Exception as error:  # what its client raises without a connection differs from version to version
        raise TopiaristError(
            f"the hub does not take {name} ({first_line(error)}): run the same command again"
        ) from error
    return str(made)


def check_finished(folder: Path) -> None:
    """Raise CheckpointError unless a folder is a finished result whose files are what its report says."""
    check_name(folder)
    if not folder.is_dir():
        raise CheckpointError(f"result folder {folder} does not exist")
    if (folder / JOURNAL).exists():
        raise CheckpointError(f"{folder} is not finished: run its command again first")
    if not (folder / REPORT).is_file() or not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} is no finished result of topiarist: it has no {REPORT} or no config.json")
    finished.check_finished(folder)
