"""LFM2-VL, of which the text model is taken."""

from __future__ import annotations

from typing import Any

from checkpoint_families.lfm2 import CONFIG as TEXT

WHAT = "LFM2-VL: its text model; what sees is left out"
VOCABULARY = None
PRE = None
CONFIG: dict[str, Any] = {
    "architectures": ["Lfm2VlForConditionalGeneration"],
    "model_type": "lfm2_vl",
    "projector_hidden_size": 64,
    "text_config": {**TEXT, "num_hidden_layers": 3, "full_attn_idxs": [1]},
    "vision_config": {
        "model_type": "siglip2_vision_model",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_patches": 16,
        "vision_use_head": False,
    },
}
