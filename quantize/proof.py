"""Proves that llama.cpp will read text with the new file as the model's own tokenizer does.

A wrong vocabulary can end or hang llama.cpp, so that the work is done by a process of its own (see `proof_child`),
which gets the header without any weight, while the rest is prepared; no weight is read before it has said yes. What is
proven once is not proven again (see `proof_memory`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import signal
import threading
from collections.abc import Iterable
from typing import Any

from app.errors import StorageError, TokenizerError
from quantize import proof_memory
from quantize.header import KeyTable, encode_header
from quantize.proof_process import SECONDS, ProofProcess, how_it_ended
from quantize.source import Source

_SLOWDOWN = 10  # a machine that is busier than this makes a proof fail
_GRACE_SECONDS = 5.0
_SPECIAL_NAMES = ("phi-3", "phi3", "modern-bert")  # for which llama.cpp has rules of their own
_END_KEYS = ("tokenizer.ggml.eom_token_id", "tokenizer.ggml.eot_token_id")


@dataclasses.dataclass
class _Found:
    """What the process has said so far; shared by all who ask the same."""

    missing_ends: list[int] | None = None
    notes: tuple[str, ...] | None = None
    error: str | None = None
    no_start: str | None = None
    process: ProofProcess | None = None
    changed: threading.Condition = dataclasses.field(default_factory=threading.Condition)

    @property
    def is_over(self) -> bool:
        return self.notes is not None or self.error is not None or self.no_start is not None


_known: dict[bytes, _Found] = {}  # what is proven, or being proven


class Proof:
    """A proof that is under way, or done."""

    def __init__(
        self,
        keys: KeyTable,
        source: Source,
        ends: Iterable[int],
        process: ProofProcess | None = None,
        seconds: float = SECONDS,
    ) -> None:
        """Begin, in a process that was started ahead or in a new one; it ends by itself."""
        self._folder = source.folder
        self._seconds = seconds
        self._patience = seconds * _SLOWDOWN + _GRACE_SECONDS
        self._files = proof_memory.files_digest(source.folder)
        self._digest = _digest(keys, self._files, list(ends))
        known = _known.get(self._digest)
        if known is None and (notes := proof_memory.recall(self._files, self._digest)) is not None:
            known = _known[self._digest] = _Found(missing_ends=[], notes=notes)
        self._found = known or _Found()
        if known is None:
            self._start(keys, list(ends), process)
        elif process is not None:
            process.close()

    def wait(self) -> tuple[str, ...]:
        """Wait for the end and return what people should know.

        Raises `TokenizerError` that shows what differs, `StorageError` if the process could not be started.
        """
        with self._found.changed:
            self._found.changed.wait_for(lambda: self._found.is_over, self._patience)
        if not self._found.is_over:
            self.close()
            raise TokenizerError(self._timeout())
        self._check()
        return self._found.notes or ()

    def missing_ends(self) -> list[int]:
        """Wait until llama.cpp has loaded the vocabulary; return the tokens that should end an answer and would not."""
        with self._found.changed:
            self._found.changed.wait_for(
                lambda: self._found.missing_ends is not None or self._found.is_over, self._patience
            )
        self._check()
        return self._found.missing_ends or []

    def close(self) -> None:
        """End the process, if it still runs."""
        process = self._found.process
        if process is not None and not self._found.is_over:
            self._forget()
            process.close()

    def _check(self) -> None:
        if self._found.no_start is not None:
            raise StorageError(self._found.no_start)
        if self._found.error is not None:
            raise TokenizerError(self._found.error)

    def _start(self, keys: KeyTable, ends: list[int], process: ProofProcess | None) -> None:
        sentencepiece = _content(keys, "tokenizer.ggml.model") == "llama"
        try:
            process = process or ProofProcess(self._seconds)
            self._found.process = process
            _known[self._digest] = self._found
            process.read(self._folder)
            process.prove(encode_header(keys, ()), ends, sentencepiece=sentencepiece, said=self._take, ended=self._end)
        except OSError as error:
            # told when the proof is waited for: a full disk has a better message before that
            self._found.no_start = f"the tokenizer's proof cannot be started: {error}"
            if process is not None:
                process.close()

    def _end(self, code: int, said: str) -> None:
        if not self._found.is_over:
            self._take({"event": "error", "message": self._what_ended_it(code, said)})

    def _take(self, event: dict[str, Any]) -> None:
        with self._found.changed:
            if event["event"] == "vocabulary":
                self._found.missing_ends = event["missing_ends"]
            elif event["event"] == "done":
                self._found.notes = tuple(event["notes"])
                if not self._found.missing_ends:
                    proof_memory.keep(self._files, self._digest, self._found.notes)
            else:
                self._found.error = event["message"]
                self._forget()
            self._found.changed.notify_all()

    def _forget(self) -> None:
        if _known.get(self._digest) is self._found:
            del _known[self._digest]

    def _what_ended_it(self, code: int, said: str) -> str:
        if code == -signal.SIGPROF:
            return self._timeout()
        last = " ".join([line for line in said.splitlines() if line.strip()][-3:])
        return (
            f"{self._folder}: the process in which llama.cpp tries this vocabulary ended with {how_it_ended(code)}; "
            f"so would every server that loads the file; nothing was written. Its last words: {last[-600:] or 'none'}"
        )

    def _timeout(self) -> str:
        return (
            f"{self._folder}: llama.cpp did not read the test texts with this vocabulary within {self._seconds:g} s "
            f"of processor time; it hangs, or the machine is far too busy: try again when it is not"
        )


def start_proof(keys: KeyTable, source: Source, process: ProofProcess | None = None) -> Proof | None:
    """Start to prove the tokenizer's keys, which are complete; None if the file has no vocabulary.

    `process` is one that was started ahead; it is used up here. Tokens that end an answer for the checkpoint, but not
    for llama.cpp, become end of message or end of turn; a note says so. Raises `TokenizerError` that names them if
    there are too many.
    """
    if "tokenizer.ggml.tokens" not in keys.values:
        if process is not None:
            process.close()
        return None
    ends = end_tokens(source, len(keys.values["tokenizer.ggml.tokens"].content))
    proof = Proof(keys, source, ends, process)
    surely = {_content(keys, f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot", "eom")}
    missing = proof.missing_ends() if set(ends) - surely else []
    if not missing:
        return proof
    proof.close()
    tokens = keys.values["tokenizer.ggml.tokens"].content
    named = ", ".join(f"{token} {tokens[token]!r}" for token in missing)
    free = [key for key in _END_KEYS if key not in keys.values]
    if len(free) < len(missing):
        raise TokenizerError(
            f"{source.folder}: generation_config.json or config.json says that an answer ends with {named}, which "
            f"llama.cpp would not heed, and a GGUF has no key left to say so; take ids from eos_token_id there"
        )
    for key, token in zip(free, missing, strict=False):
        keys.u32(key, token)
    source.notes.append(
        f"an answer ends with {named} too, says the checkpoint; written as {' and '.join(free[: len(missing)])}, which "
        f"upstream's converter leaves out"
    )
    proof = Proof(keys, source, ends)
    if proof.missing_ends():
        proof.close()
        raise TokenizerError(f"{source.folder}: llama.cpp does not take {named} for the end of an answer")
    return proof


def end_tokens(source: Source, size: int) -> list[int]:
    """Return the ids of tokens that `eos_token_id` lists in generation_config.json and config.json."""
    configs: list[Any] = [source.read_object("generation_config.json"), source.config]
    configs.append(source.config.get("text_config"))
    found: list[int] = []
    for config in configs:
        ids = config.get("eos_token_id") if isinstance(config, dict) else None
        found += [token for token in (ids if isinstance(ids, list) else [ids]) if type(token) is int]
    return [token for token in dict.fromkeys(found) if 0 <= token < size]


def _content(keys: KeyTable, key: str) -> Any:
    value = keys.values.get(key)
    return value.content if value else None


def _digest(keys: KeyTable, files: bytes, ends: list[int]) -> bytes:
    """Tell apart what could be read in another way: the keys that count, the files that are compared with."""
    counted = KeyTable()
    counted.values = {key: value for key, value in keys.values.items() if key.startswith("tokenizer.")}
    name = str(_content(keys, "general.name")).lower()
    counted.text("general.architecture", _content(keys, "general.architecture") or "")
    counted.text("general.name", ",".join(special for special in _SPECIAL_NAMES if special in name))
    return hashlib.sha256(encode_header(counted, ()) + files + f"{ends}".encode()).digest()
