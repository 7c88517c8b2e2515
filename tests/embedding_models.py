"""Small models that embed and rerank, with random weights, made by our own quantizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from quantize.pipeline import quantize
from tests.quantize import test_family_bert as bert
from tests.quantize import test_family_xlm_roberta as xlm_roberta
from tests.quantize.encoder_files import TOKENS

SIZE = bert.HIDDEN
CONTEXT = bert.POSITIONS
CAT, CLS, SEP = (TOKENS.index(text) for text in ("cat", "[CLS]", "[SEP]"))


def write_embedder(folder: Path) -> Path:
    """Write a BERT that pools the mean, in f16; return the GGUF."""
    return _quantized(bert.make(folder / "Embedder"), folder / "embedder.gguf")


def write_unpooled(folder: Path) -> Path:
    """Write a BERT that does not say how it is pooled."""
    source = bert.make(folder / "Unpooled")
    (source / "modules.json").unlink()
    return _quantized(source, folder / "unpooled.gguf")


def write_reranker(folder: Path) -> Path:
    """Write an XLM-RoBERTa with a head of two layers and one class."""
    hidden = xlm_roberta.HIDDEN
    head: dict[str, tuple[int, ...]] = {
        "classifier__dense__weight": (hidden, hidden),
        "classifier__dense__bias": (hidden,),
        "classifier__out_proj__weight": (1, hidden),
        "classifier__out_proj__bias": (1,),
    }
    fields: dict[str, Any] = {"architectures": ["XLMRobertaForSequenceClassification"], "id2label": {"0": "LABEL_0"}}
    source = xlm_roberta.make(folder / "Reranker", xlm_roberta.weights_of("roberta.", **head), **fields)
    return _quantized(source, folder / "reranker.gguf")


def write_bert_classifier(folder: Path, *names: str) -> Path:
    """Write a BERT whose head tells these classes apart."""
    weights = bert.weights_of("bert.", classifier__weight=(len(names), SIZE), classifier__bias=(len(names),))
    labels = {str(place): name for place, name in enumerate(names)}
    fields = {"architectures": ["BertForSequenceClassification"], "id2label": labels}
    source = bert.make(folder / "Classifier", weights, **fields)
    (source / "modules.json").unlink()
    return _quantized(source, folder / "classifier.gguf")


def _quantized(source: Path, target: Path) -> Path:
    quantize(source, "f16", target)
    return target
