"""A context that gives one vector for each text: embeddings, or the score of a classification head."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from app.errors import DecodeError, ModelLoadError
from app.llama.context import decode_failure
from app.llama.handle import Handle
from app.llama.library import load, log_tail
from app.models.gguf_types import TENSOR_TYPE_NUMBERS
from app.models.kind import PoolingType

if TYPE_CHECKING:
    import numpy.typing as npt

    from app.llama.batch import Batch
    from app.llama.model import Model

MAX_SEQUENCES = 256  # LLAMA_MAX_SEQ
_PADDING = 256
_FLASH_ATTENTION = {"auto": -1, "off": 0, "on": 1}


class EmbeddingContext(Handle):
    """A context for batches of up to `batch_tokens` tokens of up to `sequences` texts, computed in one go.

    One go, because attention that goes both ways and pooling both need all tokens of a text at once.
    """

    def __init__(
        self,
        model: Model,
        pooling: PoolingType,
        *,
        context_length: int,
        batch_tokens: int,
        sequences: int,
        threads: int,
        cache_type: str = "f16",
        flash_attention: Literal["auto", "on", "off"] = "auto",
    ) -> None:
        """Allocate the compute buffers. Raises ModelLoadError when llama.cpp can't."""
        self._llama = load()
        parameters = self._llama.llama_context_default_params()
        tokens = max(batch_tokens, context_length)
        parameters.n_ctx = math.ceil(tokens / _PADDING) * _PADDING
        parameters.n_batch = parameters.n_ubatch = tokens
        parameters.n_seq_max = sequences
        parameters.kv_unified = True  # of models that have a cache: a batch's texts share it
        parameters.embeddings = True
        parameters.pooling_type = int(pooling)
        parameters.n_threads = parameters.n_threads_batch = threads
        parameters.flash_attn_type = _FLASH_ATTENTION[flash_attention]
        parameters.type_k = parameters.type_v = TENSOR_TYPE_NUMBERS[cache_type]
        parameters.offload_kqv = parameters.op_offload = bool(model.gpus)
        parameters.no_perf = True
        log_tail.clear()
        pointer = self._llama.llama_init_from_model(model.pointer, parameters)
        if not pointer:
            raise ModelLoadError(
                f"llama.cpp cannot create a context for texts of {context_length} tokens:\n{log_tail.summary()}\n"
                "a smaller --ctx-size needs less memory"
            )
        super().__init__(pointer)
        self.context_length = context_length
        self.batch_tokens = tokens
        self.sequences = sequences
        scores = self._llama.llama_model_n_cls_out(model.pointer)
        size = scores if pooling is PoolingType.RANK else self._llama.llama_model_n_embd_out(model.pointer)
        self.size = int(size)  # numbers of one vector
        self.last_code = 0  # what llama_decode returned last
        self._memory = self._llama.llama_get_memory(pointer)

    def embed(self, batch: Batch, count: int) -> npt.NDArray[np.float32]:
        """Compute a batch of `count` sequences, numbered from 0; return a vector of each, shape (count, size), float32.

        The vectors are the model's own: nothing is normalised. Raises DecodeError; the context is empty then, too.
        """
        if len(batch) > self.batch_tokens or not 1 <= count <= self.sequences:
            raise DecodeError(
                f"a batch of {len(batch)} tokens in {count} texts is over the context's limits "
                f"({self.batch_tokens}, {self.sequences})"
            )
        try:
            code = self.last_code = self._llama.llama_decode(self.pointer, batch.structure)
            if code != 0:
                raise decode_failure(code)
            return np.stack([self._vector(sequence) for sequence in range(count)])
        finally:
            if self._memory:
                self._llama.llama_memory_clear(self._memory, False)

    def _vector(self, sequence: int) -> npt.NDArray[np.float32]:
        address: Any = self._llama.llama_get_embeddings_seq(self.pointer, sequence)
        if not address:
            raise DecodeError(f"llama.cpp gave no embedding of text {sequence} of the batch")
        return np.ctypeslib.as_array(address, shape=(self.size,))

    def _free(self, pointer: Any) -> None:
        self._llama.llama_free(pointer)
