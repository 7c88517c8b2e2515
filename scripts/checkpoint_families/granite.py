"""Granite 3: a Llama with four scales."""

WHAT = "Granite 3: four scales, tied embeddings, grouped queries"
VOCABULARY = "refact"  # which is Granite's
PRE = None
CONFIG = {
    "architectures": ["GraniteForCausalLM"],
    "model_type": "granite",
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000000.0,
    "attention_multiplier": 0.015625,
    "embedding_multiplier": 12.0,
    "logits_scaling": 8.0,
    "residual_multiplier": 0.22,
    "tie_word_embeddings": True,
}
