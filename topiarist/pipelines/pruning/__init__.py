"""One-shot pruning end to end."""
