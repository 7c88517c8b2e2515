"""The keys that upstream's converter sets for every text model, in its order, from whatever config.json has."""

from __future__ import annotations

from typing import Any

from app.errors import CheckpointError
from app.models.gguf_types import ValueType
from quantize.families.config import Config
from quantize.header import KeyTable

# the factors of llama3 and proportional are a tensor; dynamic scaling, which llama.cpp does not know, begins beyond the
# trained context
_WITHOUT_KEYS = {"default", "llama3", "proportional", "dynamic"}
_SIZES = (
    ("context_length", ("max_position_embeddings", "n_ctx", "n_positions", "max_length", "max_sequence_length",
                        "model_max_length")),
    ("embedding_length", ("hidden_size", "n_embd", "dim")),
    ("feed_forward_length", ("prefix_dense_intermediate_size", "dense_intermediate_size", "intermediate_size",
                             "n_inner", "hidden_dim")),
    ("attention.head_count", ("num_attention_heads", "n_head", "n_heads")),
    ("attention.head_count_kv", ("num_key_value_heads", "n_kv_heads")),
)  # fmt: skip
_EPSILONS = (
    ("attention.layer_norm_rms_epsilon", ("rms_norm_eps", "norm_eps")),
    ("attention.layer_norm_epsilon", ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon")),
)
_EXPERTS = (
    ("expert_count", ("num_local_experts", "num_experts", "n_routed_experts")),
    ("expert_used_count", ("num_experts_per_tok", "num_experts_per_token", "top_k_experts")),
    ("expert_group_count", ("n_group",)),
    ("expert_group_used_count", ("topk_group",)),
)
_SCORE_FIELDS = ("score_function", "scoring_func", "score_func", "moe_router_activation",
                 "moe_router_activation_func", "expert_selection_fn")  # fmt: skip
_SCORES = {"softmax": 1, "sigmoid": 2, "sqrtsoftplus": 4}
_MOST_BLOCKS, _MOST_EXPERTS = 512, 1024  # LLAMA_MAX_LAYERS, LLAMA_MAX_EXPERTS


def set_common_keys(keys: KeyTable, architecture: str, config: Config, file_type: int, blocks: int) -> None:
    """Set sizes, rotary parameters, epsilons, experts, head sizes and the file type.

    Raises `CheckpointError` that names the field whose value is impossible.
    """
    keys.u32(f"{architecture}.block_count", blocks)
    _set_sizes(keys, architecture, config, _SIZES)
    if config.fields.get("is_causal") is False:
        keys.boolean(f"{architecture}.attention.causal", False)
    _set_rope(keys, architecture, config)
    for key, names in _EPSILONS:
        if name := config.first(*names):
            keys.f32(f"{architecture}.{key}", config.number(name))
    check_limits(config, blocks)
    _set_sizes(keys, architecture, config, _EXPERTS)
    if name := config.first(*_SCORE_FIELDS):
        score = config.fields[name]
        if score not in _SCORES:
            raise CheckpointError(f"{config.path}: {name} is {score!r}; known are {', '.join(_SCORES)}")
        keys.u32(f"{architecture}.expert_gating_func", _SCORES[score])
    if config.first("head_dim"):
        keys.u32(f"{architecture}.attention.key_length", config.count("head_dim"))
        keys.u32(f"{architecture}.attention.value_length", config.count("head_dim"))
    keys.u32("general.file_type", file_type)


def check_limits(config: Config, blocks: int) -> None:
    """Refuse what makes llama.cpp end the process."""
    if blocks > _MOST_BLOCKS:
        raise CheckpointError(f"{config.path}: {blocks} layers; llama.cpp takes at most {_MOST_BLOCKS}")
    found = [(name, config.sizes(name)) for _, names in _EXPERTS if (name := config.first(*names))]
    sizes = {name: max(size) if isinstance(size, list) else size for name, size in found}
    count, used, groups, used_groups = (sizes.get(config.first(*names) or "", 0) for _, names in _EXPERTS)
    grouped = groups > 1
    if (
        count > _MOST_EXPERTS
        or not min(count, 1) <= used <= count
        or groups >= max(count, 1)
        or (grouped and (count % groups or not 0 < used_groups < groups))
    ):
        stated = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise CheckpointError(f"{config.path}: numbers of experts that cannot be: {stated}")


def set_size(keys: KeyTable, key: str, value: int | list[int]) -> None:
    """Set a size, or one for each layer."""
    if isinstance(value, int):
        keys.u32(key, value)
    else:
        keys.array(key, ValueType.INT32, value)


def _set_sizes(
    keys: KeyTable, architecture: str, config: Config, table: tuple[tuple[str, tuple[str, ...]], ...]
) -> None:
    for key, names in table:
        if name := config.first(*names):
            set_size(keys, f"{architecture}.{key}", config.sizes(name))


def _set_rope(keys: KeyTable, architecture: str, config: Config) -> None:
    prefix, rope = f"{architecture}.rope", config.rope
    kind = rope.get("rope_type")
    if kind in {"linear", "yarn"} and rope.get("factor") is not None:
        keys.text(f"{prefix}.scaling.type", str(kind))
        keys.f32(f"{prefix}.scaling.factor", config.rope_number("factor"))
        if kind == "yarn":
            _set_yarn(keys, prefix, config)
    elif kind in {"su", "longrope"}:
        keys.text(f"{prefix}.scaling.type", "longrope")
    elif kind is not None and str(kind).lower() not in _WITHOUT_KEYS:
        raise CheckpointError(f"{config.path}: the rope scaling {kind!r} is not known")
    if sections := config.rope_all.get("mrope_section"):
        keys.array(f"{prefix}.dimension_sections", ValueType.INT32, _sections(config, sections))
    if "rope_theta" in rope:
        keys.f32(f"{prefix}.freq_base", config.rope_number("rope_theta"))
    local: Any = config.rope_all.get("sliding_attention") or {}
    if local.get("rope_theta") is not None:
        keys.f32(f"{prefix}.freq_base_swa", config.finite("rope_theta of sliding_attention", local["rope_theta"]))


def _set_yarn(keys: KeyTable, prefix: str, config: Config) -> None:
    trained = config.rope_number("original_max_position_embeddings")
    keys.u32(f"{prefix}.scaling.original_context_length", int(trained))
    for key, names in (
        ("yarn_ext_factor", ("extrapolation_factor",)),
        ("yarn_attn_factor", ("attention_factor", "attn_factor")),
        ("yarn_beta_fast", ("beta_fast",)),
        ("yarn_beta_slow", ("beta_slow",)),
    ):
        name = next((name for name in names if name in config.rope), None)
        if name is not None and config.rope[name] is not None:
            keys.f32(f"{prefix}.scaling.{key}", config.rope_number(name))


def _sections(config: Config, sections: Any) -> list[int]:
    if not isinstance(sections, list) or not all(type(size) is int and size >= 0 for size in sections):
        raise CheckpointError(f"{config.path}: mrope_section is {sections!r}; a list of sizes was expected")
    return [*sections, 0, 0, 0, 0][:4]
