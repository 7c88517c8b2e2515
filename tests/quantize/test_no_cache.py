"""Models from the Hub, streamed shard by shard past the cache, against a local server that is honest or not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from quantize.pipeline import quantize
from tests.quantize.checkpoints import Shape, make_checkpoint, write_safetensors
from tests.quantize.hub_server import Hub, command, environment, running
from tests.quantize.quantized import Make
from tests.quantize.test_family_gpt_oss import packed

ROOT = Path(__file__).parents[2]
SHARD = "model-00002-of-00003.safetensors"
CARDED = ("", ".card.json", ".card.md")  # what ends the names of a file and its card
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("hub") / "Tiny-1M-Instruct", Shape(shards=3))


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Return the folder of the result, where nothing else may stay."""
    made = tmp_path / "made"
    made.mkdir()
    return made


@pytest.fixture
def run(tmp_path: Path, place: Path) -> Run:
    """Return a function that quantizes a model of the Hub at a URL to out.gguf, with --no-cache."""

    def quantize_it(server: Hub, *arguments: str, **variables: str) -> Any:
        result = subprocess.run(
            command(place / "out.gguf", "--no-cache", *arguments), cwd=ROOT,
            env=environment(server, tmp_path / "hf", **variables), capture_output=True, text=True, timeout=100,
            check=False,
        )  # fmt: skip
        assert "Traceback" not in result.stderr
        left = sorted(path.name for path in place.iterdir())
        made = [f"out.gguf{suffix}" for suffix in CARDED]
        assert left == (made if result.returncode == 0 and "--dry-run" not in arguments else [])
        return result

    return quantize_it


def made_locally(folder: Path, tmp_path: Path, chosen: str = "q8_0") -> bytes:
    quantize(folder, chosen, tmp_path / "local.gguf")
    return (tmp_path / "local.gguf").read_bytes()


def dealt(folder: Path, target: Path, shards: int = 3) -> Path:
    """Copy a checkpoint of one shard and deal its tensors to several, so that what belongs together is apart."""
    target.mkdir(parents=True)
    for path in folder.iterdir():
        if path.suffix != ".safetensors":
            (target / path.name).write_bytes(path.read_bytes())
    content = (folder / "model.safetensors").read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    entries = json.loads(content[8:start])
    entries.pop("__metadata__", None)
    tensors = {
        name: (entry["dtype"], tuple(entry["shape"]), content[start:][slice(*entry["data_offsets"])])
        for name, entry in entries.items()
    }
    weight_map = {}
    for shard in range(shards):
        name = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = dict(list(tensors.items())[shard::shards])
        write_safetensors(target / name, part)
        weight_map |= dict.fromkeys(part, name)
    (target / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return target


def test_the_file_is_that_of_the_folder(run: Run, folder: Path, tmp_path: Path, place: Path) -> None:
    with running(Hub.of(folder, redirect="localhost", token="secret")) as server:
        result = run(server, HF_TOKEN="secret")
        assert (result.returncode, result.stderr) == (0, "")
        assert server.secrets == [], "the token went to another host"
    assert (place / "out.gguf").read_bytes() == made_locally(folder, tmp_path)
    assert not list((tmp_path / "hf").rglob("*.safetensors")), "the cache was filled"


@pytest.mark.parametrize("method", ["fp8 blocks", "packed int4 shuffled", "gptq 4 shuffled", "mxfp4", "gpt-oss"])
def test_scales_in_another_shard(method: str, run: Run, made: Make, tmp_path: Path, place: Path) -> None:
    folder, chosen = (packed(tmp_path), "mxfp4_moe") if method == "gpt-oss" else (made(method)[0], "q8_0")
    apart = dealt(folder, tmp_path / "apart" / "Tiny-1M-Instruct")
    with running(Hub.of(apart)) as server:
        result = run(server, "--type", chosen)
    assert result.returncode == 0, result.stderr
    assert (place / "out.gguf").read_bytes() == made_locally(apart, tmp_path, chosen)


def test_several_types_and_progress(folder: Path, tmp_path: Path, place: Path) -> None:
    arguments = ["--no-cache", "--format", "json", "--type", "q8_0,q4_0"]
    with running(Hub.of(folder)) as server:
        result = subprocess.run(
            command(place / "new" / "both", *arguments), cwd=ROOT, env=environment(server, tmp_path / "hf"),
            capture_output=True, text=True, timeout=100, check=True,
        )  # fmt: skip
        fetched = sum(len(content) for name, content in server.files.items() if name.endswith(".safetensors"))
    events = [json.loads(line) for line in result.stdout.splitlines()]
    last = [event for event in events if event["event"] == "progress"][-1]
    done = [event for event in events if event["event"] == "done"]
    assert last["done"] == last["total"] == done[0]["source_bytes"] + fetched
    names = [f"Tiny-1M-Instruct-{kind}.gguf{suffix}" for kind in ("Q4_0", "Q8_0") for suffix in CARDED]
    assert sorted(path.name for path in place.rglob("*")) == [*names, "both", "new"]
    assert (place / "new" / "both" / "Tiny-1M-Instruct-Q8_0.gguf").read_bytes() == made_locally(folder, tmp_path)


def disk_bytes(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.lstat().st_blocks * 512
        except FileNotFoundError:
            continue
    return total


def test_the_disk_holds_one_shard_at_a_time(run: Run, tmp_path: Path, place: Path) -> None:
    large = make_checkpoint(tmp_path / "Tiny-1M-Instruct", Shape(hidden=1024, feed_forward=4096, shards=4))
    shards = [path.stat().st_size for path in large.glob("*.safetensors")]
    small = sum(path.stat().st_size for path in large.iterdir() if path.suffix != ".safetensors")
    peak, there, ended = 0, [], threading.Event()

    def watch() -> None:
        nonlocal peak
        while not ended.wait(0.001):
            peak = max(peak, disk_bytes(place))

    def heard(_request: str) -> None:
        there.append(sum(path.stat().st_size for path in place.rglob("*.safetensors")))

    watcher = threading.Thread(target=watch)
    watcher.start()
    with running(Hub.of(large, heard=heard)) as server:
        result = run(server)
    ended.set()
    watcher.join()
    assert result.returncode == 0, result.stderr
    output = (place / "out.gguf").stat().st_size
    slack = 4096 * (len(list(large.iterdir())) + 8)  # blocks that are not full, and folders
    assert output + min(shards) < peak <= output + max(shards) + small + slack
    assert max(there) == 0, "a shard was asked for while another was there"


def test_room_for_the_largest_shard_is_looked_for_first(run: Run, folder: Path, place: Path) -> None:
    def mounted(size: int) -> bool:
        return not subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place], check=False, capture_output=True
        ).returncode

    shards = [path.stat().st_size for path in folder.glob("*.safetensors")]
    if not mounted(sum(shards) // 2 + max(shards) + 65536):
        pytest.skip("no disk of its own can be mounted here: root is needed")
    try:
        with running(Hub.of(folder)) as server:
            result = run(server)
            assert result.returncode == 4
            assert f"for the result and {max(shards)} for the largest shard" in result.stderr
            assert not [request for request in server.requests if request.endswith(".safetensors")]
    finally:
        subprocess.run(["umount", place], check=True)


def test_what_the_cache_has_is_used_and_stays(run: Run, folder: Path, tmp_path: Path, place: Path) -> None:
    with running(Hub.of(folder)) as server:
        arguments = command(tmp_path / "cached.gguf")
        subprocess.run(arguments, cwd=ROOT, env=environment(server, tmp_path / "hf"), check=True, capture_output=True)
        kept = {path: path.stat().st_ino for path in (tmp_path / "hf" / "hub").rglob("*") if path.is_file()}
        lost = next(path for path in kept if path.name == SHARD)
        lost.resolve().unlink()
        lost.unlink()
        kept = {path: inode for path, inode in kept.items() if path.exists()}
        server.requests.clear()
        assert run(server).returncode == 0
    assert {request.split()[1].rpartition("/")[2] for request in server.requests if "resolve" in request} == {SHARD}
    assert (place / "out.gguf").read_bytes() == (tmp_path / "cached.gguf").read_bytes()
    assert {path: path.stat().st_ino for path in (tmp_path / "hf" / "hub").rglob("*") if path.is_file()} == kept


def test_dry_run(run: Run, folder: Path) -> None:
    with running(Hub.of(folder)) as server:
        result = run(server, "--dry-run")
        whole = [request for request in server.requests if "safetensors " in request and "bytes=0-" not in request]
    assert result.returncode == 0, result.stderr
    assert "nothing was written" in result.stdout
    assert whole == [], "weights were fetched"


LIES: dict[str, tuple[dict[str, Any], int, str]] = {
    "cut": ({"cut": 2}, 0, ""),
    "ignored range": ({"cut": 1, "no_range": True}, 0, ""),
    "stall": ({"stall": 3.0}, 0, ""),
    "always cut": ({"cut": 1000}, 4, "attempts in a row did not help"),
    "one bit": ({"swap": lambda content: content[:-1] + bytes([content[-1] ^ 1])}, 5, "has the hash"),
    "too short": ({"swap": lambda _: b"x"}, 5, "has 1 bytes; the Hub says"),
    "too long": ({"more": b"x"}, 5, "more bytes than"),
    "other header": ({"alter": lambda content: content.replace(b'"pt"', b'"PT"')}, 5, "has another header"),
    "no header": ({"alter": lambda content: bytes(len(content))}, 3, "header is damaged"),
    "huge header": ({"alter": lambda content: b"\xff" * len(content)}, 3, "truncated or no safetensors"),
    "other range": ({"shift": 1}, 4, "the Hub sends 'bytes 1-"),
    "compressed": ({"encoding": "gzip"}, 4, "comes compressed"),
    "redirected for ever": ({"redirect": "localhost", "loops": True}, 4, "the Hub does not answer as it should"),
    "hostile name": ({"extra": ["../../evil.json", "1_Pooling/../../config.json"]}, 0, ""),
    "hostile small name": ({"extra": ["..\\evil.json"]}, 3, "impossible name"),
    "gone": ({"status": 503}, 4, "the Hub does not answer as it should"),
    "denied": ({"token": "secret"}, 3, "then set HF_TOKEN"),
}


@pytest.mark.parametrize("lie", LIES)
def test_lies_are_not_believed(lie: str, run: Run, folder: Path, tmp_path: Path, place: Path) -> None:
    faults, exit_code, message = LIES[lie]
    if "swap" in faults:
        faults = {"swap": {SHARD: faults["swap"]((folder / SHARD).read_bytes())}}
    with running(Hub.of(folder, **faults)) as server:
        result = run(server)
    assert result.returncode == exit_code, result.stderr
    assert message in result.stderr
    assert not list(tmp_path.rglob("evil.json"))
    if exit_code == 0:
        assert (place / "out.gguf").read_bytes() == made_locally(folder, tmp_path)


def test_scales_that_differ_from_those_of_their_shard(run: Run, made: Make, tmp_path: Path) -> None:
    apart = dealt(made("fp8 blocks")[0], tmp_path / "apart" / "Tiny-1M-Instruct")

    def alter(content: bytes) -> bytes:
        return content if b'"dtype"' in content else bytes(len(content))

    with running(Hub.of(apart, alter=alter)) as server:
        result = run(server)
    assert result.returncode == 5, result.stderr
    assert "_scale_inv' came by itself with other bytes" in result.stderr


@pytest.fixture
def under_way(folder: Path, tmp_path: Path, place: Path) -> Iterator[subprocess.Popen[str]]:
    """Yield a run that waits for the second half of a shard."""
    with running(Hub.of(folder, stall=8.0)) as server:
        process = subprocess.Popen(
            command(place / "out.gguf", "--no-cache"), cwd=ROOT, text=True, stderr=subprocess.PIPE,
            env=environment(server, tmp_path / "hf", HF_HUB_DOWNLOAD_TIMEOUT="30"),
        )  # fmt: skip
        deadline = time.monotonic() + 30
        while not any(path.stat().st_size for path in place.rglob("*.safetensors")) and time.monotonic() < deadline:
            time.sleep(0.01)
        yield process
        process.kill()
        process.wait()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_leave_nothing(number: int, under_way: subprocess.Popen[str], place: Path) -> None:
    assert list(place.rglob("*.safetensors"))
    under_way.send_signal(number)
    _, said = under_way.communicate(timeout=20)
    assert under_way.returncode == 130, said
    assert list(place.iterdir()) == []


def test_the_next_run_sweeps_after_a_kill(
    under_way: subprocess.Popen[str], folder: Path, tmp_path: Path, place: Path
) -> None:
    quantize(folder, "q8_0", tmp_path / "other.gguf")
    assert list(place.rglob("*.safetensors")), "another run took away what a living one needs"
    os.kill(under_way.pid, signal.SIGKILL)
    under_way.communicate()
    assert list(place.rglob("*.safetensors"))
    arguments = [*command(place / "out.gguf"), "--dry-run"]
    arguments[arguments.index("tiny/Tiny-1M-Instruct")] = str(folder)
    subprocess.run(arguments, cwd=ROOT, check=True, capture_output=True)
    assert not list(place.rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("name", "variables", "message"),
    [
        ("tiny/Tiny-1M-Instruct", {"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE forbids"),
        (str(ROOT), {}, "--no-cache is for a model on the Hub"),
        ("no name of the Hub", {}, "--no-cache is for a model on the Hub"),
    ],
)
def test_where_it_means_nothing(
    name: str, variables: dict[str, str], message: str, tmp_path: Path, place: Path
) -> None:
    result = subprocess.run(
        command(place / "out.gguf", "--no-cache", name=name), cwd=ROOT, capture_output=True, text=True, check=False,
        env=environment(Hub({}, url="http://127.0.0.1:9"), tmp_path / "hf", **variables),
    )  # fmt: skip
    assert result.returncode == 2
    assert message in result.stderr
    assert list(place.iterdir()) == []
