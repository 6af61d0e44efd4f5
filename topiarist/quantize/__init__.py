"""Quantised weights: grids, GPTQ with the mask held, and the files that other programs open."""

from topiarist.quantize.gptq import GPTQ
from topiarist.quantize.grid import Grid, QuantizedWeight, dequantize, round_to_nearest

__all__ = ["GPTQ", "Grid", "QuantizedWeight", "dequantize", "round_to_nearest"]
