"""Falcon-H1 in f16, in which it is multiplied."""

from checkpoint_families.falcon_h1 import CONFIG

__all__ = ["CONFIG"]

WHAT = "Falcon-H1 in f16, in which it is multiplied"
VOCABULARY = None
PRE = None
DTYPE = "float16"
