"""Qwen3 MoE, small: more experts than digits, so that their names are not in the order of their numbers; tied."""

WHAT = "Qwen3 MoE: experts one by one, norms of queries and keys, tied"
VOCABULARY = "qwen2"
PRE = None
CONFIG = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 256,
    "intermediate_size": 768,
    "moe_intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "num_experts": 12,
    "num_experts_per_tok": 4,
    "max_position_embeddings": 40960,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
}
