"""Several types in one read of the source: each file is the one that a run of its own makes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from app.errors import StorageError, VerificationError
from app.models.gguf import read_header
from quantize import carded, target
from quantize.checkpoint import Checkpoint
from quantize.cli import main
from quantize.pipeline import prepare, quantize, run_all

TYPES = ("q8_0", "q4_k_m", "bf16", "q4_0", "f16", "f32")


@pytest.mark.parametrize("shape", ["smollm", "from f16"])
def test_each_file_is_as_if_made_alone(shape: str, checkpoint_of: Callable[[str], Path], tmp_path: Path) -> None:
    source = checkpoint_of(shape)
    for name in TYPES:
        quantize(source, name, tmp_path / name, threads=2)
    for types in (TYPES, TYPES[::-1]):
        outs = [tmp_path / f"{name}.gguf" for name in types]
        results = run_all(prepare(source, types), outs, threads=2)
        assert [(result.type_name, result.path) for result in results] == list(zip(types, outs, strict=True))
        for name, out in zip(types, outs, strict=True):
            assert out.read_bytes() == (tmp_path / name).read_bytes(), name


def test_the_source_is_read_once(
    checkpoint_of: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    real = Checkpoint.read_into

    def counted(self: Checkpoint, tensor: Any, offset: int, buffer: memoryview) -> None:
        read.append(len(buffer))
        real(self, tensor, offset, buffer)

    monkeypatch.setattr(Checkpoint, "read_into", counted)
    prepared = prepare(checkpoint_of("llama3"), TYPES)
    run_all(prepared, [tmp_path / name for name in TYPES])
    assert sum(read) == prepared.source_bytes


def test_the_command_fills_a_folder(
    checkpoint_of: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "folder"
    command = [str(checkpoint_of("llama3")), "--type", "q8_0, Q4_0", "--out", str(out), "--format", "json"]
    assert main([*command, "--dry-run"]) == 0
    planned = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert not out.parent.exists()
    assert main([*command, "--no-measure"]) == 0
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    done = [event for event in events if event["event"] == "done"]
    paths = [out / f"Tiny-llama3-1M-Instruct-{label}.gguf" for label in ("Q8_0", "Q4_0")]
    for events in (planned, done):
        assert [event["path"] for event in events] == [str(path) for path in paths]
        assert [event["type"] for event in events] == ["q8_0", "q4_0"]
        assert [event["bytes"] for event in events] == [path.stat().st_size for path in paths]
    assert sorted(out.glob("*.gguf")) == sorted(paths)
    assert [read_header(path).file_type for path in paths] == [7, 2]


def test_a_file_is_no_folder(
    checkpoint_of: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_bytes(b"")
    assert main([str(checkpoint_of("llama3")), "--type", "q8_0,q4_0", "--out", str(tmp_path / "file")]) == 2
    assert "is a file; for several types, --out names a folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("types", "complaint"),
    [("q8_0,", "unknown type ''"), ("q8_0,q4_0,Q8_0", "names q8_0 twice"), ("q8_0,q9", "unknown type 'q9'")],
)
def test_impossible_lists(
    types: str, complaint: str, checkpoint_of: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(checkpoint_of("llama3")), "--type", types, "--dry-run"]) == 2
    assert complaint in capsys.readouterr().err


def test_one_bad_file_keeps_all_back(
    checkpoint_of: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, seen = target.verify, []

    def damage_second(path: Path, *arguments: Any) -> None:
        seen.append(path)
        if len(seen) == 2:
            with path.open("r+b") as file:
                file.write(b"GGUX")
        real(path, *arguments)

    monkeypatch.setattr(target, "verify", damage_second)
    with pytest.raises(VerificationError):
        run_all(prepare(checkpoint_of("llama3"), ["q8_0", "q4_0"]), [tmp_path / "a.gguf", tmp_path / "b.gguf"])
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_stays_empty_is_taken_away(
    checkpoint_of: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise StorageError("no room")

    monkeypatch.setattr(carded, "run_all", refuse)
    command = [str(checkpoint_of("llama3")), "--type", "q8_0,q4_0", "--out", str(tmp_path / "a" / "b")]
    assert main([*command, "--no-measure", "--format", "quiet"]) == 4
    assert list(tmp_path.iterdir()) == []
