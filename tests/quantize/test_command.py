"""The command: formats, exit codes, atomic output, memory."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from app.models.gguf import read_header
from quantize.cli import main
from quantize.part import sweep
from tests.quantize.checkpoints import Shape, config_of, make_checkpoint, shapes_of, write_raw_safetensors

ROOT = Path(__file__).parents[2]
Command = Callable[..., subprocess.CompletedProcess[str]]
SLOW = Shape(layers=8, hidden=1024, heads=16, key_heads=4, feed_forward=4096)


@pytest.fixture(scope="module")
def slow_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a checkpoint that takes seconds to become Q4_K_M on one thread."""
    return make_checkpoint(tmp_path_factory.mktemp("slow") / "Slow", SLOW)


def test_human(checkpoint_of: Callable[[str], Path], tmp_path: Path, quantize_command: Command) -> None:
    out = tmp_path / "model.gguf"
    finished = quantize_command(checkpoint_of("llama3"), "--type", "Q4_K_M", "--out", out, "--no-measure")
    assert finished.returncode == 0, finished.stderr
    assert f"{out}: Q4_K_M, " in finished.stdout
    assert read_header(out).file_type == 15


def test_the_default_name_is_the_folders(
    checkpoint_of: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([str(checkpoint_of("llama3")), "--type", "q8_0", "--format", "quiet", "--no-measure"]) == 0
    name = "Tiny-llama3-1M-Instruct-Q8_0.gguf"
    assert {path.name for path in tmp_path.iterdir()} == {name, f"{name}.card.json", f"{name}.card.md"}
    assert capsys.readouterr() == ("", "")


def test_json(checkpoint_of: Callable[[str], Path], tmp_path: Path, quantize_command: Command) -> None:
    out = tmp_path / "model.gguf"
    finished = quantize_command(
        checkpoint_of("llama3"), "--type", "q8_0", "--out", out, "--format", "json", "--no-measure"
    )
    events = [json.loads(line) for line in finished.stdout.splitlines()]
    assert [event["event"] for event in events][-3:] == ["progress", "done", "card"]
    assert events[-3]["done"] == events[-3]["total"]
    assert events[-2]["bytes"] == out.stat().st_size
    assert [event["path"] for event in events[-2:]] == [str(out), str(out)]
    assert finished.stderr == ""


@pytest.mark.parametrize(
    ("arguments", "code", "kind"),
    [
        (["--type", "q9"], 2, "UsageError"),
        (["--type", "q8_0", "--threads", "0"], 2, "UsageError"),
        (["--type", "q8_0", "--out", "/nowhere/at/all.gguf"], 4, "StorageError"),
    ],
)
def test_json_errors(
    arguments: list[str], code: int, kind: str, checkpoint_of: Callable[[str], Path],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert main([str(checkpoint_of("llama3")), *arguments, "--no-measure", "--format", "json"]) == code
    event = json.loads(capsys.readouterr().out)
    assert (event["event"], event["kind"], event["exit_code"]) == ("error", kind, code)


def test_bad_input_is_exit_code_3(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "nothing"), "--type", "q8_0"]) == 3
    assert capsys.readouterr().err == f"error: {tmp_path / 'nothing'}: no such folder\n"


def test_missing_arguments_are_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([])
    assert caught.value.code == 2
    assert "SOURCE" in capsys.readouterr().err


def test_dry_run(checkpoint_of: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = checkpoint_of("llama3"), tmp_path / "model.gguf"
    for name in ("q4_0", "q4_k_m", "q8_0", "f16", "bf16"):
        assert main([str(source), "--type", name, "--out", str(out), "--dry-run", "--format", "json"]) == 0
        planned = json.loads(capsys.readouterr().out)
        assert not out.exists()
        assert main([str(source), "--type", name, "--out", str(out), "--format", "quiet", "--no-measure"]) == 0
        assert planned["bytes"] == out.stat().st_size
        found = {tensor.name: (tensor.type_name, tensor.nbytes) for tensor in read_header(out).tensors}
        assert {tensor["name"]: (tensor["type"], tensor["bytes"]) for tensor in planned["tensors"]} == found
        out.unlink()
    assert main([str(source), "--type", "q4_k_m", "--out", str(out), "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "q6_K" in text
    assert "nothing was written" in text


def test_an_existing_file_is_replaced(checkpoint_of: Callable[[str], Path], tmp_path: Path) -> None:
    out = tmp_path / "model.gguf"
    out.write_bytes(b"old")
    with out.open("rb") as reader:  # a server that has it mapped
        command = [str(checkpoint_of("llama3")), "--type", "q8_0", "--out", str(out), "--format", "quiet"]
        assert main([*command, "--no-measure"]) == 0
        assert reader.read() == b"old"
    assert read_header(out).architecture == "llama"


def left_by_a_run(folder: Path) -> set[str]:
    """Return the suffixes of all files of a folder; each is there once."""
    suffixes = [path.suffix for path in folder.iterdir()]
    assert len(set(suffixes)) == len(suffixes)
    return set(suffixes)


def start_slow_run(source: Path, out: Path) -> subprocess.Popen[str]:
    """Start a run and wait until it writes."""
    command = [sys.executable, "-P", "-m", "quantize", str(source), "--type", "q4_k_m", "--threads", "1",
               "--out", str(out), "--format", "json", "--no-measure"]  # fmt: skip
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert json.loads(process.stdout.readline())["event"] == "progress"
    assert left_by_a_run(out.parent) == {".pestle-part", ".pestle-journal"}
    assert not out.exists()
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupted_leaves_nothing(number: signal.Signals, slow_checkpoint: Path, tmp_path: Path) -> None:
    process = start_slow_run(slow_checkpoint, tmp_path / "model.gguf")
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130, err
    assert json.loads(out.splitlines()[-1])["kind"] == "InterruptedByUserError"
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_run_leaves_is_swept(slow_checkpoint: Path, tmp_path: Path) -> None:
    target = tmp_path / "model.gguf"
    process = start_slow_run(slow_checkpoint, target)
    sweep(target)
    assert len(left_by_a_run(tmp_path)) == 2, "the temporary files of a living process were swept"
    process.kill()
    process.communicate(timeout=30)
    assert len(left_by_a_run(tmp_path)) == 2
    sweep(target)
    assert list(tmp_path.iterdir()) == []


def write_zeros(folder: Path, shape: Shape) -> int:
    """Write a checkpoint of zeros that takes no room on the disk; return the bytes that it claims."""
    template = make_checkpoint(folder, Shape(layers=1, hidden=64, heads=2, key_heads=1, feed_forward=96))
    vocabulary = json.loads((template / "config.json").read_text())["vocab_size"]
    (folder / "config.json").write_text(json.dumps(config_of(shape, vocabulary)))
    header: dict[str, Any] = {}
    offset = 0
    for name, size in shapes_of(shape, vocabulary).items():
        count = 2 * int.__mul__(*(size if len(size) == 2 else (*size, 1)))
        header[name] = {"dtype": "BF16", "shape": size, "data_offsets": [offset, offset + count]}
        offset += count
    write_raw_safetensors(folder / "model.safetensors", header, b"")
    path = folder / "model.safetensors"
    os.truncate(path, path.stat().st_size + offset)
    return offset


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    claimed = write_zeros(tmp_path / "Zeros", Shape(layers=4, hidden=4096, heads=32, key_heads=8, feed_forward=14336))
    assert claimed > 1 << 30
    script = (
        "import sys, re, pathlib; from quantize.cli import main; assert main(sys.argv[1:]) == 0; "
        "print(re.search(r'VmHWM:\\s+(\\d+) kB', pathlib.Path('/proc/self/status').read_text())[1])"
    )
    out = tmp_path / "zeros.gguf"
    command = [sys.executable, "-c", script, str(tmp_path / "Zeros"), "--type", "q4_0", "--threads", "2"]
    command += ["--out", str(out), "--format", "quiet", "--no-measure"]
    peak = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, timeout=100).stdout
    out.unlink()
    assert int(peak) * 1024 < 160 << 20


def test_startup_is_lean() -> None:
    """A run on a small model takes a fraction of a second, so nothing heavy may be imported."""
    command = [sys.executable, "-P", "-c", "import sys, quantize.pipeline, quantize.cli; print(*sys.modules)"]
    modules = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, timeout=60).stdout.split()
    heavy = {"torch", "transformers", "jinja2", "litestar", "yaml", "sentencepiece", "tokenizers", "huggingface_hub"}
    assert heavy.isdisjoint(modules)
