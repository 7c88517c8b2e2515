"""Gemma 2, the text model of Gemma 3, and EmbeddingGemma, which is a Gemma 3 that looks both ways."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from app.errors import CheckpointError
from app.models.gguf_types import ValueType
from quantize import vocab
from quantize.checkpoint import StoredTensor
from quantize.families.common_keys import check_limits, set_common_keys
from quantize.families.config import Config
from quantize.families.mapping import Want, map_tensors
from quantize.families.pooling import set_pooling
from quantize.header import KeyTable
from quantize.source import Source
from quantize.tensors import TensorSpec, plus_one
from quantize.vocab_gemma import set_gemma_vocabulary

# what transformers' config classes fill in when config.json is silent
_GEMMA2: dict[str, Any] = {
    "vocab_size": 256000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "final_logit_softcapping": 30.0,
    "attn_logit_softcapping": 50.0,
}
_GEMMA3: dict[str, Any] = {
    **_GEMMA2,
    "vocab_size": 262208,
    "max_position_embeddings": 131072,
    "rope_theta": 1000000.0,
    "rope_local_base_freq": 10000.0,
    "final_logit_softcapping": None,
    "attn_logit_softcapping": None,
}
_DEFAULTS = {"gemma2": _GEMMA2, "gemma3": _GEMMA3, "gemma3_text": _GEMMA3}

_NORMS = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
# what comes before `layers.0...`: a text model by itself, one within a multimodal one (of old and of new), a bare one
_PREFIXES = ("model.", "language_model.model.", "model.language_model.", "")
_OTHER_MODELS = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")


def open(source: Source) -> Gemma2Model | Gemma3Model:  # noqa: A001 - every family is opened by this name
    """Read config.json. Raises `CheckpointError` that names the field at fault."""
    name = source.config["architectures"][0]
    if name == "Gemma2ForCausalLM":
        return Gemma2Model(source)
    return EmbeddingGemmaModel(source) if name == "Gemma3TextModel" else Gemma3Model(source)


def text_prefix(stored: Mapping[str, StoredTensor]) -> str:
    """Return what the names of the text model's tensors begin with."""
    return next((prefix for prefix in _PREFIXES if f"{prefix}embed_tokens.weight" in stored), _PREFIXES[0])


def sliding_layers(config: Config, blocks: int, period: int) -> list[bool]:
    """Return for each layer whether it looks through a sliding window; by default all but every `period`-th one.

    Raises `CheckpointError` if config.json's layer_types is anything but a list of the two known kinds.
    """
    types = config.fields.get("layer_types")
    if types is None:
        return [(layer + 1) % period != 0 for layer in range(blocks)]
    kinds = {"sliding_attention": True, "full_attention": False}
    if not isinstance(types, list) or len(types) != blocks or not all(kind in kinds for kind in map(str, types)):
        raise CheckpointError(
            f"{config.path}: layer_types is {types!r}; {blocks} times sliding_attention or full_attention was expected"
        )
    return [kinds[kind] for kind in types]


class _GemmaModel:
    """What Gemma 2 and 3 share: norms that are stored as what they add to 1, and four of them in each layer."""

    architecture: str
    period: int
    """llama.cpp takes every `period`-th layer for one of full attention."""
    long_blocks: int
    """The size of the family that has so many layers scales its attention in a way of its own."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._config = config = Config(source, _DEFAULTS)
        self.blocks = config.count("num_hidden_layers")
        check_limits(config, self.blocks)
        self.hidden = config.count("hidden_size")
        self.feed_forward = config.count("intermediate_size")
        self.heads = config.count("num_attention_heads")
        self.key_heads = config.count("num_key_value_heads")
        self.head_size = config.count("head_dim")
        self.vocabulary = config.count("vocab_size")
        if self.heads % self.key_heads:
            raise CheckpointError(
                f"{config.path}: num_attention_heads ({self.heads}) is no multiple of "
                f"num_key_value_heads ({self.key_heads})"
            )

    def set_vocabulary(self, keys: KeyTable) -> None:
        """Set the tokenizer from tokenizer.model, or from tokenizer.json if that is gone."""
        if (self._source.folder / "tokenizer.model").is_file():
            vocab.set_sentencepiece_vocabulary(keys, self._source, self.vocabulary)
            keys.boolean("tokenizer.ggml.add_space_prefix", False)
        else:
            set_gemma_vocabulary(keys, self._source, self.vocabulary)
            self._source.notes.append(
                "no tokenizer.model: the vocabulary is that of tokenizer.json, written as Gemma 4's; upstream's "
                "converter refuses this"
            )

    def tensors(self, stored: Mapping[str, StoredTensor]) -> list[TensorSpec]:
        """Map every tensor of the text model, after checking that all are there and that each has its shape."""
        if self.blocks > len(stored):
            raise CheckpointError(
                f"{self._source.folder}: config.json speaks of {self.blocks} layers; there are {len(stored)} tensors"
            )
        prefix = text_prefix(stored)
        wants = [*self._outer(prefix), *(want for block in range(self.blocks) for want in self._layer(prefix, block))]
        return map_tensors(self._source.folder, stored, wants, ignored=self._is_left_out)

    def _is_left_out(self, name: str) -> bool:
        raise NotImplementedError

    def _outer(self, prefix: str) -> Iterator[Want]:
        yield Want("token_embd.weight", f"{prefix}embed_tokens.weight", (self.vocabulary, self.hidden))
        yield Want("output_norm.weight", f"{prefix}norm.weight", (self.hidden,), change=plus_one)

    def _layer(self, prefix: str, block: int) -> Iterator[Want]:
        source, target = f"{prefix}layers.{block}", f"blk.{block}"
        hidden, queries, keys = self.hidden, self.heads * self.head_size, self.key_heads * self.head_size
        for name, inner in _NORMS.items():
            yield Want(f"{target}.{inner}.weight", f"{source}.{name}.weight", (hidden,), change=plus_one)
        for name, inner, shape in (
            ("self_attn.q_proj", "attn_q", (queries, hidden)),
            ("self_attn.k_proj", "attn_k", (keys, hidden)),
            ("self_attn.v_proj", "attn_v", (keys, hidden)),
            ("self_attn.o_proj", "attn_output", (hidden, queries)),
            ("mlp.gate_proj", "ffn_gate", (self.feed_forward, hidden)),
            ("mlp.up_proj", "ffn_up", (self.feed_forward, hidden)),
            ("mlp.down_proj", "ffn_down", (hidden, self.feed_forward)),
        ):
            yield Want(f"{target}.{inner}.weight", f"{source}.{name}.weight", shape)

    def _set_window(self, keys: KeyTable) -> None:
        key = f"{self.architecture}.attention.sliding_window"
        keys.u32(key, self._config.count("sliding_window"))
        stated = sliding_layers(self._config, self.blocks, self._config.count("sliding_window_pattern", self.period))
        if stated != [(layer + 1) % self.period != 0 for layer in range(self.blocks)]:
            # upstream leaves the key out, and llama.cpp then counts by itself
            keys.array(f"{key}_pattern", ValueType.BOOL, stated)
            self._source.notes.append(
                f"full attention is not in every {self.period}th layer: {key}_pattern says so, which upstream's "
                f"converter leaves out"
            )

    def _check_scale(self) -> None:
        known = self.hidden // self.heads if self.blocks == self.long_blocks else self.head_size
        stated = self._config.number("query_pre_attn_scalar")
        if stated != known:
            self._source.notes.append(
                f"config.json's query_pre_attn_scalar is {stated:g}; llama.cpp has no key for it and takes {known}"
            )


class Gemma2Model(_GemmaModel):
    """A Gemma 2: capped logits, every other layer with a sliding window, tied embeddings."""

    architecture = "gemma2"
    period = 2
    long_blocks = 46

    def __init__(self, source: Source) -> None:
        super().__init__(source)
        for name in ("attn_logit_softcapping", "final_logit_softcapping"):
            if source.config.get(name, 0) is None:
                raise CheckpointError(f"{self._config.path}: {name} is null; llama.cpp's Gemma 2 always caps")

    def set_hyper_parameters(self, keys: KeyTable, file_type: int) -> None:
        """Set the `gemma2.*` keys and the file type."""
        prefix, config = self.architecture, self._config
        keys.u32(f"{prefix}.context_length", config.count("max_position_embeddings"))
        keys.u32(f"{prefix}.embedding_length", self.hidden)
        keys.u32(f"{prefix}.block_count", self.blocks)
        keys.u32(f"{prefix}.feed_forward_length", self.feed_forward)
        keys.u32(f"{prefix}.attention.head_count", self.heads)
        keys.u32(f"{prefix}.attention.head_count_kv", self.key_heads)
        keys.f32(f"{prefix}.attention.layer_norm_rms_epsilon", config.number("rms_norm_eps"))
        keys.u32(f"{prefix}.attention.key_length", self.head_size)
        keys.u32(f"{prefix}.attention.value_length", self.head_size)
        keys.u32("general.file_type", file_type)
        keys.f32(f"{prefix}.attn_logit_softcapping", config.number("attn_logit_softcapping"))
        keys.f32(f"{prefix}.final_logit_softcapping", config.number("final_logit_softcapping"))
        self._set_window(keys)
        self._set_rope(keys)
        self._check_scale()

    def _set_rope(self, keys: KeyTable) -> None:
        base, kind = self._config.rope_number("rope_theta"), self._config.rope.get("rope_type")
        if kind not in {None, "default"}:
            raise CheckpointError(f"{self._config.path}: the rope scaling {kind!r} is not known for Gemma 2")
        if base != _GEMMA2["rope_theta"]:
            keys.f32("gemma2.rope.freq_base", base)
            self._source.notes.append(
                f"rope_theta is {base:g}: gemma2.rope.freq_base says so, which upstream's converter leaves out"
            )

    def _is_left_out(self, name: str) -> bool:
        return name == "lm_head.weight"  # a copy of the embeddings, which some tools add


class Gemma3Model(_GemmaModel):
    """The text model of a Gemma 3: five layers with a sliding window, then one with full attention."""

    architecture = "gemma3"
    period = 6
    long_blocks = 62
    has_head = True

    def __init__(self, source: Source) -> None:
        super().__init__(source)
        if self._config.fields.get("attn_logit_softcapping") is not None:
            raise CheckpointError(f"{self._config.path}: attn_logit_softcapping is set; llama.cpp's Gemma 3 has none")
        self._check_direction()

    def _check_direction(self) -> None:
        if self._config.fields.get("use_bidirectional_attention"):
            raise CheckpointError(
                f"{self._config.path}: use_bidirectional_attention is set; llama.cpp's Gemma 3 looks back only"
            )

    def set_hyper_parameters(self, keys: KeyTable, file_type: int) -> None:
        """Set the architecture's keys and the file type."""
        config, prefix = self._config, self.architecture
        set_common_keys(keys, prefix, config, file_type, self.blocks)
        keys.f32(f"{prefix}.rope.freq_base", config.rope_number("rope_theta", _GEMMA3["rope_theta"]))
        if config.fields.get("final_logit_softcapping"):
            keys.f32(f"{prefix}.final_logit_softcapping", config.number("final_logit_softcapping"))
        if config.fields.get("sliding_window_pattern") != 1:  # 1: every layer has full attention
            self._set_window(keys)
        self._check_scale()

    def set_vocabulary(self, keys: KeyTable) -> None:
        """Set the tokenizer: SentencePiece, or the byte-level BPE of models that only share the shape."""
        tokenizer = self._source.tokenizer
        has_model = (self._source.folder / "tokenizer.model").is_file()
        if has_model or tokenizer is None or vocab.is_sentencepiece(tokenizer):
            super().set_vocabulary(keys)
        else:
            vocab.set_bpe_vocabulary(keys, self._source, self.vocabulary)

    def _is_left_out(self, name: str) -> bool:
        return name.startswith(_OTHER_MODELS)

    def _outer(self, prefix: str) -> Iterator[Want]:
        yield from super()._outer(prefix)
        head = "language_model.lm_head.weight" if prefix == "language_model.model." else "lm_head.weight"
        tied = self._config.fields.get("tie_word_embeddings") is not False
        yield Want("output.weight", head, (self.vocabulary, self.hidden), optional=tied or not self.has_head)

    def _layer(self, prefix: str, block: int) -> Iterator[Want]:
        yield from super()._layer(prefix, block)
        for name in ("q_norm", "k_norm"):
            source = f"{prefix}layers.{block}.self_attn.{name}.weight"
            yield Want(f"blk.{block}.attn_{name}.weight", source, (self.head_size,), change=plus_one)


class EmbeddingGemmaModel(Gemma3Model):
    """EmbeddingGemma. What sentence-transformers does after the pooling is not part of the file."""

    architecture = "gemma-embedding"
    long_blocks = 0
    has_head = False

    def _check_direction(self) -> None:
        if not self._config.fields.get("use_bidirectional_attention"):
            self._source.notes.append(
                "config.json does not ask for bidirectional attention; llama.cpp's EmbeddingGemma always has it"
            )
        if self._source.config.get("sliding_window") is None:
            raise CheckpointError(f"{self._config.path}: sliding_window is missing")

    def set_hyper_parameters(self, keys: KeyTable, file_type: int) -> None:
        """Set the `gemma-embedding.*` keys and the file type."""
        super().set_hyper_parameters(keys, file_type)
        set_pooling(keys, self.architecture, self._config, self._source)
