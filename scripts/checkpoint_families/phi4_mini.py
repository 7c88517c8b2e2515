"""Phi-4-mini: LongRoPE with factors for three quarters of each head, tied embeddings, byte-level BPE."""

WHAT = "Phi-4-mini: LongRoPE factors, partial rotary positions, grouped queries, tied, byte-level BPE"
VOCABULARY = None
PRE = None
CONFIG = {
    "architectures": ["Phi3ForCausalLM"],
    "model_type": "phi3",
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 131072,
    "original_max_position_embeddings": 4096,
    "partial_rotary_factor": 0.75,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "long_factor": [1.0 + 1.7 * pair for pair in range(24)],
        "short_factor": [1.0 + 0.01 * pair for pair in range(24)],
        "type": "longrope",
    },
    "rope_theta": 10000.0,
    "sliding_window": 262144,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
}
