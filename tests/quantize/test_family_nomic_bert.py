"""Nomic's BERT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from app.errors import CheckpointError
from quantize.pipeline import prepare
from tests.quantize.encoder_files import TEXTS, TOKENS, pooling_files, tokens_of, wordpiece_files, write_encoder
from tests.quantize.family_files import Arrays, changed_config, check_against_llama_cpp, floats, random_weights

HIDDEN, WIDTH, LAYERS = 256, 320, 2
VOCABULARY = len(TOKENS) + 3  # more rows than tokens, to a round number
CONFIG: dict[str, Any] = {
    "architectures": ["NomicBertModel"],
    "model_type": "nomic_bert",
    "vocab_size": VOCABULARY,
    "type_vocab_size": 2,
    "n_embd": HIDDEN,
    "n_inner": WIDTH,
    "n_layer": LAYERS,
    "n_head": 4,
    "n_positions": 8192,
    "max_trained_positions": 2048,
    "layer_norm_epsilon": 1e-12,
    "activation_function": "swiglu",
    "causal": False,
    "prenorm": False,
    "qkv_proj_bias": False,
    "mlp_fc1_bias": False,
    "mlp_fc2_bias": False,
    "rotary_emb_base": 1000,
    "rotary_emb_fraction": 1.0,
    "rotary_emb_interleaved": False,
    "rotary_emb_scale_base": None,
}
MATRICES = {
    "attn.Wqkv": ("attn_qkv", (3 * HIDDEN, HIDDEN)),
    "attn.out_proj": ("attn_output", (HIDDEN, HIDDEN)),
    "mlp.fc11": ("ffn_up", (WIDTH, HIDDEN)),
    "mlp.fc12": ("ffn_gate", (WIDTH, HIDDEN)),
    "mlp.fc2": ("ffn_down", (HIDDEN, WIDTH)),
}
NORMS = {"norm1": "attn_output_norm", "norm2": "layer_output_norm"}


def names() -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return stored name → name in the GGUF and shape."""
    found: dict[str, tuple[str, tuple[int, ...]]] = {
        "embeddings.word_embeddings.weight": ("token_embd.weight", (VOCABULARY, HIDDEN)),
        "embeddings.token_type_embeddings.weight": ("token_types.weight", (2, HIDDEN)),
        "emb_ln.weight": ("token_embd_norm.weight", (HIDDEN,)),
        "emb_ln.bias": ("token_embd_norm.bias", (HIDDEN,)),
    }
    for layer in range(LAYERS):
        for name, (target, shape) in MATRICES.items():
            found[f"encoder.layers.{layer}.{name}.weight"] = (f"blk.{layer}.{target}.weight", shape)
        for name, target in NORMS.items():
            for part in ("weight", "bias"):
                found[f"encoder.layers.{layer}.{name}.{part}"] = (f"blk.{layer}.{target}.{part}", (HIDDEN,))
    return found


def weights_of() -> Arrays:
    return random_weights({name: shape for name, (_, shape) in names().items()})


def make(folder: Path, weights: Arrays | None = None) -> Path:
    files = wordpiece_files() | pooling_files({"pooling_mode_mean_tokens": True})
    return write_encoder(folder, CONFIG, weights or weights_of(), files)


def test_every_byte_is_llama_cpps_and_no_weight_is_changed(tmp_path: Path) -> None:
    weights = weights_of()
    header = check_against_llama_cpp(make(tmp_path / "Model", weights), tmp_path, ["q8_0", "q4_k_m", "q4_0"])
    found = floats(header)
    assert set(found) == {target for target, _ in names().values()}
    for name, (target, _) in names().items():
        np.testing.assert_array_equal(found[target], weights[name])


def test_the_keys_and_the_tokens(tmp_path: Path) -> None:
    source = make(tmp_path / "Model")
    keys = check_against_llama_cpp(source, tmp_path, ["q8_0"]).metadata
    assert keys["general.architecture"] == "nomic-bert"
    assert keys["nomic-bert.context_length"] == 2048  # as trained, not as stated
    assert keys["nomic-bert.rope.freq_base"] == 1000.0
    assert keys["nomic-bert.attention.causal"] is False
    assert keys["nomic-bert.pooling_type"] == 1
    assert "nomic-bert.classifier.output_labels" not in keys
    assert keys["tokenizer.ggml.tokens"][-1] == f"▁[PAD{VOCABULARY - 1}]"
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    assert tokens_of(tmp_path / "ours.gguf") == [tokenizer.encode(text).ids for text in TEXTS]


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"n_positions": 4096}, "n_positions is 4096"),
        ({"max_trained_positions": 4096}, "max_trained_positions 4096"),
        ({"activation_function": "gelu"}, "activation_function is 'gelu'"),
        ({"qkv_proj_bias": True}, "qkv_proj_bias is True"),
        ({"prenorm": None}, "prenorm is None"),
        ({"rotary_emb_fraction": 0.5}, r"rotary_emb_fraction is 0\.5"),
        ({"rotary_emb_scale_base": 2}, "rotary_emb_scale_base is 2"),
        ({"n_inner": None}, "n_inner is missing"),
        ({"n_inner": 100}, r"mlp\.fc"),
    ],
)
def test_a_config_that_does_not_fit(fields: dict[str, Any], complaint: str, tmp_path: Path) -> None:
    source = changed_config(make(tmp_path / "Model"), **fields)
    with pytest.raises(CheckpointError, match=complaint):
        prepare(source, "q8_0")


EXPERTS = 3
MIXTURE: dict[str, Any] = {
    **CONFIG,
    "activation_function": "gelu",
    "moe_every_n_layers": 2,
    "moe_top_k": 2,
    "num_experts": EXPERTS,
    "n_positions": 2048,
    "qkv_proj_bias": True,
    "mlp_fc1_bias": True,
    "mlp_fc2_bias": True,
}


def mixture_weights() -> Arrays:
    shapes = {name: shape for name, (_, shape) in names().items() if ".mlp." not in name}
    for layer in range(LAYERS):
        prefix = f"encoder.layers.{layer}"
        shapes |= {f"{prefix}.attn.Wqkv.bias": (3 * HIDDEN,), f"{prefix}.attn.out_proj.bias": (HIDDEN,)}
    dense, experts = "encoder.layers.0.mlp", "encoder.layers.1.mlp"
    shapes |= {f"{dense}.fc1.weight": (WIDTH, HIDDEN), f"{dense}.fc1.bias": (WIDTH,)}
    shapes |= {f"{dense}.fc2.weight": (HIDDEN, WIDTH), f"{dense}.fc2.bias": (HIDDEN,)}
    shapes |= {f"{experts}.experts.mlp.{name}": (EXPERTS * WIDTH, HIDDEN) for name in ("w1", "w2")}
    shapes |= {f"{experts}.router.layer.weight": (EXPERTS, HIDDEN), f"{experts}.experts.bias": (HIDDEN,)}
    return random_weights({f"bert.{name}": shape for name, shape in shapes.items()})


def test_a_mixture_of_experts(tmp_path: Path) -> None:
    weights = mixture_weights()
    source = write_encoder(tmp_path / "Model", MIXTURE, weights, wordpiece_files())
    header = check_against_llama_cpp(source, tmp_path, ["q8_0", "q4_k_m"])
    found = floats(header)
    experts = "bert.encoder.layers.1.mlp.experts.mlp"
    ways = {name: weights[f"{experts}.{name}"].reshape(EXPERTS, WIDTH, HIDDEN) for name in ("w1", "w2")}
    np.testing.assert_array_equal(found["blk.1.ffn_up_exps.weight"], ways["w1"])
    np.testing.assert_array_equal(found["blk.1.ffn_down_exps.weight"], ways["w2"].transpose(0, 2, 1))
    np.testing.assert_array_equal(found["blk.0.ffn_up.bias"], weights["bert.encoder.layers.0.mlp.fc1.bias"])
    assert len(found) == len(weights) - 1  # all but the bias of the experts
    keys = header.metadata
    assert keys["general.architecture"] == "nomic-bert-moe"
    assert keys["nomic-bert-moe.context_length"] == 512
    assert keys["nomic-bert-moe.moe_every_n_layers"] == 2
    assert (keys["nomic-bert-moe.expert_count"], keys["nomic-bert-moe.expert_used_count"]) == (EXPERTS, 2)
    assert tokens_of(tmp_path / "ours.gguf")
    with pytest.raises(CheckpointError, match="mlp_fc2_bias is False"):
        prepare(changed_config(source, mlp_fc2_bias=False), "q8_0")
