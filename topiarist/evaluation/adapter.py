"""The low-rank companion of a pruned model, put on it for an evaluation through PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from topiarist.checkpoints.reading import locate
from topiarist.checkpoints.writing import ADAPTER
from topiarist.core.errors import CheckpointError, TopiaristError, first_line


def has_adapter(model: str | Path) -> bool:
    """Whether a folder has a low-rank companion beside its weights."""
    return (locate(model) / ADAPTER / "adapter_config.json").is_file()


def check_adapters(models: list[str]) -> None:
    """Raise TopiaristError if PEFT is not installed, CheckpointError if none of the models has a companion."""
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise TopiaristError(
            "adapters are put on by PEFT, which is not installed: pip install topiarist[adapter]"
        ) from error
    if not any(map(has_adapter, models)):
        raise CheckpointError(
            f"none of {', '.join(models)} has a folder {ADAPTER}: prune with --low-rank R, or leave --adapter out"
        )


def with_adapter(model: Any, folder: str | Path) -> Any:
    """Put the companion in FOLDER/adapter on a loaded model, unmerged. Raises CheckpointError if PEFT cannot read it."""
    from peft import PeftModel

    try:
        return PeftModel.from_pretrained(model, str(locate(folder) / ADAPTER)).eval()
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        raise CheckpointError(
            f"the adapter of {folder} cannot be put on ({first_line(error)}): prune with --low-rank again"
        ) from error
