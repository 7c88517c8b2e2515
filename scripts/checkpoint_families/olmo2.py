"""OLMo 2: norms behind attention and feed-forward, and over all queries and keys."""

WHAT = "OLMo 2: norms over all queries and keys, every head has its own key, no sliding window"
VOCABULARY = None
PRE = None
CONFIG = {
    "architectures": ["Olmo2ForCausalLM"],
    "model_type": "olmo2",
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-06,
    "rope_theta": 500000,
    "tie_word_embeddings": False,
}
