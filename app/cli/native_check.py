"""What `pestle doctor` asks of llama.cpp and of our kernels, in a process of its own: a damaged library may end it."""

from __future__ import annotations

import sys

import msgspec

from app.cli.findings import Kernel, Native
from app.llama.device import gpu_devices, thread_count
from app.llama.library import build_name, ggml_base_path
from app.models.gguf_types import TENSOR_TYPE_NUMBERS
from quantize.native import encoder, library


def look_at_libraries() -> Native:
    """Load llama.cpp, and compare the kernels with it where that is not remembered (a second or two)."""
    return Native(
        build=build_name(),
        library=str(ggml_base_path()),
        devices=[f"{device.registry}: {device.description}" for device in gpu_devices()],
        threads=thread_count(),
        instructions=[found.name for found in library.open_libraries()],
        kernels=[
            _kernel(name, weighted=weighted)
            for name in encoder.KERNELS
            for weighted in (False, True)
            if encoder.has_kernel(TENSOR_TYPE_NUMBERS[name], weighted=weighted)
        ],
    )


def _kernel(name: str, *, weighted: bool) -> Kernel:
    if not library.open_libraries():
        return Kernel(name, weighted, why="not installed: there was no C compiler, or none for this processor")
    chosen = encoder.chosen(TENSOR_TYPE_NUMBERS[name], weighted=weighted)
    if chosen is None:
        return Kernel(name, weighted, why="gives other bytes than this ggml")
    return Kernel(name, weighted, chosen)


if __name__ == "__main__":
    sys.stdout.buffer.write(msgspec.json.encode(look_at_libraries()))
