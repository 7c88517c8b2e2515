"""Gemma 4 as its small sizes are: per-layer embeddings, layers that share keys and values and are twice as wide."""

from __future__ import annotations

from typing import Any

from checkpoint_gemma import write_gemma4

WHAT = "Gemma 4's text model: per-layer embeddings, shared keys and values, its own vocabulary, the towers left out"
VOCABULARY = "gemma-4"
PRE = None
CONFIG = {
    "architectures": ["Gemma4ForConditionalGeneration"],
    "model_type": "gemma4",
    "eos_token_id": [1, 106],
    "text_config": {
        "attention_k_eq_v": False,
        "enable_moe_block": False,
        "final_logit_softcapping": 30.0,
        "global_head_dim": 128,
        "head_dim": 64,
        "hidden_size": 256,
        "hidden_size_per_layer_input": 16,
        "intermediate_size": 256,
        "layer_types": ["sliding_attention", "full_attention"] * 3,
        "max_position_embeddings": 131072,
        "model_type": "gemma4_text",
        "moe_intermediate_size": None,
        "num_attention_heads": 4,
        "num_experts": None,
        "num_global_key_value_heads": None,
        "num_hidden_layers": 6,
        "num_key_value_heads": 1,
        "num_kv_shared_layers": 2,
        "rms_norm_eps": 1e-06,
        "rope_parameters": {
            "full_attention": {"partial_rotary_factor": 0.25, "rope_theta": 1000000.0, "rope_type": "proportional"},
            "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"},
        },
        "sliding_window": 512,
        "tie_word_embeddings": True,
        "top_k_experts": None,
        "use_bidirectional_attention": None,
        "use_double_wide_mlp": True,
        "vocab_size_per_layer_input": 262144,
    },
    "vision_config": {"model_type": "gemma4_vision", "hidden_size": 32},
}
write_tokenizer = write_gemma4


def tensors(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return every tensor's shape, as Gemma 4's checkpoints have them."""
    text = config["text_config"]
    prefix, hidden, blocks = "model.language_model.", text["hidden_size"], text["num_hidden_layers"]
    shapes: dict[str, tuple[int, ...]] = {
        f"{prefix}embed_tokens.weight": (text["vocab_size"], hidden),
        f"{prefix}norm.weight": (hidden,),
        "model.vision_tower.encoder.layers.0.self_attn.q_proj.linear.weight": (32, 32),
        "model.embed_vision.embedding_projection.weight": (hidden, 32),
        "model.audio_tower.layers.0.norm_out.weight": (32,),
        "model.embed_audio.embedding_projection.weight": (hidden, 32),
    }
    if inner := text["hidden_size_per_layer_input"]:
        shapes[f"{prefix}embed_tokens_per_layer.weight"] = (text["vocab_size_per_layer_input"], inner * blocks)
        shapes[f"{prefix}per_layer_model_projection.weight"] = (inner * blocks, hidden)
        shapes[f"{prefix}per_layer_projection_norm.weight"] = (inner,)
    for layer in range(blocks):
        shapes |= {f"{prefix}layers.{layer}.{name}": shape for name, shape in _layer(text, layer).items()}
    return shapes


def _layer(text: dict[str, Any], layer: int) -> dict[str, tuple[int, ...]]:
    full, hidden, inner = text["layer_types"][layer] == "full_attention", text["hidden_size"], text["head_dim"]
    head = text["global_head_dim"] if full else inner
    same = full and text["attention_k_eq_v"]
    keys = head * (text["num_global_key_value_heads"] if same else text["num_key_value_heads"])
    queries = head * text["num_attention_heads"]
    shared = layer >= text["num_hidden_layers"] - text["num_kv_shared_layers"]
    width = text["intermediate_size"] * (2 if shared and text["use_double_wide_mlp"] else 1)
    shapes: dict[str, tuple[int, ...]] = {
        **{
            f"{name}_layernorm.weight": (hidden,)
            for name in ("input", "post_attention", "pre_feedforward", "post_feedforward")
        },
        "layer_scalar": (1,),
        "self_attn.q_proj.weight": (queries, hidden),
        "self_attn.q_norm.weight": (head,),
        "self_attn.o_proj.weight": (hidden, queries),
        "mlp.gate_proj.weight": (width, hidden),
        "mlp.up_proj.weight": (width, hidden),
        "mlp.down_proj.weight": (hidden, width),
    }
    if not shared:
        shapes |= {"self_attn.k_proj.weight": (keys, hidden), "self_attn.k_norm.weight": (head,)}
        shapes |= {} if same else {"self_attn.v_proj.weight": (keys, hidden)}
    if size := text["hidden_size_per_layer_input"]:
        shapes["per_layer_input_gate.weight"] = (size, hidden)
        shapes["per_layer_projection.weight"] = (hidden, size)
        shapes["post_per_layer_input_norm.weight"] = (hidden,)
    if experts := text["num_experts"]:
        inner = text["moe_intermediate_size"]
        shapes |= {
            "router.proj.weight": (experts, hidden),
            "router.scale": (hidden,),
            "router.per_expert_scale": (experts,),
            "experts.gate_up_proj": (experts, 2 * inner, hidden),
            "experts.down_proj": (experts, hidden, inner),
            "pre_feedforward_layernorm_2.weight": (hidden,),
            "post_feedforward_layernorm_1.weight": (hidden,),
            "post_feedforward_layernorm_2.weight": (hidden,),
        }
    return shapes
