"""Phi-3: queries, keys and values in one matrix, gate and up in another."""

WHAT = "Phi-3: fused matrices, a sliding window, its own SentencePiece vocabulary with added tokens"
VOCABULARY = "phi-3"
PRE = None
CONFIG = {
    "architectures": ["Phi3ForCausalLM"],
    "model_type": "phi3",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 4096,
    "original_max_position_embeddings": 4096,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 2047,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
}
