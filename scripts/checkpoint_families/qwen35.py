"""Qwen3.5, small: a multimodal checkpoint whose text part has linear attention, full attention and an MTP layer."""

from typing import Any

WHAT = "Qwen3.5: linear attention with more heads of values than of keys, an MTP layer, tied; a vision part left out"
VOCABULARY = "qwen35"
PRE = "qwen35"  # the vocabulary is that of Qwen2, for which upstream takes it
TEXT = {
    "model_type": "qwen3_5_text",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"],
    "full_attention_interval": 4,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "max_position_embeddings": 262144,
    "mtp_num_hidden_layers": 1,
    "rms_norm_eps": 1e-06,
    "rope_parameters": {
        "mrope_interleaved": True,
        "mrope_section": [3, 3, 2],
        "partial_rotary_factor": 0.25,
        "rope_theta": 10000000,
        "rope_type": "default",
    },
    "tie_word_embeddings": True,
}
CONFIG = {
    "architectures": ["Qwen3_5ForConditionalGeneration"],
    "model_type": "qwen3_5",
    "text_config": TEXT,
    "tie_word_embeddings": True,
    "vision_config": {"model_type": "qwen3_5", "depth": 1, "hidden_size": 64},
}


def tensors(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return every tensor's shape by its name."""
    return text_tensors(config["text_config"], "model.language_model.") | {
        "model.visual.pos_embed.weight": (16, 64),
        "model.visual.blocks.0.attn.qkv.weight": (192, 64),
    }


def text_tensors(text: dict[str, Any], prefix: str) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the text part, dense or with experts."""
    hidden, layers = text["hidden_size"], text["num_hidden_layers"]
    shapes: dict[str, tuple[int, ...]] = {
        f"{prefix}embed_tokens.weight": (text["vocab_size"], hidden),
        f"{prefix}norm.weight": (hidden,),
    }
    if not text["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (text["vocab_size"], hidden)
    names = [(f"{prefix}layers.{layer}", kind) for layer, kind in zip(range(layers), text["layer_types"], strict=True)]
    if text["mtp_num_hidden_layers"]:
        names.append(("mtp.layers.0", "full_attention"))
        shapes |= {f"mtp.{name}.weight": (hidden,) for name in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden")}
        shapes["mtp.fc.weight"] = (hidden, 2 * hidden)
    for name, kind in names:
        mixer = _linear(text) if kind == "linear_attention" else _full(text)
        block = {f"{norm}_layernorm.weight": (hidden,) for norm in ("input", "post_attention")}
        shapes |= {f"{name}.{part}": shape for part, shape in {**block, **mixer, **_feed_forward(text)}.items()}
    return shapes


def _linear(text: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, heads, size = text["hidden_size"], text["linear_num_value_heads"], text["linear_value_head_dim"]
    values = heads * size
    channels = 2 * text["linear_num_key_heads"] * text["linear_key_head_dim"] + values
    return {
        "linear_attn.A_log": (heads,),
        "linear_attn.dt_bias": (heads,),
        "linear_attn.conv1d.weight": (channels, 1, text["linear_conv_kernel_dim"]),
        "linear_attn.in_proj_qkv.weight": (channels, hidden),
        "linear_attn.in_proj_z.weight": (values, hidden),
        "linear_attn.in_proj_a.weight": (heads, hidden),
        "linear_attn.in_proj_b.weight": (heads, hidden),
        "linear_attn.norm.weight": (size,),
        "linear_attn.out_proj.weight": (hidden, values),
    }


def _full(text: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, size = text["hidden_size"], text["head_dim"]
    queries, keys = size * text["num_attention_heads"], size * text["num_key_value_heads"]
    return {
        "self_attn.q_proj.weight": (2 * queries, hidden),  # with a gate for each
        "self_attn.k_proj.weight": (keys, hidden),
        "self_attn.v_proj.weight": (keys, hidden),
        "self_attn.o_proj.weight": (hidden, queries),
        "self_attn.q_norm.weight": (size,),
        "self_attn.k_norm.weight": (size,),
    }


def _feed_forward(text: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden = text["hidden_size"]
    if "num_experts" not in text:
        return _gated("mlp", hidden, text["intermediate_size"])
    width, experts = text["moe_intermediate_size"], text["num_experts"]
    return {
        "mlp.gate.weight": (experts, hidden),
        "mlp.experts.gate_up_proj": (experts, 2 * width, hidden),
        "mlp.experts.down_proj": (experts, hidden, width),
        "mlp.shared_expert_gate.weight": (1, hidden),
        **_gated("mlp.shared_expert", hidden, text["shared_expert_intermediate_size"]),
    }


def _gated(name: str, hidden: int, width: int) -> dict[str, tuple[int, ...]]:
    wide, narrow = (width, hidden), (hidden, width)
    return {f"{name}.{part}_proj.weight": shape for part, shape in (("gate", wide), ("up", wide), ("down", narrow))}
