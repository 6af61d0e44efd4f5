"""The part of an ADMM step of ALPS that is not a product: relax, project, update the dual. See alps.py for the symbols.

In one pass over memory for N:M, and three beside the choice of the mask for other patterns, where a C++ kernel can be had;
with the same bits by plain torch elsewhere.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from topiarist.core.compiled import NoKernels, loaded
from topiarist.core.patterns import NM, Pattern

SOURCE = Path(__file__).with_suffix(".cpp")
GROUPS = (2, 4, 8, 16)
"""Group sizes that fill a register of the kernel."""


class State:
    """Projection D and dual U of one weight, between two steps.

    W: the scaled dense weight (out, in), fp32. dtype: that of products.
    """

    def __init__(self, W: Float[Tensor, "out in"], pattern: Pattern, relaxation: float, dtype: torch.dtype) -> None:
        self.W, self.pattern, self.relaxation, self.dtype = W.contiguous(), pattern, relaxation, dtype
        self.D = self.W * pattern.mask(self.W.abs())
        self.U = torch.zeros_like(self.W)
        self._kernels = _kernels() if W.device.type == "cpu" and dtype == torch.bfloat16 else None
        self._groups = (pattern.keep, pattern.of) if isinstance(pattern, NM) and pattern.of in GROUPS else None
        self._Y = torch.empty_like(self.W, dtype=dtype)

    @property
    def Y(self) -> Float[Tensor, "out in"]:
        """W - D + U: times the resolvent it is W - B."""
        return torch.sub(self.W, self.D).add_(self.U)

    def relaxed(self, Z: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """T = D + relaxation (W - Z - D) + U: what the next projection takes the largest of."""
        return torch.lerp(self.D, self.W - Z.float(), self.relaxation).add_(self.U)

    def step(self, Z: Float[Tensor, "out in"], growth: float) -> Float[Tensor, "out in"]:
        """The next Y, in `dtype`, from Z = Y K. growth: this step's rho / the next one's; U is the dual / rho."""
        if self._kernels is None:
            T = self.relaxed(Z)
            self.D = T * self.pattern.mask(T.abs())
            self.U = T.sub_(self.D).mul_(growth)
            return self.Y.to(self.dtype)
        state = (*(t.data_ptr() for t in (self.W, self.D, self.U, self._Y)), self.W.numel())
        Z, threads = Z.contiguous(), torch.get_num_threads()
        if self._groups is not None:
            self._kernels.topiarist_admm_nm(*state, Z.data_ptr(), self.relaxation, growth, *self._groups, threads)
        else:
            T = torch.empty_like(self.W)
            self._kernels.topiarist_admm_relax(*state, Z.data_ptr(), self.relaxation, T.data_ptr(), threads)
            mask = self.pattern.mask(T.abs()).contiguous()
            self._kernels.topiarist_admm_project(*state, T.data_ptr(), mask.data_ptr(), growth, threads)
        return self._Y


@functools.cache
def _kernels() -> ctypes.CDLL | None:
    """None without a compiler. Only processors that multiply bf16 ask, and those have all the instructions used."""
    try:
        library, _ = loaded(SOURCE, ("-std=c++17", "-O3", "-ffp-contract=off"))  # torch does not contract either
    except NoKernels:
        return None
    whole, long, real, pointer = ctypes.c_int, ctypes.c_int64, ctypes.c_float, ctypes.c_void_p
    state = [pointer] * 4 + [long]
    library.topiarist_admm_nm.argtypes = [*state, pointer, real, real, whole, whole, whole]
    library.topiarist_admm_relax.argtypes = [*state, pointer, real, pointer, whole]
    library.topiarist_admm_project.argtypes = [*state, pointer, pointer, real, whole]
    for function in (library.topiarist_admm_nm, library.topiarist_admm_relax, library.topiarist_admm_project):
        function.restype = None
    return library
