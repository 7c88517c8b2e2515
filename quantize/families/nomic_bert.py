"""Nomic's embedding models: BERT with rotary positions and gated feed-forward layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from app.errors import CheckpointError
from quantize.checkpoint import StoredTensor
from quantize.families.config import Config
from quantize.families.encoder import (
    check_activation,
    class_names,
    head_count,
    linear,
    map_encoder,
    norm,
    read_config,
    set_encoder_keys,
)
from quantize.families.mapping import Want
from quantize.header import KeyTable
from quantize.source import Source
from quantize.tensors import TensorSpec
from quantize.vocab_wordpiece import set_wordpiece_vocabulary

# what llama.cpp takes for granted; Nomic's own config class has other defaults, so that config.json must say so
_TAKEN_FOR_GRANTED: dict[str, Any] = {
    "causal": False,
    "qkv_proj_bias": False,
    "mlp_fc1_bias": False,
    "mlp_fc2_bias": False,
    "prenorm": False,
    "rotary_emb_fraction": 1.0,
    "rotary_emb_interleaved": False,
    "rotary_emb_scale_base": None,
}
_TRAINED_POSITIONS = 2048
_CONTEXT_LENGTHS = {8192: 2048, 2048: 512}  # n_positions in config.json → tokens that the model was trained for
_UNUSED = ("pooler.dense.", "cls.predictions.", "cls.seq_relationship.")


def open(source: Source) -> NomicBertModel:  # noqa: A001 - every family is opened by this name
    """Read config.json. Raises `CheckpointError` that names the field at fault."""
    return NomicBertModel(source)


class NomicBertModel:
    """An embedding model of Nomic's, version 1 or 1.5."""

    architecture = "nomic-bert"

    def __init__(self, source: Source) -> None:
        self._source = source
        self._config = config = read_config(source, {})
        if config.fields.get("moe_every_n_layers"):
            raise CheckpointError(f"{config.path}: moe_every_n_layers: Nomic's mixture of experts is not supported")
        self._classes = class_names(config, unnamed=0)
        self.blocks = config.count("n_layer")
        self.hidden = config.count("n_embd")
        self.feed_forward = config.count("n_inner")
        self.vocabulary = config.count("vocab_size")
        self.token_types = config.count("type_vocab_size", 1)
        head_count(config, "n_head", self.hidden)
        check_activation(config, "activation_function", ("swiglu",))
        for name, expected in _TAKEN_FOR_GRANTED.items():
            if config.fields.get(name) != expected:
                found = config.fields.get(name)
                raise CheckpointError(f"{config.path}: {name} is {found!r}; llama.cpp computes with {expected!r}")
        config.fields["n_positions"] = _context_length(config)

    def set_hyper_parameters(self, keys: KeyTable, file_type: int) -> None:
        """Set the `nomic-bert.*` keys and the file type."""
        set_encoder_keys(keys, self.architecture, self._config, self._source, file_type, self.blocks, self._classes)

    def set_vocabulary(self, keys: KeyTable) -> None:
        """Set the tokenizer, a WordPiece one."""
        set_wordpiece_vocabulary(keys, self._source, self.vocabulary, self.token_types)

    def tensors(self, stored: Mapping[str, StoredTensor]) -> list[TensorSpec]:
        """Map the encoder's tensors; heads of the training are left out."""
        return map_encoder(
            self._config, stored, self._wants(), blocks=self.blocks, classes=self._classes,
            plain_name=lambda name: name.removeprefix("bert."), unused=_UNUSED,
        )  # fmt: skip

    def _wants(self) -> Iterator[Want]:
        hidden, wide = self.hidden, self.feed_forward
        yield Want("token_embd.weight", "embeddings.word_embeddings.weight", (self.vocabulary, hidden))
        yield Want("token_types.weight", "embeddings.token_type_embeddings.weight", (self.token_types, hidden))
        yield from norm("token_embd_norm", "emb_ln", hidden)
        shapes = {
            "attn.Wqkv": ("attn_qkv", (3 * hidden, hidden)),
            "attn.out_proj": ("attn_output", (hidden, hidden)),
            "mlp.fc11": ("ffn_up", (wide, hidden)),
            "mlp.fc12": ("ffn_gate", (wide, hidden)),
            "mlp.fc2": ("ffn_down", (hidden, wide)),
        }
        for block in range(self.blocks):
            source, target = f"encoder.layers.{block}", f"blk.{block}"
            yield from norm(f"{target}.attn_output_norm", f"{source}.norm1", hidden)
            yield from norm(f"{target}.layer_output_norm", f"{source}.norm2", hidden)
            for name, (inner, shape) in shapes.items():
                yield from linear(f"{target}.{inner}", f"{source}.{name}", shape, bias=False)


def _context_length(config: Config) -> int:
    stated, trained = config.count("n_positions"), config.count("max_trained_positions", _TRAINED_POSITIONS)
    if trained != _TRAINED_POSITIONS or stated not in _CONTEXT_LENGTHS:
        raise CheckpointError(
            f"{config.path}: n_positions is {stated} and max_trained_positions {trained}; for how many tokens such a "
            f"model was trained is not known"
        )
    return _CONTEXT_LENGTHS[stated]
