"""Running a pruned model: packed checkpoints (packed.py), sparse linears on CPU (cpu.py) and GPU (cuda.py)."""
