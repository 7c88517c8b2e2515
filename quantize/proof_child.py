"""The process that proves a vocabulary: llama.cpp against the checkpoint's own tokenizer, on thousands of texts.

    python -P -m quantize.proof_child SECONDS

It reads two JSON lines: the model's folder, then the header and what to prove of it; before the second it encodes the
texts with the checkpoint's tokenizer. It writes JSON lines: `vocabulary` when llama.cpp has loaded the header, then
`done`, or `error` with a message. A vocabulary that ends llama.cpp ends this process only, a timer ends it when it
hangs, native code included, and so does the end of its input.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import json
import os
import re
import resource
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from app.errors import PestleError, TokenizerError
from app.llama.model import VocabularyModel
from quantize.proof_reference import Ids, Reference, has_sentencepiece, open_reference
from quantize.proof_template import render_samples
from quantize.proof_texts import texts

_MOST_BYTES = 4 << 30  # a vocabulary of 128,000 tokens takes 0.24 GB
_ALONE = 1000  # so many texts are compared one by one, the others as lines of longer ones, for
_LINES = 10  # llama.cpp compiles its regular expressions anew for each: a millisecond or two for some splitters
_AT_ONCE = 100
_SHOWN_BEFORE, _SHOWN_AFTER = 3, 5
_SHOWN_NAMES = 5
_PADDING = re.compile(r"\[PAD\d+\]")  # what stands where the file has no token


def main(seconds: float) -> None:
    """Prove the header that the input names, within so many seconds of processor time from being told of its folder."""
    with contextlib.suppress(ValueError, OSError):  # a lower limit is set already, or the system has none
        resource.setrlimit(resource.RLIMIT_DATA, (_MOST_BYTES, _MOST_BYTES))
    folder = Path(_next_message()["folder"])
    signal.setitimer(signal.ITIMER_PROF, seconds)  # hanging takes processor time, a busy machine does not
    expected = _ExpectedIds(folder)
    task = _next_message()
    threading.Thread(target=_end_with_input, daemon=True).start()
    with VocabularyModel(Path(task["header"])) as model:
        ends = model.vocabulary.eog
        _say("vocabulary", missing_ends=[token for token in task["ends"] if token not in ends])
        reference = expected.reference(sentencepiece=task["sentencepiece"])
        proof = _Comparison(model, reference, folder)
        proof.special_tokens()
        proof.chat_template()
        proof.texts(expected)
        _say("done", notes=proof.notes)


class _ExpectedIds:
    """The ids of the texts, encoded on a thread by the checkpoint's tokenizer, as soon as it is known which that is.

    Both libraries let go of Python's lock, and so work side by side.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._pool = concurrent.futures.ThreadPoolExecutor(1)
        self._reference: concurrent.futures.Future[Reference] | None = None
        self._coming: collections.deque[concurrent.futures.Future[list[Ids]]] = collections.deque()
        self._batches = list(_batches(_grouped(texts())))
        if not has_sentencepiece(folder):
            self._begin(sentencepiece=False)

    def reference(self, *, sentencepiece: bool) -> Reference:
        """Return the tokenizer. Raises `TokenizerError` that names the file which cannot be read."""
        if self._reference is None:
            self._begin(sentencepiece=sentencepiece)
        assert self._reference is not None  # noqa: S101 - it was just begun
        return self._reference.result()

    def __iter__(self) -> Iterator[tuple[list[str], list[Ids]]]:
        try:
            for batch in self._batches:
                yield batch, self._coming.popleft().result()
        finally:
            self._pool.shutdown(cancel_futures=True)

    def _begin(self, *, sentencepiece: bool) -> None:
        opened = self._reference = self._pool.submit(open_reference, self._folder, sentencepiece=sentencepiece)
        self._coming.extend(
            self._pool.submit(lambda batch: opened.result().encode(batch), batch) for batch in self._batches
        )


class _Comparison:
    def __init__(self, model: VocabularyModel, reference: Reference, folder: Path) -> None:
        self._model = model
        self._reference = reference
        self._folder = folder
        self._leeway: collections.Counter[str] = collections.Counter()
        self._compared = 0
        self._template_note: str | None = None
        self._left_out: list[str] = []

    @property
    def notes(self) -> list[str]:
        """What people should know although nothing is wrong with the file."""
        notes = [
            f"{reason}: {count} of {self._compared} texts are read in another way"
            for reason, count in self._leeway.items()
            if reason
        ]
        if self._left_out:
            named = ", ".join(self._left_out[:_SHOWN_NAMES])
            more = f" and {len(self._left_out) - _SHOWN_NAMES} more" if len(self._left_out) > _SHOWN_NAMES else ""
            notes.append(f"upstream's converter leaves out {named}{more}; llama.cpp reads that as plain text")
        return notes + ([self._template_note] if self._template_note else [])

    def special_tokens(self) -> None:
        """Compare how each special token is found where it is written."""
        size = self._model.vocabulary.size
        specials = [special for special in self._reference.specials if special.text and special.id < size]
        for special in specials:
            found = self._llama_cpp(special.text)
            padding = _PADDING.fullmatch(self._model.vocabulary.token_text(special.id))
            if found != [special.id] and (padding or special.text.startswith("<unused")):
                self._left_out.append(special.text)
                continue
            if found != [special.id]:
                self._refuse("a special token", special.text, [special.id], found)
            in_speech = self._model.tokenize(special.text).tolist()
            if special.control and special.id in {self._model.vocabulary.bos, self._model.vocabulary.eos}:
                if in_speech == [special.id]:
                    raise TokenizerError(
                        f"{self._folder}: the token {special.text!r} would not be a control token in llama.cpp, so "
                        f"that users could write it; tokenizer.json or tokenizer_config.json should call it special"
                    )
            elif not special.control and special.id not in self._model.vocabulary.eog and in_speech != [special.id]:
                self._refuse("an added token", special.text, [special.id], in_speech)

    def chat_template(self) -> None:
        """Compare how the prompts that the chat template makes are read."""
        template = self._model.chat_template
        if template is None:
            return
        vocabulary = self._model.vocabulary
        named = {"bos_token": vocabulary.bos, "eos_token": vocabulary.eos}
        tokens = {name: "" if token is None else vocabulary.token_text(token) for name, token in named.items()}
        rendered, problem = render_samples(template, tokens)
        if problem:
            self._template_note = f"the chat template was not proven, for it {problem[:200]}"
        if rendered:
            self._compare("a chat", rendered, self._reference.encode(rendered))

    def texts(self, expected: Iterable[tuple[list[str], list[Ids]]]) -> None:
        """Compare the texts with their expected ids."""
        for batch, ids in expected:
            self._compare("a text", batch, ids)

    def _compare(self, kind: str, batch: list[str], expected: list[Ids]) -> None:
        for text, ids in zip(batch, expected, strict=True):
            found = self._llama_cpp(text)
            if found != ids:
                reason = self._reference.leeway(text, ids, self._llama_cpp)
                if reason is None:
                    self._refuse_line(kind, text)
                    self._refuse(kind, text, ids, found)
                else:
                    self._leeway[reason] += 1
        self._compared += len(batch)

    def _refuse_line(self, kind: str, text: str) -> None:
        """Show the first line that differs by itself, if one does: it says more than all of them."""
        for line in text.split("\n"):
            expected, found = self._reference.encode([line])[0], self._llama_cpp(line)
            if expected != found and self._reference.leeway(line, expected, self._llama_cpp) is None:
                self._refuse(kind, line, expected, found)

    def _llama_cpp(self, text: str) -> Ids:
        ids: Ids = self._model.tokenize(text, parse_special=True).tolist()
        return ids

    def _refuse(self, kind: str, text: str, expected: Ids, found: Ids) -> None:
        same = next((i for i, (a, b) in enumerate(zip(expected, found, strict=False)) if a != b), None)
        place = min(len(expected), len(found)) if same is None else same
        splitter = self._model.metadata.get("tokenizer.ggml.pre", "none")
        raise TokenizerError(
            f"{self._folder}: llama.cpp would read text in another way than the model's own tokenizer, and the model "
            f"would answer worse than it can; nothing was written. The first of {kind} that differs:\n"
            f"  text (escaped):   {json.dumps(text)[:400]}\n"
            f"  its tokenizer:    {self._around(expected, place)}\n"
            f"  llama.cpp:        {self._around(found, place)}\n"
            f"  from token {place} on; model {self._model.metadata.get('tokenizer.ggml.model')}, splitter {splitter}\n"
            f"Check that the tokenizer's files are those that the model was trained with (tokenizer.json, "
            f"tokenizer.model, tokenizer_config.json); if they are, llama.cpp cannot serve this model rightly."
        )

    def _around(self, ids: Ids, place: int) -> str:
        first = max(0, place - _SHOWN_BEFORE)
        shown = [f"{token} {self._model.vocabulary.token_text(token)!r}" for token in ids[first : place + _SHOWN_AFTER]]
        before = ["…"] if first else []
        after = ["…"] if place + _SHOWN_AFTER < len(ids) else []
        return ", ".join([*before, *shown, *after]) or "no token"


def _grouped(all_texts: list[str]) -> list[str]:
    rest = all_texts[_ALONE:]
    return all_texts[:_ALONE] + ["\n".join(rest[first : first + _LINES]) for first in range(0, len(rest), _LINES)]


def _batches(all_texts: list[str]) -> Iterator[list[str]]:
    for first in range(0, len(all_texts), _AT_ONCE):
        yield all_texts[first : first + _AT_ONCE]


def _next_message() -> dict[str, Any]:
    line = sys.stdin.readline()
    if not line:
        sys.exit(0)  # nobody wants a proof
    message: dict[str, Any] = json.loads(line)
    return message


def _end_with_input() -> None:
    sys.stdin.read()
    os._exit(0)


def _say(event: str, **content: Any) -> None:
    print(json.dumps({"event": event, **content}), flush=True)


def _run(seconds: float) -> int:
    try:
        main(seconds)
    except PestleError as error:
        _say("error", message=error.message)
    return 0


if __name__ == "__main__":
    sys.exit(_run(float(sys.argv[1])))
