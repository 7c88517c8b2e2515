"""Gemma 3, text only: norms on queries and keys, two bases of the rotary positions."""

from checkpoint_gemma import write_gemma

WHAT = "Gemma 3: norms on queries and keys, linear rope scaling, local rope base, Llama 2's vocabulary"
VOCABULARY = "llama-spm"
STANDS_IN = True
PRE = None
CONFIG = {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 7,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "query_pre_attn_scalar": 64,
    "sliding_window": 512,
    "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
}
write_tokenizer = write_gemma
