"""Granite 4 without Mamba, which llama.cpp runs as a Granite 3."""

from checkpoint_families import granite_hybrid_dense

WHAT = "Granite 4 micro: attention in all layers, dense, which llama.cpp runs as a Granite 3"
VOCABULARY = None
PRE = None
CONFIG = {
    **granite_hybrid_dense.CONFIG,
    "layer_types": ["attention"] * 4,
    "position_embedding_type": "rope",
}
