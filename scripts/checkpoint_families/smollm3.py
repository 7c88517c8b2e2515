"""SmolLM3: rotary positions in three layers of four, tied embeddings."""

WHAT = "SmolLM3: tied embeddings that config.json is silent about"
VOCABULARY = None
PRE = None
CONFIG = {
    "architectures": ["SmolLM3ForCausalLM"],
    "model_type": "smollm3",
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 65536,
    "rms_norm_eps": 1e-06,
    "rope_theta": 5000000.0,
    "pad_token_id": 2,
    "no_rope_layer_interval": 4,
    "no_rope_layers": [1, 1, 1, 0],
}
