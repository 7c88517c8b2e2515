"""Gemma 2: norms that are stored as what they add to 1, four of them in each layer, and capped logits."""

from checkpoint_gemma import write_gemma

WHAT = "Gemma 2: norms stored as what they add to 1, capped logits, Llama 2's vocabulary"
VOCABULARY = "llama-spm"
STANDS_IN = True
PRE = None
CONFIG = {
    "architectures": ["Gemma2ForCausalLM"],
    "model_type": "gemma2",
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 96,
    "query_pre_attn_scalar": 96,
    "sliding_window": 512,
}
write_tokenizer = write_gemma
