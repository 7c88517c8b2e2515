"""Nomic's embedding model, version 2: a mixture of experts in every other layer, biases, unigrams."""

from typing import Any

from checkpoint_unigram import write_unigram

from checkpoint_families import bert, nomic_bert

WHAT = "Nomic BERT as a mixture of experts: turned expert matrices, the unigrams of XLM-RoBERTa"
VOCABULARY = "nomic-bert-moe"
PRE = None
CONFIG = {
    **nomic_bert.CONFIG,
    "activation_function": "gelu",
    "layer_norm_epsilon": 1e-05,
    "mlp_fc1_bias": True,
    "mlp_fc2_bias": True,
    "moe_every_n_layers": 2,
    "moe_top_k": 2,
    "num_experts": 4,
    "n_embd": 64,
    "n_head": 2,
    "n_inner": 256,
    "n_layer": 3,
    "n_positions": 2048,
    "pad_token_id": 1,
    "qkv_proj_bias": True,
    "rotary_emb_base": 10000,
    "type_vocab_size": 1,
    "vocab_size": 250048,
}
FILES = bert.FILES
write_tokenizer = write_unigram


def tensors(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return every tensor's shape."""
    hidden, wide, experts = config["n_embd"], config["n_inner"], config["num_experts"]
    shapes = {name: shape for name, shape in nomic_bert.tensors(config).items() if ".mlp.fc11." not in name}
    for layer in range(config["n_layer"]):
        prefix = f"encoder.layers.{layer}"
        shapes |= {f"{prefix}.attn.Wqkv.bias": (3 * hidden,), f"{prefix}.attn.out_proj.bias": (hidden,)}
        del shapes[f"{prefix}.mlp.fc12.weight"]
        if layer % config["moe_every_n_layers"] == 1:
            del shapes[f"{prefix}.mlp.fc2.weight"]
            shapes[f"{prefix}.mlp.router.layer.weight"] = (experts, hidden)
            shapes[f"{prefix}.mlp.experts.bias"] = (hidden,)
            shapes |= {f"{prefix}.mlp.experts.mlp.{name}": (experts * wide, hidden) for name in ("w1", "w2")}
        else:
            shapes |= {f"{prefix}.mlp.fc1.weight": (wide, hidden), f"{prefix}.mlp.fc1.bias": (wide,)}
            shapes[f"{prefix}.mlp.fc2.bias"] = (hidden,)
    return shapes
