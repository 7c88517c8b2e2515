"""Granite 3: a Llama with four scales; with experts, whose gate and up lie in one matrix, and a shared one or none."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from app.errors import CheckpointError
from quantize.families.config import Config
from quantize.families.experts import Experts
from quantize.families.llama import LlamaModel
from quantize.families.mapping import Want
from quantize.header import KeyTable
from quantize.source import Source

# what transformers' config classes fill in when config.json is silent
_COMMON: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "embedding_multiplier": 1.0,
    "logits_scaling": 1.0,
    "residual_multiplier": 1.0,
    "attention_multiplier": 1.0,
}
_EXPERTS = {**_COMMON, "num_local_experts": 8, "num_experts_per_tok": 2}
_DEFAULTS = {"granite": _COMMON, "granitemoe": _EXPERTS, "granitemoeshared": _EXPERTS}

_SCALES = {
    "attention_multiplier": "attention.scale",
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
    "logits_scaling": "logit_scale",
}


def open(source: Source) -> GraniteModel:  # noqa: A001 - every family is opened by this name
    """Read config.json. Raises `CheckpointError` that names the field at fault."""
    return (
        GraniteModel(source) if source.config["architectures"][0] == "GraniteForCausalLM" else GraniteMoeModel(source)
    )


class GraniteModel(LlamaModel):
    """A dense Granite."""

    architecture = "granite"
    defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = _DEFAULTS

    def __init__(self, source: Source) -> None:
        super().__init__(source)
        if self.head_size * self.heads != self.hidden:
            raise CheckpointError(
                f"{self._config.path}: the {self.heads} heads of {self.head_size} do not make up hidden_size "
                f"({self.hidden}), as llama.cpp's Granite needs it"
            )
        self._config.fields.pop("head_dim", None)

    def set_hyper_parameters(self, keys: KeyTable, file_type: int) -> None:
        """Set the keys of the architecture, the file type, and the scales."""
        super().set_hyper_parameters(keys, file_type)
        for field, key in _SCALES.items():
            if self._config.fields.get(field):
                keys.f32(f"{self.architecture}.{key}", self._config.number(field))


class GraniteMoeModel(GraniteModel):
    """A Granite with experts, and if it has a `shared_intermediate_size` with a shared one."""

    architecture = "granitemoe"

    def __init__(self, source: Source) -> None:
        super().__init__(source)
        self.experts = self._read_experts()
        self.shared_feed_forward = one_size(self._config, "shared_intermediate_size")

    def set_hyper_parameters(self, keys: KeyTable, file_type: int) -> None:
        """Set the keys of the architecture, the file type, the scales, and the size of the shared expert."""
        super().set_hyper_parameters(keys, file_type)
        if self.shared_feed_forward:
            keys.u32(f"{self.architecture}.expert_shared_feed_forward_length", self.shared_feed_forward)

    def _read_experts(self) -> Experts | None:
        return Experts.read(self._config, "num_local_experts", self.hidden, self.feed_forward)

    def _feed_forward(self, source: str, target: str) -> Iterator[Want]:
        if self.experts is not None:
            routed = f"{source}.block_sparse_moe"
            yield self.experts.router(target, f"{routed}.router.layer.weight")
            yield from self.experts.fused(target, f"{routed}.input_linear.weight", f"{routed}.output_linear.weight")
        if width := self.shared_feed_forward:
            wide, narrow = (width, self.hidden), (self.hidden, width)
            suffix = "" if self.experts is None else "_shexp"
            for half, name in enumerate(("gate", "up")):
                stored = f"{source}.shared_mlp.input_linear.weight"
                inner = f"{target}.ffn_{name}{suffix}.weight"
                yield Want(inner, stored, (2 * width, self.hidden), wide, start=half * width)
            yield Want(f"{target}.ffn_down{suffix}.weight", f"{source}.shared_mlp.output_linear.weight", narrow)


def one_size(config: Config, name: str) -> int:
    """Return a number from 0 on, which is what an absent field means."""
    size = config.sizes(name) if config.first(name) else 0
    if not isinstance(size, int):
        raise CheckpointError(f"{config.path}: {name} is {size!r}; one number was expected")
    return size
