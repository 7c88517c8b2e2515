"""Prefixes that no slot holds: back from memory, and from disk after a restart, with the real model."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.llama.context import Context
from app.llama.model import Model
from app.worker.prefix_files import PrefixFiles, model_identity
from app.worker.prefix_store import PrefixStore
from tests.engine.harness import Harness

LONG = "The lighthouse keeper wrote down the weather of every day, and the ships that passed. " * 38
PLENTY = 1 << 30


@pytest.fixture(scope="module")
def model(default_model: Path) -> Iterator[Model]:
    with Model(default_model, device="cpu") as model:
        yield model


def open_harness(model: Model, memory: int = PLENTY, files: PrefixFiles | None = None) -> Harness:
    context = Context(model, slots=1, context_length=1024, batch_size=256, threads=2)
    return Harness(model, context, store=PrefixStore(memory), files=files)


def wait_for_files(folder: Path, count: int) -> None:
    end = time.monotonic() + 10
    while len(list(folder.glob("*.prefix"))) < count:
        assert time.monotonic() < end, "nothing was written"
        time.sleep(0.01)


def test_what_a_slot_loses_comes_back_from_memory(model: Model) -> None:
    with (harness := open_harness(model)).context:
        first = harness.run(1, LONG, 4)
        harness.run(2, "Something else entirely. " * 60, 4)
        again = harness.run(3, LONG, 4)
        assert (first.cached_tokens, again.cached_tokens) == (0, len(harness.tokens(LONG)) // 4 - 1)
        assert harness.answer(1) == harness.answer(3)


def test_without_memory_for_it_nothing_comes_back(model: Model) -> None:
    with (harness := open_harness(model, memory=0)).context:
        harness.run(1, LONG, 2)
        harness.run(2, "Something else entirely. " * 60, 2)
        assert harness.run(3, LONG, 2).cached_tokens < 10


def test_a_known_prompt_is_answered_at_once_after_a_restart(model: Model, tmp_path: Path) -> None:
    folder = tmp_path / "prefixes"
    with (harness := open_harness(model, files=PrefixFiles(folder, PLENTY))).context:
        first = harness.run(1, LONG, 4)
        wait_for_files(folder, 1)
    assert (folder.stat().st_mode & 0o777, next(folder.iterdir()).stat().st_mode & 0o777) == (0o700, 0o600)
    with (harness := open_harness(model, files=PrefixFiles(folder, PLENTY))).context:
        again = harness.run(2, LONG, 4)
        assert again.cached_tokens == len(harness.tokens(LONG)) // 4 - 1
        assert first.timings is not None
        assert again.timings is not None
        assert again.timings.prefill < 0.3 * first.timings.prefill
        fresh = harness.run(3, LONG + " And", 2, scope="another key")
        assert fresh.cached_tokens == 0


@pytest.mark.parametrize("damage", ["torn", "flipped", "foreign", "gone"])
def test_a_damaged_file_costs_nothing_but_time(model: Model, tmp_path: Path, damage: str) -> None:
    with (harness := open_harness(model, files=PrefixFiles(tmp_path, PLENTY))).context:
        harness.run(1, LONG, 4)
        wait_for_files(tmp_path, 1)
        expected = harness.answer(1)
    files = PrefixFiles(tmp_path, PLENTY)
    (file,) = tmp_path.glob("*.prefix")
    content = bytearray(file.read_bytes())
    if damage == "torn":
        file.write_bytes(content[:-100])
    elif damage == "flipped":
        content[-1000] ^= 1
        file.write_bytes(content)
    elif damage == "foreign":
        file.write_bytes(b"{}" + bytes(1000))
    with (harness := open_harness(model, files=files)).context:
        if damage == "gone":
            file.unlink()
        assert harness.run(2, LONG, 4).cached_tokens == 0
        assert harness.answer(2) == expected
        assert not file.exists()


def test_the_folder_stays_within_its_limit(model: Model, tmp_path: Path) -> None:
    with (harness := open_harness(model, files=PrefixFiles(tmp_path, 40_000_000))).context:
        for request in range(3):
            harness.run(request, f"Number {request}. " + LONG, 1)
        end = time.monotonic() + 10
        while time.monotonic() < end:
            time.sleep(0.05)
            sizes = [path.stat().st_size for path in tmp_path.glob("*.prefix")]
            if len(sizes) < 3 and not list(tmp_path.glob("*.part")):
                break
        assert 0 < sum(sizes) <= 40_000_000


def test_an_identity_changes_with_content_and_settings(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(bytes(5_000_000))
    first = model_identity(path, "build 1")
    assert first == model_identity(path, "build 1") != model_identity(path, "build 2")
    with path.open("r+b") as file:
        file.seek(4_999_999)
        file.write(b"x")
    assert model_identity(path, "build 1") != first
