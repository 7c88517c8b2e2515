"""Texts for models that embed or rerank, to tokens: each with the tokens that the model wants around it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from app.errors import PromptRefusedError
from app.messages import MAX_FRAME_BYTES, RenderedInputs, RenderInputs, RenderPairs
from app.text.tokenize import MAX_PROMPT_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import numpy.typing as npt

    from app.llama.model import VocabularyModel
    from app.text.tokenize import Tokenizer

    Tokens = npt.NDArray[np.int32]

_QUERY, _DOCUMENT = "{query}", "{document}"


class InputRenderer:
    """Tokenizes inputs and pairs of one model."""

    def __init__(self, model: VocabularyModel, tokenizer: Tokenizer) -> None:
        self._vocabulary = model.vocabulary
        self._tokenizer = tokenizer
        self._template = model.rerank_template

    def rendered(self, request: RenderInputs | RenderPairs) -> RenderedInputs:
        """Return the tokens of each input. Raises PromptRefusedError that names the one that is too large."""
        if isinstance(request, RenderInputs):
            texts = enumerate(request.texts)
            found = (self._tokenizer.whole(text, param=f"input[{index}]") for index, text in texts)
            return RenderedInputs(request.request, _encoded(found, "input"))
        return RenderedInputs(request.request, _encoded(self._pairs(request.query, request.documents), "documents"))

    def _pairs(self, query: str, documents: list[str]) -> Iterator[Tokens]:
        before = None if self._template is not None else self._tokenizer.part(query, param="query")
        for index, text in enumerate(documents):
            if self._template is not None:
                yield self._from_template(self._template, query, text, index)
            elif before is not None:
                yield self._joined(before, self._tokenizer.part(text, param=f"documents[{index}]"))

    def _from_template(self, template: str, query: str, document: str, index: int) -> Tokens:
        """Put both into the model's template, neither into the other."""
        size = len(template) + len(query.encode("utf-8", "replace")) + len(document.encode("utf-8", "replace"))
        if size > MAX_PROMPT_BYTES:
            raise PromptRefusedError(
                f"the query and documents[{index}] have {size} bytes, the limit is {MAX_PROMPT_BYTES}; shorten them",
                param=f"documents[{index}]",
            )
        pieces = [part.replace(_DOCUMENT, document) for part in template.split(_QUERY)]
        return self._tokenizer.part(query.join(pieces), param=f"documents[{index}]")

    def _joined(self, query: Tokens, document: Tokens) -> Tokens:
        """Return [BOS] query [EOS][SEP] document [EOS], each special token as the model's file asks for it."""
        vocabulary = self._vocabulary
        bos = [vocabulary.bos] if vocabulary.adds_bos and vocabulary.bos is not None else []
        end = vocabulary.eos if vocabulary.eos is not None else vocabulary.sep
        eos = [end] if vocabulary.adds_eos and end is not None else []
        sep = [vocabulary.sep] if vocabulary.adds_sep and vocabulary.sep is not None else []
        return np.concatenate([bos, query, eos, sep, document, eos]).astype(np.int32)


def _encoded(found: Iterable[Tokens], param: str) -> list[bytes]:
    """Return the inputs as a frame carries them. Raises PromptRefusedError before they are more than one can."""
    inputs: list[bytes] = []
    room = MAX_FRAME_BYTES // 2
    for tokens in found:
        inputs.append(tokens.astype("<i4", copy=False).tobytes())
        room -= len(inputs[-1])
        if room < 0:
            raise PromptRefusedError(
                f"'{param}' come to more than {MAX_FRAME_BYTES // 8} tokens together, a query counted with each of its "
                "documents: send fewer, or shorter ones",
                param=param,
            )
    return inputs
