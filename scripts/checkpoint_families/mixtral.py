"""Mixtral, small: 8 experts of which 2 are used, the rotary pairs of Llama."""

WHAT = "Mixtral: a Llama with experts"
VOCABULARY = None
PRE = None
CONFIG = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 32768,
    "sliding_window": None,
}
