"""From a folder to a GGUF: source → checkpoint → family → plan → kernels → writer → verify."""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
import math
import os
import time
from collections.abc import Callable, Generator
from pathlib import Path

from app.errors import UsageError
from quantize import dequantize, families
from quantize import recipe as recipes
from quantize.checkpoint import Checkpoint
from quantize.header import QUANTIZATION_VERSION, KeyTable, aligned
from quantize.kernels import Slab, Workspace, encode, slabs_of
from quantize.left_out import left_out
from quantize.metadata import set_general
from quantize.model_size import ModelSize
from quantize.plan import Plan, plan_file
from quantize.recipe import NO_OVERRIDES, Overrides, Recipe
from quantize.selection import decide_types
from quantize.source import Source, open_source
from quantize.tensors import Part
from quantize.verify import Samples, verify
from quantize.writer import AtomicFile

Progress = Callable[[int, int], None]
"""Called with the bytes of the source that are done, and all of them."""

_DATA_NAMES = ("config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json")


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A run that is planned to the byte and has read no weight yet."""

    source: Source
    checkpoint: Checkpoint
    recipe: Recipe
    plan: Plan
    notes: tuple[str, ...] = ()
    """What people should know: what is left out, and what the family found."""

    @property
    def source_bytes(self) -> int:
        """The bytes of the weights that will be read."""
        return sum(self.bytes_read(part, part.rows) for tensor in self.plan.tensors for part in tensor.spec.parts)

    def bytes_read(self, part: Part, rows: int) -> int:
        """Return the bytes of the source that so many rows of a part take."""
        return self.checkpoint.tensors[part.source].stored_bytes(part.stored_rows(rows) * part.width)


@dataclasses.dataclass(frozen=True)
class Result:
    """What a run made: sizes in bytes, times in seconds."""

    path: Path
    type_name: str
    file_size: int
    source_bytes: int
    weights: int
    seconds: float
    by_type: dict[str, tuple[int, int, int]]


def prepare(path: Path, type_name: str, overrides: Overrides = NO_OVERRIDES) -> Prepared:
    """Understand a model's folder and plan its file; milliseconds, whatever the model's size.

    Raises `UsageError` for an unknown type or an impossible override, and `BadInputError` for a folder that cannot be
    used.
    """
    recipe = recipes.find(type_name)
    if overrides and not recipe.quantized:
        raise UsageError(
            f"types of single tensors can be set in quantized files only, not in {recipe.name}", param="type"
        )
    source = open_source(path)
    checkpoint = Checkpoint.open(source.folder)
    dequantize.decode(checkpoint, source)
    family = families.open_model(source)
    specs = family.tensors(checkpoint.tensors)
    keys = KeyTable()
    set_general(keys, source, family.architecture, ModelSize.of(specs))
    family.set_hyper_parameters(keys, recipe.file_type)
    keys.u32("general.quantization_version", QUANTIZATION_VERSION)
    decided = decide_types(keys, specs, [recipe], overrides).get(recipe.name, {})
    family.set_vocabulary(keys)
    notes = (*left_out(checkpoint.tensors, specs), *source.notes)
    return Prepared(source, checkpoint, recipe, plan_file(keys, specs, recipe, decided), notes)


def quantize(
    source: Path,
    type_name: str,
    out: Path,
    *,
    overrides: Overrides = NO_OVERRIDES,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Result:
    """Make a GGUF of a model's folder. `out` is replaced when the new file is whole, and not before.

    Raises `UsageError`, `BadInputError`, `StorageError` or `VerificationError`; then nothing is left behind.
    """
    return run(prepare(source, type_name, overrides), out, threads=threads, progress=progress)


def run(prepared: Prepared, out: Path, *, threads: int | None = None, progress: Progress | None = None) -> Result:
    """Carry a plan out."""
    began = time.monotonic()
    plan, checkpoint = prepared.plan, prepared.checkpoint
    out = out.absolute()
    _check_target(out, prepared)
    samples, done, total = Samples(), 0, prepared.source_bytes
    encoded = _encoded(prepared, threads or available_cpus())
    with checkpoint, AtomicFile(out, plan.file_size) as file, contextlib.closing(encoded):
        file.write(memoryview(plan.header))
        for slab, data in encoded:
            tensor = slab.tensor
            samples.take(len(plan.header) + tensor.offset + slab.offset, data)
            file.write(data)
            if slab.is_last:
                file.write(memoryview(bytes(aligned(tensor.nbytes) - tensor.nbytes)))
            if slab.part is not None:
                end = slab.first_row + slab.rows  # differences, so that rounded sizes add up
                done += prepared.bytes_read(slab.part, end) - prepared.bytes_read(slab.part, slab.first_row)
            if progress is not None:
                progress(done, total)
        file.commit(lambda part: verify(part, plan, samples))
    weights = sum(tensor.spec.weights for tensor in plan.tensors)
    seconds = time.monotonic() - began
    return Result(out, prepared.recipe.name, plan.file_size, total, weights, seconds, plan.by_type())


def available_cpus() -> int:
    """Return how many processors this process may use: the smaller of its affinity and its cgroup's quota."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        if quota != "max":
            cpus = min(cpus, math.ceil(int(quota) / int(period)))
    return max(1, cpus)


def _encoded(prepared: Prepared, threads: int) -> Generator[tuple[Slab, memoryview], None, None]:
    """Yield every slab with its bytes, in the file's order; the next ones are computed meanwhile."""
    checkpoint, through_bf16 = prepared.checkpoint, prepared.recipe.quantized

    def work(slab: Slab, space: Workspace) -> memoryview:
        return encode(slab, checkpoint, space, through_bf16=through_bf16).data

    free = [Workspace() for _ in range(threads * 2 + 2)]
    pending: collections.deque[tuple[Slab, Workspace, concurrent.futures.Future[memoryview]]] = collections.deque()
    with concurrent.futures.ThreadPoolExecutor(threads, thread_name_prefix="quantize") as pool:
        try:
            for tensor in prepared.plan.tensors:
                for slab in slabs_of(tensor):
                    if not free:
                        done, space, future = pending.popleft()
                        yield done, future.result()
                        free.append(space)
                    space = free.pop()
                    pending.append((slab, space, pool.submit(work, slab, space)))
            while pending:
                done, _, future = pending.popleft()
                yield done, future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _check_target(out: Path, prepared: Prepared) -> None:
    if out.is_dir():
        raise UsageError(f"{out}: a folder; --out names the file to write", param="out")
    inputs = [*prepared.checkpoint.shards, *(prepared.source.folder / name for name in _DATA_NAMES)]
    if out.exists() and any(path.exists() and out.samefile(path) for path in inputs):
        raise UsageError(f"{out}: is a file of the model itself; choose another --out", param="out")
