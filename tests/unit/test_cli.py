from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from app.cli import main
from app.cli.module import run_native
from app.cli.prepare import prepare_model
from app.errors import BadInputError, StorageError, UsageError
from app.pool.pool import Pool


def test_the_version_is_the_distributions(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out.startswith("pestle 0.")


@pytest.mark.parametrize(
    ("arguments", "exit_code", "culprit"),
    [
        (["serve"], 2, "LLM_MODEL_PATH"),
        (["serve", "nowhere.gguf"], 2, "nowhere.gguf"),
        (["serve", "\udcff.gguf"], 2, "rename"),
        (["serve", ".", "--quantization", "q9_9"], 2, "q4_k_m"),
        (["serve", "nowhere.gguf", "--port", "x"], 2, "--port"),
        (["serve", "one.gguf", "--model-path", "two.gguf"], 2, "twice"),
        (["serve", "x.gguf", "--config", "nowhere.toml"], 4, "nowhere.toml"),
    ],
)
def test_what_is_wrong_is_named_in_one_line(
    arguments: list[str],
    exit_code: int,
    culprit: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("LLM_MODEL_PATH", raising=False)
    assert main(arguments) == exit_code
    message = capsys.readouterr().err
    assert culprit in message
    assert message.count("\n") == 1


def test_a_file_that_is_no_model_is_refused_before_any_process_starts(tmp_path: Path) -> None:
    file = tmp_path / "not-a-model.gguf"
    file.write_bytes(b"hello, world")
    finished = subprocess.run(
        [sys.executable, "-m", "app.cli", "serve", str(file), "--port", "0"],
        check=False,
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert finished.returncode == 3
    assert "not-a-model.gguf" in finished.stderr


def test_a_signal_that_the_imports_swallow_still_ends_it(
    monkeypatch: pytest.MonkeyPatch, default_model: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    class Swallows:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGTERM)

    def spawn(_pool: Pool) -> None:
        Swallows()

    monkeypatch.setattr(Pool, "spawn", spawn)
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)
    monkeypatch.setattr("app.observability.logging.configure", lambda *_: None)
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert main(["serve", str(default_model), "--port", "0"]) == 0
    finally:
        signal.signal(signal.SIGTERM, before)
    assert "Chat page" not in capfd.readouterr().out


def test_a_gguf_is_served_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.touch()
    assert prepare_model(str(file), "q8_0", tmp_path / "cache") == file
    assert not (tmp_path / "cache").exists()


def test_a_folder_without_weights_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="safetensors"):
        prepare_model(str(tmp_path), "q8_0", tmp_path / "cache")
    with pytest.raises(UsageError, match="nowhere"):
        prepare_model(str(tmp_path / "nowhere"), "q8_0", tmp_path / "cache")


def test_a_cache_that_cannot_be_written_is_named_with_the_cure(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "cache").write_text("a file where a folder should be")
    with pytest.raises(StorageError, match="LLM_CACHE_DIR"):
        prepare_model(str(tmp_path), "q8_0", tmp_path / "cache")


def test_a_folder_is_quantized_once_and_again_when_it_changes(default_checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / default_checkpoint.name
    folder.mkdir()
    for file in default_checkpoint.iterdir():
        (folder / file.name).symlink_to(file)

    first = prepare_model(str(folder), "q8_0", tmp_path / "cache")
    made = first.stat().st_mtime_ns
    assert first.name == f"{folder.name}-Q8_0.gguf"
    assert prepare_model(str(folder), "q8_0", tmp_path / "cache").stat().st_mtime_ns == made

    (folder / "generation_config.json").unlink()
    (folder / "generation_config.json").write_text("{}")
    assert prepare_model(str(folder), "q8_0", tmp_path / "cache") != first


def test_a_native_death_is_a_files_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "aborts.py").write_text("import os\nos.abort()\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert run_native("aborts") == 3
    assert "llama.cpp ended with signal 6" in capfd.readouterr().err
