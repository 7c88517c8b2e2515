"""Qwen2 MoE, small: experts stored one by one, a shared expert with its gate."""

WHAT = "Qwen2 MoE: experts one by one, a shared expert, biases"
VOCABULARY = "qwen2"
PRE = None
CONFIG = {
    "architectures": ["Qwen2MoeForCausalLM"],
    "model_type": "qwen2_moe",
    "hidden_size": 256,
    "intermediate_size": 768,
    "moe_intermediate_size": 256,
    "shared_expert_intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "num_experts": 12,
    "num_experts_per_tok": 4,
    "max_position_embeddings": 8192,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
}
