"""Granite 4 with Mamba 2 and without experts: the feed-forward layers are what else is the shared expert."""

from checkpoint_families import granite_hybrid

WHAT = "Granite 4 hybrid, dense: Mamba 2 in one group, the shared expert is the feed-forward layer"
VOCABULARY = None
PRE = None
CONFIG = {
    **granite_hybrid.CONFIG,
    "intermediate_size": 512,
    "shared_intermediate_size": 512,
    "num_local_experts": 0,
    "num_experts_per_tok": 0,
    "mamba_n_groups": 1,
}
