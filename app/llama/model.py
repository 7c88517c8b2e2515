"""A GGUF that llama.cpp has opened: whole, or its vocabulary only."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.errors import ModelFileError, ModelLoadError, StorageError
from app.llama.device import Device, GpuDevice, offload_devices
from app.llama.handle import Handle
from app.llama.library import load, log_tail
from app.llama.vocab import Vocabulary
from app.models.gguf import read_header

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

_TEXT_BYTES = 256
_ALL_LAYERS = -1


class _LoadedModel(Handle):
    def __init__(self, path: Path, parameters: Any) -> None:
        """Load the file. Raises ModelLoadError with llama.cpp's own explanation."""
        self._llama = load()
        if not path.is_file():
            raise ModelLoadError(f"{path} is not a file; give the path of a GGUF")
        try:
            read_header(path, largest_array=0)  # bounded: llama.cpp's own parser trusts what it reads too far
        except (ModelFileError, StorageError) as error:
            raise ModelLoadError(error.message) from error
        log_tail.clear()
        pointer = self._llama.llama_model_load_from_file(str(path).encode(), parameters)
        if not pointer:
            raise ModelLoadError(f"llama.cpp cannot load {path}:\n{log_tail.summary()}")
        super().__init__(pointer)
        self.path = path
        self.vocabulary = Vocabulary(self._llama.llama_model_get_vocab(pointer))

    @functools.cached_property
    def metadata(self) -> dict[str, str]:
        """The file's keys and values (no arrays), as llama.cpp prints them."""
        llama, pointer = self._llama, self.pointer
        entries: dict[str, str] = {}
        for index in range(llama.llama_model_meta_count(pointer)):
            key = _read_text(llama.llama_model_meta_key_by_index, pointer, index)
            entries[key] = _read_text(llama.llama_model_meta_val_str_by_index, pointer, index)
        return entries

    @property
    def architecture(self) -> str:
        """The file's `general.architecture`."""
        return self.metadata.get("general.architecture", "")

    @property
    def name(self) -> str:
        """The file's `general.name`."""
        return self.metadata.get("general.name", "")

    @property
    def trained_context(self) -> int:
        """Tokens of context that the model was trained for; 0 when the file doesn't say."""
        return int(self.metadata.get(f"{self.architecture}.context_length", "0"))

    @property
    def chat_template(self) -> str | None:
        """The file's default chat template (Jinja)."""
        template: bytes | None = self._llama.llama_model_chat_template(self.pointer, None)
        return None if template is None else template.decode("utf-8", "replace")

    @property
    def rerank_template(self) -> str | None:
        """The file's template for rerankers: a text with {query} and {document} in it."""
        return self.metadata.get("tokenizer.chat_template.rerank")

    def _free(self, pointer: Any) -> None:
        self._llama.llama_model_free(pointer)


class VocabularyModel(_LoadedModel):
    """A model of which only metadata and vocabulary are loaded: for templates and tokenizing."""

    def __init__(self, path: Path) -> None:
        """Load the vocabulary. Raises ModelLoadError."""
        parameters = load().llama_model_default_params()
        parameters.vocab_only = True
        parameters.devices = ctypes.cast(_device_list([]), ctypes.c_void_p)
        super().__init__(path, parameters)

    def tokenize(
        self, text: str | bytes, *, add_special: bool = False, parse_special: bool = False
    ) -> npt.NDArray[np.int32]:
        """Return the token ids of a text; see Vocabulary.tokenize."""
        _ = self.pointer  # raises when closed
        return self.vocabulary.tokenize(text, add_special=add_special, parse_special=parse_special)

    def token_to_piece(self, token: int, *, special: bool = False) -> bytes:
        """Return the bytes of one token; see Vocabulary.token_to_piece."""
        _ = self.pointer
        return self.vocabulary.token_to_piece(token, special=special)


class Model(_LoadedModel):
    """A model with its weights, on the devices chosen."""

    def __init__(self, path: Path, *, device: Device = "auto", gpu_layers: int = _ALL_LAYERS) -> None:
        """Load the weights. Raises ModelLoadError: no such device, not a GGUF, or a model that can't generate."""
        self.gpus: list[GpuDevice] = offload_devices(device) if gpu_layers != 0 else []
        parameters = load().llama_model_default_params()
        devices = _device_list([gpu.pointer for gpu in self.gpus])
        parameters.devices = ctypes.cast(devices, ctypes.c_void_p)
        parameters.n_gpu_layers = gpu_layers if self.gpus else 0
        super().__init__(path, parameters)
        if self._llama.llama_model_has_encoder(self.pointer) or not self._llama.llama_model_has_decoder(self.pointer):
            self.close()
            raise ModelLoadError(f"{path} holds a model with an encoder; Pestle serves decoder-only text models")

    @property
    def device_name(self) -> str:
        """The GPUs in use, or "CPU"."""
        return ", ".join(gpu.description for gpu in self.gpus) or "CPU"

    @property
    def description(self) -> str:
        """llama.cpp's own words, as "llama 135M Q8_0"."""
        return _read_text(self._llama.llama_model_desc, self.pointer)

    @property
    def parameter_count(self) -> int:
        """Number of weights."""
        return int(self._llama.llama_model_n_params(self.pointer))

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all tensors."""
        return int(self._llama.llama_model_size(self.pointer))

    @property
    def has_recurrent_state(self) -> bool:
        """Whether each sequence has a state of a fixed size, which takes memory for every slot."""
        return bool(
            self._llama.llama_model_is_recurrent(self.pointer) or self._llama.llama_model_is_hybrid(self.pointer)
        )

    @property
    def can_rewind(self) -> bool:
        """Whether a sequence's memory can be cut at any position: not with recurrent states or sliding windows."""
        return not (self.has_recurrent_state or self._llama.llama_model_n_swa(self.pointer) > 0)


def _device_list(pointers: list[int]) -> Any:
    return (ctypes.c_void_p * (len(pointers) + 1))(*pointers, None)


def _read_text(function: Any, *arguments: Any) -> str:
    size = _TEXT_BYTES
    while True:
        buffer = ctypes.create_string_buffer(size)
        length = function(*arguments, buffer, size)
        if length < size:
            return buffer.value.decode("utf-8", "replace") if length >= 0 else ""
        size = length + 1
