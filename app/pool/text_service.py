"""What can be had of a model without its weights: tokens of texts, texts of tokens, and its template's text."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from app.errors import QueueFullError, RequestError
from app.messages import Detokenize, Tokenize, WriteChat
from app.pool.chat_request import render_chat
from app.pool.context_check import token_prompt
from app.pool.request import ChatPrompt, TextPrompt, TokenPrompt

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from app.messages import Tokenized
    from app.pool.request import Prompt
    from app.pool.text_client import TextClient

_MOST_WAITING = 32


class TextService:
    """The text child's answers to whoever needs no worker. They don't enter the queue, and go behind those who do."""

    def __init__(self, client: TextClient, numbers: Iterator[int], check_state: Callable[[], None]) -> None:
        """Ask through `client`; `check_state` raises when nothing can be asked now."""
        self.vocabulary_size = 0
        self._client = client
        self._numbers = numbers
        self._check_state = check_state
        self._waiting = 0

    async def tokenize(self, text: str, *, add_special: bool, parse_special: bool, with_pieces: bool) -> Tokenized:
        """Return the tokens of a text. Raises PromptRefusedError, LoadingError and its kin."""
        with self._permit():
            number = next(self._numbers)
            return await self._client.tokenize(Tokenize(number, text, add_special, parse_special, with_pieces))

    async def detokenize(self, tokens: list[int], param: str) -> str:
        """Return the text of tokens, control tokens as they are written; `param` is the field that errors name.

        Raises RequestError for an id outside the vocabulary, and what `tokenize` raises.
        """
        with self._permit():
            return await self._written(tokens, param)

    async def written_chat(self, prompt: ChatPrompt) -> str:
        """Return the text that the model's template makes of a chat: its messages, tools, documents and switches.

        Raises TemplateRefusedError, and what `tokenize` raises.
        """
        with self._permit():
            return await self._client.write(WriteChat(render_chat(next(self._numbers), prompt)))

    async def echo(self, prompt: Prompt) -> str:
        """Return a prompt's own text. Raises RequestError for one that is neither text nor tokens."""
        if isinstance(prompt, TextPrompt):
            return prompt.text
        if isinstance(prompt, TokenPrompt):
            return await self._written(prompt.tokens, "prompt")
        raise RequestError("'echo' goes with prompts of text or tokens only", param="echo")

    async def _written(self, tokens: list[int], param: str) -> str:
        ids = token_prompt(tokens, self.vocabulary_size, param)
        return await self._client.write(Detokenize(next(self._numbers), ids, param))

    @contextlib.contextmanager
    def _permit(self) -> Iterator[None]:
        """Hold one of the places. Raises QueueFullError, and what `check_state` does."""
        self._check_state()
        if self._waiting >= _MOST_WAITING:
            raise QueueFullError(f"{_MOST_WAITING} texts wait to be tokenized or written: try again", retry_after=1.0)
        self._waiting += 1
        try:
            yield
        finally:
            self._waiting -= 1
