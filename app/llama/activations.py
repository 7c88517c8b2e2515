"""What goes into a model's matrix multiplications while it computes: seen through llama.cpp's evaluation callback.

The callback runs between C frames, where a Python exception would be lost: it is kept, the computation stops, and
`Context.decode` raises it. Python raises what a signal's handler raises before a function's first line, where nothing
can keep it: decode on another thread than the main one, which signals never interrupt, and `stop` it from there.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from app.errors import EngineError
from app.llama.library import ggml_base, load

_F32, _I32 = 0, 26  # ggml_type
_OBJECT_BYTES = 32  # GGML_OBJECT_SIZE, which ggml_tensor_overhead counts in
_MOST_OPERATIONS = 64  # fewer than ggml has: it reads past the end of its table of names
_DIMENSIONS, _SOURCES = 4, 10


class _Tensor(ctypes.Structure):
    """ggml's `ggml_tensor`; `ne` are the dimensions, innermost first, and `nb` the strides in bytes."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * _DIMENSIONS),
        ("nb", ctypes.c_size_t * _DIMENSIONS),
        ("op", ctypes.c_int),
        ("op_params", ctypes.c_int32 * 16),
        ("flags", ctypes.c_int32),
        ("src", ctypes.c_void_p * _SOURCES),
        ("view_src", ctypes.c_void_p),
        ("view_offs", ctypes.c_size_t),
        ("data", ctypes.c_void_p),
        ("name", ctypes.c_char * 64),
        ("extra", ctypes.c_void_p),
        ("padding", ctypes.c_char * 8),
    )


@dataclasses.dataclass(frozen=True, slots=True)
class Multiplication:
    """A weight matrix (or a stack of them) and what it was multiplied with.

    `stack` is the shape of the stack, (outer, inner), (1, 1) for a plain matrix. `inputs` has the shape (outer, inner,
    rows, columns), float32. With `experts`, shape (tokens, experts used), the stack is one of experts, and `inputs` is
    (1, tokens, rows, columns): the input of use u of a token is its row u modulo rows.
    """

    weight: str
    stack: tuple[int, int]
    inputs: NDArray[np.float32]
    experts: NDArray[np.int32] | None


class MultiplicationTap:
    """Shows each multiplication of a context to `take`, if `wants` (name of the weight, rows of the input) says so.

    Those of experts are always shown, as llama-imatrix takes them. Belongs to one context, which keeps it alive.
    """

    def __init__(self, wants: Callable[[str, int], bool], take: Callable[[Multiplication], None]) -> None:
        """Make the callback. Raises EngineError if this library's tensors are not laid out as we read them."""
        self._wants, self._take = wants, take
        self._failure: BaseException | None = None
        self._stopped = False
        self._plain, self._experts = _operation("MUL_MAT"), _operation("MUL_MAT_ID")
        _check_layout()
        self.callback: Any = load().ggml_backend_sched_eval_callback(self._called)

    def stop(self) -> None:
        """Let the computation that is under way end soon, and every later one; what it computes is then worthless."""
        self._stopped = True

    def raise_failure(self) -> None:
        """Raise what `wants` or `take` raised in a computation, once."""
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _called(self, address: int, asked: bool, _user_data: Any) -> bool:
        try:
            if self._stopped or self._failure is not None:
                return asked  # yes, call again when this one is computed; then no, don't go on
            tensor = _Tensor.from_address(address)
            if asked:
                return self._is_wanted(tensor)
            self._take(self._read(tensor))
        except BaseException as error:  # raised again when no C frame is above us
            self._failure = error
            return False
        return True

    def _is_wanted(self, tensor: _Tensor) -> bool:
        if tensor.op == self._experts:
            return True
        if tensor.op != self._plain:
            return False
        inputs = _Tensor.from_address(tensor.src[1])
        return inputs.type == _F32 and self._wants(_weight_name(_Tensor.from_address(tensor.src[0])), inputs.ne[1])

    def _read(self, tensor: _Tensor) -> Multiplication:
        weight = _Tensor.from_address(tensor.src[0])
        inputs = _numbers(tensor.src[1], _F32, np.float32)
        experts = None
        if tensor.op == self._experts:
            experts = _numbers(tensor.src[2], _I32, np.int32)[0, 0]
            if experts.shape[0] != inputs.shape[1] or inputs.shape[0] != 1:
                raise EngineError(f"{_weight_name(weight)}: inputs {inputs.shape} for experts {experts.shape}")
        return Multiplication(_weight_name(weight), (weight.ne[3], weight.ne[2]), inputs, experts)


def _weight_name(weight: _Tensor) -> str:
    """Return the name without what the scheduler puts around it for a copy on a device: `CUDA0#NAME#0`."""
    name: str = weight.name.decode("utf-8", "surrogateescape")
    return name.split("#")[1] if "#" in name else name


def _numbers(address: int, type_number: int, dtype: Any) -> NDArray[Any]:
    """Copy a tensor from where it is, also a device, into an array of four dimensions."""
    tensor = _Tensor.from_address(address)
    if tensor.type != type_number or tensor.nb[0] != dtype().itemsize:
        raise EngineError(f"a tensor of type {tensor.type} and stride {tensor.nb[0]} where numbers were expected")
    size = _base().ggml_nbytes(address)
    raw = np.empty(size, np.uint8)
    _base().ggml_backend_tensor_get(address, raw.ctypes.data, 0, size)
    return np.ndarray(tuple(tensor.ne)[::-1], dtype, raw.data, strides=tuple(tensor.nb)[::-1])


@functools.cache
def _base() -> Any:
    base = ggml_base()
    base.ggml_op_name.argtypes = [ctypes.c_int]
    base.ggml_op_name.restype = ctypes.c_char_p
    base.ggml_tensor_overhead.restype = ctypes.c_size_t
    base.ggml_nbytes.argtypes = [ctypes.c_void_p]
    base.ggml_nbytes.restype = ctypes.c_size_t
    base.ggml_backend_tensor_get.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]
    base.ggml_backend_tensor_get.restype = None
    return base


@functools.cache
def _operation(name: str) -> int:
    for number in range(_MOST_OPERATIONS):
        if _base().ggml_op_name(number) == name.encode():
            return number
    raise EngineError(f"this build of ggml has no operation {name}")


def _check_layout() -> None:
    expected, found = ctypes.sizeof(_Tensor) + _OBJECT_BYTES, _base().ggml_tensor_overhead()
    if found != expected:
        raise EngineError(f"this build of ggml has tensors of {found} bytes, not {expected}: their inside is unknown")
