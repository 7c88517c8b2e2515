"""The 12 models whose types llama.cpp keeps as snapshots: what of their published configurations decides over types.

A snapshot names the tensors and their types, and a few sizes in a comment; rows' lengths and the other keys that
llama.cpp reads before it chooses are not in it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

STACKED = ("attn_k_b", "attn_v_b", "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")  # a matrix for each head or expert


@dataclass(frozen=True)
class SnapshotModel:
    """An architecture, the keys that it needs beside the common ones, and the rows that are not `n_embd` long.

    `rows` are by the name of the tensor within its block. Of `keys`, lists hold a number for each block, or, as a pair,
    the numbers of blocks that have a tensor of that name and of those that have not.
    """

    architecture: str
    rows: dict[str, int] = field(default_factory=dict)
    keys: dict[str, Any] = field(default_factory=dict)


def _delta_net(inner: int, time_steps: int, **more: Any) -> dict[str, Any]:
    return {
        "ssm.conv_kernel": 4, "ssm.inner_size": inner, "ssm.state_size": 128, "ssm.time_step_rank": time_steps,
        "ssm.group_count": 16, **more,
    }  # fmt: skip


MODELS: dict[str, SnapshotModel] = {
    "deepseek-v3.1": SnapshotModel(
        "deepseek2",
        {"attn_output": 16384, "attn_q_b": 1536, "attn_k_b": 128, "attn_v_b": 512, "ffn_down": 18432,
         "ffn_down_exps": 2048, "ffn_down_shexp": 2048},
        {"attention.q_lora_rank": 1536, "attention.kv_lora_rank": 512, "attention.key_length_mla": 192,
         "attention.value_length_mla": 128, "attention.key_length": 576, "attention.value_length": 512,
         "expert_feed_forward_length": 2048, "expert_shared_count": 1, "leading_dense_block_count": 3,
         "expert_used_count": 8},
    ),
    "gemma-3-4b-it": SnapshotModel(
        "gemma3", {"attn_output": 2048, "ffn_down": 10240},
        {"attention.sliding_window": 1024, "attention.key_length": 256, "attention.value_length": 256},
    ),
    "glm-4.6v": SnapshotModel(
        "glm4moe", {"attn_output": 12288, "ffn_down": 10944, "ffn_down_exps": 1408, "ffn_down_shexp": 1408},
        {"expert_feed_forward_length": 1408, "expert_shared_count": 1, "leading_dense_block_count": 1,
         "expert_used_count": 8, "attention.key_length": 128, "attention.value_length": 128},
    ),
    "gpt-oss-120b": SnapshotModel(
        "gpt-oss", {"attn_output": 4096, "ffn_down_exps": 2880},
        {"expert_feed_forward_length": 2880, "attention.sliding_window": 128, "expert_used_count": 4,
         "attention.key_length": 64, "attention.value_length": 64},
    ),
    "meta-llama-3.1-70b-instruct": SnapshotModel("llama", {"attn_output": 8192, "ffn_down": 28672}),
    "nvidia-nemotron-3-nano-30b-a3b": SnapshotModel(
        "nemotron_h_moe",
        {"attn_output": 4096, "ffn_down_exps": 1856, "ffn_down_shexp": 3712, "ssm_out": 4096},
        {"attention.head_count_kv": ("attn_k", 2, 0), "feed_forward_length": ("ffn_down_exps", 1856, 0),
         "ssm.conv_kernel": 4, "ssm.inner_size": 4096, "ssm.state_size": 128, "ssm.time_step_rank": 64,
         "ssm.group_count": 8, "attention.layer_norm_epsilon": 1e-5, "expert_feed_forward_length": 1856,
         "expert_shared_feed_forward_length": 3712, "expert_shared_count": 1, "expert_used_count": 6},
    ),
    "qwen3-0.6b": SnapshotModel("qwen3", {"attn_output": 2048, "ffn_down": 3072}),
    "qwen3-14b": SnapshotModel("qwen3", {"attn_output": 5120, "ffn_down": 17408}),
    "qwen3-coder-next": SnapshotModel(
        "qwen3next", {"attn_output": 4096, "ffn_down_exps": 512, "ffn_down_shexp": 512, "ssm_out": 4096},
        _delta_net(4096, 32, expert_used_count=10),
    ),
    "qwen3.5-397b-a17b": SnapshotModel(
        "qwen35moe", {"attn_output": 8192, "ffn_down_exps": 1024, "ffn_down_shexp": 1024, "ssm_out": 8192},
        _delta_net(8192, 64, expert_used_count=10) | {"rope.dimension_sections": [11, 11, 10, 0]},
    ),
    "qwen3.6-27b": SnapshotModel(
        "qwen35", {"attn_output": 6144, "ffn_down": 17408, "ssm_out": 6144},
        _delta_net(6144, 48) | {"rope.dimension_sections": [11, 11, 10, 0]},
    ),
    "step-3.5-flash": SnapshotModel(
        "step35", {"attn_output": 8192, "ffn_down": 11264, "ffn_down_exps": 1280, "ffn_down_shexp": 1280},
        {"attention.sliding_window": 512, "attention.sliding_window_pattern": [False, True, True, True],
         "expert_feed_forward_length": 1280, "expert_used_count": 8, "attention.key_length": 128,
         "attention.value_length": 128},
    ),
}  # fmt: skip
