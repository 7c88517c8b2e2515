"""gpt-oss with experts in bf16."""

from __future__ import annotations

from typing import Any

WHAT = "gpt-oss: experts in bf16 with biases, gates and ups taking turns, attention sinks, YaRN"
VOCABULARY = None
PRE = None
CONFIG: dict[str, Any] = {
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    "hidden_size": 256,
    "intermediate_size": 288,
    "num_hidden_layers": 4,
    "num_local_experts": 6,
    "num_experts_per_tok": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "sliding_window": 128,
    "tie_word_embeddings": False,
}
