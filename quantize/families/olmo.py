"""OLMo 2 and 3: norms behind attention and feed-forward, and one over all queries and all keys of a token."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from app.errors import CheckpointError
from app.models.gguf_types import ValueType
from quantize import vocab
from quantize.families.common_keys import set_common_keys
from quantize.families.llama import LlamaModel
from quantize.families.mapping import Want
from quantize.header import KeyTable
from quantize.source import Source

# what transformers' config classes fill in when config.json is silent
_COMMON: dict[str, Any] = {
    "vocab_size": 50304,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
}
_DEFAULTS: dict[str, dict[str, Any]] = {"olmo2": _COMMON, "olmo3": {**_COMMON, "sliding_window": 4096}}

_FULL, _SLIDING = "full_attention", "sliding_attention"
_STEP = 4  # without layer_types every fourth layer sees the whole text


def open(source: Source) -> OlmoModel:  # noqa: A001 - every family is opened by this name
    """Read config.json. Raises `CheckpointError` that names the field at fault."""
    return OlmoModel(source)


class OlmoModel(LlamaModel):
    """A model of OLMo 2 or 3: Llama's matrices, whose rotary pairs lie as llama.cpp wants them."""

    architecture = "olmo2"
    defaults = _DEFAULTS

    def __init__(self, source: Source) -> None:
        super().__init__(source)
        config = self._config
        if self.head_size * self.heads != self.hidden:
            raise CheckpointError(
                f"{config.path}: the {self.heads} heads of {self.head_size} do not make up hidden_size "
                f"({self.hidden}), as llama.cpp's OLMo needs it"
            )
        if config.rope.get("rope_type") == "llama3":
            raise CheckpointError(f"{config.path}: the rope scaling 'llama3' is not known for OLMo")
        self.window = config.optional_count("sliding_window")
        self._check_kinds()

    def set_hyper_parameters(self, keys: KeyTable, file_type: int) -> None:
        """Set the `olmo2.*` keys and the file type."""
        set_common_keys(keys, self.architecture, self._config, file_type, self.blocks)
        if self.window:
            keys.u32(f"{self.architecture}.attention.sliding_window", self.window)
            kinds = self._config.fields.get("layer_types")
            pattern = (
                [kind == _SLIDING for kind in kinds] if kinds else [n % _STEP != 0 for n in range(1, self.blocks + 1)]
            )
            keys.array(f"{self.architecture}.attention.sliding_window_pattern", ValueType.BOOL, pattern)

    def set_vocabulary(self, keys: KeyTable) -> None:
        """Set the tokenizer from tokenizer.json."""
        vocab.set_bpe_vocabulary(keys, self._source, self.vocabulary)

    def _check_kinds(self) -> None:
        kinds = self._config.fields.get("layer_types")
        if kinds is None:
            return
        if not isinstance(kinds, list) or len(kinds) != self.blocks or not all(k in (_FULL, _SLIDING) for k in kinds):
            raise CheckpointError(
                f"{self._config.path}: layer_types is {kinds!r}; {_FULL!r} or {_SLIDING!r} was expected for each of "
                f"the {self.blocks} layers"
            )
        if _SLIDING in kinds and not self.window:
            raise CheckpointError(f"{self._config.path}: layer_types has sliding windows; sliding_window is missing")

    def _wants(self) -> Iterator[Want]:
        hidden, keys = self.hidden, self.key_heads * self.head_size
        yield Want("token_embd.weight", "model.embed_tokens.weight", (self.vocabulary, hidden))
        yield Want("output_norm.weight", "model.norm.weight", (hidden,))
        yield Want("output.weight", "lm_head.weight", (self.vocabulary, hidden))
        has_biases = bool(self._config.fields.get("attention_bias"))
        names: dict[str, tuple[str, tuple[int, ...]]] = {
            "attn_q": ("self_attn.q_proj", (hidden, hidden)),
            "attn_k": ("self_attn.k_proj", (keys, hidden)),
            "attn_v": ("self_attn.v_proj", (keys, hidden)),
            "attn_output": ("self_attn.o_proj", (hidden, hidden)),
            "attn_q_norm": ("self_attn.q_norm", (hidden,)),
            "attn_k_norm": ("self_attn.k_norm", (keys,)),
            "post_attention_norm": ("post_attention_layernorm", (hidden,)),
            "ffn_gate": ("mlp.gate_proj", (self.feed_forward, hidden)),
            "ffn_up": ("mlp.up_proj", (self.feed_forward, hidden)),
            "ffn_down": ("mlp.down_proj", (hidden, self.feed_forward)),
            "post_ffw_norm": ("post_feedforward_layernorm", (hidden,)),
        }
        for block in range(self.blocks):
            for target, (source, shape) in names.items():
                stem, stored = f"blk.{block}.{target}", f"model.layers.{block}.{source}"
                yield Want(f"{stem}.weight", f"{stored}.weight", shape)
                if has_biases and source.endswith("_proj") and source.startswith("self_attn"):
                    yield Want(f"{stem}.bias", f"{stored}.bias", shape[:1])
