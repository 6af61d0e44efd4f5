"""Measuring a model for the rules of allocation, and searching for the best."""
