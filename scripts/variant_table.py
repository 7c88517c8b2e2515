"""The variants that oracle_variants.py compares. A new one is a line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final


class _Gone:
    """Stands for a file or key that is taken away."""


GONE: Final = _Gone()


@dataclass(frozen=True)
class Variant:
    """Changes to a base: file → its text, keys to merge into its JSON, or GONE; `expected` is in the difference."""

    files: dict[str, Any]
    base: str = "bpe"
    expected: str = ""
    reason: str = ""


def _card(front_matter: str, **more: Any) -> Variant:
    return Variant({"README.md": f"---\n{front_matter}---\nbody\n"}, **more)


def _config(base: str = "bpe", expected: str = "", reason: str = "", **keys: Any) -> Variant:
    return Variant({"config.json": keys}, base, expected, reason)


def _tokenizer(base: str = "bpe", expected: str = "", reason: str = "", **keys: Any) -> Variant:
    return Variant({"tokenizer_config.json": keys}, base, expected, reason)


_FAILS: dict[str, Any] = {"expected": "upstream failed", "reason": "upstream ends in an exception"}
_STOPPED: dict[str, Any] = {
    "expected": "llama.cpp would read text in another way",
    "reason": "an added token takes a piece's place, or is spelled with a space: llama.cpp reads text otherwise, which "
    "Pestle's proof finds and upstream does not",
}
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192, "factor": 8.0}

FOLDERS = [
    "Meta-Llama-3.1-8B-Instruct", "Mistral-7B-v0.3", "TinyLlama-1.1B-Chat-v1.0", "model", "a", "phi-2-GGUF",
    "0123456789abcdef0123456789abcdef01234567", "Mixtral-8x7B-Instruct-v0.1", "SmolLM2-1.7B-Instruct-16k",
    "org_name_Model-X-70b-chat-hf", "llama-2-7b-chat-lora", "Qwen2.5-0.5B-Instruct-v1", "Hermes-3-Llama-3.2-3B",
    "deepseek_r1-distill-llama-8b-2024.01", "Foo-135M-bar-v2.1-beta-K4", "name with spaces 1B v1",
]  # fmt: skip

CARDS = {
    "card-text-only": Variant({"README.md": "# Just text\n"}),
    "card-empty": Variant({"README.md": ""}),
    "card-unclosed": Variant({"README.md": "---\nlicense: mit\ntags:\n- a\n"}),
    "card-crlf": Variant({"README.md": "---\r\nlicense: mit\r\ntags:\r\n- a\r\n---\r\nbody\r\n"}),
    "card-leading-line": Variant({"README.md": "\n---\nlicense: mit\n---\n"}),
    "card-fields": _card(
        "name: My Fine Model\nauthor: Someone\nversion: v2.0\norganization: acme\nfinetune: chatty\nbasename: fine\n"
        "description: 'a: b # c'\nquantized_by: me\nsize_label: 3B\nlicense: mit\nlicense_name: mine\n"
        "license_link: https://x.y/z\nurl: https://a.b\ndoi: 10.1/x\nrepo_url: https://huggingface.co/q/w\n"
    ),
    "card-creator": _card("model_name: Cool Model 7B\nmodel_creator: The Creators\nbase_model: q/Z-7B\n"),
    "card-indented": _card(
        "license:   mit   \nlanguage:\n    - en\n    - de\nbase_model:\n    - meta-llama/Llama-3.2-1B-Instruct\n"
        "    - other/Thing\nbase_model_relation: finetune\ntags: []\ndatasets: null\n"
    ),
    "card-twice": _card("license: mit\nlicense: apache-2.0\nlanguages: [en]\nlanguage: de\npipeline_tag: [x, y]\n"),
    "card-base-objects": _card("base_model:\n- name: Foo 7B\n  organization: Bar\n  version: v1\n- org/Plain-1B\n"),
    "card-base-url": _card("base_model: https://huggingface.co/mistralai/Mistral-7B-v0.1/\nlicense: other\n"),
    "card-flow": _card("license: mit\nmore: {a: 1, b: [x, y]}\ntags: [\n  a,\n  b,\n]\n"),
    "card-unicode": _card('tags:\n- größe\n- 日本\ndescription: "esc \\u00e9 \\n x"\nauthor: O\'Neil\n'),
    "card-mixed-tags": _card("tags:\n- a\n- 3\n- true\nlanguage:\n- en\n- no\n", **_FAILS),
    "card-number": _card("version: 1.10\ntags: [2024-01-01, yes]\n", **_FAILS),
}

CONFIGS = {
    "rope-parameters": _config(
        rope_scaling=GONE, rope_theta=GONE, rope_parameters={"rope_type": "llama3", "rope_theta": 500000.0, **_LLAMA3}
    ),
    "rope-llama3": _config(rope_scaling={"rope_type": "llama3", **_LLAMA3}, rope_theta=10000),
    "rope-linear": _config(rope_scaling={"type": "linear", "factor": 2.0}),
    "rope-yarn": _config(rope_scaling={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}),
    "rope-default": _config(rope_scaling={"rope_type": "default"}),
    "rope-none": _config(rope_scaling=None),
    "rope-dynamic": _config(rope_scaling={"type": "dynamic", "factor": 2.0}),
    "head-dim-computed": _config(head_dim=GONE),
    "head-dim-null": _config(head_dim=None),
    "no-epsilon": _config(rms_norm_eps=GONE),
    "no-context-length": _config(max_position_embeddings=GONE),
    "no-eos-id": _config(eos_token_id=None, bos_token_id=None),
    "name-or-path": _config(_name_or_path="meta-llama/Llama-3.2-1B-Instruct", torch_dtype=GONE, dtype="bfloat16"),
    "tied-with-head": _config(tie_word_embeddings=True),
    "mistral": _config("spm", architectures=["MistralForCausalLM"], model_type="mistral", sliding_window=4096),
    "mistral-no-head-dim": _config(
        "spm", architectures=["MistralForCausalLM"], model_type="mistral", sliding_window=None, head_dim=GONE
    ),
    "no-kv-heads": _config("spm", num_key_value_heads=GONE),
}  # fmt: skip

TOKENIZERS = {
    "eos-null": _tokenizer(eos_token=None),
    "eos-object": _tokenizer(bos_token={"content": "<|endoftext|>"}, **_FAILS),
    "add-bos-and-eos": _tokenizer(add_bos_token=True, add_eos_token=True),
    "add-prefix-space": _tokenizer(add_prefix_space=True),
    "fast-class": _tokenizer(tokenizer_class="PreTrainedTokenizerFast", add_prefix_space=GONE),
    "templates-listed": _tokenizer(
        chat_template=[{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}]
    ),
    "template-json": Variant(
        {"tokenizer_config.json": {"chat_template": GONE}, "chat_template.json": {"chat_template": "{{ 'json' }}"}}
    ),
    "template-file": Variant({"chat_template.jinja": "{{ 'jinja' }}\n"}),
    "template-folder": Variant({"additional_chat_templates/tool_use.jinja": "{{ 'more' }}"}),
    "no-tokenizer-config": Variant({"tokenizer_config.json": GONE}),
    "no-special-tokens-map": Variant({"special_tokens_map.json": GONE}),
    "no-generation-config": Variant({"generation_config.json": GONE}),
    "no-added-tokens-decoder": _tokenizer(added_tokens_decoder=GONE),
    "added-tokens-overruled": _tokenizer(
        added_tokens_decoder={
            str(i): {"content": text, "special": False, "normalized": i == 6, "lstrip": False, "rstrip": False}
            for i, text in {5: "<file_sep>", 6: "<filename>", 1: "<|im_start|>"}.items()
        }
    ),
    "spm-added-tokens": Variant({"added_tokens.json": {"<|x|>": 31990, "<custom>": 31991}}, "spm", **_STOPPED),
    "spm-legacy": _tokenizer("spm", added_tokens_decoder=GONE, add_bos_token=False, add_prefix_space=True),
    "spm-no-config": Variant({"tokenizer_config.json": GONE}, "spm"),
    "spm-pad": _tokenizer("spm", pad_token="<unk>", unk_token={"content": "<unk>"}, add_eos_token=True),
    "spm-decoder": _tokenizer(
        "spm",
        added_tokens_decoder={
            "31998": {"content": "▁user▁def", "special": False},
            "31999": {"content": "<|sp|>", "special": False},
            "40000": {"content": "<far>", "special": True},
        },
        **_STOPPED,
    ),
}

VARIANTS: dict[str, Variant] = {**{name: Variant({}) for name in FOLDERS}, **CARDS, **CONFIGS, **TOKENIZERS}
