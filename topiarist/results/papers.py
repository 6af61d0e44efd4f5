"""What stands beside the weights of a result: report, page, card, config."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from topiarist import __about__
from topiarist.checkpoints.writing import OutputFolder
from topiarist.results.card import model_card
from topiarist.results.pages import PAGE, Result, report_page
from topiarist.results.report import RUN, RunReport


def write_papers(
    output: OutputFolder,
    report: RunReport,
    config: Mapping[str, Any],
    *,
    side_files: Path,
    texts: Mapping[str, str] | None = None,
) -> None:
    """Finish `output`, whose weights are there already, with everything else that a result has.

    config: of the model as its weights are. side_files: the folder whose tokenizer, chat templates and code are copied.
    texts: more files, by name. Raises CheckpointError if the disk cannot hold them; the same call then goes on.
    """
    # Without the timings, so that the same run writes the same page; `topiarist report` shows them.
    result = Result(report.to_dict(), __about__.__version__)
    papers = {"README.md": model_card(result), PAGE: report_page(result), RUN: json.dumps(report.run, indent=2) + "\n"}
    for name, content in {**(texts or {}), **papers}.items():
        output.write_text(name, content)
    about = {**config, "pruning_config": report.pruning_config(__about__.__version__)}
    output.finish(about, report.to_dict(), side_files=side_files)
