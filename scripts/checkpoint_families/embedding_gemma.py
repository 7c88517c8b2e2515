"""EmbeddingGemma: a bare Gemma 3 that looks both ways."""

from checkpoint_gemma import write_gemma

WHAT = "EmbeddingGemma: no `model.` before the names, both ways, Llama 2's vocabulary"
VOCABULARY = "llama-spm"
STANDS_IN = True
PRE = None
CONFIG = {
    "architectures": ["Gemma3TextModel"],
    "model_type": "gemma3_text",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 6,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 128,
    "query_pre_attn_scalar": 128,
    "max_position_embeddings": 2048,
    "sliding_window": 512,
    "use_bidirectional_attention": True,
}
FILES = {
    "modules.json": [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"},
        {"idx": 3, "name": "3", "path": "3_Normalize", "type": "sentence_transformers.models.Normalize"},
    ],
    "1_Pooling/config.json": {"word_embedding_dimension": 256, "pooling_mode_mean_tokens": True},
    "2_Dense/config.json": {"in_features": 256, "out_features": 512, "bias": False},
}
write_tokenizer = write_gemma
