"""Read the weights of a GGUF as float32."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    from app.models.gguf import Header, TensorInfo

    Array = np.ndarray[Any, Any]


class Weights:
    """The tensors of one GGUF, mapped: `values(name)` is float32 in numpy's order of dimensions."""

    def __init__(self, header: Header) -> None:
        unknown = sorted({tensor.type_name for tensor in header.tensors} - set(_DECODERS))
        if unknown:
            raise ValueError(f"{header.path}: no decoder for {', '.join(unknown)}, only for {', '.join(_DECODERS)}")
        self.tensors: dict[str, TensorInfo] = {tensor.name: tensor for tensor in header.tensors}
        self._start = header.data_offset
        self._bytes = np.memmap(header.path, dtype=np.uint8, mode="r")

    def values(self, name: str) -> Array:
        """Dequantize one tensor. Raises KeyError for a name that is not there."""
        tensor = self.tensors[name]
        start = self._start + tensor.offset
        block_bytes, decode = _DECODERS[tensor.type_name]
        raw = np.asarray(self._bytes[start : start + tensor.nbytes])
        return decode(raw.reshape(-1, block_bytes)).reshape(tensor.shape)


def _f32(blocks: Array) -> Array:
    return blocks.view("<f4")


def _q4_1(blocks: Array) -> Array:
    scale_and_minimum = blocks[:, :4].copy().view("<f2").astype(np.float32)
    packed = blocks[:, 4:]
    levels = np.concatenate([packed & 0x0F, packed >> 4], axis=1).astype(np.float32)
    return levels * scale_and_minimum[:, :1] + scale_and_minimum[:, 1:]


def _q8_0(blocks: Array) -> Array:
    scales = blocks[:, :2].copy().view("<f2").astype(np.float32)
    return blocks[:, 2:].view(np.int8).astype(np.float32) * scales


# ggml type → bytes of a block, and the decoder of an array of blocks
_DECODERS: dict[str, tuple[int, Callable[[Array], Array]]] = {
    "f32": (4, _f32),
    "q4_1": (20, _q4_1),
    "q8_0": (34, _q8_0),
}
