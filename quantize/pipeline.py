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
from quantize.card import remove_card
from quantize.checkpoint import Checkpoint, StoredTensor
from quantize.digest import FileDigest, RunningDigest
from quantize.encoding import available_cpus, encoded
from quantize.header import QUANTIZATION_VERSION, KeyTable, aligned
from quantize.importance import ImportanceMatrix, check_importance
from quantize.left_out import left_out
from quantize.loss import Losses
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
from quantize.streamed import open_streamed
from quantize.tensors import Part, TensorSpec
from quantize.verify import Samples, verify
from quantize.writer import AtomicFile

ReferenceChoice = Callable[[Sequence[TensorSpec], Mapping[str, StoredTensor]], str | None]
"""Says which unquantized type is made too, to judge the others against; None: no such file."""

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
    overrides: Overrides = NO_OVERRIDES
    allow_requantize: bool = False

    proof: Proof | None = None
    """That llama.cpp will read text rightly, under way."""

    @property
    def plan(self) -> Plan:
        """The plan of the first file, in whose order the source is read."""
        return self.outputs[0].plan

    @property
    def source_bytes(self) -> int:
        """The bytes of the weights that will be read."""
        return sum(self.bytes_read(part, part.rows) for part in self.parts)

    @property
    def parts(self) -> list[Part]:
        """Everything that will be read."""
        return [part for tensor in self.plan.tensors for part in tensor.spec.parts]

    def prove(self) -> tuple[str, ...]:
        """Wait for the proof of the tokenizer and return what people should know. Raises `TokenizerError`."""
        return () if self.proof is None else self.proof.wait()

    def close(self) -> None:
        """End what is under way, if the run does not come to it."""
        if self.proof is not None:
            self.proof.close()

    def bytes_of(self, slab: Slab) -> int:
        """Return the bytes of the source that a slab takes: differences, so that rounded sizes add up."""
        if slab.part is None:
            return 0
        return self.bytes_read(slab.part, slab.first_row + slab.rows) - self.bytes_read(slab.part, slab.first_row)

    def bytes_read(self, part: Part, rows: int) -> int:
        """Return the bytes of the source that so many rows of a part take; a group of rows is shared by its takers."""
        stored, weights = self.checkpoint.tensors, rows * part.width
        if part.scales is not None:
            return weights // BLOCK_WEIGHTS * BLOCK_BYTES
        return stored[part.source].stored_bytes(weights)


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
    digest: FileDigest
    losses: Losses | None = None
    """What each tensor lost, if that was asked for."""


def prepare(
    path: Path,
    type_names: str | Sequence[str],
    overrides: Overrides = NO_OVERRIDES,
    *,
    importance: Path | str | None = None,
    allow_requantize: bool = False,
    proof_process: ProofProcess | None = None,
    reference: ReferenceChoice | None = None,
    workplace: Path | None = None,
) -> Prepared:
    """Understand a model's folder and plan its file, or one for each type; milliseconds, whatever the model's size.

    A GGUF is quantized as llama-quantize does it; one that is quantized already only with `allow_requantize`, as are
    weights that a checkpoint holds in one of ggml's types.
    `importance` is a file of llama-imatrix, `proof_process` one that was started ahead. `reference` may add a file, the
    last, if it is not among the types; a GGUF needs none. A model on the Hub is streamed through `workplace`, a folder
    that outlives the run, if there is one: see `streamed`. Raises `UsageError` for an unknown type or an impossible
    override, and `BadInputError` for a folder or a matrix that cannot be used.
    """
    chosen = [recipes.find(name) for name in ([type_names] if isinstance(type_names, str) else type_names)]
    matrix = _open_importance(importance, chosen)
    _check_recipes(chosen, overrides)
    if workplace is None and path.is_file() and path.suffix == ".gguf":
        return _prepare_gguf(path.absolute(), chosen, overrides, matrix, allow_requantize=allow_requantize)
    source, checkpoint = _open(path, workplace)
    if proof_process is not None:
        proof_process.read(source.folder)
    dequantize.decode(checkpoint, source)
    family = families.open_model(source)
    specs = family.tensors(checkpoint.tensors)
    if reference and (name := reference(specs, checkpoint.tensors)) and name not in [one.name for one in chosen]:
        chosen.append(recipes.find(name))
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
    return Prepared(
        source, checkpoint, outputs, notes, importance=matrix, overrides=overrides, allow_requantize=allow_requantize,
        proof=proof,
    )  # fmt: skip


def _open(path: Path, workplace: Path | None) -> tuple[Source, Checkpoint]:
    if workplace is not None:
        return open_streamed(path, workplace)
    source = open_source(path)
    return source, Checkpoint.open(source.folder)


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
    return Prepared(
        Source(path.parent, kind="gguf"), model.checkpoint, outputs, through_bf16=False, importance=matrix,
        overrides=overrides, allow_requantize=allow_requantize,
    )  # fmt: skip


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
    with_losses: bool = False,
) -> list[Result]:
    """Carry all plans out in one read of the source. The files get their names when all of them are whole.

    `with_losses` also finds what each tensor loses. The card of a file that is replaced goes with it.
    """
    began = time.monotonic()
    outs = [out.absolute() for out in outs]
    for out in outs:
        check_target(out, prepared)
    targets = [_Target(output.plan, out) for output, out in zip(prepared.outputs, outs, strict=True)]
    losses = [Losses() for _ in targets if with_losses]
    output_bytes = sum(output.plan.file_size for output in prepared.outputs)
    done, total = 0, prepared.source_bytes + prepared.checkpoint.expect(prepared.parts, output_bytes)

    def advance(count: int) -> None:
        nonlocal done
        if prepared.proof is not None:
            prepared.proof.check()
        done += count
        if progress is not None:
            progress(done, total)

    pieces_of_slabs = encoded(
        [output.plan for output in prepared.outputs],
        prepared.checkpoint,
        threads or available_cpus(),
        fetched=advance,
        through_bf16=[prepared.through_bf16 and output.recipe.quantized for output in prepared.outputs],
        importance=prepared.importance,
        losses=losses,
    )
    with contextlib.ExitStack() as stack:
        stack.enter_context(prepared.checkpoint)
        if prepared.importance is not None:
            stack.enter_context(prepared.importance)
        for target in targets:
            stack.enter_context(target.file)
        stack.enter_context(contextlib.closing(pieces_of_slabs))
        if prepared.proof is not None:
            stack.enter_context(contextlib.closing(prepared.proof))
        for slabs, pieces in pieces_of_slabs:
            for target, slab, data in zip(targets, slabs, pieces, strict=True):
                target.write(slab, data)
            advance(prepared.bytes_of(slabs[0]))
        for target in targets:
            target.check()
        prepared.prove()
        for target in targets:
            target.publish()
    seconds = time.monotonic() - began
    lost: Sequence[Losses | None] = losses or [None] * len(targets)
    read = prepared.source_bytes
    return [_result(*each, read, seconds) for each in zip(prepared.outputs, targets, lost, strict=True)]


class _Target:
    """A file on its way, with the checksums of its pieces and its digest so far."""

    def __init__(self, plan: Plan, out: Path) -> None:
        self.out = out
        self.file = AtomicFile(out, plan.file_size)
        self.digest: FileDigest | None = None
        self._plan, self._samples, self._running = plan, Samples(), RunningDigest(plan)
        self._has_header = False

    def write(self, slab: Slab, data: memoryview) -> None:
        if not self._has_header:
            self._put(0, memoryview(self._plan.header))
            self._has_header = True
        tensor = slab.tensor
        start = len(self._plan.header) + tensor.offset
        self._samples.take(start + slab.offset, data)
        self._put(start + slab.offset, data)
        if slab.is_last:
            padding = aligned(tensor.nbytes) - tensor.nbytes
            self._put(start + tensor.nbytes, memoryview(bytes(padding)))

    def check(self) -> None:
        self.file.check(self._look_at)

    def publish(self) -> None:
        remove_card(self.out)  # before: it must never be taken for the new file's
        self.file.publish()

    def _put(self, offset: int, data: memoryview) -> None:
        self.file.write_at(offset, data)
        self._running.take(offset, data)

    def _look_at(self, part: Path) -> None:
        verify(part, self._plan, self._samples)
        self.digest = self._running.finish(part)


def _result(output: Output, target: _Target, losses: Losses | None, source_bytes: int, seconds: float) -> Result:
    plan = output.plan
    weights = sum(tensor.spec.weights for tensor in plan.tensors)
    if target.digest is None:
        raise AssertionError(f"{target.out} was not checked")
    return Result(
        target.out, output.recipe.name, plan.file_size, source_bytes, weights, seconds, plan.by_type(), target.digest,
        losses,
    )  # fmt: skip


def _check_recipes(chosen: list[Recipe], overrides: Overrides) -> None:
    names = [recipe.name for recipe in chosen]
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise UsageError(f"--type names {', '.join(twice)} twice", param="type")
    if overrides and not any(recipe.quantized for recipe in chosen):
        raise UsageError(
            f"types of single tensors can be set in quantized files only, not in {', '.join(names)}", param="type"
        )


def check_target(out: Path, prepared: Prepared) -> None:
    """Raise `UsageError` for a path that is a folder, or a file of the model itself."""
    if out.is_dir():
        raise UsageError(f"{out}: a folder; --out names the file to write", param="out")
    inputs = [*prepared.checkpoint.shards, *(prepared.source.folder / name for name in _DATA_NAMES)]
    if out.exists() and any(path.exists() and out.samefile(path) for path in inputs):
        raise UsageError(f"{out}: is a file of the model itself; choose another --out", param="out")
