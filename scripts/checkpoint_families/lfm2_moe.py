"""LFM2 with experts, which the transformers of upstream's environment does not know yet."""

from __future__ import annotations

from typing import Any

WHAT = "LFM2 MoE: convolutions, one dense layer, then 12 experts with a bias for their choice"
VOCABULARY = None
PRE = None
CONFIG: dict[str, Any] = {
    "architectures": ["Lfm2MoeForCausalLM"],
    "model_type": "lfm2_moe",
    "hidden_size": 256,
    "intermediate_size": 512,
    "moe_intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "num_dense_layers": 1,
    "num_experts": 12,
    "num_experts_per_tok": 4,
    "layer_types": ["conv", "conv", "full_attention", "conv"],
    "conv_L_cache": 3,
    "conv_bias": False,
    "norm_eps": 1e-5,
    "norm_topk_prob": True,
    "rope_theta": 1000000.0,
    "routed_scaling_factor": 1.0,
    "use_expert_bias": True,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}


def tensors(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return every tensor's shape."""
    hidden, keys = 256, 64
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], hidden),
        "model.embedding_norm.weight": (hidden,),
    }
    for layer, kind in enumerate(config["layer_types"]):
        prefix = f"model.layers.{layer}"
        shapes |= {f"{prefix}.operator_norm.weight": (hidden,), f"{prefix}.ffn_norm.weight": (hidden,)}
        if kind == "conv":
            shapes |= {
                f"{prefix}.conv.conv.weight": (hidden, 1, config["conv_L_cache"]),
                f"{prefix}.conv.in_proj.weight": (3 * hidden, hidden),
                f"{prefix}.conv.out_proj.weight": (hidden, hidden),
            }
        else:
            shapes |= {
                f"{prefix}.self_attn.q_proj.weight": (hidden, hidden),
                f"{prefix}.self_attn.k_proj.weight": (keys, hidden),
                f"{prefix}.self_attn.v_proj.weight": (keys, hidden),
                f"{prefix}.self_attn.out_proj.weight": (hidden, hidden),
                f"{prefix}.self_attn.q_layernorm.weight": (hidden // 8,),
                f"{prefix}.self_attn.k_layernorm.weight": (hidden // 8,),
            }
        dense = layer < config["num_dense_layers"]
        width = config["intermediate_size" if dense else "moe_intermediate_size"]
        for expert in [""] if dense else [f"experts.{number}." for number in range(config["num_experts"])]:
            shapes |= {
                f"{prefix}.feed_forward.{expert}w1.weight": (width, hidden),
                f"{prefix}.feed_forward.{expert}w2.weight": (hidden, width),
                f"{prefix}.feed_forward.{expert}w3.weight": (width, hidden),
            }
        if not dense:
            shapes |= {
                f"{prefix}.feed_forward.gate.weight": (config["num_experts"], hidden),
                f"{prefix}.feed_forward.expert_bias": (config["num_experts"],),
            }
    return shapes
