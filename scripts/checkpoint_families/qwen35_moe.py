"""Qwen3.5 MoE, small: experts in stacks, a shared expert, linear attention, an MTP layer; a text model by itself."""

from typing import Any

from checkpoint_families import qwen35

WHAT = "Qwen3.5 MoE: stacks of gates over ups, a shared expert, an MTP layer, untied"
VOCABULARY = "qwen35"
PRE = "qwen35"  # the vocabulary is that of Qwen2, for which upstream takes it
CONFIG: dict[str, Any] = {
    **qwen35.TEXT,
    "architectures": ["Qwen3_5MoeForCausalLM"],
    "model_type": "qwen3_5_moe_text",
    "linear_num_value_heads": 4,
    "moe_intermediate_size": 256,
    "shared_expert_intermediate_size": 256,
    "num_experts": 12,
    "num_experts_per_tok": 4,
    "tie_word_embeddings": False,
}
del CONFIG["intermediate_size"]


def tensors(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return every tensor's shape by its name."""
    return qwen35.text_tensors(config, "model.")
