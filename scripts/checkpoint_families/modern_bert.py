"""ModernBERT as an embedding model: sliding windows, two rotary bases, gated feed-forward layers, byte-level BPE."""

from checkpoint_modern_bert import SIZE, write_modern_bert

from checkpoint_families import bert

WHAT = "ModernBERT: sliding windows, two rotary bases, its vocabulary rebuilt from GPT-NeoX's, pooling by the mean"
VOCABULARY = "gpt-neox"
PRE = None
CONFIG = {
    "architectures": ["ModernBertModel"],
    "model_type": "modernbert",
    "vocab_size": SIZE,
    "bos_token_id": 50281,
    "eos_token_id": 50282,
    "cls_token_id": 50281,
    "sep_token_id": 50282,
    "pad_token_id": 50283,
    "hidden_size": 256,
    "intermediate_size": 352,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "hidden_activation": "gelu",
    "max_position_embeddings": 8192,
    "layer_norm_eps": 1e-05,
    "norm_eps": 1e-05,
    "global_attn_every_n_layers": 3,
    "global_rope_theta": 160000.0,
    "local_attention": 128,
    "local_rope_theta": 10000.0,
}
FILES = bert.FILES
write_tokenizer = write_modern_bert
