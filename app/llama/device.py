"""What we may compute on: the devices of the library build, and the cores of this process."""

from __future__ import annotations

import ctypes
import functools
import math
import os
from pathlib import Path
from typing import Literal, NamedTuple

import psutil

from app.errors import ModelLoadError
from app.llama.library import ggml, ggml_base, load

Device = Literal["auto", "cpu", "cuda", "metal"]

_GPU_TYPES = (1, 2)  # GGML_BACKEND_DEVICE_TYPE_GPU, _IGPU
_REGISTRIES = {"cuda": ("CUDA", "ROCm", "MUSA"), "metal": ("MTL", "Metal")}
_CGROUP_QUOTA_FILE = Path("/sys/fs/cgroup/cpu.max")


class GpuDevice(NamedTuple):
    """A device that layers can be offloaded to."""

    pointer: int
    registry: str
    description: str


def gpu_devices() -> list[GpuDevice]:
    """Return the GPUs that this library build can use."""
    load()
    registry, base = ggml(), _device_functions()
    registry.ggml_backend_dev_count.restype = ctypes.c_size_t
    registry.ggml_backend_dev_get.restype = ctypes.c_void_p
    registry.ggml_backend_dev_get.argtypes = [ctypes.c_size_t]
    pointers = [registry.ggml_backend_dev_get(index) for index in range(registry.ggml_backend_dev_count())]
    return [
        GpuDevice(
            pointer,
            base.ggml_backend_reg_name(base.ggml_backend_dev_backend_reg(pointer)).decode(),
            base.ggml_backend_dev_description(pointer).decode("utf-8", "replace"),
        )
        for pointer in pointers
        if base.ggml_backend_dev_type(pointer) in _GPU_TYPES
    ]


def offload_devices(device: Device) -> list[GpuDevice]:
    """Return the GPUs to use for a choice of device: none for "cpu", all that there are for "auto".

    Raises ModelLoadError when the library build or the machine lacks the device.
    """
    if device == "cpu":
        return []
    present = gpu_devices()
    if device == "auto":
        return present
    chosen = [gpu for gpu in present if gpu.registry in _REGISTRIES[device]]
    if not chosen:
        has = ", ".join(f"{gpu.registry} ({gpu.description})" for gpu in present) or "the CPU only"
        raise ModelLoadError(
            f"device {device!r} is not there: this build of llama.cpp on this machine has {has}; "
            f"build for it with `make setup ACCEL={device}`, or choose --device auto"
        )
    return chosen


def thread_count(requested: int = 0) -> int:
    """Return how many threads may compute: as asked, or one a physical core within affinity and cgroup quota."""
    if requested > 0:
        return requested
    physical = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else physical
    return max(1, min(physical, allowed, _cgroup_cpus()))


def _cgroup_cpus() -> int:
    try:
        quota, period = _CGROUP_QUOTA_FILE.read_text("ascii").split()
        return math.ceil(int(quota) / int(period))
    except (OSError, ValueError):  # no cgroup, or its quota is "max"
        return 2**31


@functools.cache
def _device_functions() -> ctypes.CDLL:
    base = ggml_base()
    base.ggml_backend_dev_type.restype = ctypes.c_int
    base.ggml_backend_dev_type.argtypes = [ctypes.c_void_p]
    base.ggml_backend_dev_description.restype = ctypes.c_char_p
    base.ggml_backend_dev_description.argtypes = [ctypes.c_void_p]
    base.ggml_backend_dev_backend_reg.restype = ctypes.c_void_p
    base.ggml_backend_dev_backend_reg.argtypes = [ctypes.c_void_p]
    base.ggml_backend_reg_name.restype = ctypes.c_char_p
    base.ggml_backend_reg_name.argtypes = [ctypes.c_void_p]
    return base
