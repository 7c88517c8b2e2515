"""The text model of Gemma 4: per-layer embeddings, layers that share keys and values, or mixtures of experts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from app.errors import CheckpointError
from app.models.gguf_types import ValueType
from quantize.checkpoint import StoredTensor
from quantize.families.common_keys import set_common_keys, set_size
from quantize.families.config import Config
from quantize.families.gemma import sliding_layers, text_prefix
from quantize.families.mapping import Want, map_tensors
from quantize.header import KeyTable
from quantize.source import Source
from quantize.tensors import TensorSpec
from quantize.vocab_gemma import set_gemma4_vocabulary

_NORMS = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_EXPERT_NORMS = {
    "pre_feedforward_layernorm_2": "pre_ffw_norm_2",
    "post_feedforward_layernorm_1": "post_ffw_norm_1",
    "post_feedforward_layernorm_2": "post_ffw_norm_2",
}
_OTHER_MODELS = ("vision_tower.", "audio_tower.", "embed_vision.", "embed_audio.", "vision_embedder.")
_NO_ROTATION = 1e30  # a frequency divided by this much is none


def open(source: Source) -> Gemma4Model:  # noqa: A001 - every family is opened by this name
    """Read config.json. Raises `CheckpointError` that names the field at fault."""
    return Gemma4Model(source)


class Gemma4Model:
    """The text model of a Gemma 4.

    Layers of full attention have a head size, and may have a number of key heads, of their own. The last `shared`
    layers take keys and values from earlier ones.
    """

    architecture = "gemma4"

    def __init__(self, source: Source) -> None:
        self._source = source
        self._config = config = Config(source, {})
        self.blocks = config.count("num_hidden_layers")
        self.hidden = config.count("hidden_size")
        self.vocabulary = config.count("vocab_size")
        self.heads = config.count("num_attention_heads")
        self.feed_forward = config.count("intermediate_size")
        self.per_layer = self._size("hidden_size_per_layer_input")
        self.shared = self._size("num_kv_shared_layers")
        self.experts = self._size("num_experts") if config.fields.get("enable_moe_block") is not False else 0
        self.expert_width = self._size(config.first("expert_intermediate_size", "moe_intermediate_size") or "")
        if "layer_types" not in config.fields:
            raise CheckpointError(f"{config.path}: layer_types is missing")
        self.sliding = sliding_layers(config, self.blocks, 1)
        self._read_heads()
        self._check()

    def _read_heads(self) -> None:
        config, full = self._config, self._of_full_layers()
        key_heads, head = config.count("num_key_value_heads"), config.count("head_dim")
        full_head = config.optional_count("global_head_dim") or full.get("head_dim")
        if full_head is None:
            raise CheckpointError(f"{config.path}: global_head_dim is missing")
        self.full_key_heads = config.optional_count("num_global_key_value_heads") or full.get("num_key_value_heads")
        self.head_sizes = [head if sliding else full_head for sliding in self.sliding]
        self.key_heads = [key_heads if sliding else self.full_key_heads or key_heads for sliding in self.sliding]
        self.head_size, self.full_head_size = head, full_head

    def _of_full_layers(self) -> dict[str, int]:
        """Return what `per_layer_config` says of layers of full attention: a newer way to state it."""
        config, found = self._config, dict[str, int]()
        layers = config.fields.get("per_layer_config") or {}
        if not isinstance(layers, dict) or not all(isinstance(layer, dict) for layer in layers.values()):
            raise CheckpointError(f"{config.path}: per_layer_config is no object of objects")
        for number, layer in layers.items():
            if number.isdecimal() and int(number) < self.blocks and not self.sliding[int(number)]:
                for name in ("head_dim", "num_key_value_heads"):
                    if name in layer and name not in found:
                        if type(layer[name]) is not int or layer[name] < 1:
                            raise CheckpointError(f"{config.path}: {name} of layer {number} is {layer[name]!r}")
                        found[name] = layer[name]
        return found

    def _size(self, name: str) -> int:
        return self._config.optional_count(name) or 0 if self._config.fields.get(name) else 0

    def _check(self) -> None:
        config, fields = self._config, self._config.fields
        for heads in {*self.key_heads}:
            if self.heads % heads:
                raise CheckpointError(
                    f"{config.path}: num_attention_heads ({self.heads}) is no multiple of {heads} key heads"
                )
        if all(self.sliding):
            raise CheckpointError(f"{config.path}: no layer has full attention; llama.cpp's Gemma 4 needs one")
        if self.shared >= self.blocks:
            raise CheckpointError(f"{config.path}: num_kv_shared_layers is {self.shared} of {self.blocks} layers")
        if fields.get("attn_logit_softcapping") is not None:
            raise CheckpointError(f"{config.path}: attn_logit_softcapping is set; llama.cpp's Gemma 4 has none")
        if fields.get("use_bidirectional_attention") not in {None, False, "vision"}:
            raise CheckpointError(f"{config.path}: use_bidirectional_attention; llama.cpp's Gemma 4 looks back only")
        if self.experts and not self.expert_width:
            raise CheckpointError(f"{config.path}: moe_intermediate_size is missing")
        if "full_attention" not in config.rope_all or config.rope.get("rope_type") != "proportional":
            raise CheckpointError(
                f"{config.path}: rope_parameters must say for full_attention that rope_type is proportional"
            )

    @property
    def widths(self) -> int | list[int]:
        """The width of the feed-forward layers; those that share keys and values may be twice as wide."""
        if not self._config.fields.get("use_double_wide_mlp"):
            return self.feed_forward
        own = self.blocks - self.shared
        return [self.feed_forward * (1 if block < own else 2) for block in range(self.blocks)]

    def set_hyper_parameters(self, keys: KeyTable, file_type: int) -> None:
        """Set the `gemma4.*` keys and the file type."""
        config, prefix = self._config, self.architecture
        attention = f"{prefix}.attention"
        set_common_keys(keys, prefix, config, file_type, self.blocks)
        keys.f32(f"{prefix}.rope.freq_base", config.rope_number("rope_theta", 1000000.0))
        if config.fields.get("final_logit_softcapping"):
            keys.f32(f"{prefix}.final_logit_softcapping", config.number("final_logit_softcapping"))
        keys.u32(f"{attention}.sliding_window", config.count("sliding_window"))
        keys.u32(f"{attention}.shared_kv_layers", self.shared)
        keys.u32(f"{prefix}.embedding_length_per_layer_input", self.per_layer)
        keys.array(f"{attention}.sliding_window_pattern", ValueType.BOOL, self.sliding)
        for name in ("key_length", "value_length"):
            keys.u32(f"{attention}.{name}", self.full_head_size)
        for name in ("key_length_swa", "value_length_swa"):
            keys.u32(f"{attention}.{name}", self.head_size)
        if self.expert_width:
            keys.u32(f"{prefix}.expert_feed_forward_length", self.expert_width)
        set_size(keys, f"{prefix}.feed_forward_length", self.widths)
        if self.full_key_heads:
            set_size(keys, f"{attention}.head_count_kv", self.key_heads)
        keys.u32(f"{prefix}.rope.dimension_count", self.full_head_size)
        keys.u32(f"{prefix}.rope.dimension_count_swa", self.head_size)
        if self._source.config["architectures"][0] == "Gemma4UnifiedForConditionalGeneration":
            self._set_suppressed_tokens(keys)

    def _set_suppressed_tokens(self, keys: KeyTable) -> None:
        tokens = (self._source.read_object("generation_config.json") or {}).get("suppress_tokens") or []
        if not isinstance(tokens, list) or not all(type(token) is int for token in tokens):
            raise CheckpointError(
                f"{self._source.folder / 'generation_config.json'}: suppress_tokens is no list of numbers of tokens"
            )
        keys.array("tokenizer.ggml.suppress_tokens", ValueType.INT32, tokens)

    def set_vocabulary(self, keys: KeyTable) -> None:
        """Set the tokenizer from tokenizer.json."""
        set_gemma4_vocabulary(keys, self._source, self.vocabulary)

    def tensors(self, stored: Mapping[str, StoredTensor]) -> list[TensorSpec]:
        """Map every tensor of the text model, after checking that all are there and that each has its shape."""
        if self.blocks > len(stored):
            raise CheckpointError(
                f"{self._source.folder}: config.json speaks of {self.blocks} layers; there are {len(stored)} tensors"
            )
        prefix = text_prefix(stored)
        wants = [*self._outer(prefix), *(want for block in range(self.blocks) for want in self._layer(prefix, block))]
        others = tuple(f"{outer}{name}" for outer in ("", "model.") for name in _OTHER_MODELS)
        mapped = map_tensors(self._source.folder, stored, wants, ignored=lambda name: name.startswith(others))
        return [self._rope_factors(), *mapped]

    def _rope_factors(self) -> TensorSpec:
        # Gemma 4 turns the first pairs only, each pair half a head apart. llama.cpp would look for them side by side if
        # it were told to turn less than the head: it turns all, and the factors stop the rest.
        pairs = self.full_head_size // 2
        rotated = int(self.full_head_size * self._config.rope_number("partial_rotary_factor") / 2)
        if not 0 <= rotated <= pairs:
            raise CheckpointError(f"{self._config.path}: partial_rotary_factor must be from 0 to 1")
        factors = np.array([1.0] * rotated + [_NO_ROTATION] * (pairs - rotated), np.float32)
        return TensorSpec("rope_freqs.weight", (pairs,), data=factors.tobytes(), keep_f32=True)

    def _outer(self, prefix: str) -> Iterator[Want]:
        hidden, per_layer = self.hidden, self.per_layer
        yield Want("token_embd.weight", f"{prefix}embed_tokens.weight", (self.vocabulary, hidden))
        yield Want("output_norm.weight", f"{prefix}norm.weight", (hidden,))
        head = "language_model.lm_head.weight" if prefix == "language_model.model." else "lm_head.weight"
        tied = self._config.fields.get("tie_word_embeddings") is not False
        yield Want("output.weight", head, (self.vocabulary, hidden), optional=tied)
        if per_layer:
            all_layers = per_layer * self.blocks
            rows = self._config.count("vocab_size_per_layer_input", self.vocabulary)
            yield Want("per_layer_token_embd.weight", f"{prefix}embed_tokens_per_layer.weight", (rows, all_layers))
            projection = f"{prefix}per_layer_model_projection.weight"
            yield Want("per_layer_model_proj.weight", projection, (all_layers, hidden))
            yield Want("per_layer_proj_norm.weight", f"{prefix}per_layer_projection_norm.weight", (per_layer,))

    def _layer(self, prefix: str, block: int) -> Iterator[Want]:
        source, target, hidden = f"{prefix}layers.{block}", f"blk.{block}", self.hidden
        for name, inner in _NORMS.items():
            yield Want(f"{target}.{inner}.weight", f"{source}.{name}.weight", (hidden,))
        yield Want(f"{target}.layer_output_scale.weight", f"{source}.layer_scalar", (1,))
        yield from self._attention(source, target, block)
        width = self.widths if isinstance(self.widths, int) else self.widths[block]
        for name, shape in (("gate", (width, hidden)), ("up", (width, hidden)), ("down", (hidden, width))):
            yield Want(f"{target}.ffn_{name}.weight", f"{source}.mlp.{name}_proj.weight", shape)
        if self.experts:
            yield from self._mixture(source, target)
        if self.per_layer:
            gate, projection = (self.per_layer, hidden), (hidden, self.per_layer)
            yield Want(f"{target}.inp_gate.weight", f"{source}.per_layer_input_gate.weight", gate)
            yield Want(f"{target}.proj.weight", f"{source}.per_layer_projection.weight", projection)
            yield Want(f"{target}.post_norm.weight", f"{source}.post_per_layer_input_norm.weight", (hidden,))

    def _attention(self, source: str, target: str, block: int) -> Iterator[Want]:
        head, hidden = self.head_sizes[block], self.hidden
        queries, keys = self.heads * head, self.key_heads[block] * head
        shares = block >= self.blocks - self.shared
        keys_are_values = bool(self._config.fields.get("attention_k_eq_v")) and not self.sliding[block]
        wanted: tuple[tuple[str, str, tuple[int, ...], bool], ...] = (
            ("q_proj", "attn_q", (queries, hidden), False),
            ("k_proj", "attn_k", (keys, hidden), shares),
            ("v_proj", "attn_v", (keys, hidden), shares or keys_are_values),
            ("o_proj", "attn_output", (hidden, queries), False),
            ("q_norm", "attn_q_norm", (head,), False),
            ("k_norm", "attn_k_norm", (head,), shares),
        )
        for name, inner, shape, optional in wanted:
            yield Want(f"{target}.{inner}.weight", f"{source}.self_attn.{name}.weight", shape, optional=optional)

    def _mixture(self, source: str, target: str) -> Iterator[Want]:
        count, width, hidden = self.experts, self.expert_width, self.hidden
        for name, inner in _EXPERT_NORMS.items():
            yield Want(f"{target}.{inner}.weight", f"{source}.{name}.weight", (hidden,))
        yield Want(f"{target}.ffn_gate_inp.weight", f"{source}.router.proj.weight", (count, hidden))
        yield Want(f"{target}.ffn_gate_inp.scale", f"{source}.router.scale", (hidden,))
        yield Want(f"{target}.ffn_down_exps.scale", f"{source}.router.per_expert_scale", (count,))
        yield Want(f"{target}.ffn_gate_up_exps.weight", f"{source}.experts.gate_up_proj", (count, 2 * width, hidden))
        yield Want(f"{target}.ffn_down_exps.weight", f"{source}.experts.down_proj", (count, hidden, width))
