"""Mistral 3: the text model of Mistral Small 3.1 and of others that see, and Ministral 3."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

from app.errors import CheckpointError
from quantize.checkpoint import StoredTensor
from quantize.families.llama import LlamaModel
from quantize.families.mapping import Want
from quantize.header import KeyTable
from quantize.source import Source
from quantize.tensors import TensorSpec

# what `model.` and `lm_head.` become: by itself, within a multimodal model of old, and of new
_LAYOUTS = (
    {"model.": "model.", "lm_head.": "lm_head."},
    {"model.": "language_model.model.", "lm_head.": "language_model.lm_head."},
    {"model.": "model.language_model.", "lm_head.": "lm_head."},
)
_NOT_TEXT = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")


def open(source: Source) -> Mistral3Model:  # noqa: A001 - every family is opened by this name
    """Read config.json. Raises `CheckpointError` that names the field at fault."""
    return Mistral3Model(source)


class Mistral3Model(LlamaModel):
    """The text model of a Mistral 3."""

    architecture = "mistral3"

    def __init__(self, source: Source) -> None:
        super().__init__(source)
        self._layout = _LAYOUTS[0]
        kind, rope = self._config.fields.get("model_type"), self._config.rope
        if kind not in {"mistral", "ministral3"}:
            raise CheckpointError(f"{self._config.path}: the text model is a {kind}; mistral and ministral3 are known")
        self._scales_queries = kind == "ministral3"
        if self._scales_queries and rope.get("rope_type") != "yarn":
            raise CheckpointError(
                f"{self._config.path}: rope_type is {rope.get('rope_type')!r}; llama.cpp's Ministral 3 has yarn only"
            )

    def set_hyper_parameters(self, keys: KeyTable, file_type: int) -> None:
        """Set the `mistral3.*` keys and the file type."""
        super().set_hyper_parameters(keys, file_type)
        if self._scales_queries:
            rope = self._config.rope_number
            keys.f32(f"{self.architecture}.rope.scaling.yarn_log_multiplier", rope("mscale_all_dim"))
            keys.f32(f"{self.architecture}.attention.temperature_scale", rope("llama_4_scaling_beta"))

    def tensors(self, stored: Mapping[str, StoredTensor]) -> list[TensorSpec]:
        """Map every tensor of the text model, after checking that all are there and that each has its shape."""
        embeddings = "embed_tokens.weight"
        found = (layout for layout in _LAYOUTS if f"{layout['model.']}{embeddings}" in stored)
        self._layout = next(found, _LAYOUTS[0])
        return super().tensors(stored)

    def _wants(self) -> Iterator[Want]:
        for want in super()._wants():
            first, rest = str(want.sources).split(".", 1)
            yield dataclasses.replace(want, sources=f"{self._layout[f'{first}.']}{rest}")

    def _is_left_out(self, name: str) -> bool:
        return name.startswith(_NOT_TEXT)
