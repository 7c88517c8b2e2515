"""What `pestle doctor` finds out, as its JSON has it."""

from __future__ import annotations

import msgspec


class Machine(msgspec.Struct, frozen=True):
    """Sizes are in bytes. `memory_limit` is the control group's, None where it sets none."""

    python: str
    platform: str
    processor: str
    features: list[str]
    cpus: int
    usable_cpus: int
    memory: int
    memory_available: int
    memory_limit: int | None


class Folder(msgspec.Struct, frozen=True):
    """A folder that we write to, whether we may, and the free bytes of its disk."""

    path: str
    writable: bool
    free: int


class Kernel(msgspec.Struct, frozen=True):
    """What quantizes a type, with an importance matrix or without: an instruction set of ours, or ggml, and why."""

    type: str
    importance: bool
    runs: str | None = None
    why: str | None = None


class Native(msgspec.Struct, frozen=True):
    """The build of llama.cpp, its devices and its threads; the kernels, and the instruction sets that we have here."""

    build: str
    library: str
    devices: list[str]
    threads: int
    instructions: list[str]
    kernels: list[Kernel]


class Report(msgspec.Struct, frozen=True):
    """All that there is to say; `problem` is why llama.cpp cannot be used."""

    pestle: str
    machine: Machine
    cache: Folder
    native: Native | None = None
    problem: str | None = None
