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
from quantize.checkpoint import Checkpoint, StoredTensor
from quantize.digest import KEPT_BYTES, FileDigest
from quantize.encoding import available_cpus, encoded
from quantize.header import QUANTIZATION_VERSION, KeyTable
from quantize.identity import identities
from quantize.importance import ImportanceMatrix, check_importance
from quantize.left_out import left_out
from quantize.loss import Losses
from quantize.metadata import set_general
from quantize.model_size import ModelSize
from quantize.plan import check_originals, plan_file
from quantize.prepared import Output, Prepared
from quantize.proof import start_proof
from quantize.proof_process import ProofProcess
from quantize.recipe import NO_OVERRIDES, Overrides, Recipe
from quantize.selection import decide_types
from quantize.slabs import Slab
from quantize.source import Source, open_source
from quantize.streamed import open_streamed
from quantize.target import Target
from quantize.tensors import TensorSpec

ReferenceChoice = Callable[[Sequence[TensorSpec], Mapping[str, StoredTensor]], str | None]
"""Says which unquantized type is made too, to judge the others against; None: no such file."""

Progress = Callable[[int, int], None]
"""Called with the bytes of the source that are done, and all of them."""

_DATA_NAMES = ("config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json")


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
    proven: Callable[[tuple[str, ...]], None] = lambda _notes: None,
    with_losses: bool = False,
    resume: bool = False,
) -> list[Result]:
    """Carry all plans out in one read of the source. The files get their names when all of them are whole.

    `proven` hears what people should know of the tokenizer, before any weight is read. `with_losses` also finds what
    each tensor loses. `resume` goes on where a run that was killed had come to, and lets an interrupted one be gone on
    with. The card of a file that is replaced goes with it.
    """
    began = time.monotonic()
    outs = [out.absolute() for out in outs]
    targets = _targets(prepared, outs, resume=resume)
    losses = [Losses() for _ in targets if with_losses]
    output_bytes = sum(output.plan.file_size for output in prepared.outputs)
    advance = _Advance(prepared, prepared.checkpoint.expect(prepared.parts, output_bytes), progress)

    def is_missing(slabs: list[Slab]) -> bool:
        if not all(target.has_slab(slab) for target, slab in zip(targets, slabs, strict=True)):
            return True
        advance(prepared.bytes_of(slabs[0]))
        return False

    pieces_of_slabs = encoded(
        [output.plan for output in prepared.outputs],
        prepared.checkpoint,
        threads or available_cpus(),
        fetched=advance,
        through_bf16=[prepared.through_bf16 and output.recipe.quantized for output in prepared.outputs],
        importance=prepared.importance,
        losses=losses,
        missing=is_missing,
    )
    with contextlib.ExitStack() as stack:
        stack.enter_context(prepared.checkpoint)
        if prepared.importance is not None:
            stack.enter_context(prepared.importance)
        for target in targets:
            stack.enter_context(target)
        stack.enter_context(contextlib.closing(pieces_of_slabs))
        stack.callback(prepared.close)
        proven(prepared.prove())  # before any weight is read, or fetched
        for slabs, pieces in pieces_of_slabs:
            for target, slab, data in zip(targets, slabs, pieces, strict=True):
                target.write(slab, data)
            advance(prepared.bytes_of(slabs[0]))
        for target in targets:
            target.check_plan()
        for target in targets:
            target.publish()
    seconds = time.monotonic() - began
    lost: Sequence[Losses | None] = losses or [None] * len(targets)
    read = prepared.source_bytes
    return [
        _result(output, target, loss, read, seconds, resumed=resume)
        for output, target, loss in zip(prepared.outputs, targets, lost, strict=True)
    ]


class _Advance:
    """Counts the bytes of the source that are done, and tells of them."""

    def __init__(self, prepared: Prepared, to_fetch: int, progress: Progress | None) -> None:
        self._progress = progress
        self._done, self._total = 0, prepared.source_bytes + to_fetch

    def __call__(self, count: int) -> None:
        self._done += count
        if self._progress is not None:
            self._progress(self._done, self._total)


def _targets(prepared: Prepared, outs: Sequence[Path], *, resume: bool) -> list[Target]:
    for out in outs:
        check_target(out, prepared)
    planned = zip(prepared.outputs, outs, identities(prepared), strict=True)
    kept = KEPT_BYTES // len(outs)
    return [Target(output.plan, out, run, resume=resume, kept_bytes=kept) for output, out, run in planned]


def _result(
    output: Output, target: Target, losses: Losses | None, source_bytes: int, seconds: float, *, resumed: bool
) -> Result:
    plan = output.plan
    if target.digest is None:
        raise AssertionError(f"{target.out} was not checked")
    return Result(
        path=target.out,
        type_name=output.recipe.name,
        file_size=plan.file_size,
        source_bytes=source_bytes,
        weights=sum(tensor.spec.weights for tensor in plan.tensors),
        seconds=seconds,
        by_type=plan.by_type(),
        digest=target.digest,
        losses=losses,
        resumed_bytes=target.resumed_bytes if resumed else None,
    )


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
