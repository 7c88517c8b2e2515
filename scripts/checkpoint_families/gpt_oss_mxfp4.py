"""gpt-oss as it is published: experts in MXFP4, which transformers cannot write without a GPU's kernels."""

from __future__ import annotations

from typing import Any

from checkpoint_families.gpt_oss import CONFIG as PLAIN

WHAT = "gpt-oss with experts in MXFP4, whose bits are moved"
VOCABULARY = None
PRE = None
REQUANTIZE = True  # without being told so, both sides refuse to quantize MXFP4 again
BYTES = {"_blocks": (0, 255), "_scales": (116, 124)}
CONFIG: dict[str, Any] = {
    **PLAIN,
    "quantization_config": {
        "quant_method": "mxfp4",
        "modules_to_not_convert": [
            "model.layers.*.self_attn",
            "model.layers.*.mlp.router",
            "model.embed_tokens",
            "lm_head",
        ],
    },
}


def tensors(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return every tensor's shape; `_blocks` and `_scales` are bytes."""
    hidden, wide, experts = config["hidden_size"], config["intermediate_size"], config["num_local_experts"]
    heads, queries = config["num_attention_heads"], config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (config["vocab_size"], hidden),
    }
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        shapes |= {
            f"{prefix}.input_layernorm.weight": (hidden,),
            f"{prefix}.post_attention_layernorm.weight": (hidden,),
            f"{prefix}.self_attn.sinks": (heads,),
            f"{prefix}.mlp.router.weight": (experts, hidden),
            f"{prefix}.mlp.router.bias": (experts,),
            f"{prefix}.mlp.experts.gate_up_proj_blocks": (experts, 2 * wide, hidden // 32, 16),
            f"{prefix}.mlp.experts.gate_up_proj_scales": (experts, 2 * wide, hidden // 32),
            f"{prefix}.mlp.experts.gate_up_proj_bias": (experts, 2 * wide),
            f"{prefix}.mlp.experts.down_proj_blocks": (experts, hidden, wide // 32, 16),
            f"{prefix}.mlp.experts.down_proj_scales": (experts, hidden, wide // 32),
            f"{prefix}.mlp.experts.down_proj_bias": (experts, hidden),
        }
        for name, rows, columns in (("q", queries, hidden), ("k", keys, hidden), ("v", keys, hidden),
                                    ("o", hidden, queries)):  # fmt: skip
            shapes[f"{prefix}.self_attn.{name}_proj.weight"] = (rows, columns)
            shapes[f"{prefix}.self_attn.{name}_proj.bias"] = (rows,)
    return shapes
