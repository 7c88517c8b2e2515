"""Importance matrices that we measure: what is summed, what is written, and the command."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from numpy.typing import NDArray

from app.cli import main
from app.errors import BadInputError
from app.llama import quantizer
from app.llama.activations import Multiplication, MultiplicationTap
from app.llama.batch import Batch
from app.llama.context import Context
from app.llama.model import Model
from app.models.gguf import read_header
from quantize.activation_sums import ActivationSums
from quantize.calibration import calibrate
from quantize.importance import ImportanceMatrix
from quantize.importance_writer import write_importance
from quantize.pipeline import quantize
from quantize.quality import cut, measure
from quantize.recipe import RECIPES
from quantize.text_file import CALIBRATION_TEXT as CALIBRATION
from quantize.text_file import JUDGED_TEXT as JUDGED
from quantize.text_file import open_text
from tests.quantize.checkpoints import Shape, make_checkpoint
from tests.quantize.family_files import floats
from tests.quantize.test_family_bert import make as make_bert
from tests.quantize.test_family_qwen_moe import EXPERTS, QWEN2, QWEN3
from tests.quantize.test_family_qwen_moe import make as make_mixture

TEXT = "the quick brown fox jumps over the lazy dog and thinks in 12 other languages, is it not? " * 30
CHUNK, CHUNKS = 128, 3
TOKENS = CHUNK * CHUNKS


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the checkpoint `dense`, and the files dense.gguf, qwen2.gguf and qwen3.gguf in bf16."""
    folder = tmp_path_factory.mktemp("imatrix")
    make_checkpoint(folder / "dense", Shape())
    quantize(folder / "dense", "bf16", folder / "dense.gguf")
    for name, config in (("qwen2", QWEN2), ("qwen3", QWEN3)):
        quantize(make_mixture(folder / name, config)[0], "bf16", folder / f"{name}.gguf")
    return folder


def collected(path: Path, **options: Any) -> ActivationSums:
    return calibrate(path, TEXT, threads=1, chunk=CHUNK, most_chunks=CHUNKS, **options).sums


def seen_in(path: Path) -> list[Multiplication]:
    """Return every multiplication of the blocks in one chunk."""
    seen: list[Multiplication] = []
    tap = MultiplicationTap(lambda name, _: name.startswith("blk."), seen.append)
    with (
        Model(path, device="cpu") as model,
        Context(
            model, slots=1, context_length=CHUNK, batch_size=CHUNK, threads=1, logits_rows=CHUNK, tap=tap
        ) as context,
    ):
        batch = Batch(CHUNK)
        batch.add(0, 0, cut(model, TEXT, CHUNK)[0], wants_logits=True)
        batch.want_logits_from(0)
        context.decode(batch)
    return seen


def test_the_first_blocks_inputs_are_the_normalized_embeddings(folder: Path) -> None:
    """That needs no llama.cpp: the sums of squares are computed here from the weights and the tokens."""
    sums, arrays = collected(folder / "dense.gguf"), floats(read_header(folder / "dense.gguf"))
    with Model(folder / "dense.gguf", device="cpu") as model:
        tokens = np.concatenate(cut(model, TEXT, CHUNK)[:CHUNKS])
    embedded = arrays["token_embd.weight"][tokens].astype(np.float64)
    normalized = embedded / np.sqrt((embedded**2).mean(axis=1, keepdims=True) + 1e-5) * arrays["blk.0.attn_norm.weight"]
    expected = (normalized**2).sum(axis=0)
    for letter in "qkv":
        assert np.allclose(sums.tensors[f"blk.0.attn_{letter}.weight"].sums[0], expected, rtol=1e-5)


def test_every_position_of_every_block_is_counted(folder: Path) -> None:
    sums = collected(folder / "dense.gguf")
    matrices = {t.name for t in read_header(folder / "dense.gguf").tensors if len(t.shape) == 2}
    assert set(sums.tensors) == matrices - {"token_embd.weight", "output.weight"}
    assert {int(entry.counts.item()) for entry in sums.tensors.values()} == {TOKENS}
    assert sums.chunks(CHUNK) == CHUNKS
    assert (sums.tensors["blk.3.ffn_gate.weight"].sums == sums.tensors["blk.3.ffn_up.weight"].sums).all()


def test_the_output_is_taken_in_when_asked_for(folder: Path) -> None:
    assert "output.weight" in collected(folder / "dense.gguf", output=True).tensors


@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
def test_what_experts_were_sent(name: str, folder: Path) -> None:
    tensors = collected(folder / f"{name}.gguf").tensors
    for block in range(2):
        gate, down = (tensors[f"blk.{block}.ffn_{part}_exps.weight"] for part in ("gate", "down"))
        router = tensors[f"blk.{block}.ffn_gate_inp.weight"]
        assert gate.sums.shape[0] == down.sums.shape[0] == gate.counts.size == EXPERTS
        assert (gate.counts == down.counts).all()
        assert gate.counts.sum() == 3 * TOKENS  # each token goes to three of them, with what the router saw of it
        assert np.allclose(gate.sums.sum(axis=0), 3 * router.sums[0], rtol=1e-5)
        assert len(set(gate.counts.tolist())) > 1


@pytest.mark.parametrize("name", ["dense", "qwen2"])
def test_the_sums_are_those_of_upstreams_loops(name: str, folder: Path) -> None:
    sums = ActivationSums()
    expected: dict[str, tuple[NDArray[np.float64], NDArray[np.int64]]] = {}
    for seen in seen_in(folder / f"{name}.gguf"):
        sums.take(seen)
        add_slowly(expected, seen)
    assert set(sums.tensors) == set(expected)
    for weight, (values, counts) in expected.items():
        assert np.allclose(sums.tensors[weight].sums, values, rtol=1e-5)
        assert (sums.tensors[weight].counts == counts).all()


def add_slowly(expected: dict[str, tuple[NDArray[np.float64], NDArray[np.int64]]], seen: Multiplication) -> None:
    """Add a multiplication as tools/imatrix/imatrix.cpp does: row by row."""
    (outer, inner), columns = seen.stack, seen.inputs.shape[3]
    stacks = outer * inner
    values, counts = expected.setdefault(
        seen.weight, (np.zeros((stacks, columns)), np.zeros(1 if seen.experts is None else stacks, np.int64))
    )
    if seen.experts is None:
        for i3 in range(seen.inputs.shape[0]):
            for i2 in range(seen.inputs.shape[1]):
                for row in seen.inputs[i3, i2].astype(np.float64):
                    values[i3 % outer * inner + i2 % inner] += row**2
        counts += seen.inputs.shape[0] * seen.inputs.shape[1] * seen.inputs.shape[2] // stacks
        return
    for use in range(seen.experts.shape[1]):
        for token in range(seen.inputs.shape[1]):
            expert = seen.experts[token, use]
            values[expert] += seen.inputs[0, token, use % seen.inputs.shape[2]].astype(np.float64) ** 2
            counts[expert] += 1


def test_stacks_that_are_not_of_experts() -> None:
    """As multi-head latent attention has them: a matrix for each head."""
    inputs = np.random.default_rng(0).standard_normal((1, 4, 32, 8), dtype=np.float32)
    seen = Multiplication("blk.0.attn_k_b.weight", (1, 4), inputs, None)
    sums, expected = ActivationSums(), {}
    sums.take(seen)
    add_slowly(expected, seen)
    values, counts = expected[seen.weight]
    assert np.allclose(sums.tensors[seen.weight].sums, values, rtol=1e-5)
    assert sums.tensors[seen.weight].counts.tolist() == counts.tolist() == [32]


@pytest.mark.parametrize(
    ("weight", "rows", "output", "wanted"),
    [
        ("blk.0.attn_q.weight", 16, False, True),
        ("blk.0.attn_q.weight", 15, True, False),
        ("output.weight", 512, False, False),
        ("output.weight", 512, True, True),
        ("token_embd.weight", 512, True, False),
        ("cache_k_l0 (view)", 512, True, False),
    ],
)
def test_which_products_are_taken(weight: str, rows: int, output: bool, wanted: bool) -> None:
    assert ActivationSums(output=output).wants(weight, rows) is wanted


@pytest.mark.parametrize("error", [BadInputError("enough"), KeyboardInterrupt()])
def test_what_is_raised_in_the_callback_comes_out_of_decode(error: BaseException, folder: Path) -> None:
    def fail(_: Multiplication) -> None:
        raise error

    tap = MultiplicationTap(lambda name, _: name.startswith("blk."), fail)
    with (
        Model(folder / "dense.gguf", device="cpu") as model,
        Context(model, slots=1, context_length=32, batch_size=32, threads=1, tap=tap) as context,
    ):
        batch = Batch(32)
        batch.add(0, 0, np.arange(20, dtype=np.int32), wants_logits=True)
        with pytest.raises(type(error)) as caught:
            context.decode(batch)
        assert caught.value is error


def test_numbers_that_are_not_finite(folder: Path, tmp_path: Path) -> None:
    header = read_header(folder / "dense.gguf")
    norm = next(tensor for tensor in header.tensors if tensor.name == "blk.1.attn_norm.weight")
    start = header.data_offset + norm.offset
    data = bytearray(header.path.read_bytes())
    data[start : start + 4] = np.float32(np.inf).tobytes()
    (tmp_path / "broken.gguf").write_bytes(data)
    with pytest.raises(BadInputError, match=r"blk.1.attn_[qkv].weight: what goes into it is not finite"):
        collected(tmp_path / "broken.gguf")


def test_a_model_for_embeddings(tmp_path: Path) -> None:
    quantize(make_bert(tmp_path / "Model"), "bf16", tmp_path / "bert.gguf")
    with pytest.raises(BadInputError, match=r"bert.gguf: a model for embeddings"):
        collected(tmp_path / "bert.gguf")


@pytest.mark.parametrize("name", ["dense", "qwen3"])
def test_the_file_is_quantizes(name: str, folder: Path, tmp_path: Path) -> None:
    sums, matrix = collected(folder / f"{name}.gguf"), tmp_path / "m.gguf"
    size = write_importance(matrix, sums.tensors, dataset="a text", chunks=CHUNKS, chunk_tokens=CHUNK)
    header = read_header(matrix)
    assert matrix.stat().st_size == size
    assert header.metadata == {
        "general.type": "imatrix",
        "imatrix.datasets": ["a text"],
        "imatrix.chunk_count": CHUNKS,
        "imatrix.chunk_size": CHUNK,
    }
    assert [tensor.name for tensor in header.tensors] == [
        f"{weight}.{part}" for weight in sorted(sums.tensors) for part in ("in_sum2", "counts")
    ]
    means = {
        weight: np.stack([
            row / np.float32(count) if count else np.ones_like(row)
            for row, count in zip(entry.sums.astype(np.float32), entry.counts, strict=True)
        ])
        for weight, entry in sums.tensors.items()
    }  # fmt: skip
    keys: dict[str, int | bytes] = {
        "quantize.imatrix.file": str(matrix).encode()[:127],
        "quantize.imatrix.dataset": b"a text",
        "quantize.imatrix.entries_count": len(means),
        "quantize.imatrix.chunks_count": CHUNKS,
    }
    quantize(folder / f"{name}.gguf", "q4_k_m", tmp_path / "ours.gguf", importance=matrix, threads=1)
    quantizer.quantize_file(
        folder / f"{name}.gguf",
        tmp_path / "theirs.gguf",
        RECIPES["q4_k_m"].file_type,
        importance=means,
        keys=keys,
        threads=1,
    )
    assert (tmp_path / "ours.gguf").read_bytes() == (tmp_path / "theirs.gguf").read_bytes()


def test_a_real_model_loses_less_with_its_matrix(default_model: Path, tmp_path: Path) -> None:
    """The text that is judged over is not the one that was calibrated over."""
    calibrated = calibrate(default_model, open_text(None, CALIBRATION).content, threads=1, chunk=256, most_chunks=2)
    assert len(calibrated.sums.tensors) == 7 * 30
    assert calibrated.perplexity < 60
    matrix = tmp_path / "m.gguf"
    write_importance(matrix, calibrated.sums.tensors, dataset=CALIBRATION, chunks=2, chunk_tokens=256)
    files = [tmp_path / "plain.gguf", tmp_path / "weighed.gguf"]
    for out, importance in zip(files, (None, matrix), strict=True):
        quantize(default_model, "q4_0", out, importance=importance, allow_requantize=True, threads=1)
    judged = open_text(None, JUDGED).content
    _, plain, weighed = measure(default_model, files, judged, threads=1, chunk=256, most_chunks=1)
    assert weighed.kld_mean < 0.9 * plain.kld_mean


def test_the_texts_share_no_line() -> None:
    judged, calibration = ({line for line in open_text(None, name).content.splitlines() if len(line) > 12}
                           for name in (JUDGED, CALIBRATION))  # fmt: skip
    assert not judged & calibration
    assert len(open_text(None, CALIBRATION).content.encode()) > 30_000


def test_the_command(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    command = [sys.executable, "-P", "-m", "app.cli", "imatrix"]
    options = ["--chunks", "2", "--threads", "1"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, *arguments, *options], capture_output=True, text=True, check=True, env=environment
        )

    human = run(str(folder / "dense")).stdout
    assert human.startswith("dense.imatrix.gguf: 28 tensors, over 2 chunks of 512 tokens of Pestle's calibration.txt")
    (tmp_path / "text.txt").write_text(TEXT)
    events = [
        json.loads(line)
        for line in run(
            str(folder / "dense.gguf"), "--text", "text.txt", "--out", "m.gguf", "--format", "json", "--process-output"
        ).stdout.splitlines()
    ]
    assert [event["event"] for event in events] == ["progress", "progress", "done"]
    assert (events[-1]["tensors"], events[-1]["chunks"], events[-1]["text"]) == (29, 2, "text.txt")
    assert read_header(tmp_path / "m.gguf").metadata["imatrix.datasets"] == ["text.txt"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense.imatrix.gguf", "m.gguf", "text.txt"]
    assert set(ImportanceMatrix.open("dense.imatrix.gguf").entries) | {"output.weight"} == set(
        ImportanceMatrix.open("m.gguf").entries
    )


def test_an_interrupted_run_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-P", "-m", "app.cli", "imatrix", str(folder / "dense"), "--out", str(tmp_path / "m")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob(".pestle-imatrix-*/*-BF16.gguf")) and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 130
        assert process.stderr is not None
        assert "interrupted" in process.stderr.read()
    assert not list(tmp_path.iterdir())


def test_a_signal_during_the_computation_is_not_lost(default_model: Path, tmp_path: Path) -> None:
    """A model that is large enough for the signal to come while llama.cpp computes."""
    out = tmp_path / "m.gguf"
    command = [sys.executable, "-P", "-m", "quantize.imatrix", str(default_model), "--format", "json"]
    command += ["--out", str(out), "--threads", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert json.loads(process.stdout.readline())["event"] == "progress"
        running = psutil.Process(process.pid)
        begun = running.cpu_times().user
        while running.cpu_times().user < begun + 0.4:  # however busy the machine is, it computes by then
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        events = [json.loads(line) for line in process.stdout]
        assert process.wait(30) == 130
        assert events[-1]["message"] == "interrupted; nothing was left behind"
        assert len(events) <= 3
        assert process.stderr.read() == ""
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "exit_code"),
    [
        (["missing.gguf"], 2),
        (["dense.gguf", "--chunks", "0"], 2),
        (["dense.gguf", "--text", "missing.txt"], 4),
        (["dense.gguf", "--text", "short.txt"], 3),
        (["dense.gguf", "--text", "latin.txt"], 2),
        (["dense.gguf", "--out", "dense.gguf"], 2),
        (["dense.gguf", "--out", "nowhere/m.gguf"], 4),
        (["dense", "--out", "nowhere/m.gguf"], 4),
        (["dense", "--threads", "0"], 2),
        (["empty"], 3),
        (["damaged.gguf"], 3),
    ],
)
def test_bad_input(arguments: list[str], exit_code: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    Path("damaged.gguf").write_bytes(Path("dense.gguf").read_bytes()[:5000])
    Path("short.txt").write_text("hello")
    Path("latin.txt").write_bytes(b"\xe9t\xe9")
    Path("empty").mkdir(exist_ok=True)
    before = Path("dense.gguf").read_bytes()
    assert main(["imatrix", *arguments]) == exit_code
    assert Path("dense.gguf").read_bytes() == before
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]
