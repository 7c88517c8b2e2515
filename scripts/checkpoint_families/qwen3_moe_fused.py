"""Qwen3 MoE with experts in stacks, gates over ups, as some tools store them."""

from checkpoint_families import qwen3_moe

WHAT = "Qwen3 MoE: experts in stacks, gates over ups, untied"
VOCABULARY = "qwen2"
PRE = None
CONFIG = {**qwen3_moe.CONFIG, "num_hidden_layers": 2, "tie_word_embeddings": False}


def tensors(config: dict[str, int]) -> dict[str, tuple[int, ...]]:
    """Return every tensor's shape by its name."""
    hidden, width, experts = config["hidden_size"], config["moe_intermediate_size"], config["num_experts"]
    head, queries = config["head_dim"], config["head_dim"] * config["num_attention_heads"]
    keys = head * config["num_key_value_heads"]
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (config["vocab_size"], hidden),
    }
    for layer in range(config["num_hidden_layers"]):
        block = {
            "input_layernorm.weight": (hidden,),
            "post_attention_layernorm.weight": (hidden,),
            "self_attn.q_proj.weight": (queries, hidden),
            "self_attn.k_proj.weight": (keys, hidden),
            "self_attn.v_proj.weight": (keys, hidden),
            "self_attn.o_proj.weight": (hidden, queries),
            "self_attn.q_norm.weight": (head,),
            "self_attn.k_norm.weight": (head,),
            "mlp.gate.weight": (experts, hidden),
            "mlp.experts.gate_up_proj": (experts, 2 * width, hidden),
            "mlp.experts.down_proj": (experts, hidden, width),
        }
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in block.items()}
    return shapes
