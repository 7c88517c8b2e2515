"""The proof of the tokenizer: what is right passes, and each kind of mistake stops the run."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from app.errors import TokenizerError
from app.models.gguf import read_header
from quantize import pretokenizers
from quantize.checkpoint import Checkpoint
from quantize.header import KeyTable, Value
from quantize.pipeline import prepare, quantize
from quantize.pretokenizers import pre_tokenizer_name
from quantize.proof import Proof, start_proof
from quantize.proof_template import render_samples
from quantize.proof_texts import COUNT, texts
from quantize.source import Source, open_source
from quantize.special_tokens import find_special_tokens
from quantize.vocab import set_bpe_vocabulary
from tests.quantize.checkpoints import LLAMA3_SPLITTER, SMOLLM_SPLITTER, Shape, make_checkpoint

CL100K = LLAMA3_SPLITTER["pretokenizers"][0]["pattern"]["Regex"]
LETTER_CASES = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+SUFFIX"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*SUFFIX"
    r"|DIGITS| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN = LETTER_CASES.replace("SUFFIX", "").replace("DIGITS", r"\p{N}")
O200K = LETTER_CASES.replace("SUFFIX", "(?i:'s|'t|'re|'ve|'m|'ll|'d)?").replace("DIGITS", r"\p{N}{1,3}")
QWEN2 = CL100K.replace("{1,3}", "")
QWEN35 = QWEN2.replace(r"?\p{L}+", r"?[\p{L}\p{M}]+").replace(r"[^\s\p{L}\p{N}]", r"[^\s\p{L}\p{M}\p{N}]")
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
WORDS = BYTES | {"use_regex": True}
NFC = {"type": "NFC"}


def by_regex(regex: str, *, inverted: bool = False) -> dict[str, Any]:
    """Return a pre-tokenizer in one of the two spellings that checkpoints have."""
    behavior = "Removed" if inverted else "Isolated"
    split = {"type": "Split", "pattern": {"Regex": regex}, "behavior": behavior, "invert": inverted}
    return {"type": "Sequence", "pretokenizers": [split, BYTES]}


SPLITTERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "gpt-2": (None, WORDS),
    "olmo": (NFC, WORDS),
    "smollm": (None, SMOLLM_SPLITTER),
    "command-r": (NFC, SMOLLM_SPLITTER),
    "dbrx": (None, by_regex(CL100K, inverted=True)),
    "stablelm2": (None, by_regex(QWEN2, inverted=True)),
    "qwen2": (NFC, by_regex(QWEN2)),
    "qwen35": (NFC, by_regex(QWEN35)),
    "tekken": (None, by_regex(TEKKEN)),
    "gpt-4o": (None, by_regex(O200K)),
}
MARKED = {
    "refact": ("smollm", ["<fim_prefix>"]),
    "starcoder": ("smollm", ["<fim_prefix>", "<repo_name>"]),
    "lfm2": ("dbrx", ["<|startoftext|>", "<|im_end|>"]),
    "smaug-bpe": ("dbrx", ["<|begin_of_text|>"]),
    "modern-bert": ("olmo", ["[MASK]"]),
    "llama4": ("gpt-4o", ["<|begin_of_text|>"]),
    "deepseek-r1-qwen": ("qwen2", ["<\uff5cbegin\u2581of\u2581sentence\uff5c>"]),
}


def make(folder: Path, **changes: Any) -> Source:
    """Make a checkpoint whose tokenizer.json has these changes; those of the model go into it."""
    source = make_checkpoint(folder / "Model", Shape(layers=1, hidden=64, heads=2, key_heads=1, feed_forward=96))
    path = source / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return open_source(source)


def keys_of(source: Source) -> KeyTable:
    """Return keys with which llama.cpp loads the vocabulary."""
    keys = KeyTable()
    for key, value in prepare_keys(source).items():
        keys.values[key] = value
    return keys


def prepare_keys(source: Source) -> dict[str, Value]:
    """Return what a header must have besides the vocabulary, then the vocabulary."""
    keys = KeyTable()
    keys.text("general.architecture", "llama")
    for name, number in (("block_count", 1), ("context_length", 64), ("embedding_length", 64)):
        keys.u32(f"llama.{name}", number)
    keys.u32("llama.feed_forward_length", 96)
    keys.u32("llama.attention.head_count", 2)
    keys.f32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    set_bpe_vocabulary(keys, source, source.config["vocab_size"])
    assert find_special_tokens(source).ids
    return keys.values


def proven(keys: KeyTable, source: Source) -> tuple[str, ...]:
    proof = start_proof(keys, source)
    assert proof is not None
    return proof.wait()


@pytest.mark.parametrize("name", SPLITTERS)
def test_every_splitter_of_the_table(name: str, tmp_path: Path) -> None:
    normalizer, splitter = SPLITTERS[name]
    source = make(tmp_path, normalizer=normalizer, pre_tokenizer=splitter)
    if name == "tekken":  # llama.cpp takes it that this one looks words up before it merges
        path = source.folder / "tokenizer.json"
        content = json.loads(path.read_text())
        path.write_text(json.dumps(content | {"model": content["model"] | {"ignore_merges": True}}))
        source = open_source(source.folder)
    keys = keys_of(source)
    assert keys.values["tokenizer.ggml.pre"].content == name
    notes = proven(keys, source)
    assert [note for note in notes if "normal form" in note] == (list(notes) if normalizer else [])
    assert any("capitals" in note for note in notes) == (name == "tekken")


@pytest.mark.parametrize("name", MARKED)
def test_names_of_one_splitter_are_told_apart_by_the_vocabulary(name: str) -> None:
    like, tokens = MARKED[name]
    normalizer, splitter = SPLITTERS[like]
    added = [{"content": token} for token in tokens]
    tokenizer = {"normalizer": normalizer, "pre_tokenizer": splitter, "added_tokens": added, "model": {}}
    assert pre_tokenizer_name(tokenizer) == name
    assert pre_tokenizer_name(tokenizer | {"added_tokens": []}) == like
    assert {*SPLITTERS, *MARKED, "llama-bpe"} == set(pretokenizers._NAMES.split(", "))


def test_a_wrong_splitter_is_shown(tmp_path: Path) -> None:
    source = make(tmp_path)
    keys = keys_of(source)
    keys.text("tokenizer.ggml.pre", "llama-bpe")
    began = time.monotonic()
    with pytest.raises(TokenizerError, match="would read text in another way") as caught:
        proven(keys, source)
    assert time.monotonic() - began < 20
    message = caught.value.message
    assert caught.value.exit_code == 3
    assert "splitter llama-bpe" in message
    shown = [line.split(":", 1)[1] for line in message.splitlines() if line.startswith("  ") and ":" in line]
    assert len(json.loads(shown[0])) > 0
    assert shown[1] != shown[2]


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("tokenizer.ggml.merges", lambda merges: merges[1:]),
        ("tokenizer.ggml.merges", lambda merges: merges[::-1]),
        ("tokenizer.ggml.tokens", lambda tokens: [tokens[1], tokens[0], *tokens[2:]]),
        ("tokenizer.ggml.token_type", lambda types: [1 if kind == 4 else kind for kind in types]),
        ("tokenizer.ggml.token_type", lambda types: [3 if kind == 4 else kind for kind in types]),
        ("tokenizer.ggml.token_type", lambda types: [4 if kind == 3 else kind for kind in types]),
    ],
    ids=["lost merge", "order of merges", "swapped tokens", "forgotten token", "hidden token", "open control tokens"],
)
def test_wrong_lists_are_caught(key: str, change: Callable[[Any], Any], tmp_path: Path) -> None:
    source = make(tmp_path)
    keys = keys_of(source)
    value = keys.values[key]
    keys.values[key] = Value(value.type, change(value.content), value.item_type)
    with pytest.raises(TokenizerError, match=r"another way|control token"):
        proven(keys, source)


def test_what_ends_llama_cpp_is_an_error(tmp_path: Path) -> None:
    source = make(tmp_path)
    keys = keys_of(source)
    tokens = keys.values["tokenizer.ggml.tokens"]
    keys.values["tokenizer.ggml.tokens"] = Value(tokens.type, [*tokens.content[:-1], "a"], tokens.item_type)
    with pytest.raises(TokenizerError, match=r"ended with signal 6 \(SIGABRT\)"):
        proven(keys, source)


def test_what_hangs_is_an_error(tmp_path: Path) -> None:
    source = make(tmp_path, truncation=None)  # another file than those that are proven already
    path = source.folder / "tokenizer.json"
    path.write_text(path.read_text() + " ")
    proof = Proof(keys_of(source), source, [], seconds=0.01)
    with pytest.raises(TokenizerError, match="hangs, or the machine is far too busy"):
        proof.wait()


def test_every_end_of_an_answer_is_heeded(tmp_path: Path) -> None:
    source = make(tmp_path)
    ends = [source.tokenizer["added_tokens"][place]["id"] for place in (2, 3, 1)] if source.tokenizer else []
    (source.folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    keys = keys_of(source)
    proven(keys, source)
    assert keys.values["tokenizer.ggml.eom_token_id"].content == ends[1]
    assert keys.values["tokenizer.ggml.eot_token_id"].content == ends[2]
    assert "an answer ends with" in source.notes[0]
    (source.folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [*ends, 5]}))
    with pytest.raises(TokenizerError, match=r"generation_config\.json .* ends with .* 5 '"):
        start_proof(keys_of(source), source)


def test_upstreams_bytes_where_llama_cpp_knows_the_ends(tmp_path: Path) -> None:
    source = make(tmp_path)
    ends = [entry["id"] for entry in (source.tokenizer or {})["added_tokens"] if entry["content"] != "<tool>"]
    (source.folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [ends[0], ends[2]]}))
    keys = keys_of(source)
    before = dict(keys.values)
    proven(keys, source)
    assert keys.values == before


def test_a_mismatch_leaves_no_file(tmp_path: Path, quantize_command: Callable[..., Any]) -> None:
    source = make(tmp_path)
    path = source.folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["ignore_merges"] = True  # which the splitter of SmolLM does not do
    content["model"]["vocab"]["zebra"] = len(content["model"]["vocab"]) + len(content["added_tokens"])
    path.write_text(json.dumps(content))
    config = source.config | {"vocab_size": source.config["vocab_size"] + 1, "tie_word_embeddings": True}
    content["model"]["merges"] = []
    (source.folder / "config.json").write_text(json.dumps(config))
    out = tmp_path / "out.gguf"
    finished: subprocess.CompletedProcess[str]
    finished = quantize_command(source.folder, "--type", "q8_0", "--no-measure", "--out", out)
    assert finished.returncode == 3
    assert not out.exists()


def test_no_weight_is_read_before_the_proof(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make(tmp_path, normalizer=None)
    path = source.folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["merges"].append("z e")  # makes no token
    path.write_text(json.dumps(content))
    read: list[str] = []
    monkeypatch.setattr(Checkpoint, "read_into", lambda _self, tensor, *_: read.append(tensor.name))
    with pytest.raises(TokenizerError, match="tokenizers library cannot read it"):
        quantize(source.folder, "q8_0", tmp_path / "out.gguf")
    assert read == []
    assert list(tmp_path.glob("*out.gguf*")) == []


def test_dry_run_waits_for_the_proof(tmp_path: Path, quantize_command: Callable[..., Any]) -> None:
    source = make(tmp_path, normalizer=None)
    path = source.folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["merges"].append("z e")  # makes no token
    path.write_text(json.dumps(content))
    finished = quantize_command(source.folder, "--type", "q8_0", "--dry-run")
    assert finished.returncode == 3
    assert "tokenizers library cannot read it" in finished.stderr


def test_prepared_twice_is_proven_once(tmp_path: Path) -> None:
    source = make(tmp_path)
    assert prepare(source.folder, "q8_0").prove() == ()
    began = time.monotonic()
    quantize(source.folder, "q8_0", tmp_path / "out.gguf")
    assert time.monotonic() - began < 5
    assert read_header(tmp_path / "out.gguf").metadata["tokenizer.ggml.pre"] == "smollm"


def test_texts_are_many_and_always_the_same() -> None:
    some = texts()
    assert len(set(some)) == len(some) == COUNT == 10_000
    assert some[:500] == texts(500)
    everything = "".join(some)
    for wanted in ("\r\n", "\u00a0", "\u200d", "\ufffd", "'ll", "\u0308", "\u6771", "\U0001f3fd"):
        assert wanted in everything, ascii(wanted)
    assert not any(0xD800 <= ord(letter) <= 0xDFFF for letter in everything)


def test_templates() -> None:
    template = "{{ bos_token }}{% for m in messages %}{{ m.role }}:{{ m.content | tojson }}{% endfor %}"
    rendered, problem = render_samples(template, {"bos_token": "<s>"})
    assert problem is None
    assert rendered[0].startswith('<s>system:"You are terse.')
    assert render_samples("{{ raise_exception('no') }}", {}) == ([], "refuses every sample: no")
    assert "does not compile" in str(render_samples("{% if %}", {})[1])
    unsafe, problem = render_samples("{{ ''.__class__.__mro__[1].__subclasses__() }}", {})
    assert unsafe == []
    assert problem is not None
