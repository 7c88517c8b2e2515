"""LFM2: its early spelling of config.json, in which the width of the feed-forward layers is adjusted."""

from __future__ import annotations

from typing import Any

WHAT = "LFM2: convolutions in half of the layers, no key heads there, adjusted feed-forward width"
VOCABULARY = None
PRE = None
CONFIG: dict[str, Any] = {
    "architectures": ["Lfm2ForCausalLM"],
    "model_type": "lfm2",
    "hidden_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "full_attn_idxs": [2, 4, 5],
    "block_ff_dim": 1000,
    "block_auto_adjust_ff_dim": True,
    "block_ffn_dim_multiplier": 1.1,
    "block_multiple_of": 64,
    "conv_L_cache": 3,
    "conv_bias": False,
    "norm_eps": 1e-5,
    "max_position_embeddings": 4096,
}
