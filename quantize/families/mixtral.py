"""Mixtral: a Mistral whose feed-forward networks are experts; to llama.cpp a Llama with experts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from quantize.families.experts import Experts
from quantize.families.llama import LlamaModel
from quantize.families.mapping import Want
from quantize.source import Source

# what transformers' config class fills in when config.json is silent
_DEFAULTS: dict[str, dict[str, Any]] = {
    "mixtral": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000000.0,
        "num_experts_per_tok": 2,
        "num_local_experts": 8,
    }
}
_MATRICES = {"ffn_gate_exps": "w1", "ffn_down_exps": "w2", "ffn_up_exps": "w3"}


def open(source: Source) -> MixtralModel:  # noqa: A001 - every family is opened by this name
    """Read config.json. Raises `CheckpointError` that names the field at fault."""
    return MixtralModel(source)


class MixtralModel(LlamaModel):
    """A Mixtral model."""

    defaults = _DEFAULTS

    def __init__(self, source: Source) -> None:
        super().__init__(source)
        self.experts = Experts.read(self._config, "num_local_experts", self.hidden, self.feed_forward)

    def _feed_forward(self, source: str, target: str) -> Iterator[Want]:
        mixture = f"{source}.block_sparse_moe"
        yield self.experts.router(target, f"{mixture}.gate.weight")
        names = {stack: f"{mixture}.experts.{{}}.{name}.weight" for stack, name in _MATRICES.items()}
        yield from self.experts.separate(target, names)
