"""Small random checkpoints of the Llama family, with vocabularies made on the spot."""

from __future__ import annotations

import functools
import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
SMOLLM_SPLITTER = {
    "type": "Sequence",
    "pretokenizers": [
        {"type": "Digits", "individual_digits": True},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    ],
}
LLAMA3_SPLITTER = {
    "type": "Sequence",
    "pretokenizers": [
        {
            "type": "Split",
            "pattern": {
                "Regex": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                r"|\s*[\r\n]+|\s+(?!\S)|\s+"
            },
            "behavior": "Isolated",
            "invert": False,
        },
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
    ],
}


@dataclass
class Shape:
    """What a checkpoint looks like; its vocabulary is `bpe`, `spm` (tokenizer.model) or `spm-json`."""

    architecture: str = "LlamaForCausalLM"
    model_type: str = "llama"
    layers: int = 4
    hidden: int = 256
    feed_forward: int = 512
    heads: int = 8
    key_heads: int = 2
    head_dim: int | None = None
    tied: bool = False
    biases: bool = False
    dtype: str = "BF16"
    shards: int = 1
    vocabulary: str = "bpe"
    splitter: dict[str, Any] = field(default_factory=lambda: SMOLLM_SPLITTER)
    rope_scaling: dict[str, Any] | None = None
    seed: int = 0


SHAPES: dict[str, Shape] = {
    "llama3": Shape(splitter=LLAMA3_SPLITTER, rope_scaling=LLAMA3_ROPE),
    "smollm": Shape(hidden=192, heads=3, key_heads=1, feed_forward=480, tied=True),  # rows no multiple of 256
    "mistral": Shape(
        architecture="MistralForCausalLM", model_type="mistral", head_dim=64, heads=6, key_heads=2, vocabulary="spm"
    ),
    "llama2": Shape(key_heads=8, vocabulary="spm-json"),
    "biased": Shape(biases=True, shards=3),
    "from f16": Shape(dtype="F16", hidden=192, heads=3, key_heads=3, feed_forward=304),  # 304: no multiple of 32
    "from f32": Shape(dtype="F32", shards=2),
}


def byte_letters() -> list[str]:
    """Return GPT-2's letter for each byte."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = {byte: chr(byte) for byte in shown}
    hidden = [byte for byte in range(256) if byte not in letters]
    letters |= {byte: chr(256 + rank) for rank, byte in enumerate(hidden)}
    return [letters[byte] for byte in range(256)]


def bpe_files(splitter: dict[str, Any], *, pairs: bool = False) -> dict[str, Any]:
    """Return tokenizer.json and tokenizer_config.json of a small byte-level BPE."""
    merges = ["t h", "h e", "th e", "Ġ t", "Ġt he", "i n", "Ġ a", "e r", "1 2", "l l", "Ġ Ġ", "o n", "' s"]
    vocab = {letter: token for token, letter in enumerate(byte_letters())}
    for merge in merges:
        vocab.setdefault(merge.replace(" ", ""), len(vocab))
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    added = [
        {"id": len(vocab) + place, "content": text, "special": True, "normalized": False}
        for place, text in enumerate(special)
    ]
    added.append({"id": len(vocab) + len(special), "content": "<tool>", "special": False, "normalized": False})
    added = [{**entry, "lstrip": False, "rstrip": False, "single_word": False} for entry in added]
    whole_words = splitter is LLAMA3_SPLITTER  # llama.cpp takes it that Llama 3 looks words up before it merges
    model = {
        "type": "BPE",
        "ignore_merges": whole_words,
        "vocab": vocab,
        "merges": [merge.split(" ") for merge in merges] if pairs else merges,
    }
    tokenizer = {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": splitter,
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": model,
    }
    settings = {
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "add_bos_token": False,
        "chat_template": "{% for message in messages %}{{ message['content'] }}{% endfor %}",
    }
    return {"tokenizer.json": tokenizer, "tokenizer_config.json": settings}


@functools.cache
def sentencepiece_model() -> bytes:
    """Train a small SentencePiece BPE with byte fallback."""
    words = ["the quick brown fox jumps over the lazy dog", "thinking in other languages", "hello there world"]
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(words * 20), model_writer=model, vocab_size=320, model_type="bpe", byte_fallback=True,
        hard_vocab_limit=False, minloglevel=2, num_threads=1,
    )  # fmt: skip
    return model.getvalue()


def single_pieces(processor: SentencePieceProcessor) -> list[str]:
    """Return the special tokens, bytes and single letters of a SentencePiece model."""
    pieces = [processor.IdToPiece(token) for token in range(processor.vocab_size())]
    return [text for text in pieces if len(text) == 1 or text.startswith("<")]


def sentencepiece_files(*, as_json: bool) -> dict[str, Any]:
    """Return a SentencePiece vocabulary as tokenizer.model, or as transformers writes it to tokenizer.json.

    tokenizer.json has no scores, without which llama.cpp cannot merge: that one has single letters only.
    """
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "add_bos_token": True,
        "add_eos_token": False,
    }
    if not as_json:
        return {"tokenizer.model": sentencepiece_model(), "tokenizer_config.json": settings}
    pieces = SentencePieceProcessor(model_proto=sentencepiece_model())
    vocab = {text: token for token, text in enumerate(single_pieces(pieces))}
    flags = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": True}
    tokenizer = {
        "added_tokens": [{"id": vocab[text], "content": text, **flags} for text in ("<unk>", "<s>", "</s>")],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "\u2581"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
            ],
        },
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": []},
        "model": {"type": "BPE", "byte_fallback": True, "vocab": vocab, "merges": []},
    }
    return {"tokenizer.json": tokenizer, "tokenizer_config.json": settings}


def vocabulary_size(files: dict[str, Any]) -> int:
    """Return how many tokens the files define."""
    if "tokenizer.json" in files:
        tokenizer = files["tokenizer.json"]
        return len(set(tokenizer["model"]["vocab"]) | {entry["content"] for entry in tokenizer["added_tokens"]})
    return int(SentencePieceProcessor(model_proto=files["tokenizer.model"]).vocab_size())


def encode(values: np.ndarray[Any, Any], dtype: str) -> bytes:
    """Return f32 numbers as the little-endian bytes of a safetensors dtype (bf16: cut off)."""
    if dtype == "BF16":
        return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16).tobytes()
    return values.astype({"F16": np.float16, "F32": np.float32}[dtype]).tobytes()


def write_safetensors(path: Path, tensors: dict[str, tuple[str, tuple[int, ...], bytes]]) -> None:
    """Write one shard."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + len(data)]}
        offset += len(data)
    write_raw_safetensors(path, header, b"".join(data for _, _, data in tensors.values()))


def write_raw_safetensors(path: Path, header: Any, data: bytes) -> None:
    """Write a shard with this header, be it right or wrong."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def config_of(shape: Shape, vocabulary: int) -> dict[str, Any]:
    """Return the config.json of a shape."""
    config: dict[str, Any] = {
        "architectures": [shape.architecture],
        "model_type": shape.model_type,
        "num_hidden_layers": shape.layers,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.feed_forward,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.key_heads,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "vocab_size": vocabulary,
        "tie_word_embeddings": shape.tied,
        "attention_bias": shape.biases,
        "rope_scaling": shape.rope_scaling,
    }
    ids = {} if shape.vocabulary == "bpe" else {"bos_token_id": 1, "eos_token_id": 2}
    return config | ids | ({"head_dim": shape.head_dim} if shape.head_dim else {})


def shapes_of(shape: Shape, vocabulary: int) -> dict[str, tuple[int, ...]]:
    """Return every tensor's shape, by the name that it has in the checkpoint."""
    head = shape.head_dim or shape.hidden // shape.heads
    queries, keys, hidden = head * shape.heads, head * shape.key_heads, shape.hidden
    tensors: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}"
        tensors[f"{prefix}.input_layernorm.weight"] = (hidden,)
        tensors[f"{prefix}.post_attention_layernorm.weight"] = (hidden,)
        for name, rows, columns in (
            ("q", queries, hidden),
            ("k", keys, hidden),
            ("v", keys, hidden),
            ("o", hidden, queries),
        ):
            tensors[f"{prefix}.self_attn.{name}_proj.weight"] = (rows, columns)
            if shape.biases:
                tensors[f"{prefix}.self_attn.{name}_proj.bias"] = (rows,)
        for name, rows, columns in (
            ("gate", shape.feed_forward, hidden),
            ("up", shape.feed_forward, hidden),
            ("down", hidden, shape.feed_forward),
        ):
            tensors[f"{prefix}.mlp.{name}_proj.weight"] = (rows, columns)
    tensors["model.norm.weight"] = (hidden,)
    if not shape.tied:
        tensors["lm_head.weight"] = (vocabulary, hidden)
    return tensors


def make_checkpoint(folder: Path, shape: Shape) -> Path:
    """Write a checkpoint of random weights and return its folder."""
    folder.mkdir(parents=True)
    if shape.vocabulary == "bpe":
        files = bpe_files(shape.splitter, pairs=shape.rope_scaling is not None)
    else:
        files = sentencepiece_files(as_json=shape.vocabulary == "spm-json")
    vocabulary = vocabulary_size(files)
    files["config.json"] = config_of(shape, vocabulary)
    for name, content in files.items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    random = np.random.default_rng(shape.seed)
    tensors = {
        name: (shape.dtype, size, encode(random.standard_normal(size, dtype=np.float32) * 0.05, shape.dtype))
        for name, size in shapes_of(shape, vocabulary).items()
    }
    if shape.shards == 1:
        write_safetensors(folder / "model.safetensors", tensors)
        return folder
    weight_map: dict[str, str] = {}
    for shard in range(shape.shards):
        name = f"model-{shard + 1:05}-of-{shape.shards:05}.safetensors"
        part = dict(list(tensors.items())[shard :: shape.shards])
        write_safetensors(folder / name, part)
        weight_map |= dict.fromkeys(part, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder
