"""Shapes are checked in tests only: jaxtyping with beartype, switched on before topiarist is imported."""

import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from jaxtyping import install_import_hook

sys.path.insert(0, str(Path(__file__).parent))
install_import_hook("topiarist", "beartype.beartype")
torch.set_num_threads(1)
