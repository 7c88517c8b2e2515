"""From a folder to a GGUF: source → checkpoint → family → plan → kernels → writer → verify."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from app.errors import UsageError
from quantize import dequantize, families, gguf_source
from quantize import recipe as recipes
from quantize.checkpoint import Checkpoint
from quantize.encoding import available_cpus, encoded
from quantize.header import QUANTIZATION_VERSION, KeyTable
from quantize.identity import identities
from quantize.importance import ImportanceMatrix, check_importance
from quantize.left_out import left_out
from quantize.metadata import set_general
from quantize.model_size import ModelSize
from quantize.mxfp4 import BLOCK_BYTES, BLOCK_WEIGHTS
from quantize.plan import Plan, check_originals, plan_file
from quantize.proof import Proof, start_proof
from quantize.proof_process import ProofProcess
from quantize.recipe import NO_OVERRIDES, Overrides, Recipe
from quantize.selection import decide_types
from quantize.slabs import Slab
from quantize.source import Source, open_source
from quantize.target import Target
from quantize.tensors import Part, TensorSpec

Progress = Callable[[int, int], None]
"""Called with the bytes of the source that are done, and all of them."""

_DATA_NAMES = ("config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json")


@dataclasses.dataclass(frozen=True)
class Output:
    """One file that a run makes."""

    recipe: Recipe
    plan: Plan


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A run that is planned to the byte and has read no weight yet."""

    source: Source
    checkpoint: Checkpoint
    outputs: tuple[Output, ...]
    notes: tuple[str, ...] = ()
    """What people should know: what is left out, and what the family found."""
    through_bf16: bool = True
    """Whether quantized files are made of numbers rounded to bf16, as upstream's two steps do."""
    importance: ImportanceMatrix | None = None

    proof: Proof | None = None
    """That llama.cpp will read text rightly, under way."""

    @property
    def plan(self) -> Plan:
        """The plan of the first file, in whose order the source is read."""
        return self.outputs[0].plan

    @property
    def source_bytes(self) -> int:
        """The bytes of the weights that will be read."""
        return sum(self.bytes_read(part, part.rows) for tensor in self.plan.tensors for part in tensor.spec.parts)

    def prove(self) -> tuple[str, ...]:
        """Wait for the proof of the tokenizer and return what people should know. Raises `TokenizerError`."""
        return () if self.proof is None else self.proof.wait()

    def bytes_read(self, part: Part, rows: int) -> int:
        """Return the bytes of the source that so many rows of a part take."""
        stored, weights = self.checkpoint.tensors, part.stored_rows(rows) * part.width
        if part.scales is not None:
            return weights // BLOCK_WEIGHTS * BLOCK_BYTES
        return stored[part.source].stored_bytes(weights)

    def bytes_of(self, slab: Slab) -> int:
        """Return the bytes of the source that a slab stands for."""
        if slab.part is None:
            return 0
        end = slab.first_row + slab.rows  # differences, so that rounded sizes add up
        return self.bytes_read(slab.part, end) - self.bytes_read(slab.part, slab.first_row)


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
    resumed_bytes: int | None = None
    """The bytes of the file that an earlier run had made; None if the run was not asked to resume."""


def prepare(
    path: Path,
    type_names: str | Sequence[str],
    overrides: Overrides = NO_OVERRIDES,
    *,
    importance: Path | str | None = None,
    allow_requantize: bool = False,
    proof_process: ProofProcess | None = None,
) -> Prepared:
    """Understand a model's folder and plan its file, or one for each type; milliseconds, whatever the model's size.

    A GGUF is quantized as llama-quantize does it; one that is quantized already only with `allow_requantize`, as are
    weights that a checkpoint holds in one of ggml's types.
    `importance` is a file of llama-imatrix, `proof_process` one that was started ahead. Raises `UsageError` for an
    unknown type or an impossible override, and `BadInputError` for a folder or a matrix that cannot be used.
    """
    chosen = [recipes.find(name) for name in ([type_names] if isinstance(type_names, str) else type_names)]
    matrix = _open_importance(importance, chosen)
    _check_recipes(chosen, overrides)
    if path.is_file() and path.suffix == ".gguf":
        return _prepare_gguf(path.absolute(), chosen, overrides, matrix, allow_requantize=allow_requantize)
    source = open_source(path)
    if proof_process is not None:
        proof_process.read(source.folder)
    checkpoint = Checkpoint.open(source.folder)
    dequantize.decode(checkpoint, source)
    family = families.open_model(source)
    specs = family.tensors(checkpoint.tensors)
    keys = KeyTable()
    set_general(keys, source, family.architecture, ModelSize.of(specs))
    family.set_hyper_parameters(keys, chosen[0].file_type)
    keys.u32("general.quantization_version", QUANTIZATION_VERSION)
    decided = decide_types(keys, specs, chosen, overrides, with_importance=matrix is not None)
    if not allow_requantize:
        check_originals(specs, decided)
    family.set_vocabulary(keys)
    proof = start_proof(keys, source, proof_process)
    notes = (*left_out(checkpoint.tensors, specs), *source.notes)
    outputs = _outputs(keys, specs, chosen, decided, matrix)
    return Prepared(source, checkpoint, outputs, notes, importance=matrix, proof=proof)


def _prepare_gguf(
    path: Path, chosen: list[Recipe], overrides: Overrides, matrix: ImportanceMatrix | None, *, allow_requantize: bool
) -> Prepared:
    model = gguf_source.open_gguf(path)
    chosen = [dataclasses.replace(recipe, quantized=True) for recipe in chosen]  # llama-quantize makes 16-bit files too
    decided = decide_types(
        model.keys, model.specs, chosen, overrides, types=model.types, with_importance=matrix is not None
    )
    if not allow_requantize:
        model.check_originals(decided)
    outputs = _outputs(model.keys, model.specs, chosen, decided, matrix)
    return Prepared(Source(path.parent), model.checkpoint, outputs, through_bf16=False, importance=matrix)


def _outputs(
    keys: KeyTable,
    specs: list[TensorSpec],
    chosen: list[Recipe],
    decided: Mapping[str, Mapping[str, str]],
    matrix: ImportanceMatrix | None,
) -> tuple[Output, ...]:
    more = {} if matrix is None else matrix.keys
    outputs = []
    for recipe in chosen:
        plan = plan_file(keys, specs, recipe, decided.get(recipe.name, {}), more)
        if recipe.quantized:
            check_importance(plan.tensors, matrix)
        outputs.append(Output(recipe, plan))
    return tuple(outputs)


def _open_importance(path: Path | str | None, chosen: list[Recipe]) -> ImportanceMatrix | None:
    if path is None:
        return None
    if not any(recipe.quantized for recipe in chosen):
        raise UsageError("--imatrix: it does nothing for files that are not quantized", param="imatrix")
    return ImportanceMatrix.open(path)


def quantize(
    source: Path,
    type_name: str,
    out: Path,
    *,
    overrides: Overrides = NO_OVERRIDES,
    importance: Path | str | None = None,
    allow_requantize: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Result:
    """Make a GGUF of a model's folder. `out` is replaced when the new file is whole, and not before.

    Raises `UsageError`, `BadInputError`, `StorageError` or `VerificationError`; then nothing is left behind.
    """
    prepared = prepare(source, type_name, overrides, importance=importance, allow_requantize=allow_requantize)
    return run(prepared, out, threads=threads, progress=progress)


def run(prepared: Prepared, out: Path, *, threads: int | None = None, progress: Progress | None = None) -> Result:
    """Carry the plan of one file out."""
    return run_all(prepared, [out], threads=threads, progress=progress)[0]


def run_all(
    prepared: Prepared,
    outs: Sequence[Path],
    *,
    threads: int | None = None,
    progress: Progress | None = None,
    resume: bool = False,
) -> list[Result]:
    """Carry all plans out in one read of the source. The files get their names when all of them are whole.

    `resume` goes on where a run that was killed had come to, and lets an interrupted one be gone on with.
    """
    began = time.monotonic()
    outs = [out.absolute() for out in outs]
    targets = _targets(prepared, outs, resume=resume)
    done, total = 0, prepared.source_bytes

    def is_missing(slabs: list[Slab]) -> bool:
        nonlocal done
        if not all(target.has_slab(slab) for target, slab in zip(targets, slabs, strict=True)):
            return True
        done += prepared.bytes_of(slabs[0])
        return False

    pieces_of_slabs = encoded(
        [output.plan for output in prepared.outputs],
        prepared.checkpoint,
        threads or available_cpus(),
        through_bf16=[prepared.through_bf16 and output.recipe.quantized for output in prepared.outputs],
        importance=prepared.importance,
        wanted=is_missing,
    )
    with contextlib.ExitStack() as stack:
        stack.enter_context(prepared.checkpoint)
        if prepared.importance is not None:
            stack.enter_context(prepared.importance)
        for target in targets:
            stack.enter_context(target)
        stack.enter_context(contextlib.closing(pieces_of_slabs))
        if prepared.proof is not None:
            stack.enter_context(contextlib.closing(prepared.proof))
        for slabs, pieces in pieces_of_slabs:
            if prepared.proof is not None:
                prepared.proof.check()
            for target, slab, data in zip(targets, slabs, pieces, strict=True):
                target.write(slab, data)
            done += prepared.bytes_of(slabs[0])
            if progress is not None:
                progress(done, total)
        for target in targets:
            target.check_plan()
        prepared.prove()
        for target in targets:
            target.publish()
    seconds = time.monotonic() - began
    return [
        _result(output, out, total, seconds, target.resumed_bytes if resume else None)
        for output, out, target in zip(prepared.outputs, outs, targets, strict=True)
    ]


def _targets(prepared: Prepared, outs: Sequence[Path], *, resume: bool) -> list[Target]:
    for out in outs:
        _check_target(out, prepared)
    planned = zip(prepared.outputs, outs, identities(prepared), strict=True)
    return [Target(output.plan, out, run, resume=resume) for output, out, run in planned]


def _result(output: Output, out: Path, source_bytes: int, seconds: float, resumed: int | None) -> Result:
    plan = output.plan
    weights = sum(tensor.spec.weights for tensor in plan.tensors)
    return Result(out, output.recipe.name, plan.file_size, source_bytes, weights, seconds, plan.by_type(), resumed)


def _check_recipes(chosen: list[Recipe], overrides: Overrides) -> None:
    names = [recipe.name for recipe in chosen]
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise UsageError(f"--type names {', '.join(twice)} twice", param="type")
    if overrides and not any(recipe.quantized for recipe in chosen):
        raise UsageError(
            f"types of single tensors can be set in quantized files only, not in {', '.join(names)}", param="type"
        )


def _check_target(out: Path, prepared: Prepared) -> None:
    if out.is_dir():
        raise UsageError(f"{out}: a folder; --out names the file to write", param="out")
    inputs = [*prepared.checkpoint.shards, *(prepared.source.folder / name for name in _DATA_NAMES)]
    if out.exists() and any(path.exists() and out.samefile(path) for path in inputs):
        raise UsageError(f"{out}: is a file of the model itself; choose another --out", param="out")
