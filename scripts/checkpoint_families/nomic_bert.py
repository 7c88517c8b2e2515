"""Nomic's embedding model, version 1.5: rotary positions, gated feed-forward layers, no biases."""

from typing import Any

from checkpoint_wordpiece import write_wordpiece

from checkpoint_families import bert

WHAT = "Nomic BERT: rotary positions, fused queries, keys and values, context length as trained, WordPiece"
VOCABULARY = "bert-bge"
PRE = None
CONFIG = {
    "architectures": ["NomicBertModel"],
    "model_type": "nomic_bert",
    "auto_map": {"AutoConfig": "configuration_hf_nomic_bert.NomicBertConfig"},
    "bos_token_id": None,
    "eos_token_id": None,
    "activation_function": "swiglu",
    "causal": False,
    "layer_norm_epsilon": 1e-12,
    "max_trained_positions": 2048,
    "mlp_fc1_bias": False,
    "mlp_fc2_bias": False,
    "n_embd": 256,
    "n_head": 4,
    "n_inner": 1024,
    "n_layer": 3,
    "n_positions": 8192,
    "pad_vocab_size_multiple": 64,
    "prenorm": False,
    "qkv_proj_bias": False,
    "rotary_emb_base": 1000,
    "rotary_emb_fraction": 1.0,
    "rotary_emb_interleaved": False,
    "rotary_emb_scale_base": None,
    "rotary_scaling_factor": None,
    "type_vocab_size": 2,
    "vocab_size": 30528,
}
FILES = bert.FILES
write_tokenizer = write_wordpiece


def tensors(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return every tensor's shape."""
    hidden, wide = config["n_embd"], config["n_inner"]
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (config["vocab_size"], hidden),
        "embeddings.token_type_embeddings.weight": (config["type_vocab_size"], hidden),
    }
    norms = ["emb_ln"]
    for layer in range(config["n_layer"]):
        prefix = f"encoder.layers.{layer}"
        norms += [f"{prefix}.norm1", f"{prefix}.norm2"]
        shapes[f"{prefix}.attn.Wqkv.weight"] = (3 * hidden, hidden)
        shapes[f"{prefix}.attn.out_proj.weight"] = (hidden, hidden)
        shapes[f"{prefix}.mlp.fc11.weight"] = shapes[f"{prefix}.mlp.fc12.weight"] = (wide, hidden)
        shapes[f"{prefix}.mlp.fc2.weight"] = (hidden, wide)
    return shapes | {f"{name}.{part}": (hidden,) for name in norms for part in ("weight", "bias")}
