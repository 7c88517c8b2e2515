"""Write a checkpoint of random weights with the shape of a real model family, for tests, comparisons and benchmarks.

    python scripts/random_checkpoint.py --shape tiny-llama3 --out DIR [--shards N] [--dtype bf16|f16|f32] [--seed N]
        [--vocab FILE.gguf | --vocab-from CHECKPOINT] [--truncate-vocab N]

The weights are normally distributed with the scale of trained ones, and are the same for the same seed. The vocabulary
is a real one: that of a GGUF (`--vocab`; byte-level BPE or SentencePiece), or that of the embedded default's checkpoint
(`--vocab-from`). numpy only; memory is bounded by the largest tensor.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from checkpoint_vocabulary import SPECIAL_ROLES, Vocabulary, write_tokenizer
from checkpoint_writer import TORCH_DTYPES, Tensor, whole_folder, write_json, write_shards

from app.models.gguf import read_header


@dataclass(frozen=True)
class Shape:
    """A Llama-like model: sizes, and what config.json says besides them."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    tied: bool
    architecture: str = "LlamaForCausalLM"
    config: tuple[tuple[str, Any], ...] = ()
    front_matter: str = ""
    instruct: bool = False  # laid out as newer instruct models are: see _as_instruct


LLAMA3_ROPE = {
    "factor": 32.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
LLAMA3_CONFIG = (("max_position_embeddings", 131072), ("rope_scaling", LLAMA3_ROPE), ("rope_theta", 500000.0))
FRONT_MATTER = """license: llama3.2
language:
- en
- de
tags:
- pestle
- random
pipeline_tag: text-generation
"""

INSTRUCT_FRONT_MATTER = """base_model:
- meta-llama/Llama-3.2-1B
datasets:
- pestle/nothing-at-all
language: en
library_name: transformers
license: other
license_name: random
license_link: LICENSE
tags: [llama-3, instruct]
"""
INSTRUCT_EOS = ("<|end_of_text|>", "<|eot_id|>")
INSTRUCT_TEMPLATE = (
    "{{- bos_token }}{% for message in messages %}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}"
    "{{- message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)

SHAPES = {
    # Grouped queries, rope scaling, untied. 688 is no multiple of 256, so that K-quants fall back in ffn_down.
    "tiny-llama3": Shape(256, 688, 8, 8, 2, 32, tied=False, config=LLAMA3_CONFIG, front_matter=FRONT_MATTER),
    "tiny-llama3-instruct": Shape(
        256, 512, 8, 4, 2, 64, tied=True, config=LLAMA3_CONFIG, front_matter=INSTRUCT_FRONT_MATTER, instruct=True
    ),
    # head_dim * heads != hidden, as Mistral Nemo has it; 320 is no multiple of 256.
    "tiny-mistral": Shape(
        320, 1024, 6, 8, 2, 64, tied=False, architecture="MistralForCausalLM",
        config=(("max_position_embeddings", 32768), ("rope_theta", 1000000.0), ("sliding_window", 4096)),
    ),
    # Llama 2: every head has its own key, no rope_theta in the config.
    "tiny-llama-spm": Shape(256, 768, 4, 4, 4, 64, tied=False, config=(("max_position_embeddings", 4096),)),
    # The widths of Llama 3.2 1B; with 49,152 tokens 1.17 billion parameters, with 128,256 tokens 1.5.
    "llama-1b": Shape(2048, 8192, 16, 32, 8, 64, tied=False, config=LLAMA3_CONFIG),
}  # fmt: skip


def main() -> int:
    """Run from the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--shape", choices=sorted(SHAPES), required=True)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--shards", type=int, default=1, metavar="N")
    parser.add_argument("--dtype", choices=["bf16", "f16", "f32"], default="bf16")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    vocabulary = parser.add_mutually_exclusive_group(required=True)
    vocabulary.add_argument("--vocab", type=Path, metavar="FILE.gguf", help="take the vocabulary of a GGUF")
    vocabulary.add_argument("--vocab-from", type=Path, metavar="CHECKPOINT", help="take that of a checkpoint folder")
    parser.add_argument("--truncate-vocab", type=int, metavar="N", help="keep the first N ordinary tokens (BPE only)")
    arguments = parser.parse_args()
    if arguments.shards < 1:
        parser.error("--shards must be at least 1")
    if arguments.out.exists():
        parser.error(f"--out {arguments.out} exists already")
    source = vocabulary_of_gguf(arguments.vocab) if arguments.vocab else vocabulary_of_checkpoint(arguments.vocab_from)
    if arguments.truncate_vocab:
        if source.model == "llama":
            parser.error("--truncate-vocab needs a byte-level BPE vocabulary")
        source = source.truncated(arguments.truncate_vocab)
    started = time.monotonic()
    write_checkpoint(arguments.out, SHAPES[arguments.shape], source, arguments.dtype, arguments.shards, arguments.seed)
    print(f"{arguments.out}: {arguments.shape} written in {time.monotonic() - started:.1f} s")
    return 0


def write_checkpoint(out: Path, shape: Shape, vocabulary: Vocabulary, dtype: str, shards: int, seed: int) -> None:
    """Write the whole folder; `dtype` is bf16, f16 or f32."""
    config = model_config(shape, vocabulary, dtype)
    with whole_folder(out) as folder:
        write_json(folder / "config.json", config)
        roles = [role for role in ("bos_token", "eos_token", "pad_token") if role in vocabulary.special]
        write_json(folder / "generation_config.json", {f"{role}_id": vocabulary.special[role] for role in roles})
        write_tokenizer(folder, vocabulary, context_length=int(config["max_position_embeddings"]))
        if shape.front_matter:
            text = f"---\n{shape.front_matter}---\n\nRandom weights in the shape of a real model.\n"
            (folder / "README.md").write_text(text, encoding="utf-8")
        if shape.instruct:
            _as_instruct(folder, vocabulary)
        tensors = model_tensors(shape, len(vocabulary.tokens), seed)
        for _ in write_shards(folder, tensors, dtype.upper(), shards):
            pass


def _as_instruct(folder: Path, vocabulary: Vocabulary) -> None:
    """Lay the folder out as newer instruct models are.

    The chat template has a file of its own, generations end at any of several tokens, config.json leaves head_dim to be
    computed, and the tokenizer's EOS is that of a turn.
    """
    ends = [vocabulary.tokens.index(token) for token in INSTRUCT_EOS]
    for name in ("config.json", "generation_config.json"):
        values = json.loads((folder / name).read_text(encoding="utf-8"))
        values.pop("head_dim", None)
        write_json(folder / name, values | {"eos_token_id": ends})
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    write_json(folder / "tokenizer_config.json", config | {"eos_token": INSTRUCT_EOS[-1]})
    special = json.loads((folder / "special_tokens_map.json").read_text(encoding="utf-8"))
    special["eos_token"]["content"] = INSTRUCT_EOS[-1]
    write_json(folder / "special_tokens_map.json", special)
    (folder / "chat_template.jinja").write_text(INSTRUCT_TEMPLATE, encoding="utf-8")


def model_config(shape: Shape, vocabulary: Vocabulary, dtype: str) -> dict[str, Any]:
    """Return config.json as transformers writes it for such a model."""
    config: dict[str, Any] = {
        "architectures": [shape.architecture],
        "model_type": "mistral" if shape.architecture.startswith("Mistral") else "llama",
        "attention_bias": False,
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "rms_norm_eps": 1e-05,
        "tie_word_embeddings": shape.tied,
        "torch_dtype": TORCH_DTYPES[dtype.upper()],
        "vocab_size": len(vocabulary.tokens),
        **{f"{role}_id": token for role, token in vocabulary.special.items() if role in {"bos_token", "eos_token"}},
        **dict(shape.config),
    }
    return dict(sorted(config.items()))


def model_tensors(shape: Shape, vocabulary_size: int, seed: int) -> list[Tensor]:
    """Return all tensors, sorted by name, each with its own random stream so that order and sharding change nothing."""
    q_rows, kv_rows = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocabulary_size, shape.hidden),
        "model.norm.weight": (shape.hidden,),
    }
    if not shape.tied:
        shapes["lm_head.weight"] = (vocabulary_size, shape.hidden)
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}"
        shapes |= {
            f"{prefix}.input_layernorm.weight": (shape.hidden,),
            f"{prefix}.post_attention_layernorm.weight": (shape.hidden,),
            f"{prefix}.self_attn.q_proj.weight": (q_rows, shape.hidden),
            f"{prefix}.self_attn.k_proj.weight": (kv_rows, shape.hidden),
            f"{prefix}.self_attn.v_proj.weight": (kv_rows, shape.hidden),
            f"{prefix}.self_attn.o_proj.weight": (shape.hidden, q_rows),
            f"{prefix}.mlp.gate_proj.weight": (shape.intermediate, shape.hidden),
            f"{prefix}.mlp.up_proj.weight": (shape.intermediate, shape.hidden),
            f"{prefix}.mlp.down_proj.weight": (shape.hidden, shape.intermediate),
        }
    return [Tensor(name, shapes[name], random_values(name, shapes[name], seed)) for name in sorted(shapes)]


def random_values(name: str, shape: tuple[int, ...], seed: int) -> Any:
    """Return a function that makes a tensor's numbers, the same for the same name, shape and seed."""

    def values() -> np.ndarray[Any, Any]:
        random = np.random.default_rng([seed, *name.encode()])
        if len(shape) == 1:  # a norm's weight
            return random.normal(1.0, 0.1, shape).astype(np.float32)
        numbers = random.standard_normal(shape, dtype=np.float32)
        numbers *= np.float32(0.02 if "embed" in name else shape[-1] ** -0.5)
        return numbers

    return values


def vocabulary_of_gguf(path: Path) -> Vocabulary:
    """Take the vocabulary of a GGUF of the gpt2 (llama-bpe or smollm) or llama kind."""
    return Vocabulary.from_gguf(read_header(path).metadata)


def vocabulary_of_checkpoint(folder: Path) -> Vocabulary:
    """Take the vocabulary of a checkpoint that `rebuild_default_checkpoint.py` wrote."""
    model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    ids: dict[str, int] = model["model"]["vocab"]
    added = {token["id"]: token for token in model["added_tokens"]}
    tokens = sorted(ids, key=ids.__getitem__)
    special = {role: ids[config[role]] for role in SPECIAL_ROLES if role in config}
    control, normal = 3, 1
    return Vocabulary(
        model="gpt2",
        pre="smollm",
        tokens=tokens,
        types=[control if i in added else normal for i in range(len(tokens))],
        merges=model["model"]["merges"],
        scores=[],
        special=special,
        add_bos=False,
        chat_template=config.get("chat_template"),
    )


if __name__ == "__main__":
    sys.exit(main())
