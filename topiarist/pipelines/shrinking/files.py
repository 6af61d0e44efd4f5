"""The shrunk checkpoint that a structural run writes at its end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from topiarist.checkpoints.reading import read_json
from topiarist.checkpoints.writing import OutputFolder
from topiarist.data import Windows
from topiarist.models import modeling_pruned
from topiarist.models.opened import OpenedModel
from topiarist.models.saving import write_model
from topiarist.pipelines.common.finish import finish
from topiarist.pipelines.shrinking.report import ShrinkReport
from topiarist.structured import PruneSpec
from topiarist.structured.block_configs import ARCHITECTURE
from topiarist.structured.spec import SPEC


def write_shrunk(
    output: OutputFolder,
    source: OpenedModel,
    small: Any,
    spec: PruneSpec,
    report: ShrinkReport,
    windows: Windows | None,
) -> None:
    """Write the smaller model and its papers."""
    written = write_model(output, small, source.loaded_tokenizer)
    config = read_json(written / "config.json")
    config |= _known_to_others(source.stored_config, config, small.config)
    texts = {SPEC: spec.to_json()}
    if str(config["model_type"]).startswith(modeling_pruned.PREFIX):
        base = config["model_type"].removeprefix(modeling_pruned.PREFIX)
        if "block_configs" in config:  # for vLLM; transformers takes the class that auto_map names
            config["architectures"] = [ARCHITECTURE]
        texts[modeling_pruned.CODE] = modeling_pruned.code(base)
    finish(output, report, source, text=windows, written=written, config=config, texts=texts)


def _known_to_others(before: Mapping[str, Any], written: Mapping[str, Any], config: Any) -> dict[str, Any]:
    """Keys of the dense model's config.json that transformers no longer writes, or leaves out as its defaults.

    Older versions and other readers know rope_theta and torch_dtype, not what took their place. What the smaller model
    has under the same name goes before what the dense one had.
    """
    now = {**config.to_dict(), **{alias: getattr(config, name) for alias, name in config.attribute_map.items()}}
    return {key: now.get(key, value) for key, value in before.items() if key not in written}
