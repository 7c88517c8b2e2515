"""XLM-RoBERTa: the multilingual encoder of BGE-M3, multilingual E5 and many rerankers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from app.errors import CheckpointError
from quantize.families import bert
from quantize.families.encoder import linear
from quantize.families.mapping import Want
from quantize.header import KeyTable
from quantize.source import Source
from quantize.vocab_unigram import set_unigram_vocabulary

# what transformers' XLMRobertaConfig fills in when config.json is silent
_DEFAULTS: dict[str, dict[str, Any]] = {"xlm-roberta": {**bert.DEFAULTS["bert"], "pad_token_id": 1}}


def open(source: Source) -> XlmRobertaModel:  # noqa: A001 - every family is opened by this name
    """Read config.json. Raises `CheckpointError` that names the field at fault."""
    return XlmRobertaModel(source)


class XlmRobertaModel(bert.BertModel):
    """A model of the XLM-RoBERTa family: BERT's shape, positions that begin after the padding token's, unigrams."""

    defaults: ClassVar[dict[str, dict[str, Any]]] = _DEFAULTS

    def __init__(self, source: Source) -> None:
        super().__init__(source)
        config = self._config
        if config.fields.get("lora_adaptations"):
            raise CheckpointError(f"{config.path}: lora_adaptations: adapters inside of a model are not supported")
        padding = config.fields.get("pad_token_id")
        if padding is not None:
            if type(padding) is not int or not 0 <= padding < self.positions - 1:
                raise CheckpointError(f"{config.path}: pad_token_id is {padding!r}; the positions begin after it")
            self.unused_positions = padding + 1
            config.fields["max_position_embeddings"] = self.positions - self.unused_positions

    def set_vocabulary(self, keys: KeyTable) -> None:
        """Set the tokenizer, a unigram one."""
        set_unigram_vocabulary(keys, self._source, self.vocabulary, self.token_types)

    def _head(self) -> Iterator[Want]:
        if self._classes:
            yield from linear("cls", "classifier.dense", (self.hidden, self.hidden), optional=True)
            yield from linear("cls.output", "classifier.out_proj", (len(self._classes), self.hidden), optional=True)
