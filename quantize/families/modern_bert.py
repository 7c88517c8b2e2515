"""ModernBERT: rotary positions, sliding windows in two layers of three, gated feed-forward layers, byte-level BPE."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

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
from quantize.vocab import set_bpe_vocabulary

# what transformers' ModernBertConfig fills in when config.json is silent
_DEFAULTS: dict[str, dict[str, Any]] = {
    "modernbert": {
        "vocab_size": 50368,
        "hidden_size": 768,
        "intermediate_size": 1152,
        "num_hidden_layers": 22,
        "num_attention_heads": 12,
        "hidden_activation": "gelu",
        "max_position_embeddings": 8192,
        "norm_eps": 1e-5,
        "global_rope_theta": 160000.0,
        "local_rope_theta": 10000.0,
        "global_attn_every_n_layers": 3,
        "local_attention": 128,
        "classifier_pooling": "cls",
    },
}
_ACTIVATIONS = ("gelu", "silu")
_UNUSED = ("decoder.",)  # of the training; llama.cpp's graph ends before it


def open(source: Source) -> ModernBertModel:  # noqa: A001 - every family is opened by this name
    """Read config.json. Raises `CheckpointError` that names the field at fault."""
    return ModernBertModel(source)


class ModernBertModel:
    """A model of the ModernBERT family."""

    architecture = "modern-bert"

    def __init__(self, source: Source) -> None:
        self._source = source
        self._config = config = read_config(source, _DEFAULTS)
        self._classes = class_names(config)
        self.blocks = config.count("num_hidden_layers")
        self.hidden = config.count("hidden_size")
        self.feed_forward = config.count("intermediate_size")
        self.vocabulary = config.count("vocab_size")
        head_count(config, "num_attention_heads", self.hidden)
        check_activation(config, "hidden_activation", _ACTIVATIONS)
        # llama.cpp cannot do without this one, which is norm_eps by another name and in most config.json
        config.fields.setdefault("layer_norm_eps", config.fields.get("norm_eps"))

    def set_hyper_parameters(self, keys: KeyTable, file_type: int) -> None:
        """Set the `modern-bert.*` keys and the file type."""
        config, prefix = self._config, self.architecture
        set_encoder_keys(keys, prefix, config, self._source, file_type, self.blocks, self._classes)
        keys.u32(f"{prefix}.attention.sliding_window", config.count("local_attention"))
        period = config.optional_count("global_attn_every_n_layers")
        if period is not None:
            keys.u32(f"{prefix}.attention.sliding_window_pattern", period)
        keys.text(f"{prefix}.rope.scaling.type", "none")
        keys.u32(f"{prefix}.vocab_size", self.vocabulary)
        keys.text(f"{prefix}.hidden_activation", str(config.fields["hidden_activation"]))

    def set_vocabulary(self, keys: KeyTable) -> None:
        """Set the tokenizer, a byte-level BPE that puts tokens around a text."""
        for kind in ("bos", "eos", "sep"):
            keys.boolean(f"tokenizer.ggml.add_{kind}_token", True)
        set_bpe_vocabulary(keys, self._source, self.vocabulary)

    def tensors(self, stored: Mapping[str, StoredTensor]) -> list[TensorSpec]:
        """Map the encoder's tensors and those of a head; what turns embeddings into tokens again is left out."""
        return map_encoder(
            self._config, stored, self._wants(), blocks=self.blocks, classes=self._classes,
            plain_name=lambda name: name.removeprefix("model."), unused=lambda name: name.startswith(_UNUSED),
        )  # fmt: skip

    def _wants(self) -> Iterator[Want]:
        hidden, wide = self.hidden, self.feed_forward
        yield Want("token_embd.weight", "embeddings.tok_embeddings.weight", (self.vocabulary, hidden))
        yield from norm("token_embd_norm", "embeddings.norm", hidden, bias=False)
        yield from norm("output_norm", "final_norm", hidden, bias=False)
        yield from linear("cls", "head.dense", (hidden, hidden), bias=False, optional=True)
        yield Want("cls.norm.weight", "head.norm.weight", (hidden,), optional=True)
        if self._classes:
            yield from linear("cls.output", "classifier", (len(self._classes), hidden), optional=True)
        shapes = {
            "attn.Wqkv": ("attn_qkv", (3 * hidden, hidden)),
            "attn.Wo": ("attn_output", (hidden, hidden)),
            "mlp.Wi": ("ffn_up", (2 * wide, hidden)),
            "mlp.Wo": ("ffn_down", (hidden, wide)),
        }
        for block in range(self.blocks):
            source, target = f"layers.{block}", f"blk.{block}"
            yield Want(f"{target}.attn_norm.weight", f"{source}.attn_norm.weight", (hidden,), optional=block == 0)
            yield Want(f"{target}.ffn_norm.weight", f"{source}.mlp_norm.weight", (hidden,))
            for name, (inner, shape) in shapes.items():
                yield from linear(f"{target}.{inner}", f"{source}.{name}", shape, bias=False)
