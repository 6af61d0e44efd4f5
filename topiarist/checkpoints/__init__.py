"""Checkpoints in, tensor by tensor and safely, and checkpoints out, atomically and resumable."""
