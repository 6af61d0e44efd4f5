"""Tensors and numbers, no model: patterns, Grams, linear algebra, selection, losses."""
