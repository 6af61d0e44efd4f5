"""Quantised weights: grids, GPTQ with the mask held, and the files that other programs open."""

from topiarist.quantization.gptq import GPTQ
from topiarist.quantization.grid import Grid, QuantizedWeight, dequantize, round_to_nearest
from topiarist.quantization.methods import METHODS, Method, Rounding

__all__ = ["GPTQ", "METHODS", "Grid", "Method", "QuantizedWeight", "Rounding", "dequantize", "round_to_nearest"]
