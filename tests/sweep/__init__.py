"""Every model type that transformers knows, tiny and random: what topiarist does with each."""
