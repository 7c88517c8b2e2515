"""Gemma 4 with a mixture of experts, as its 26B A4B is: values that are keys, and fewer of them, in full attention."""

from __future__ import annotations

from typing import Any

from checkpoint_gemma import write_gemma4

from checkpoint_families.gemma4 import CONFIG as DENSE
from checkpoint_families.gemma4 import tensors

WHAT = "Gemma 4's text model with experts: fused gate and up, scales of the router, values that are keys"
VOCABULARY = "gemma-4"
PRE = None
_TEXT: Any = DENSE["text_config"]
CONFIG = {
    **DENSE,
    "text_config": {
        **_TEXT,
        "attention_k_eq_v": True,
        "enable_moe_block": True,
        "hidden_size_per_layer_input": 0,
        "intermediate_size": 352,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        "moe_intermediate_size": 256,
        "num_experts": 4,
        "num_global_key_value_heads": 1,
        "num_hidden_layers": 3,
        "num_key_value_heads": 2,
        "num_kv_shared_layers": 0,
        "top_k_experts": 2,
        "use_bidirectional_attention": "vision",
        "use_double_wide_mlp": False,
    },
}
write_tokenizer = write_gemma4
__all__ = ["CONFIG", "PRE", "VOCABULARY", "WHAT", "tensors", "write_tokenizer"]
