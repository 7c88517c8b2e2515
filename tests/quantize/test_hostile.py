"""Files made to harm: each is refused with a clear error, soon, and before a library sees it."""

from __future__ import annotations

import copy
import io
import json
import os
import random
import resource
import shutil
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from app.errors import BadInputError, CheckpointError, ModelFileError, PestleError
from app.models.gguf import read_header
from quantize import pipeline
from quantize.checkpoint import Checkpoint
from quantize.gguf_source import open_gguf
from quantize.pipeline import prepare
from quantize.proof_process import ProofProcess
from quantize.reporting import HumanReporter, JsonReporter
from quantize.source import Source
from tests.quantize.checkpoints import Shape, make_checkpoint, write_raw_safetensors

SMALL = Shape(layers=1, hidden=64, heads=2, key_heads=1, feed_forward=96)
DEEP: Any = json.loads("[" * 900 + "]" * 900)
VALUES: list[Any] = [
    -1, 0, 1, 2**31, 2**63, 2**64, 10**40, -(2**63), 1.0, 0.5, 1e308, float("inf"), float("nan"), True, None, "", "0",
    "a\0b", "\ud800", "\x1b[2J", "../../etc/passwd", "x" * 100_000, [], {}, [[]], [1] * 10_000, {"": {}},
    {"\0": "\udfff"}, DEEP,
]  # fmt: skip
SECONDS = 5.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("hostile") / "Model", SMALL)


@pytest.fixture
def folder(model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "Model"))


def paths_of(content: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield where each value of some JSON is."""
    if path:
        yield path
    items: Any = (
        content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    )
    for key, value in items:
        yield from paths_of(value, (*path, key))


def mutated(draw: random.Random, content: Any) -> Any:
    """Return JSON in which a few values are hostile ones, missing, in each other's places or under other names."""
    content = copy.deepcopy(content)
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        shallow = [path for path in paths_of(content) if len(path) < 5]
        if not shallow:
            return draw.choice(VALUES)
        path = draw.choice(shallow) if draw.random() < 0.5 else draw.choice([path for path in shallow if len(path) < 3])
        parent = content
        for key in path[:-1]:
            parent = parent[key]
        kind = draw.random()
        if kind < 0.7 or not isinstance(parent, dict):
            parent[path[-1]] = draw.choice(VALUES)
        elif kind < 0.85:
            del parent[path[-1]]
        else:
            parent[draw.choice(["a\0b", "\ud800", "", "../x", "9" * 5000, "-1"])] = parent.pop(path[-1])
    return content


def refused_or_read(work: Callable[[], Any]) -> None:
    """Make sure that an error is one of ours, comes soon, and can be shown to people and programs."""
    cpu = time.process_time()
    try:
        work()
    except PestleError as error:
        if not isinstance(error, BadInputError):
            raise
        out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
        JsonReporter(out).error(error)
        HumanReporter(out, out).error(error)
        out.flush()
        said = out.buffer.getvalue().decode()
        assert "\x1b" not in said
        assert len(said) < 60_000
    assert time.process_time() - cpu < SECONDS


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"])
def test_json_files(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # what survives goes to a process of its own, one a second; test_proof.py has those
    monkeypatch.setattr(pipeline, "start_proof", lambda *_: None)
    (folder / "generation_config.json").write_text('{"eos_token_id": [258, 257]}')
    path = folder / name
    original, draw = json.loads(path.read_text()), random.Random(name)
    for _ in range(250):
        path.write_text(json.dumps(mutated(draw, original)))
        refused_or_read(lambda: prepare(folder, "q8_0"))


def test_safetensors_headers(folder: Path) -> None:
    shard = folder / "model.safetensors"
    content = shard.read_bytes()
    length = int.from_bytes(content[:8], "little")
    original, data, draw = json.loads(content[8 : 8 + length]), content[8 + length :], random.Random(0)
    for _ in range(300):
        write_raw_safetensors(shard, mutated(draw, original), data)
        refused_or_read(lambda: Checkpoint.open(folder))


def test_indices(folder: Path) -> None:
    index, draw = folder / "model.safetensors.index.json", random.Random(0)
    names = Checkpoint.open(folder).tensors
    original = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, "model.safetensors")}
    for _ in range(200):
        index.write_text(json.dumps(mutated(draw, original)))
        refused_or_read(lambda: Checkpoint.open(folder))


def test_bytes_of_a_gguf(model: Path, tmp_path: Path) -> None:
    whole, path = tmp_path / "whole.gguf", tmp_path / "hostile.gguf"
    pipeline.quantize(model, "q8_0", whole)
    content, header, draw = whole.read_bytes(), read_header(whole), random.Random(0)
    words = [
        b"\0" * 8,
        b"\xff" * 8,
        struct.pack("<Q", 1 << 62),
        struct.pack("<Q", 1 << 31),
        struct.pack("<I", 9),
        b"GGUF",
    ]
    for _ in range(400):
        changed = bytearray(content)
        for _ in range(draw.choice([1, 1, 2, 5])):
            place = draw.randrange(draw.choice([32, 2000, header.data_offset]))
            word = draw.choice(words) if draw.random() < 0.5 else bytes([draw.randrange(256)])
            changed[place : place + len(word)] = word
        if draw.random() < 0.2:
            del changed[draw.randrange(len(changed)) :]
        path.write_bytes(changed)
        refused_or_read(lambda: open_gguf(path))


def entry(**changes: Any) -> dict[str, Any]:
    return {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (entry(shape=[2**62, 4], data_offsets=[0, 8]), r"'a' \(F32, shape \(4611686018427387904, 4\)\) has"),
        (entry(shape=[2**64, 0]), "'a' has"),
        (entry(shape=[10**4000] * 1000), "'a' has 1000 dimensions"),
        (entry(shape=[1] * 9 + [2]), "'a' has 10 dimensions"),
        (entry(data_offsets=[2**64, 2**64 + 8]), "'a' has"),
        (entry(data_offsets=[8, 0]), "'a'"),
        ({"a\0b": entry()["a"]}, r"'a\\x00b'.* name"),
        ({"x" * 5000: entry()["a"]}, "name of 5000 letters"),
        (b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}", "header is damaged"),
        (b'{"a":' + b"1" * 100_000 + b"}", "header is damaged"),
    ],
)
def test_hostile_safetensors(header: Any, message: str, tmp_path: Path) -> None:
    write_raw_safetensors(tmp_path / "model.safetensors", header, bytes(8))
    began = time.process_time()
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(tmp_path)
    assert time.process_time() - began < 1


@pytest.fixture
def little_memory() -> Iterator[None]:
    """Leave 512 MiB over what is mapped already: who believes a bomb gets a MemoryError."""
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (mapped + (512 << 20), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads what is mapped from /proc")
@pytest.mark.usefixtures("little_memory")
def test_bombs_are_not_unpacked(tmp_path: Path) -> None:
    bomb = b'{"a":[' + b"[]," * 30_000_000 + b"[]]}"  # 90 MB, 2 GB as objects
    write_raw_safetensors(tmp_path / "model.safetensors", bomb, b"")
    with pytest.raises(CheckpointError, match=r"model.safetensors: .* more than .* values"):
        Checkpoint.open(tmp_path)
    for name in ("config.json", "model.safetensors.index.json"):
        (tmp_path / name).write_bytes(bomb)
    with pytest.raises(CheckpointError, match=r"index.json: .* more than .* values"):
        Checkpoint.open(tmp_path)
    with pytest.raises(CheckpointError, match=r"config.json: .* more than .* values"):
        _ = Source(tmp_path).config


@pytest.mark.skipif(not Path("/proc/self/limits").exists(), reason="reads limits from /proc")
def test_the_proofs_memory_is_limited() -> None:
    with ProofProcess() as process:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            limits = Path(f"/proc/{process.pid}/limits").read_text().splitlines()
            (data,) = [line.split()[3:5] for line in limits if line.startswith("Max data size")]
            if data == [str(4 << 30)] * 2:
                return
            time.sleep(0.05)
    pytest.fail(f"the limit stays {data}")


def test_what_is_no_file_is_not_opened(folder: Path) -> None:
    shard = folder / "model.safetensors"
    shard.unlink()
    os.mkfifo(shard)  # who opens it waits for ever
    with pytest.raises(CheckpointError, match=r"no model\.safetensors"):
        Checkpoint.open(folder)


def test_a_link_out_of_the_folder_is_read(folder: Path, tmp_path: Path) -> None:
    shard = folder / "model.safetensors"
    shard.rename(tmp_path / "blob")  # as in the Hub's cache
    shard.symlink_to(tmp_path / "blob")
    assert Checkpoint.open(folder).tensors


def gguf(keys: list[tuple[bytes, int, bytes]], tensors: bytes = b"", count: int = 0) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", 3, count, len(keys))
    return (
        head
        + b"".join(struct.pack("<Q", len(name)) + name + struct.pack("<I", kind) + value for name, kind, value in keys)
        + tensors
    )


def test_many_arrays_of_a_gguf(tmp_path: Path) -> None:
    array = struct.pack("<IQ", 0, 1 << 22) + bytes(1 << 22)
    path = tmp_path / "many.gguf"
    path.write_bytes(gguf([(b"a%d" % number, 9, array) for number in range(8)]))
    with pytest.raises(ModelFileError, match="items in all"):
        read_header(path)
    assert len(read_header(path, largest_array=10).metadata) == 8


def test_an_endless_header_of_a_gguf(tmp_path: Path) -> None:
    path = tmp_path / "long.gguf"
    text = struct.pack("<Q", 1 << 26)
    with path.open("wb") as file:
        file.write(gguf([])[:16] + struct.pack("<Q", 100))
        for number in range(100):
            file.write(struct.pack("<Q", 2) + b"%02d" % number + struct.pack("<I", 8) + text)
            file.seek(1 << 26, 1)  # a hole: takes no room on the disk
        file.truncate(file.tell() + 100)
    began = time.process_time()
    with pytest.raises(ModelFileError, match="header is longer than"):
        read_header(path)
    assert time.process_time() - began < 3


@pytest.mark.parametrize("name", [b"a\0b", b"\0"])
def test_names_that_c_cuts_off(name: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf([(name, 4, bytes(4))]))
    with pytest.raises(ModelFileError, match="a zero byte"):
        read_header(path)
    tensor = struct.pack("<Q", len(name)) + name + struct.pack("<IQIQ", 1, 4, 0, 0)
    path.write_bytes(gguf([], tensor, 1) + bytes(99))
    with pytest.raises(ModelFileError, match="a zero byte"):
        read_header(path)
