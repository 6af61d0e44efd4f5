"""The shrunk checkpoint that a structural run writes at its end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from topiarist import __about__
from topiarist.checkpoints.reading import Checkpoint
from topiarist.checkpoints.writing import OutputFolder
from topiarist.data import Windows
from topiarist.models import modeling_pruned
from topiarist.pipelines.common.written import saved_beside
from topiarist.pipelines.shrinking.report import ShrinkReport, shrunk_card
from topiarist.results.pages import PAGE, Result, measured, report_page
from topiarist.structured import PruneSpec
from topiarist.structured.block_configs import ARCHITECTURE
from topiarist.structured.spec import SPEC

CODE = "modeling_pruned.py"


def write_shrunk(
    output: OutputFolder,
    checkpoint: Checkpoint | None,
    model: Any,
    tokenizer: Any,
    spec: PruneSpec,
    report: ShrinkReport,
    windows: Windows | None,
) -> None:
    """The shrunk checkpoint and its papers. transformers knows names and ties, so it writes first, among the states."""
    written = output.states / "written"
    with saved_beside(model, tokenizer, written, cure="; make room and run the same command again"):
        fresh = Checkpoint(written)
    output.take_files(written)
    result = Result(report.to_dict(), __about__.__version__)
    texts = {
        SPEC: spec.to_json(),
        "README.md": shrunk_card(report, __about__.__version__, measured(result)),
        PAGE: report_page(result),
        "pruning_run.json": json.dumps(report.run, indent=2) + "\n",
    }
    if windows is not None:
        texts["pruning_calibration.json"] = windows.record()
    config = {**fresh.config, "pruning_config": report.pruning_config(__about__.__version__)}
    if str(config["model_type"]).startswith(modeling_pruned.PREFIX):
        base = config["model_type"].removeprefix(modeling_pruned.PREFIX)
        if "block_configs" in config:  # for vLLM; transformers takes the class that auto_map names
            config["architectures"] = [ARCHITECTURE]
        code = Path(modeling_pruned.__file__).read_text(encoding="utf-8")
        texts[CODE] = f'{code}\n\nPrunedConfig, PrunedForCausalLM = pruned_classes("{base}")\n'
    for name, text in texts.items():
        output.write_text(name, text)
    side_files = checkpoint.folder if checkpoint is not None else written
    output.finish(config, report.to_dict(), side_files=side_files)
