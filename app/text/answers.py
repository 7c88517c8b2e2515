"""What the text child does for each kind of request but grammars."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from app.messages import (
    Detokenize,
    RenderChat,
    Rendered,
    RenderInfill,
    RenderText,
    Tokenize,
    Tokenized,
    WriteChat,
    Written,
)

if TYPE_CHECKING:
    import numpy.typing as npt

    from app.messages import TextAnswer
    from app.text.template import ChatTemplate
    from app.text.tokenize import Tokenizer

    Work = RenderChat | RenderText | RenderInfill | WriteChat | Detokenize | Tokenize


def answer(request: Work, template: ChatTemplate, tokenizer: Tokenizer) -> TextAnswer:
    """Return the answer. Raises PromptRefusedError, TemplateRefusedError, UnsupportedFieldError; and MemoryError."""
    number = request.request
    if isinstance(request, Detokenize):
        text = b"".join(map(tokenizer.piece, np.frombuffer(request.tokens, "<i4").tolist()))
        return Written(number, text.decode("utf-8", "replace"))
    if isinstance(request, WriteChat):
        return Written(number, _written(request.chat, template))
    if isinstance(request, Tokenize):
        tokens = tokenizer.tokens(request.text, add_special=request.add_special, parse_special=request.parse_special)
        pieces = [tokenizer.piece(token) for token in tokens.tolist()] if request.with_pieces else None
        return Tokenized(number, _frame(tokens), pieces)
    if isinstance(request, RenderInfill):
        ids = request.before_tokens
        before = request.before if ids is None else np.frombuffer(ids, "<i4")
        return Rendered(number, _frame(tokenizer.infill(before, request.after)))
    if isinstance(request, RenderChat):
        return Rendered(number, _frame(tokenizer.rendered_chat(_written(request, template))))
    return Rendered(number, _frame(tokenizer.plain(request.text)))


def _written(chat: RenderChat, template: ChatTemplate) -> str:
    return template.render(
        chat.messages, add_generation_prompt=chat.add_generation_prompt, arguments=chat.template_arguments
    )


def _frame(tokens: npt.NDArray[np.int32]) -> bytes:
    return tokens.astype("<i4", copy=False).tobytes()
