"""Gemma 3 with images, as its first releases were laid out: a sparse text_config, old names, a tower of vision."""

from __future__ import annotations

from typing import Any

from checkpoint_gemma import write_gemma

WHAT = "Gemma 3's text model out of a multimodal checkpoint: sparse text_config, the vision tower left out"
VOCABULARY = "llama-spm"
STANDS_IN = True
PRE = None
CONFIG = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "model_type": "gemma3",
    "image_token_index": 262144,
    "text_config": {
        "hidden_size": 256,
        "intermediate_size": 512,
        "model_type": "gemma3_text",
        "num_hidden_layers": 3,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "vision_config": {
        "hidden_size": 32,
        "image_size": 28,
        "intermediate_size": 64,
        "model_type": "siglip_vision_model",
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "patch_size": 14,
    },
}
write_tokenizer = write_gemma
_HEADS, _KEY_HEADS, _HEAD = 8, 4, 256  # transformers' defaults


def tensors(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return every tensor's shape."""
    text = config["text_config"]
    hidden, width = text["hidden_size"], text["intermediate_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "language_model.model.embed_tokens.weight": (text["vocab_size"], hidden),
        "language_model.model.norm.weight": (hidden,),
        "multi_modal_projector.mm_input_projection_weight": (32, hidden),
        "multi_modal_projector.mm_soft_emb_norm.weight": (32,),
        "vision_tower.vision_model.embeddings.patch_embedding.weight": (32, 3, 14, 14),
        "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight": (64, 32),
        "vision_tower.vision_model.post_layernorm.weight": (32,),
    }
    for layer in range(text["num_hidden_layers"]):
        prefix = f"language_model.model.layers.{layer}"
        for norm in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
            shapes[f"{prefix}.{norm}_layernorm.weight"] = (hidden,)
        for name, heads in (("q", _HEADS), ("k", _KEY_HEADS), ("v", _KEY_HEADS)):
            shapes[f"{prefix}.self_attn.{name}_proj.weight"] = (heads * _HEAD, hidden)
        shapes[f"{prefix}.self_attn.o_proj.weight"] = (hidden, _HEADS * _HEAD)
        shapes |= {f"{prefix}.self_attn.{name}_norm.weight": (_HEAD,) for name in "qk"}
        shapes |= {f"{prefix}.mlp.{name}_proj.weight": (width, hidden) for name in ("gate", "up")}
        shapes[f"{prefix}.mlp.down_proj.weight"] = (hidden, width)
    return shapes
