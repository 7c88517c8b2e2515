"""What the worker does with a model that embeds or reranks, in place of loading it for generation."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from app.errors import ModelFileError, ModelLoadError, StorageError
from app.llama.device import thread_count
from app.llama.embedding_context import MAX_SEQUENCES, EmbeddingContext
from app.llama.library import build_name
from app.llama.model import Model
from app.messages import Hello
from app.models.gguf import read_header
from app.models.kind import ModelKind, model_kind
from app.worker.embedding_engine import EmbeddingEngine
from app.worker.embedding_request import EmbeddingModel
from app.worker.prefix_files import model_identity

if TYPE_CHECKING:
    from collections.abc import Callable

    import msgspec

    from app.messages import Capability, LoadModel

_FALLBACK_CONTEXT = 512  # for files that don't say what the model was trained for
_LONGEST_LABELS = 1024  # classes of a classifier whose names are looked at


def kind_of(command: LoadModel) -> ModelKind:
    """Return what the file is for. Raises ModelLoadError, also for a file that can't be read."""
    path = Path(command.path)
    try:
        return model_kind(read_header(path, largest_array=_LONGEST_LABELS), command.pooling)
    except (ModelFileError, StorageError) as error:
        raise ModelLoadError(error.message) from error


class EmbeddingWorker:
    """A loaded model with its context and engine; close it."""

    def __init__(self, command: LoadModel, kind: ModelKind, publish: Callable[[msgspec.Struct], None]) -> None:
        """Load everything and compute one token. Raises ModelLoadError, DecodeError."""
        started = time.perf_counter()
        self._command, self._kind = command, kind
        self._model = Model(Path(command.path), device=command.device, gpu_layers=command.gpu_layers)
        try:
            self._context = self._new_context()
        except ModelLoadError:
            self._model.close()
            raise
        description = EmbeddingModel(
            self._model.vocabulary.size,
            self._context.size,
            reranks=kind.reranks,
            gives_probabilities=kind.gives_probabilities,
        )
        self.engine = EmbeddingEngine(
            self._context,
            description,
            publish,
            batch_tokens=command.batch_size,
            deterministic=command.deterministic,
        )
        self.engine.warm_up()
        self.hello = self._new_hello(time.perf_counter() - started)

    def close(self) -> None:
        """Free context and model."""
        self._context.close()
        self._model.close()

    def _new_context(self) -> EmbeddingContext:
        command = self._command
        trained = self._model.trained_context or _FALLBACK_CONTEXT
        context_length = min(command.context_length or trained, trained)
        return EmbeddingContext(
            self._model,
            self._kind.pooling,
            context_length=context_length,
            batch_tokens=command.batch_size,
            sequences=self._sequences(),
            threads=thread_count(command.threads),
            cache_type=command.cache_type,
            flash_attention=command.flash_attention,
        )

    def _sequences(self) -> int:
        """Return how many texts a batch may have."""
        if self._command.deterministic:
            return 1
        if self._model.has_recurrent_state:  # memory for each of them
            return self._command.slots
        return min(MAX_SEQUENCES, self._command.batch_size)

    def _new_hello(self, seconds: float) -> Hello:
        command, model, context = self._command, self._model, self._context
        capability: Capability = "rerank" if self._kind.reranks else "embeddings"
        settings = (command.cache_type, command.flash_attention, str(context.batch_tokens), self._kind.pooling.name)
        return Hello(
            child="worker",
            pid=os.getpid(),
            vocabulary_size=model.vocabulary.size,
            context_length=context.context_length,
            slots=command.slots,
            model_name=model.name,
            architecture=model.architecture,
            description=model.description,
            parameters=model.parameter_count,
            model_bytes=model.tensor_bytes,
            library_build=build_name(),
            device=model.device_name,
            fingerprint=model_identity(Path(command.path), build_name(), model.device_name, *settings),
            load_seconds=seconds,
            capabilities=[capability],
            embedding_size=0 if self._kind.reranks else context.size,
        )
