"""An engine that tests step by hand."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import msgspec

from app.llama.context import Context
from app.llama.model import Model
from app.messages import Generate, Piece, Sampling, Step
from app.worker.draft import DraftModel
from app.worker.engine import Engine
from app.worker.prefix_files import PrefixFiles
from app.worker.prefix_store import PrefixStore
from app.worker.speculation import Speculation

GREEDY = Sampling(temperature=0)


@dataclass
class Harness:
    """An engine that is stepped by hand."""

    model: Model
    context: Context
    sent: list[msgspec.Struct] = field(default_factory=list)
    store: PrefixStore | None = None
    files: PrefixFiles | None = None
    deterministic: bool = False
    speculation: Speculation | None = None
    draft: DraftModel | None = None

    def __post_init__(self) -> None:
        self.engine = Engine(
            self.model,
            self.context,
            self.sent.append,
            store=self.store,
            files=self.files,
            deterministic=self.deterministic,
            speculation=self.speculation,
            draft=self.draft,
        )

    def tokens(self, text: str) -> bytes:
        return self.model.vocabulary.tokenize(text).astype("<i4").tobytes()

    def submit(self, request: int, text: str, max_tokens: int = 8, sampling: Sampling = GREEDY, **more: Any) -> None:
        self.engine.submit(Generate(request, self.tokens(text), max_tokens, sampling, **more))

    def pieces(self, request: int) -> list[Piece]:
        steps = [message for message in self.sent if isinstance(message, Step)]
        return [piece for step in steps for piece in step.pieces if piece.request == request]

    def finish(self, *requests: int, steps: int = 600) -> None:
        for _ in range(steps):
            if all(self.pieces(request) and self.pieces(request)[-1].finish_reason for request in requests):
                self.engine.check_integrity()
                return
            self.engine.step()
        raise AssertionError("the requests don't end")

    def answer(self, request: int) -> str:
        return "".join(piece.text for piece in self.pieces(request))

    def run(self, request: int, text: str, max_tokens: int = 8, sampling: Sampling = GREEDY, **more: Any) -> Piece:
        self.submit(request, text, max_tokens, sampling, **more)
        self.finish(request)
        return self.pieces(request)[-1]
