"""Shapes in the annotations are checked while the tests run, and only then."""

import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from jaxtyping import install_import_hook

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "benchmarks")]
install_import_hook("topiarist", "typecheck.tower")


@pytest.fixture(autouse=True)
def one_thread():
    """The same arithmetic on every machine, and no fight over cores between workers."""
    torch.set_num_threads(1)
