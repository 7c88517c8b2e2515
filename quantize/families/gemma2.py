"""Gemma 2."""

from __future__ import annotations

from typing import Any, ClassVar

from app.errors import CheckpointError
from quantize.families.gemma import GemmaModel
from quantize.header import KeyTable
from quantize.source import Source

# what transformers' config classes fill in when config.json is silent
_DEFAULTS: dict[str, Any] = {
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


def open(source: Source) -> Gemma2Model:  # noqa: A001 - every family is opened by this name
    """Read config.json. Raises `CheckpointError` that names the field at fault."""
    return Gemma2Model(source)


class Gemma2Model(GemmaModel):
    """A Gemma 2: capped logits, every other layer with a sliding window, tied embeddings."""

    architecture = "gemma2"
    defaults: ClassVar = {"gemma2": _DEFAULTS}
    left_out = ("lm_head.weight",)  # a copy of the embeddings, which some tools add
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
        self.set_window(keys)
        self._set_rope(keys)
        self.check_scale()

    def _set_rope(self, keys: KeyTable) -> None:
        base, kind = self._config.rope_number("rope_theta"), self._config.rope.get("rope_type")
        if kind not in {None, "default"}:
            raise CheckpointError(f"{self._config.path}: the rope scaling {kind!r} is not known for Gemma 2")
        if base != _DEFAULTS["rope_theta"]:
            keys.f32("gemma2.rope.freq_base", base)
            self._source.notes.append(
                f"rope_theta is {base:g}: gemma2.rope.freq_base says so, which upstream's converter leaves out"
            )
