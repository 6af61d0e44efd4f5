"""The only code that walks a model."""
