"""The worker's life: say Hello, then serve until the parent is gone.

Two threads. The reader turns the socket's bytes into commands, and ends the process at once when the parent has closed
its end, even in the middle of a decode. The main thread loads the model and runs the engine.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import queue
import select
import socket
import sys
import threading
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from app.childhood import end_with_parent
from app.errors import DecodeError, EngineError, ModelLoadError
from app.llama.context import Context
from app.llama.device import thread_count
from app.llama.library import build_name
from app.llama.model import Model
from app.messages import FrameReader, Hello, LoadFailed, LoadModel, ToWorker, encode_frame
from app.worker.draft import DraftModel, open_draft
from app.worker.embedding_worker import EmbeddingWorker, kind_of
from app.worker.engine import Engine
from app.worker.prefix_files import PrefixFiles, model_identity
from app.worker.prefix_store import PrefixStore
from app.worker.scoring import score_rows
from app.worker.speculation import Speculation, guesses_in_step

if TYPE_CHECKING:
    from collections.abc import Callable

    from app.models.kind import ModelKind
    from app.worker.embedding_engine import EmbeddingEngine

_RECEIVE_BYTES = 1 << 18
_FALLBACK_CONTEXT = 4096  # for files that don't say what the model was trained for


class Connection:
    """The worker's end of the socket pair."""

    def __init__(self, descriptor: int) -> None:
        """Own the inherited file descriptor."""
        self._socket = socket.socket(fileno=descriptor)
        self._readable = select.poll()
        self._readable.register(self._socket, select.POLLIN)
        self._sending = threading.Lock()  # the engine's thread and the reader both send
        self._engine: Engine | EmbeddingEngine | None = None
        self._first: queue.SimpleQueue[LoadModel] = queue.SimpleQueue()

    def send(self, message: msgspec.Struct) -> None:
        """Send one frame; blocks while the parent doesn't read."""
        frame = encode_frame(message)
        with self._sending:
            self._socket.sendall(frame)

    def start_reading(self) -> None:
        """Read on a thread of its own from now on."""
        threading.Thread(target=self._read, name="reader", daemon=True).start()

    def wait_for_load(self) -> LoadModel:
        """Return the parent's first frame."""
        return self._first.get()

    def serve(self, engine: Engine | EmbeddingEngine) -> None:
        """Hand every command from now on to the engine."""
        self._engine = engine

    def _read(self) -> None:
        frames = FrameReader()
        decode = msgspec.msgpack.Decoder(ToWorker).decode
        exit_code = 0
        try:
            while data := self._receive():
                for body in frames.feed(data):
                    self._handle(decode(body))
        except OSError:
            pass  # the parent went while we answered
        except Exception as error:
            print(f"worker: cannot understand the parent: {error}", file=sys.stderr, flush=True)
            exit_code = 1
        os._exit(exit_code)  # the main thread may be inside llama_decode for long: don't wait for it

    def _receive(self) -> bytes:
        self._readable.poll()  # a thread in recv would wake, too, whenever the parent has read what was sent
        try:
            return self._socket.recv(_RECEIVE_BYTES)
        except ConnectionError:
            return b""

    def _handle(self, message: ToWorker) -> None:
        if isinstance(message, LoadModel):
            self._first.put(message)
        elif self._engine is None:
            raise ValueError(f"{type(message).__name__} came before Hello was sent")
        else:
            self._engine.submit(message)


def main(arguments: list[str]) -> int:
    """Run the worker on the socket whose descriptor is the only argument; return the exit code."""
    if len(arguments) != 2 or not arguments[1].isdigit():
        print("usage: python -m app.worker FD (Pestle's server starts it)", file=sys.stderr)
        return 2
    faulthandler.enable()
    end_with_parent()
    connection = Connection(int(arguments[1]))
    connection.start_reading()
    try:
        command = connection.wait_for_load()
        if not (kind := kind_of(command)).generates:
            return _serve_embeddings(command, kind, connection)
        model, context, hello = load(command)
        draft = _draft(command, model, context)
    except (EngineError, OSError, ImportError) as error:  # the latter two: a library that isn't there
        connection.send(LoadFailed(str(error)))
        return 1
    with model, context, contextlib.nullcontext() if draft is None else contextlib.closing(draft):
        store = PrefixStore(command.prefix_memory_bytes, can_rewind=model.can_rewind)
        files, speculation = _prefix_files(command), _speculation(command, model, draft)
        engine = Engine(
            model,
            context,
            connection.send,
            command.itl_target,
            store,
            files,
            speculation,
            draft,
            deterministic=command.deterministic,
        )
        try:
            engine.warm_up()
        except DecodeError as error:
            connection.send(LoadFailed(error.message))
            return 1
        connection.serve(engine)
        connection.send(hello)
        return _run(engine.run)


def _serve_embeddings(command: LoadModel, kind: ModelKind, connection: Connection) -> int:
    with contextlib.closing(EmbeddingWorker(command, kind, connection.send)) as worker:
        connection.serve(worker.engine)
        connection.send(worker.hello)
        return _run(worker.engine.run)


def _draft(command: LoadModel, model: Model, context: Context) -> DraftModel | None:
    if not command.draft_path or not _speculates(command, model):
        return None
    try:
        return open_draft(command, model, context.context_length)
    except ModelLoadError:
        context.close()
        model.close()
        raise


def _prefix_files(command: LoadModel) -> PrefixFiles | None:
    if not command.prefix_disk_bytes:
        return None
    settings = (build_name(), command.cache_type, command.flash_attention, command.device)
    folder = Path(command.prefix_folder) / model_identity(Path(command.path), *settings)
    try:
        return PrefixFiles(folder, command.prefix_disk_bytes)
    except OSError as error:
        print(f"worker: no prefixes on disk: {folder}: {error.strerror}", file=sys.stderr, flush=True)
        return None


def _fingerprint(command: LoadModel, model: Model, context: Context) -> str:
    """Return what changes with anything that answers depend on (docs/determinism.md)."""
    together = "alone" if command.deterministic else f"{context.slots} slots, shared {context.shared_tokens}"
    numbers = (
        thread_count(command.threads),  # flash attention divides sums among them
        context.context_length,  # on which scaled rotary embeddings depend
        context.batch_size,
        context.micro_batch_size,
        command.gpu_layers,
    )
    libraries = (_version(name) for name in ("numpy", "llguidance", "jinja2"))
    guesses = (command.speculate, str(command.draft_tokens), command.draft_path)
    settings = (command.cache_type, command.flash_attention, *map(str, numbers), *libraries, *guesses, together)
    return model_identity(Path(command.path), build_name(), model.device_name, *settings)


def _version(name: str) -> str:
    """Return a library's version; of one that is not there, which only grammars need, nothing."""
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _speculates(command: LoadModel, model: Model) -> bool:
    return command.speculate != "off" and model.can_rewind


def _speculation(command: LoadModel, model: Model, draft: DraftModel | None) -> Speculation | None:
    if _speculates(command, model):
        cost = None if draft is None else draft.tensor_bytes / model.tensor_bytes
        return Speculation(command.draft_tokens, guesses_in_step(command.slots, command.draft_tokens), draft_cost=cost)
    if command.speculate != "off":
        print("worker: no speculation: this model's memory cannot be cut back", file=sys.stderr, flush=True)
    return None


def load(command: LoadModel) -> tuple[Model, Context, Hello]:
    """Load the model and make its context. Raises ModelLoadError."""
    started = time.perf_counter()
    model = Model(Path(command.path), device=command.device, gpu_layers=command.gpu_layers)
    try:
        trained = model.trained_context
        context_length = min(
            command.context_length or trained or _FALLBACK_CONTEXT,
            trained or sys.maxsize,
            command.kv_tokens or sys.maxsize,
        )
        guesses = guesses_in_step(command.slots, command.draft_tokens) if _speculates(command, model) else 0
        batch_size = max(command.batch_size, command.slots)
        context = Context(
            model,
            slots=command.slots,
            context_length=context_length,
            batch_size=batch_size,
            threads=thread_count(command.threads),
            logits_rows=command.slots + guesses,
            prompt_rows=max(command.slots, score_rows(model.vocabulary.size, batch_size)),
            shared_tokens=command.kv_tokens or None,
            cache_type=command.cache_type,
            flash_attention=command.flash_attention,
            micro_batch_size=command.micro_batch_size,
        )
    except ModelLoadError:
        model.close()
        raise
    hello = Hello(
        child="worker",
        pid=os.getpid(),
        vocabulary_size=model.vocabulary.size,
        context_length=context_length,
        slots=command.slots,
        model_name=model.name,
        architecture=model.architecture,
        description=model.description,
        parameters=model.parameter_count,
        model_bytes=model.tensor_bytes,
        has_chat_template=model.chat_template is not None,
        library_build=build_name(),
        device=model.device_name,
        fingerprint=_fingerprint(command, model, context),
        load_seconds=time.perf_counter() - started,
        capabilities=["completion"] if model.chat_template is None else ["chat", "completion"],
    )
    return model, context, hello


def _run(serve: Callable[[], None]) -> int:
    try:
        serve()
    except EngineError as error:
        print(f"worker: {error.message}", file=sys.stderr, flush=True)
        return 1
    except (BrokenPipeError, ConnectionResetError):
        return 0
    return 0
