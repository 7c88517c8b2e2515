"""Falcon-H1 with every multiplier, two groups and a norm in Mamba."""

from __future__ import annotations

from typing import Any

WHAT = "Falcon-H1: attention beside Mamba 2 with two groups and a norm, 14 multipliers folded into the weights"
VOCABULARY = None
PRE = None
CONFIG: dict[str, Any] = {
    "architectures": ["FalconH1ForCausalLM"],
    "model_type": "falcon_h1",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000000000.0,
    "tie_word_embeddings": False,
    "mamba_d_ssm": 384,
    "mamba_n_heads": 12,
    "mamba_d_head": 32,
    "mamba_n_groups": 2,
    "mamba_d_state": 64,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_conv_bias": True,
    "mamba_norm_before_gate": False,
    "mamba_rms_norm": True,
    "attention_in_multiplier": 0.9,
    "attention_out_multiplier": 0.9375,
    "embedding_multiplier": 5.656854249492381,
    "key_multiplier": 0.39062499999999994,
    "lm_head_multiplier": 0.0390625,
    "mlp_multipliers": [0.8838834764831844, 0.5859375],
    "ssm_in_multiplier": 1.25,
    "ssm_multipliers": [0.3535533905932738, 0.25, 0.3535533905932738, 0.5, 0.3535533905932738],
    "ssm_out_multiplier": 0.23570226039551587,
}
