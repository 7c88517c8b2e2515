"""What a GGUF is for, read from its header: continuing text, embedding it, or scoring documents against a query."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Any

import msgspec

from app.errors import ModelLoadError

if TYPE_CHECKING:
    from app.messages import Pooling
    from app.models.gguf import Header

_BERT = "bert"
_WITH_SOFTMAX = ("qwen3", "qwen3vl")
_YES_OR_NO = ["yes", "no"]


class PoolingType(enum.IntEnum):
    """llama.cpp's `llama_pooling_type`."""

    NONE = 0
    MEAN = 1
    CLS = 2
    LAST = 3
    RANK = 4


_ASKED = {"mean": PoolingType.MEAN, "cls": PoolingType.CLS, "last": PoolingType.LAST}


class ModelKind(msgspec.Struct, frozen=True):
    """What to do with the model. Without a pooling it generates."""

    pooling: PoolingType = PoolingType.NONE
    gives_probabilities: bool = False  # a reranker whose scores llama.cpp puts through a softmax

    @property
    def generates(self) -> bool:
        """Whether it continues text."""
        return self.pooling is PoolingType.NONE

    @property
    def reranks(self) -> bool:
        """Whether it scores documents."""
        return self.pooling is PoolingType.RANK


def model_kind(header: Header, pooling: Pooling = "auto") -> ModelKind:
    """Return what the model is for, `pooling` being what the user said.

    Raises ModelLoadError for a file that neither generates nor says how it is pooled, and for a classifier that is no
    reranker.
    """
    if pooling != "auto":
        return ModelKind(_ASKED[pooling])
    prefix = header.architecture
    stated = header.integer(f"{prefix}.pooling_type")
    obstacle = _no_reranker(header)
    if stated == PoolingType.RANK or _has_classifier(header):
        if obstacle is None:
            return ModelKind(PoolingType.RANK, prefix in _WITH_SOFTMAX)
        if stated in (None, PoolingType.NONE, PoolingType.RANK):
            raise ModelLoadError(
                f"{header.path} is a classifier, and not one that reranks: {obstacle}; --pooling mean or cls serves "
                "its embeddings"
            )
    if stated is not None and PoolingType.MEAN <= stated <= PoolingType.LAST:
        return ModelKind(PoolingType(stated))
    if header.metadata.get(f"{prefix}.attention.causal") is False:
        raise ModelLoadError(
            f"{header.path} is an encoder and does not say how the embeddings of a text's tokens become one: say "
            "--pooling mean, cls or last, as its model card has it"
        )
    return ModelKind()


def _has_classifier(header: Header) -> bool:
    return any(tensor.name == "cls.output.weight" for tensor in header.tensors)


def _no_reranker(header: Header) -> str | None:
    """Return why the file's classifier gives no score of a document; None if it does."""
    names = {tensor.name for tensor in header.tensors}
    labels: Any = header.metadata.get(f"{header.architecture}.classifier.output_labels")
    if labels is not None and (not isinstance(labels, list) or (len(labels) > 1 and labels != _YES_OR_NO)):
        count = len(labels) if isinstance(labels, list) else "very many"
        return f"it tells {count} classes apart"
    if header.architecture == _BERT and "cls.weight" not in names:
        return "BERT's classifier belongs behind a layer (pooler) that llama.cpp leaves out, its scores would be wrong"
    return None
