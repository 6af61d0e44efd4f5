"""Structural pruning end to end."""
