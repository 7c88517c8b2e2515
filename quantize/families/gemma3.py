"""The text model of Gemma 3, and EmbeddingGemma, which is a Gemma 3 that looks both ways."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from app.errors import CheckpointError
from quantize import vocab
from quantize.families.common_keys import set_common_keys
from quantize.families.gemma import GemmaModel
from quantize.families.mapping import Want
from quantize.families.pooling import set_pooling
from quantize.header import KeyTable
from quantize.source import Source
from quantize.tensors import plus_one
from quantize.vocab_sentencepiece import is_sentencepiece

# what transformers' config class fills in when config.json is silent
_DEFAULTS: dict[str, Any] = {
    "vocab_size": 262208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "rope_local_base_freq": 10000.0,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}


def open(source: Source) -> Gemma3Model:  # noqa: A001 - every family is opened by this name
    """Read config.json. Raises `CheckpointError` that names the field at fault."""
    name = source.config["architectures"][0]
    return EmbeddingGemmaModel(source) if name == "Gemma3TextModel" else Gemma3Model(source)


class Gemma3Model(GemmaModel):
    """The text model of a Gemma 3: five layers with a sliding window, then one with full attention."""

    architecture = "gemma3"
    defaults: ClassVar = {"gemma3": _DEFAULTS, "gemma3_text": _DEFAULTS}
    left_out = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")
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
        keys.f32(f"{prefix}.rope.freq_base", config.rope_number("rope_theta", _DEFAULTS["rope_theta"]))
        if config.fields.get("final_logit_softcapping"):
            keys.f32(f"{prefix}.final_logit_softcapping", config.number("final_logit_softcapping"))
        if config.fields.get("sliding_window_pattern") != 1:  # 1: every layer has full attention
            self.set_window(keys)
        self.check_scale()

    def set_vocabulary(self, keys: KeyTable) -> None:
        """Set the tokenizer: SentencePiece, or the byte-level BPE of models that only share the shape."""
        tokenizer = self._source.tokenizer
        has_model = (self._source.folder / "tokenizer.model").is_file()
        if has_model or tokenizer is None or is_sentencepiece(tokenizer):
            super().set_vocabulary(keys)
        else:
            vocab.set_bpe_vocabulary(keys, self._source, self.vocabulary)

    def _outer(self, prefix: str) -> Iterator[Want]:
        yield from super()._outer(prefix)
        head = "language_model.lm_head.weight" if prefix == "language_model.model." else "lm_head.weight"
        tied = self._config.fields.get("tie_word_embeddings") is not False
        yield Want("output.weight", head, (self.vocabulary, self.hidden), optional=tied or not self.has_head)

    def _layer(self, prefix: str, block: int) -> Iterator[Want]:
        yield from super()._layer(prefix, block)
        for name in ("q_norm", "k_norm"):
            source = f"{prefix}layers.{block}.self_attn.{name}.weight"
            yield Want(f"blk.{block}.attn_{name}.weight", source, (self.head_size,), changes=(plus_one,))


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
