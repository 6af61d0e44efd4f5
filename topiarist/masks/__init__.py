"""Masks as files: one frozen base, many masks of two thirds of a bit per weight (2:4).

save_masks("masks.safetensors", masks, weights=state, pattern="2:4", base_model="...")
file = MaskFile("masks.safetensors"); file["model.layers.0.mlp.up_proj.weight"]   # a bool tensor, True = kept
apply("base-folder", "masks.safetensors", "out-folder")       # refuses another base
swap(model, "masks.safetensors")                              # on a loaded model, again and again
hold(model)                                                   # keep zeros through anyone's training loop
read_npz / write_npz                                          # the published packbits format
"""

from topiarist.checkpoints.reading import weight_digest
from topiarist.masks.applying import apply
from topiarist.masks.files import MaskFile, save_masks, swap
from topiarist.masks.holding import Hold, hold, zeros_of
from topiarist.masks.npz import read_npz, write_npz

__all__ = [
    "Hold",
    "MaskFile",
    "apply",
    "hold",
    "read_npz",
    "save_masks",
    "swap",
    "weight_digest",
    "write_npz",
    "zeros_of",
]
