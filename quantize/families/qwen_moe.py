"""Qwen2 MoE (Qwen1.5-MoE, Qwen2-57B-A14B) and Qwen3 MoE: Qwen2 and Qwen3 whose feed-forward networks are experts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from app.errors import CheckpointError
from quantize import vocab
from quantize.checkpoint import StoredTensor
from quantize.families.common_keys import set_common_keys
from quantize.families.config import Config
from quantize.families.experts import Experts
from quantize.families.mapping import Want
from quantize.families.qwen import Qwen2Model, gated_wants
from quantize.header import KeyTable
from quantize.source import Source

# what transformers' config classes fill in when config.json is silent
_DEFAULTS: dict[str, dict[str, Any]] = {
    "qwen2_moe": {
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
        "num_experts_per_tok": 4,
        "num_experts": 60,
        "qkv_bias": True,
    },
    "qwen3_moe": {
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "moe_intermediate_size": 768,
        "num_experts_per_tok": 8,
        "num_experts": 128,
    },
}


def open(source: Source) -> Qwen2MoeModel:  # noqa: A001 - every family is opened by this name
    """Read config.json. Raises `CheckpointError` that names the field at fault."""
    return (Qwen2MoeModel if source.config["architectures"][0].startswith("Qwen2") else Qwen3MoeModel)(source)


class Qwen2MoeModel(Qwen2Model):
    """A Qwen2 MoE: routed experts, and one that all tokens share."""

    architecture = "qwen2moe"
    defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = _DEFAULTS

    def __init__(self, source: Source) -> None:
        super().__init__(source)
        config = self._config
        check_no_dense_layers(config, self.blocks)
        self.experts = Experts.read(config, "num_experts", self.hidden, config.count("moe_intermediate_size"))
        if config.fields.get("tie_word_embeddings") and self.architecture == "qwen2moe":
            raise CheckpointError(f"{config.path}: tie_word_embeddings is true; llama.cpp's qwen2moe needs a head")

    def set_hyper_parameters(self, keys: KeyTable, file_type: int) -> None:
        """Set the architecture's keys and the file type."""
        set_common_keys(keys, self.architecture, self._config, file_type, self.blocks)
        set_expert_widths(keys, self.architecture, self._config)

    def set_vocabulary(self, keys: KeyTable) -> None:
        """Set the tokenizer, a byte-level BPE."""
        vocab.set_bpe_vocabulary(keys, self._source, self.vocabulary)

    def _feed_forward_wants(self, target: str, source: str, stored: Mapping[str, StoredTensor]) -> Iterator[Want]:
        yield from expert_wants(self.experts, target, source, stored)
        if not self.head_norms:
            yield from shared_expert_wants(self._config, target, source, self.hidden)

    def _biased(self) -> bool:
        return bool(self._config.fields.get("attention_bias" if self.head_norms else "qkv_bias"))


class Qwen3MoeModel(Qwen2MoeModel):
    """A Qwen3 MoE: as Qwen3 is to Qwen2, and without a shared expert."""

    architecture = "qwen3moe"
    head_norms = True


def set_expert_widths(keys: KeyTable, architecture: str, config: Config) -> None:
    """Set how wide a routed expert is, and the shared one if config.json has it."""
    for key, name in (
        ("expert_feed_forward_length", "moe_intermediate_size"),
        ("expert_shared_feed_forward_length", "shared_expert_intermediate_size"),
    ):
        if (width := config.optional_count(name)) is not None:
            keys.u32(f"{architecture}.{key}", width)


def expert_wants(experts: Experts, target: str, source: str, stored: Mapping[str, StoredTensor]) -> Iterator[Want]:
    """Want a layer's router and its experts, stored as one matrix each or as stacks."""
    yield experts.router(target, f"{source}.gate.weight")
    for ending in ("", ".weight"):
        if f"{source}.experts.gate_up_proj{ending}" in stored:
            gate_up, down = (f"{source}.experts.{name}{ending}" for name in ("gate_up_proj", "down_proj"))
            yield from experts.fused(target, gate_up, down)
            return
    names = {f"ffn_{name}_exps": f"{source}.experts.{{}}.{name}_proj.weight" for name in ("down", "gate", "up")}
    yield from experts.separate(target, names)


def shared_expert_wants(config: Config, target: str, source: str, hidden: int) -> Iterator[Want]:
    """Want the expert that all tokens share, and its gate."""
    yield Want(f"{target}.ffn_gate_inp_shexp.weight", f"{source}.shared_expert_gate.weight", (1, hidden))
    width = config.count("shared_expert_intermediate_size")
    yield from gated_wants(target, f"{source}.shared_expert", hidden, width, "_shexp")


def check_no_dense_layers(config: Config, blocks: int) -> None:
    """Refuse mixtures with ordinary layers in between, which llama.cpp's Qwen models don't have."""
    dense = config.fields.get("mlp_only_layers") or []
    step = config.fields.get("decoder_sparse_step", 1)
    if (isinstance(step, int) and step != 1 and blocks > 0) or dense:
        raise CheckpointError(
            f"{config.path}: mlp_only_layers {dense!r} and decoder_sparse_step {step!r} mean layers without experts; "
            f"llama.cpp runs no such Qwen"
        )
