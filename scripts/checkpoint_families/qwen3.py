"""Qwen3, small: norms for each head's queries and keys, heads wider than hidden / heads, a head of its own."""

WHAT = "Qwen3: norms of queries and keys, heads wider than hidden / heads, untied"
VOCABULARY = "qwen2"
PRE = None
CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 256,
    "intermediate_size": 640,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 40960,
    "rope_theta": 1000000,
    "tie_word_embeddings": False,
}
