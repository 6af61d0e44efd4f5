"""Recovery: a pruned model trained as a whole, its zeros held, towards the dense model's predictions."""
