"""What a model is worth: perplexity, zero-shot tasks, an audit of its zeros."""
