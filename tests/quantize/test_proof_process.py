"""The process of the tokenizer's proof when it is started ahead: it is used, and never left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from app.errors import BadInputError, TokenizerError
from quantize import proof
from quantize.cli import main
from quantize.pipeline import prepare
from quantize.proof_process import ProofProcess
from tests.quantize.checkpoints import Shape, make_checkpoint

SHAPE = Shape(layers=1, hidden=64, heads=2, key_heads=1, feed_forward=96)
SECONDS = 10.0


@pytest.fixture(autouse=True)
def nothing_is_proven_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proof, "_known", {})


def is_running(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_until_gone(process: psutil.Process) -> None:
    """Wait for its end without taking its exit code away from those who want it."""
    end = time.monotonic() + SECONDS
    while is_running(process):
        assert time.monotonic() < end, f"{process} still runs"
        time.sleep(0.01)


def test_a_process_that_was_started_ahead_proves(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "Ahead", SHAPE)
    with ProofProcess() as process:
        child = psutil.Process(process.pid)
        prepared = prepare(source, "q8_0", proof_process=process)
        assert prepared.proof is not None
        assert is_running(child)
        others = [other for other in psutil.Process().children() if other.pid != child.pid]
        assert all(other.create_time() <= child.create_time() for other in others), "a second process was started"
        assert prepared.prove() == ()
        wait_until_gone(child)


def test_it_ends_when_nobody_asks_it(tmp_path: Path) -> None:
    with ProofProcess() as process:
        child = psutil.Process(process.pid)
        with pytest.raises(BadInputError):
            prepare(tmp_path / "nothing", "q8_0", proof_process=process)
    wait_until_gone(child)


def test_it_ends_when_its_time_is_over_before_it_is_asked(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "Late", SHAPE)
    with ProofProcess(seconds=0.01) as process:
        process.read(source)
        child = psutil.Process(process.pid)
        wait_until_gone(child)
        with pytest.raises(TokenizerError, match="did not read the test texts"):
            prepare(source, "q8_0", proof_process=process).prove()


def test_the_command_leaves_no_process_behind(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = {child.pid for child in psutil.Process().children()}
    assert main([str(tmp_path / "nothing"), "--type", "q8_0", "--format", "quiet"]) == 3
    assert "no such folder" in capfd.readouterr().err
    assert not [child for child in psutil.Process().children() if child.pid not in before and is_running(child)]


def test_it_does_not_outlive_a_run_that_is_killed() -> None:
    code = "import time; from quantize.proof_process import ProofProcess; ProofProcess(); print(flush=True)"
    code += "; time.sleep(60)"
    with subprocess.Popen([sys.executable, "-P", "-c", code], stdout=subprocess.PIPE) as run:
        assert run.stdout is not None
        run.stdout.readline()
        (child,) = psutil.Process(run.pid).children()
        os.kill(run.pid, signal.SIGKILL)
        run.wait()
        wait_until_gone(child)
