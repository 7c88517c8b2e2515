"""What this machine gives us: Python, processor, memory, disk."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
from pathlib import Path

import psutil

from app.cli.findings import Folder, Machine

_FEATURES = (  # what llama.cpp or our kernels can use, by the names of /proc/cpuinfo
    "sse2", "ssse3", "avx", "avx2", "f16c", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_int8",
    "asimd", "asimddp", "asimdhp", "i8mm", "bf16", "sve", "sve2",
)  # fmt: skip
_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUPS = Path("/proc/self/cgroup")


def look_at_machine() -> Machine:
    """Ask the operating system."""
    memory = psutil.virtual_memory()
    name, features = _processor()
    return Machine(
        python=f"{platform.python_implementation()} {platform.python_version()}",
        platform=platform.platform(),
        processor=name,
        features=features,
        cpus=os.cpu_count() or 1,
        usable_cpus=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory=memory.total,
        memory_available=memory.available,
        memory_limit=memory_limit(),
    )


def look_at_folder(path: Path) -> Folder:
    """Look at a folder, or at the one that it would be made in."""
    existing = next(folder for folder in (path, *path.parents) if folder.exists())
    writable = existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)
    return Folder(str(path), writable=writable, free=shutil.disk_usage(existing).free)


def memory_limit(cgroups: Path = _CGROUPS, own: Path = _OWN_CGROUPS) -> int | None:
    """Return the least limit of our control group and those above it, of either version; None if there is none."""
    limits = []
    with contextlib.suppress(OSError):
        for line in own.read_text("utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "":
                root, name = cgroups, "memory.max"
            elif "memory" in controllers.split(","):
                root, name = cgroups / "memory", "memory.limit_in_bytes"
            else:
                continue
            folder = root / path.lstrip("/")
            limits += [_limit(above / name) for above in (folder, *folder.parents) if above.is_relative_to(root)]
    known = [limit for limit in limits if limit is not None]
    return min(known) if known else None


def _limit(file: Path) -> int | None:
    try:
        limit = int(file.read_text("ascii"))
    except (OSError, ValueError):  # there is none, or it is "max"
        return None
    return limit if limit < 1 << 60 else None  # the first version says a number near 2^63 for no limit


def _processor() -> tuple[str, list[str]]:
    name, features = platform.processor() or platform.machine(), set[str]()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text("utf-8", "replace").split("\n\n")[0].splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                name = value.strip()
            elif key.strip() in {"flags", "Features"}:
                features.update(value.split())
    return name, [feature for feature in _FEATURES if feature in features]
