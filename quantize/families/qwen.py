"""Qwen2, Qwen2.5 and Qwen3, with the embedding models and rerankers that were made of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from app.errors import CheckpointError
from quantize import vocab
from quantize.checkpoint import StoredTensor
from quantize.families import qwen_rerank
from quantize.families.common_keys import set_common_keys
from quantize.families.config import Config
from quantize.families.mapping import Want, map_tensors
from quantize.families.pooling import set_pooling
from quantize.header import KeyTable
from quantize.source import Source
from quantize.tensors import TensorSpec

# what transformers' config classes fill in when config.json is silent
_DEFAULTS: dict[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
}


def open(source: Source) -> Qwen2Model:  # noqa: A001 - every family is opened by this name
    """Read config.json. Raises `CheckpointError` that names the field at fault."""
    return (Qwen2Model if source.config["architectures"][0].startswith("Qwen2") else Qwen3Model)(source)


class Qwen2Model:
    """A Qwen2 or Qwen2.5: a Llama with biases for queries, keys and values, its rotary pairs in halves."""

    architecture: str = "qwen2"
    defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {"qwen2": _DEFAULTS}
    head_norms: ClassVar[bool] = False
    """Whether each head's queries and keys have norms: then heads have any size, and biases only if announced."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._config = config = Config(source, self.defaults)
        self.blocks = config.count("num_hidden_layers")
        self.hidden = config.count("hidden_size")
        self.heads = config.count("num_attention_heads")
        if _is_null(source, "num_key_value_heads"):
            config.fields["num_key_value_heads"] = self.heads  # as the config classes do
        self.key_heads = config.count("num_key_value_heads", self.heads)
        self.vocabulary = config.count("vocab_size")
        if self.heads % self.key_heads:
            raise CheckpointError(
                f"{config.path}: num_attention_heads ({self.heads}) is no multiple of "
                f"num_key_value_heads ({self.key_heads})"
            )
        self.head_size = self._head_size()
        if self.head_size % 2:
            raise CheckpointError(
                f"{config.path}: the head size {self.head_size} is odd; rotary pairs need an even one"
            )

    def set_hyper_parameters(self, keys: KeyTable, file_type: int) -> None:
        """Set the architecture's keys and the file type."""
        set_common_keys(keys, self.architecture, self._config, file_type, self.blocks)
        set_pooling(keys, self.architecture, self._config, self._source)

    def set_vocabulary(self, keys: KeyTable) -> None:
        """Set the tokenizer: SentencePiece if tokenizer.model is there, else what tokenizer.json holds."""
        if (self._source.folder / "tokenizer.model").is_file():
            vocab.set_sentencepiece_vocabulary(keys, self._source, self.vocabulary)
        else:
            vocab.set_bpe_vocabulary(keys, self._source, self.vocabulary)

    def tensors(self, stored: Mapping[str, StoredTensor]) -> list[TensorSpec]:
        """Map every tensor of the checkpoint, after checking that all are there and that each has its shape."""
        if self.blocks > len(stored):
            raise CheckpointError(
                f"{self._source.folder}: config.json speaks of {self.blocks} layers; there are {len(stored)} tensors"
            )
        return map_tensors(self._source.folder, stored, self._wants(stored))

    def _head_size(self) -> int:
        if _is_null(self._source, "head_dim"):
            self._config.fields.pop("head_dim", None)  # to the config classes null is not the same as silence
        size = self._config.optional_count("head_dim") or self.hidden // self.heads
        if size * self.heads != self.hidden and not self.head_norms:
            raise CheckpointError(
                f"{self._config.path}: {self.heads} heads of {size} do not make up hidden_size ({self.hidden}); "
                f"llama.cpp's {self.architecture} needs that"
            )
        return size

    def _wants(self, stored: Mapping[str, StoredTensor]) -> Iterator[Want]:
        prefix = "" if "embed_tokens.weight" in stored else "model."  # embedding models are saved without a head
        yield from self._head_wants(prefix)
        for block in range(self.blocks):
            target, source = f"blk.{block}", f"{prefix}layers.{block}"
            yield Want(f"{target}.attn_norm.weight", f"{source}.input_layernorm.weight", (self.hidden,))
            yield Want(f"{target}.ffn_norm.weight", f"{source}.post_attention_layernorm.weight", (self.hidden,))
            yield from self._attention_wants(target, f"{source}.self_attn")
            yield from self._feed_forward_wants(target, f"{source}.mlp", stored)

    def _head_wants(self, prefix: str) -> Iterator[Want]:
        shape = (self.vocabulary, self.hidden)
        headless = not prefix or bool(self._config.fields.get("tie_word_embeddings"))
        yield Want("token_embd.weight", f"{prefix}embed_tokens.weight", shape)
        yield Want("output_norm.weight", f"{prefix}norm.weight", (self.hidden,))
        yield Want("output.weight", "lm_head.weight", shape, optional=headless)

    def _attention_wants(self, target: str, source: str) -> Iterator[Want]:
        queries, keys = self.heads * self.head_size, self.key_heads * self.head_size
        for letter, rows in (("q", queries), ("k", keys), ("v", keys)):
            yield Want(f"{target}.attn_{letter}.weight", f"{source}.{letter}_proj.weight", (rows, self.hidden))
            bias = f"{source}.{letter}_proj.bias"
            yield Want(f"{target}.attn_{letter}.bias", bias, (rows,), optional=not self._biased())
        yield Want(f"{target}.attn_output.weight", f"{source}.o_proj.weight", (self.hidden, queries))
        for letter in "qk" if self.head_norms else "":
            yield Want(f"{target}.attn_{letter}_norm.weight", f"{source}.{letter}_norm.weight", (self.head_size,))

    def _feed_forward_wants(self, target: str, source: str, stored: Mapping[str, StoredTensor]) -> Iterator[Want]:
        del stored  # only experts are stored in more than one way
        yield from gated_wants(target, source, self.hidden, self._config.count("intermediate_size"))

    def _biased(self) -> bool:
        return bool(self._config.fields.get("attention_bias")) if self.head_norms else True


class Qwen3Model(Qwen2Model):
    """A Qwen3: norms for each head's queries and keys instead of biases, and heads of any size."""

    architecture = "qwen3"
    defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {"qwen3": {**_DEFAULTS, "head_dim": 128}}
    head_norms = True

    def __init__(self, source: Source) -> None:
        super().__init__(source)
        self._rows = qwen_rerank.find_rows(source)

    def set_hyper_parameters(self, keys: KeyTable, file_type: int) -> None:
        """Set the architecture's keys and the file type."""
        super().set_hyper_parameters(keys, file_type)
        if self._rows:
            qwen_rerank.set_keys(keys, self.architecture)

    def _head_wants(self, prefix: str) -> Iterator[Want]:
        wants = super()._head_wants(prefix)
        return (
            self._rows.wants(wants, tied=bool(self._config.fields.get("tie_word_embeddings"))) if self._rows else wants
        )


def gated_wants(target: str, source: str, hidden: int, feed_forward: int, suffix: str = "") -> Iterator[Want]:
    """Want a gated feed-forward network: `suffix` ends the names of a shared expert's."""
    for name, shape in (
        ("gate", (feed_forward, hidden)),
        ("up", (feed_forward, hidden)),
        ("down", (hidden, feed_forward)),
    ):
        yield Want(f"{target}.ffn_{name}{suffix}.weight", f"{source}.{name}_proj.weight", shape)


def _is_null(source: Source, name: str) -> bool:
    """Tell whether config.json has this field and says null."""
    return source.config.get(name, ...) is None
