"""What the text child does for each kind of request but grammars."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from app.messages import (
    Detokenize,
    RenderChat,
    Rendered,
    RenderInfill,
    RenderInputs,
    RenderPairs,
    RenderText,
    Tokenize,
    Tokenized,
    WriteChat,
    Written,
)

if TYPE_CHECKING:
    import numpy.typing as npt

    from app.messages import TextAnswer
    from app.text.chat_renderer import ChatRenderer
    from app.text.inputs import InputRenderer
    from app.text.tokenize import Tokenizer

    Work = RenderChat | RenderText | RenderInfill | RenderInputs | RenderPairs | WriteChat | Detokenize | Tokenize

_END_CHARACTERS = 64  # of a prompt, that tell how its answer begins


class Answers(NamedTuple):
    """One model's template and tokenizer, and what is asked of them."""

    chats: ChatRenderer
    inputs: InputRenderer
    tokenizer: Tokenizer

    def answer(self, request: Work) -> TextAnswer:
        """Return the answer.

        Raises PromptRefusedError, TemplateRefusedError, UnsupportedFieldError; and MemoryError.
        """
        if isinstance(request, RenderInputs | RenderPairs):
            return self.inputs.rendered(request)
        if isinstance(request, WriteChat):
            return Written(request.request, self.chats.text(request.chat))
        if isinstance(request, RenderChat):
            text = self.chats.text(request)
            return Rendered(request.request, _frame(self.tokenizer.rendered_chat(text)), text[-_END_CHARACTERS:])
        return _of_text(request, self.tokenizer)


def _of_text(request: RenderText | RenderInfill | Detokenize | Tokenize, tokenizer: Tokenizer) -> TextAnswer:
    number = request.request
    if isinstance(request, Detokenize):
        text = b"".join(map(tokenizer.piece, np.frombuffer(request.tokens, "<i4").tolist()))
        return Written(number, text.decode("utf-8", "replace"))
    if isinstance(request, Tokenize):
        tokens = tokenizer.tokens(request.text, add_special=request.add_special, parse_special=request.parse_special)
        pieces = [tokenizer.piece(token) for token in tokens.tolist()] if request.with_pieces else None
        return Tokenized(number, _frame(tokens), pieces)
    if isinstance(request, RenderInfill):
        ids = request.before_tokens
        before = request.before if ids is None else np.frombuffer(ids, "<i4")
        return Rendered(number, _frame(tokenizer.infill(before, request.after)))
    return Rendered(number, _frame(tokenizer.plain(request.text)))


def _frame(tokens: npt.NDArray[np.int32]) -> bytes:
    return tokens.astype("<i4", copy=False).tobytes()
