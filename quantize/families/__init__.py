"""The model families. A new one is one file, and one line for each architecture name in the table below."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, Protocol

from app.errors import ArchitectureError, CheckpointError
from quantize.checkpoint import StoredTensor
from quantize.header import KeyTable
from quantize.source import Source
from quantize.tensors import TensorSpec

# `architectures` in config.json → the module of this package that converts it
ARCHITECTURES: dict[str, str] = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "MixtralForCausalLM": "mixtral",
    "Mistral3ForConditionalGeneration": "mistral3",
    "Ministral3ForCausalLM": "mistral3",
    "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3",
    "Gemma3ForConditionalGeneration": "gemma3",
    "Gemma3TextModel": "gemma3",
    "Gemma4ForCausalLM": "gemma4",
    "Gemma4ForConditionalGeneration": "gemma4",
    "Gemma4UnifiedForConditionalGeneration": "gemma4",
    "Lfm2ForCausalLM": "lfm2",
    "Lfm2MoeForCausalLM": "lfm2",
    "Lfm2VlForConditionalGeneration": "lfm2",
    "GptOssForCausalLM": "gpt_oss",
    "FalconH1ForCausalLM": "falcon_h1",
    "SmolLM3ForCausalLM": "smollm3",
    "Olmo2ForCausalLM": "olmo",
    "Olmo3ForCausalLM": "olmo",
    "Phi3ForCausalLM": "phi3",
    "GraniteForCausalLM": "granite",
    "GraniteMoeForCausalLM": "granite",
    "GraniteMoeSharedForCausalLM": "granite",
    "GraniteMoeHybridForCausalLM": "granite_hybrid",
    "Qwen2ForCausalLM": "qwen",
    "Qwen2Model": "qwen",
    "Qwen3ForCausalLM": "qwen",
    "Qwen3Model": "qwen",
    "Qwen2MoeForCausalLM": "qwen_moe",
    "Qwen3MoeForCausalLM": "qwen_moe",
    "Qwen3_5ForCausalLM": "qwen35",
    "Qwen3_5ForConditionalGeneration": "qwen35",
    "Qwen3_5MoeForCausalLM": "qwen35",
    "Qwen3_5MoeForConditionalGeneration": "qwen35",
    "BertModel": "bert",
    "BertForMaskedLM": "bert",
    "BertForSequenceClassification": "bert",
    "NomicBertModel": "nomic_bert",
    "ModernBertModel": "modern_bert",
    "ModernBertForMaskedLM": "modern_bert",
    "ModernBertForSequenceClassification": "modern_bert",
    "XLMRobertaModel": "xlm_roberta",
    "XLMRobertaForSequenceClassification": "xlm_roberta",
}


class Family(Protocol):
    """One model, understood: made by a family's `open(source)`."""

    architecture: str
    """llama.cpp's name of the architecture, the prefix of its keys."""

    def set_hyper_parameters(self, keys: KeyTable, file_type: int) -> None:
        """Set the architecture's keys, in upstream's order, `general.file_type` among them."""

    def set_vocabulary(self, keys: KeyTable) -> None:
        """Set the tokenizer's keys and the chat template."""

    def tensors(self, stored: Mapping[str, StoredTensor]) -> list[TensorSpec]:
        """Map the checkpoint's tensors, in upstream's order.

        Raises `CheckpointError` that names a tensor that is missing, unexpected or of the wrong shape.
        """


def open_model(source: Source) -> Family:
    """Return the family's view of a source. Raises `ArchitectureError` with the list of known architectures."""
    names: Any = source.config.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise CheckpointError(f"{source.folder / 'config.json'}: no `architectures`; it names the kind of model")
    module = ARCHITECTURES.get(names[0])
    if module is None:
        known = ", ".join(ARCHITECTURES)
        raise ArchitectureError(f"{source.folder}: the architecture {names[0]} is not known; known ones: {known}")
    family: Family = importlib.import_module(f"quantize.families.{module}").open(source)
    return family
