"""Learned masks (MaskLLM and relatives): tensors and nn.Module only, usable in anyone's training loop.

schedule.py       how kappa, tau, lambda and the learning rate move; presets
candidates.py     the legal masks of a group
noise.py          random numbers as a pure function of (seed, layer, step, row, group)
relax.py          Categorical, TopN, Bernoulli: soft masks from logits, in plain torch
native.py, .cpp   the fused CPU kernels          triton_kernel.py  the same on a GPU
kernels.py        picks the fastest path; autograd functions
layer.py          MaskedLinear, experts          optim.py  AdamW with the mask's backward pass folded in
"""

from topiarist.masklearn.layer import (
    Annealing,
    LearnedMask,
    MaskedLinear,
    dense,
    learned_masks,
    mask_parameter,
    set_draws,
)
from topiarist.masklearn.optim import MaskAdamW, resident_bytes
from topiarist.masklearn.relax import RELAXATIONS, Bernoulli, Categorical, TopN, relaxation_for
from topiarist.masklearn.relaxation import Draw, Prior, Relaxation
from topiarist.masklearn.schedule import PRESETS, Preset, Schedule

__all__ = [
    "PRESETS",
    "RELAXATIONS",
    "Annealing",
    "Bernoulli",
    "Categorical",
    "Draw",
    "LearnedMask",
    "MaskAdamW",
    "MaskedLinear",
    "Preset",
    "Prior",
    "Relaxation",
    "Schedule",
    "TopN",
    "dense",
    "learned_masks",
    "mask_parameter",
    "relaxation_for",
    "resident_bytes",
    "set_draws",
]
