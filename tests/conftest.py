"""Shapes in the annotations are checked while the tests run, and only then (typecheck.py)."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import hypothesis
import pytest
import rounding
import torch
import typecheck

hypothesis.settings.register_profile("same", derandomize=True, deadline=None)
hypothesis.settings.load_profile("same")  # the same examples in every run
typecheck.install("topiarist")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--processor", choices=rounding.PROCESSORS, default="this", help="compute as on another processor (rounding.py)"
    )


SLOW = Path(__file__).with_name("slow_tests.txt")
"""Tests that take over a third of a second a case, or three in all their cases, on one core of a Zen 1 at 2 GHz."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave what is listed as slow out of the fast tier, beside what says so itself."""
    listed = set(SLOW.read_text().split())
    for item in items:
        if not listed.isdisjoint((item.nodeid, item.nodeid.partition("[")[0])):  # one case, or all of a test
            item.add_marker("slow")


@pytest.fixture(autouse=True)
def one_thread(request: pytest.FixtureRequest):
    """One thread, so that workers do not fight over cores; on the processor asked for. Every test checks annotations."""
    torch.set_num_threads(1)
    typecheck.forget_calls()
    with rounding.processor(request.config.getoption("--processor")):
        yield


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
