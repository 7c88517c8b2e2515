"""A run that was killed is gone on with, and ends with the same bytes; what was left is never trusted blindly."""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.errors import StorageError
from quantize.cli import main
from quantize.extents import Extents
from quantize.journal import Head, Journal, Range
from quantize.writer import AtomicFile
from tests.quantize.checkpoints import Shape, make_checkpoint

ROOT = Path(__file__).parents[2]
SHAPE = Shape(layers=4, hidden=512, heads=8, key_heads=2, feed_forward=1536)
TYPES = ("q4_k_m", "q6_k")
LABELS = {"q4_k_m": "Q4_K_M", "q6_k": "Q6_K"}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("resume") / "Model", SHAPE)


@pytest.fixture(scope="module")
def expected(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return the sha256 of each type's file, made without interruption."""
    folder = tmp_path_factory.mktemp("expected")
    assert (
        main([str(source), "--type", ",".join(TYPES), "--out", str(folder), "--no-measure", "--format", "quiet"]) == 0
    )
    return {name: digest(folder / f"Model-{LABELS[name]}.gguf") for name in TYPES}


def without_cards(folder: Path) -> list[Path]:
    """Return what is in a folder, but for cards."""
    return sorted(path for path in folder.iterdir() if ".card." not in path.name)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def start(source: Path, types: str, out: Path, *flags: str) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        "-P",
        "-m",
        "quantize",
        str(source),
        "--type",
        types,
        "--out",
        str(out),
        "--no-measure",
        "--threads",
        "1",
    ]
    return subprocess.Popen(
        [*command, "--threads", "1", *flags], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def wait_for_records(folder: Path, process: subprocess.Popen[str], files: int = 1) -> None:
    """Wait until each journal tells of several ranges."""
    while True:
        assert process.poll() is None, process.communicate()[0]
        counts = [path.read_bytes().count(b"\n") for path in folder.glob(".*.pestle-journal")]
        if len(counts) == files and min(counts) > 4:
            return
        time.sleep(0.002)


def killed_run(source: Path, types: str, out: Path, files: int = 1) -> None:
    """Run until some of the file is on the disk, and kill."""
    process = start(source, types, out)
    wait_for_records(out if files > 1 else out.parent, process, files)
    process.kill()
    process.communicate(timeout=30)


@pytest.fixture(scope="module")
def left(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return what a killed run to Q4_K_M left; tests take a copy."""
    folder = tmp_path_factory.mktemp("left")
    killed_run(source, "q4_k_m", folder / "model.gguf")
    return folder


@pytest.fixture
def out(left: Path, tmp_path: Path) -> Path:
    """Return the target of a killed run, whose remains are beside it."""
    shutil.copytree(left, tmp_path, dirs_exist_ok=True)
    return tmp_path / "model.gguf"


def resumed(source: Path, types: str, out: Path, capsys: pytest.CaptureFixture[str]) -> list[int]:
    """Go on with a run; return how many bytes of each file were taken over."""
    capsys.readouterr()
    assert main([str(source), "--type", types, "--out", str(out), "--resume", "--format", "json"]) == 0
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    return [event["resumed_bytes"] for event in events if event["event"] == "done"]


def part_of(folder: Path, suffix: str = "part") -> Path:
    (found,) = folder.glob(f".*.pestle-{suffix}")
    return found


def test_what_is_done_is_not_done_again(
    source: Path, expected: dict[str, str], out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shard = source / "model.safetensors"
    status, content = shard.stat(), shard.read_bytes()
    length = int.from_bytes(content[:8], "little")
    place = json.loads(content[8 : 8 + length])["lm_head.weight"]["data_offsets"]  # the first tensor of the file
    try:
        with shard.open("r+b") as file:  # whoever reads it again makes another file, or fails
            file.seek(8 + length + place[0])
            file.write(b"\xff" * (place[1] - place[0]))
        os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns))
        (taken,) = resumed(source, "q4_k_m", out, capsys)
    finally:
        shard.write_bytes(content)
        os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert digest(out) == expected["q4_k_m"]
    assert 0 < taken < out.stat().st_size
    assert without_cards(tmp_path) == [out]


def test_several_types(
    source: Path, expected: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    killed_run(source, ",".join(TYPES), tmp_path, files=2)
    assert min(resumed(source, ",".join(TYPES), tmp_path, capsys)) > 0
    names = [tmp_path / f"Model-{LABELS[name]}.gguf" for name in TYPES]
    assert without_cards(tmp_path) == sorted(names)
    assert [digest(path) for path in names] == list(expected.values())


def test_one_type_of_several(
    source: Path, expected: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    killed_run(source, ",".join(TYPES), tmp_path, files=2)
    out = tmp_path / "Model-Q6_K.gguf"
    assert resumed(source, "q6_k", out, capsys)[0] > 0
    assert digest(out) == expected["q6_k"]


@pytest.mark.parametrize("seed", range(3))
def test_a_damaged_part_is_not_trusted(
    seed: int, source: Path, expected: dict[str, str], out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draw = random.Random(seed)
    part, journal = part_of(tmp_path), part_of(tmp_path, "journal")
    recorded = [json.loads(line[9:]) for line in journal.read_bytes().splitlines()[1:]]
    torn = draw.sample(recorded, 2)
    with part.open("r+b") as file:
        for first, end, _ in torn:
            position = draw.randrange(first, end)
            byte = os.pread(file.fileno(), 1, position)[0]
            os.pwrite(file.fileno(), bytes([byte ^ 1 << draw.randrange(8)]), position)
    (taken,) = resumed(source, "q4_k_m", out, capsys)
    assert taken == sum(end - first for first, end, _ in recorded) - sum(end - first for first, end, _ in torn)
    assert digest(out) == expected["q4_k_m"]


@pytest.mark.parametrize("damage", ["cut", "bytes", "empty", "shrunken part", "gone"])
def test_a_damaged_journal(
    damage: str, source: Path, expected: dict[str, str], out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    part, journal = part_of(tmp_path), part_of(tmp_path, "journal")
    content = journal.read_bytes()
    if damage == "gone":
        journal.unlink()
    elif damage == "shrunken part":
        os.truncate(part, 5)
    else:
        third = content.index(b"\n", content.index(b"\n") + 1) + 12
        changed = {"cut": content[:third], "bytes": content[:third] + b"\0\n\xff" + content[third + 3 :], "empty": b""}
        journal.write_bytes(changed[damage])
    taken = resumed(source, "q4_k_m", out, capsys)[0]
    assert (taken > 0) == (damage in {"cut", "bytes"})
    assert digest(out) == expected["q4_k_m"]
    assert without_cards(tmp_path) == [out]


def test_another_runs_part_is_not_taken(
    source: Path, expected: dict[str, str], left: Path, out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert resumed(source, "q6_k", out, capsys) == [0]
    assert digest(out) == expected["q6_k"]
    shutil.copytree(left, tmp_path, dirs_exist_ok=True)
    shard = source / "model.safetensors"
    status = shard.stat()
    os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    try:
        assert resumed(source, "q4_k_m", out, capsys) == [0]
    finally:
        os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert without_cards(tmp_path) == [out]


def test_without_the_flag_everything_is_done_again(
    source: Path, expected: dict[str, str], out: Path, tmp_path: Path
) -> None:
    assert main([str(source), "--type", "q4_k_m", "--out", str(out), "--no-measure", "--format", "quiet"]) == 0
    assert without_cards(tmp_path) == [out]
    assert digest(out) == expected["q4_k_m"]


def test_an_interrupted_run_says_that_it_can_be_gone_on_with(
    source: Path, expected: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "model.gguf"
    process = start(source, "q4_k_m", out, "--resume")
    wait_for_records(tmp_path, process)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=30)[0]
    assert process.returncode == 130
    assert "interrupted; what is done is kept: run the same command again to go on" in said
    assert resumed(source, "q4_k_m", out, capsys)[0] > 0
    assert digest(out) == expected["q4_k_m"]


@pytest.mark.parametrize("resume", [False, True])
def test_a_disk_that_fills_up_later(resume: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on file systems that cannot reserve room."""
    real, full, target = os.pwrite, 3 << 20, tmp_path / "model.gguf"

    def pwrite(file: int, data: memoryview, offset: int) -> int:
        if offset >= full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(file, data, offset)

    content = random.Random(0).randbytes(4 << 20)
    pieces = [(place, memoryview(content)[place : place + 65536]) for place in range(0, len(content), 65536)]

    def fill() -> None:
        with AtomicFile(target, len(content), "run", resume=resume) as file:
            for place, piece in pieces:
                file.write_at(place, piece)

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(StorageError, match=r"no room for model\.gguf: 4194304 bytes are needed"):
        fill()
    monkeypatch.undo()
    assert len(list(tmp_path.iterdir())) == (2 if resume else 0)
    with AtomicFile(target, len(content), "run", resume=True) as file:
        assert file.resumed_bytes == (full if resume else 0)
        for place, piece in pieces:
            if not file.has(place, place + len(piece)):
                file.write_at(place, piece)
        file.check(lambda _: None)
        file.publish()
    assert target.read_bytes() == content
    assert without_cards(tmp_path) == [target]


@pytest.mark.parametrize("flags", [[], ["--resume"]])
def test_two_runs_at_once_end_well(
    flags: list[str], source: Path, expected: dict[str, str], out: Path, tmp_path: Path
) -> None:
    processes = [start(source, "q4_k_m", out, *flags) for _ in range(2)]
    said = [process.communicate(timeout=100)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert without_cards(tmp_path) == [out]
    assert digest(out) == expected["q4_k_m"]


def test_runs_that_make_the_same_folder(source: Path, expected: dict[str, str], tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    processes = [start(source, ",".join(TYPES), folder) for _ in range(2)]
    said = [process.communicate(timeout=100)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert [digest(path) for path in without_cards(folder)] == list(expected.values())


@settings(deadline=None)
@given(ranges=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 12)), max_size=12))
def test_extents_are_a_set(ranges: list[tuple[int, int]]) -> None:
    extents, positions = Extents(), set[int]()
    for first, length in ranges:
        extents.add(first, first + length)
        positions |= set(range(first, first + length))
    found = list(extents)
    assert extents.total == len(positions)
    assert all(end < after for (_, end), (after, _) in itertools.pairwise(found))
    for first in range(55):
        for end in range(first, 55):
            assert extents.covers(first, end) == (set(range(first, end)) <= positions)


@settings(max_examples=50, deadline=None)
@given(content=st.binary(max_size=300))
def test_no_journal_ends_in_a_traceback(content: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "journal"
    path.unlink(missing_ok=True)
    head = Head("run", 100)
    Journal.create(path, head).close()
    written = path.read_bytes()
    path.write_bytes(written + content)
    reopened = Journal.reopen(path, head)
    assert reopened is not None
    journal, ranges = reopened
    assert ranges == []
    journal.append([Range(0, 50, 7)])
    journal.close()
    again = Journal.reopen(path, head)
    assert again is not None
    again[0].close()
    assert again[1] == [Range(0, 50, 7)]
    path.write_bytes(content + written)
    refused = Journal.reopen(path, head)
    if content:
        assert refused is None


def test_a_journal_of_wrong_ranges(tmp_path: Path) -> None:
    head = Head("run", 100)
    for first, end in ((-1, 5), (5, 5), (9, 101)):
        path = tmp_path / f"{first}"
        journal = Journal.create(path, head)
        journal.append([Range(0, 4, 1), Range(first, end, 1), Range(4, 8, 1)])
        journal.close()
        reopened = Journal.reopen(path, head)
        assert reopened is not None
        reopened[0].close()
        assert reopened[1] == [Range(0, 4, 1)]


def test_the_source_is_watched(checkpoint_of: Callable[[str], Path]) -> None:
    from quantize.identity import identities  # noqa: PLC0415
    from quantize.pipeline import prepare  # noqa: PLC0415

    source = checkpoint_of("llama3")
    both = identities(prepare(source, ["q8_0", "q4_0"]))
    assert len(set(both)) == 2
    assert identities(prepare(source, "q8_0")) == both[:1]
