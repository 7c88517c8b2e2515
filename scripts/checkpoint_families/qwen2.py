"""Qwen2.5, small: tied embeddings, biases for queries, keys and values, YaRN; fields left to the config class."""

WHAT = "Qwen2.5: biases, tied, YaRN, fields left out of config.json"
VOCABULARY = "qwen2"
PRE = None
CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
    "tie_word_embeddings": True,
}
