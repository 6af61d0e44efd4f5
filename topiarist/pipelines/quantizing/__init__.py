"""Quantising a model block by block, its zeros held."""
