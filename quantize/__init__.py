"""Turns a checkpoint into a quantized GGUF, in one pass."""
