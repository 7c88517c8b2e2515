"""Granite 4 with Mamba 2: attention in one layer of four, no rotary positions, experts and a shared one."""

WHAT = "Granite 4 hybrid: Mamba 2 in two groups, one attention layer of four, experts and a shared one"
VOCABULARY = None
PRE = None
CONFIG = {
    "architectures": ["GraniteMoeHybridForCausalLM"],
    "model_type": "granitemoehybrid",
    "hidden_size": 256,
    "intermediate_size": 128,
    "shared_intermediate_size": 256,
    "num_hidden_layers": 4,
    "layer_types": ["mamba", "mamba", "attention", "mamba"],
    "position_embedding_type": "nope",
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 6,
    "num_experts_per_tok": 2,
    "mamba_chunk_size": 256,
    "mamba_conv_bias": True,
    "mamba_d_conv": 4,
    "mamba_d_head": 32,
    "mamba_d_state": 64,
    "mamba_expand": 2,
    "mamba_n_groups": 2,
    "mamba_n_heads": 16,
    "mamba_proj_bias": False,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000,
    "attention_multiplier": 0.0078125,
    "embedding_multiplier": 12,
    "logits_scaling": 6,
    "residual_multiplier": 0.22,
    "tie_word_embeddings": True,
}
