"""BERT as an encoder of text: embedding models such as BGE, E5, GTE and MiniLM, and classifiers with named classes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from quantize.checkpoint import StoredTensor
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

# what transformers' BertConfig fills in when config.json is silent
DEFAULTS: dict[str, dict[str, Any]] = {
    "bert": {
        "vocab_size": 30522,
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "hidden_act": "gelu",
        "max_position_embeddings": 512,
        "type_vocab_size": 2,
        "layer_norm_eps": 1e-12,
        "pad_token_id": 0,
    },
}
_ACTIVATIONS = ("gelu", "gelu_new", "gelu_fast", "gelu_python", "gelu_pytorch_tanh")
_MATRICES = {
    "attention.self.query": "attn_q",
    "attention.self.key": "attn_k",
    "attention.self.value": "attn_v",
    "attention.output.dense": "attn_output",
    "intermediate.dense": "ffn_up",
    "output.dense": "ffn_down",
}
_NORMS = {"attention.output.LayerNorm": "attn_output_norm", "output.LayerNorm": "layer_output_norm"}
_UNUSED = ("embeddings.position_ids", "pooler.dense.", "cls.predictions.", "cls.seq_relationship.")


def open(source: Source) -> BertModel:  # noqa: A001 - every family is opened by this name
    """Read config.json. Raises `CheckpointError` that names the field at fault."""
    return BertModel(source)


class BertModel:
    """A model of the BERT family."""

    architecture = "bert"
    defaults: ClassVar[dict[str, dict[str, Any]]] = DEFAULTS
    unused_positions = 0  # at the start of the table

    def __init__(self, source: Source) -> None:
        self._source = source
        self._config = config = read_config(source, self.defaults)
        self._classes = class_names(config)
        self.blocks = config.count("num_hidden_layers")
        self.hidden = config.count("hidden_size")
        self.feed_forward = config.count("intermediate_size")
        self.positions = config.count("max_position_embeddings")
        self.vocabulary = config.count("vocab_size")
        self.token_types = config.count("type_vocab_size", 1)
        head_count(config, "num_attention_heads", self.hidden)
        check_activation(config, "hidden_act", _ACTIVATIONS)

    def set_hyper_parameters(self, keys: KeyTable, file_type: int) -> None:
        """Set the `bert.*` keys and the file type."""
        set_encoder_keys(keys, self.architecture, self._config, self._source, file_type, self.blocks, self._classes)

    def set_vocabulary(self, keys: KeyTable) -> None:
        """Set the tokenizer, a WordPiece one."""
        set_wordpiece_vocabulary(keys, self._source, self.vocabulary, self.token_types)

    def tensors(self, stored: Mapping[str, StoredTensor]) -> list[TensorSpec]:
        """Map the encoder's tensors and those of a classification head; heads of the training are left out."""
        return map_encoder(
            self._config, stored, self._wants(), blocks=self.blocks, classes=self._classes,
            plain_name=plain_name, unused=lambda name: name.startswith(_UNUSED),
        )  # fmt: skip

    def _wants(self) -> Iterator[Want]:
        hidden = self.hidden
        yield Want("token_embd.weight", "embeddings.word_embeddings.weight", (self.vocabulary, hidden))
        yield Want("token_types.weight", "embeddings.token_type_embeddings.weight", (self.token_types, hidden))
        yield Want(
            "position_embd.weight", "embeddings.position_embeddings.weight", (self.positions, hidden),
            (self.positions - self.unused_positions, hidden), start=self.unused_positions,
        )  # fmt: skip
        yield from norm("token_embd_norm", "embeddings.LayerNorm", hidden)
        yield from self._head()
        for block in range(self.blocks):
            source, target = f"encoder.layer.{block}", f"blk.{block}"
            for name, inner in _NORMS.items():
                yield from norm(f"{target}.{inner}", f"{source}.{name}", hidden)
            for name, inner in _MATRICES.items():
                rows = self.feed_forward if inner == "ffn_up" else hidden
                columns = self.feed_forward if inner == "ffn_down" else hidden
                yield from linear(f"{target}.{inner}", f"{source}.{name}", (rows, columns))

    def _head(self) -> Iterator[Want]:
        if self._classes:
            yield from linear("cls.output", "classifier", (len(self._classes), self.hidden), optional=True)


def plain_name(stored: str) -> str:
    """Return a tensor's name without the prefix of models with a head; norms of old checkpoints get today's names."""
    name = stored.removeprefix("bert.").removeprefix("roberta.")
    for old, new in ((".gamma", ".weight"), (".beta", ".bias")):
        if name.endswith(old):
            name = name.removesuffix(old) + new
    return name
