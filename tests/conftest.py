"""Shapes in the annotations are checked while the tests run, and only then."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import hypothesis
import pytest
import torch
from jaxtyping import install_import_hook

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "benchmarks")]
hypothesis.settings.register_profile("same", derandomize=True, deadline=None)
hypothesis.settings.load_profile("same")  # the same examples in every run
install_import_hook("topiarist", "typecheck.tower")


@pytest.fixture(autouse=True)
def one_thread():
    """The same arithmetic on every machine, and no fight over cores between workers."""
    torch.set_num_threads(1)


@pytest.fixture
def command(monkeypatch, capsys) -> Callable[..., tuple[int, str, str]]:
    """Runs `topiarist WORDS...` in this process; returns (exit code, stdout, stderr)."""
    from topiarist import cli
    from topiarist.cli import common as cli_tools

    for console in (cli_tools.out, cli_tools.err):  # made once for the process, and read COLUMNS then
        monkeypatch.setattr(console, "width", 200)

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["topiarist", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        printed = capsys.readouterr()
        return int(stop.value.code or 0), printed.out, printed.err

    return run
