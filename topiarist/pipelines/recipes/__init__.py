"""Several stages in a row: a recipe."""
