"""Gemma 2 in f16, in which 1 is added to its norms."""

from checkpoint_families.gemma2 import CONFIG, write_tokenizer

__all__ = ["CONFIG", "write_tokenizer"]

WHAT = "Gemma 2 in f16, in which 1 is added to its norms"
VOCABULARY = "llama-spm"
STANDS_IN = True
PRE = None
DTYPE = "float16"
