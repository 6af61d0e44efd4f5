"""Learned masks (MaskLLM and relatives): tensors and nn.Module only, usable in anyone's training loop."""
