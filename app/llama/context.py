"""A model's working state: KV cache, compute buffers and threads, and the decode call."""

from __future__ import annotations

import ctypes
import math
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from app.errors import DecodeError, ModelLoadError, NoKvSlotError
from app.llama.batch import Batch
from app.llama.handle import Handle
from app.llama.library import load, log_tail
from app.llama.memory import Memory
from app.models.gguf_types import TENSOR_TYPE_NUMBERS

if TYPE_CHECKING:
    import numpy.typing as npt

    from app.llama.activations import MultiplicationTap
    from app.llama.model import Model

_MAX_UBATCH = 512  # tokens in one graph; more needs more compute buffer and is not faster
_PADDING = 256  # to whose multiples llama.cpp brings a sequence's share
_FLASH_ATTENTION = {"auto": -1, "off": 0, "on": 1}
_NO_KV_SLOT = 1
_EXPLANATIONS = {
    1: "the KV cache has no room for this batch",
    2: "the computation was aborted",
    -1: "the batch is not valid",
    -2: "memory for the computation could not be allocated",
    -3: "the computation failed on the device",
}


class Context(Handle):
    """A context for `slots` sequences of up to `context_length` tokens; each has its own share, or all one store."""

    def __init__(
        self,
        model: Model,
        *,
        slots: int,
        context_length: int,
        batch_size: int,
        threads: int,
        logits_rows: int | None = None,
        prompt_rows: int = 0,
        shared_tokens: int | None = None,
        cache_type: str = "f16",
        flash_attention: Literal["auto", "on", "off"] = "auto",
        micro_batch_size: int = 0,
        tap: MultiplicationTap | None = None,
    ) -> None:
        """Allocate KV cache and compute buffers. Raises ModelLoadError when llama.cpp can't.

        A batch may ask for `logits_rows` rows of logits, by default one a slot, and `prompt_rows` more for prompts.
        `shared_tokens`: one store of so many tokens for all slots, in place of one for each. `micro_batch_size`: tokens
        that are computed at once. `tap` sees the multiplications.
        """
        self._llama = load()
        parameters = self._llama.llama_context_default_params()
        padded = math.ceil((shared_tokens or context_length) / _PADDING) * _PADDING
        parameters.n_ctx = padded if shared_tokens else slots * padded
        parameters.n_seq_max = slots
        parameters.n_batch = batch_size
        parameters.n_ubatch = min(batch_size, micro_batch_size or _MAX_UBATCH)
        rows = (logits_rows or slots) + prompt_rows
        parameters.n_outputs_max = rows  # the default reserves a row of logits for each token
        parameters.n_threads = parameters.n_threads_batch = threads
        parameters.flash_attn_type = _FLASH_ATTENTION[flash_attention]
        parameters.type_k = parameters.type_v = TENSOR_TYPE_NUMBERS[cache_type]
        parameters.kv_unified = shared_tokens is not None
        parameters.swa_full = False
        parameters.offload_kqv = parameters.op_offload = bool(model.gpus)
        parameters.no_perf = True
        self._tap = tap  # llama.cpp calls it for as long as the context lives
        if tap is not None:
            parameters.cb_eval = tap.callback
        log_tail.clear()
        pointer = self._llama.llama_init_from_model(model.pointer, parameters)
        if not pointer:
            raise ModelLoadError(
                f"llama.cpp cannot create a context of {slots} slots with {context_length} tokens each:\n"
                f"{log_tail.summary()}\nfewer slots or a smaller context need less memory"
            )
        super().__init__(pointer)
        self.slots = slots
        self.shared_tokens = padded if shared_tokens else None
        self.context_length = context_length
        self.batch_size = batch_size
        self.micro_batch_size = int(parameters.n_ubatch)
        self.prompt_rows = prompt_rows
        self._logits_rows = rows
        self.memory = Memory(self._llama.llama_get_memory(pointer))
        self._vocabulary_size = model.vocabulary.size
        self.last_code = 0  # what llama_decode returned last
        self._logits_address = 0
        self._logits: npt.NDArray[np.float32] = np.empty((0, self._vocabulary_size), np.float32)

    def decode(self, batch: Batch) -> npt.NDArray[np.float32]:
        """Compute the batch; return its logits, shape (batch.rows, vocabulary), float32.

        The array is llama.cpp's own buffer: it may be written to, and is valid until the next decode. Raises
        NoKvSlotError (nothing has changed), DecodeError (ask `memory.length` what is left of the sequences), or what
        the tap raised.
        """
        if len(batch) > self.batch_size or batch.rows > self._logits_rows:
            raise DecodeError(
                f"a batch of {len(batch)} tokens with {batch.rows} rows of logits is over the context's limits "
                f"({self.batch_size}, {self._logits_rows})"
            )
        code = self.last_code = self._llama.llama_decode(self.pointer, batch.structure)
        if self._tap is not None:
            self._tap.raise_failure()
        if code == 0:
            return self._view_logits(batch.rows)
        if code == _NO_KV_SLOT:
            raise NoKvSlotError("the KV cache has no room for this batch (llama_decode returned 1)")
        raise decode_failure(code)

    def state_bytes(self, sequence: int) -> int:
        """Return how many bytes `save_sequence` would return."""
        return int(self._llama.llama_state_seq_get_size(self.pointer, sequence))

    def save_sequence(self, sequence: int) -> npt.NDArray[np.uint8]:
        """Return a copy of what the memory holds of a sequence, for `restore_sequence` of such a context."""
        size = self.state_bytes(sequence)
        state = np.empty(size, np.uint8)
        written = self._llama.llama_state_seq_get_data(self.pointer, _bytes_of(state), size, sequence)
        return state[:written]

    def restore_sequence(self, sequence: int, state: npt.NDArray[np.uint8]) -> bool:
        """Replace a sequence's memory; False, and the sequence empty, when the state doesn't fit."""
        self.memory.clear(sequence)
        read = self._llama.llama_state_seq_set_data(self.pointer, _bytes_of(state), len(state), sequence)
        if read != len(state):
            self.memory.clear(sequence)
            return False
        return True

    def _view_logits(self, rows: int) -> npt.NDArray[np.float32]:
        if rows == 0:
            return self._logits[:0]
        pointer: Any = self._llama.llama_get_logits(self.pointer)
        address = ctypes.addressof(pointer.contents)
        if address != self._logits_address:  # llama.cpp may have moved its buffer, which has room for all rows
            self._logits = np.ctypeslib.as_array(pointer, shape=(self._logits_rows, self._vocabulary_size))
            self._logits_address = address
        return self._logits[:rows]

    def _free(self, pointer: Any) -> None:
        self._llama.llama_free(pointer)


def decode_failure(code: int) -> DecodeError:
    """Return the error for what `llama_decode` returned, with llama.cpp's last words."""
    explanation = _EXPLANATIONS.get(code, "an unknown failure")
    return DecodeError(f"llama_decode returned {code}: {explanation}\n{log_tail.summary()}".rstrip())


def _bytes_of(array: npt.NDArray[np.uint8]) -> Any:
    return ctypes.cast(array.ctypes.data, ctypes.POINTER(ctypes.c_uint8))
