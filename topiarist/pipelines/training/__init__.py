"""Training that pipelines share: text in batches, processes, weights under masks, one loop and its saved state."""
