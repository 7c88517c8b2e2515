"""Qwen3 as a reranker: of its vocabulary only the rows of "yes" and "no" are asked for."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

import numpy as np

from app.errors import CheckpointError, TokenizerError
from app.models.gguf_types import ValueType
from quantize.families.mapping import Want
from quantize.header import KeyTable
from quantize.source import Source

_RANK = 4  # llama.cpp's LLAMA_POOLING_TYPE_RANK
_NAMES = ("qwen3-reranker", "qwen3-vl-reranker")
_TEMPLATE = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n'
    "<|im_start|>user\n<Instruct>: Given a web search query, retrieve relevant passages that answer the query\n"
    "<Query>: {query}\n<Document>: {document}<|im_end|>\n"
    "<|im_start|>assistant\n<think>\n\n</think>\n\n"
)


@dataclasses.dataclass(frozen=True, slots=True)
class Rows:
    """The tokens whose rows of the head are the classifier's."""

    yes: int
    no: int

    def wants(self, wants: Iterable[Want], *, tied: bool) -> Iterator[Want]:
        """Put the classifier in the place of the head; if both share the embeddings, these stay too."""
        head = "token_embd.weight" if tied else "output.weight"
        for want in wants:
            if want.target == head:
                yield self._classifier(want)
            if want.target != head or tied:
                yield want

    def _classifier(self, head: Want) -> Want:
        first, last = sorted((self.yes, self.no))
        if last >= head.stored[0]:
            raise CheckpointError(
                f"the tokens yes and no ({self.yes}, {self.no}) are beyond the head's {head.stored[0]}"
            )
        take = np.array([self.yes - first, self.no - first], dtype=np.intp)
        shape = (2, head.stored[1])
        # from the one to the other: no more is read than that
        return dataclasses.replace(
            head,
            target="cls.output.weight",
            shape=shape,
            start=first,
            group=last - first + 1,
            take=take,
            optional=False,
        )


def find_rows(source: Source) -> Rows | None:
    """Return the classifier's tokens if the model calls itself a reranker: in its card, or by its name."""
    card = (source.read_text("README.md") or "").lower()
    names = [source.folder.name, str(source.config.get("_name_or_path", "")), str(source.config.get("model_type", ""))]
    if not any(f"# {name}" in card or name in hint.lower() for name in _NAMES for hint in names):
        return None
    tokens = ((source.tokenizer or {}).get("model") or {}).get("vocab")
    rows = [tokens.get(word) if isinstance(tokens, dict) else None for word in ("yes", "no")]
    found = [token for token in rows if type(token) is int and token >= 0]
    if len(found) != 2:
        raise TokenizerError(
            f"{source.folder / 'tokenizer.json'}: a reranker's vocabulary must have the words yes and no"
        )
    return Rows(*found)


def set_keys(keys: KeyTable, architecture: str) -> None:
    """Set the pooling, the names of the classes and the template that queries and documents are put into."""
    keys.u32(f"{architecture}.pooling_type", _RANK)
    keys.array(f"{architecture}.classifier.output_labels", ValueType.STRING, ["yes", "no"])
    keys.text("tokenizer.chat_template.rerank", _TEMPLATE)
    keys.array("tokenizer.chat_templates", ValueType.STRING, ["rerank"])
