"""Models from the Hub, against a local server that speaks its protocol, honestly and not."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from app.models import hub
from app.models.gguf import read_header
from quantize.pipeline import quantize
from tests.quantize.checkpoints import Shape, make_checkpoint
from tests.quantize.hub_server import COMMIT, Hub, command, environment, running

ROOT = Path(__file__).parents[2]
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("hub") / "Tiny-1M-Instruct", Shape(shards=2))


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Return a function that quantizes a model of the Hub at a URL to out.gguf, with a cache of the test's own."""

    def quantize_it(server: Hub, name: str = "tiny/Tiny-1M-Instruct", **variables: str) -> Any:
        return subprocess.run(
            command(tmp_path / "out.gguf", name=name), cwd=ROOT, env=environment(server, tmp_path / "hf", **variables),
            capture_output=True, text=True, timeout=90, check=False,
        )  # fmt: skip

    return quantize_it


@pytest.mark.parametrize("name", ["a/b", "org/name@main", "org/name@refs/pr/1", "HuggingFaceTB/SmolLM2-135M.x_y"])
def test_names_on_the_hub(name: str) -> None:
    model = hub.parse(name)
    assert model is not None
    assert f"{model.repo}{'@' + model.revision if model.revision else ''}" == name


@pytest.mark.parametrize(
    "name", ["", "name", "/a/b", "a/b/c", "./a/b", "../b", "a/..", "a/b@", "a/b@../c", "a b/c", "a/b\n"]
)
def test_other_names_are_not(name: str) -> None:
    assert hub.parse(name) is None


def test_the_file_is_that_of_the_folder(run: Run, folder: Path, tmp_path: Path) -> None:
    with running(
        Hub.of(folder, redirect="localhost", token="secret", extra=["pytorch_model.bin", "original/params.json"])
    ) as server:
        result = run(server, HF_TOKEN="secret")
        assert (result.returncode, result.stderr) == (0, "")
        quantize(folder, "q8_0", tmp_path / "local.gguf")
        assert (tmp_path / "out.gguf").read_bytes() == (tmp_path / "local.gguf").read_bytes()
        assert read_header(tmp_path / "out.gguf").metadata["general.name"] == "Tiny 1M Instruct"
        assert server.secrets == [], "the token went to another host"
        asked = "\n".join(server.requests)
        assert "pytorch_model.bin" not in asked
        assert "params.json" not in asked

        server.requests.clear()
        assert run(server, HF_TOKEN="secret").returncode == 0
        assert not any("resolve" in request for request in server.requests), "the cache was not used"
        server.requests.clear()
        assert run(server, f"tiny/Tiny-1M-Instruct@{COMMIT}", HF_HUB_OFFLINE="1").returncode == 0
        assert server.requests == []


def test_a_cut_transfer_is_resumed_where_it_stopped(run: Run, tmp_path: Path) -> None:
    large = make_checkpoint(tmp_path / "Tiny-1M-Instruct", Shape(hidden=512, feed_forward=2048))  # several pieces
    with running(Hub.of(large, cut=2)) as server:
        result = run(server)
        assert result.returncode == 0, result.stderr
        assert any(" bytes=" in request and " bytes=0" not in request for request in server.requests)
    quantize(large, "q8_0", tmp_path / "local.gguf")
    assert (tmp_path / "out.gguf").read_bytes() == (tmp_path / "local.gguf").read_bytes()


def test_a_range_that_is_ignored_does_no_harm(run: Run, folder: Path, tmp_path: Path) -> None:
    with running(Hub.of(folder, cut=1, no_range=True)) as server:
        assert run(server).returncode == 0
    quantize(folder, "q8_0", tmp_path / "local.gguf")
    assert (tmp_path / "out.gguf").read_bytes() == (tmp_path / "local.gguf").read_bytes()


def test_a_stall_is_waited_for_and_resumed(run: Run, folder: Path) -> None:
    with running(Hub.of(folder, stall=3.0)) as server:
        assert run(server).returncode == 0


LIES = {
    "other bytes": ({"swap": None}, 5, "model-00001-of-00002.safetensors has the hash"),
    "too short": ({"swap": {"model-00001-of-00002.safetensors": b"x"}}, 5, "has 1 bytes; the Hub says"),
    "hostile name": ({"extra": ["../../evil.json"]}, 0, ""),
    "gone": ({"status": 503}, 4, "the Hub does not answer as it should"),
    "denied": ({"token": "secret"}, 3, "then set HF_TOKEN"),
}


@pytest.mark.parametrize("lie", LIES)
def test_lies_are_not_believed(lie: str, run: Run, folder: Path, tmp_path: Path) -> None:
    faults, exit_code, message = LIES[lie]
    if faults.get("swap", {}) is None:
        name = "model-00001-of-00002.safetensors"
        faults = {"swap": {name: bytes((folder / name).stat().st_size)}}
    with running(Hub.of(folder, **faults)) as server:
        result = run(server)
    assert result.returncode == exit_code, result.stderr
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert (tmp_path / "out.gguf").exists() == (exit_code == 0)
    assert not list(tmp_path.rglob("evil.json"))
    if exit_code == 5:  # what was wrong is not in the cache any more
        with running(Hub.of(folder)) as server:
            assert run(server).returncode == 0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tiny/Tiny-1M-Instruct@nowhere", "no such revision"),
        ("tiny/Other", "no such model on the Hub"),
        ("tiny/Other@main", "no such model on the Hub"),
    ],
)
def test_what_is_not_there(name: str, message: str, run: Run, folder: Path) -> None:
    with running(Hub.of(folder)) as server:
        result = run(server, name)
    assert result.returncode == 3
    assert message in result.stderr


def test_nobody_listens(run: Run) -> None:
    result = run(Hub({}, url="http://127.0.0.1:9"))
    assert result.returncode == 4
    assert "the Hub does not answer" in result.stderr


def test_an_index_that_points_elsewhere(run: Run, folder: Path) -> None:
    server = Hub.of(folder)
    server.files[hub.INDEX_NAME] = b'{"weight_map": {"a": "../secret.safetensors"}}'
    with running(server):
        result = run(server)
    assert result.returncode == 3
    assert "which the repository lacks" in result.stderr


def test_no_safetensors(run: Run, folder: Path) -> None:
    server = Hub({"config.json": (folder / "config.json").read_bytes(), "pytorch_model.bin": b"x"})
    with running(server):
        result = run(server)
    assert result.returncode == 3
    assert "no model.safetensors" in result.stderr
    assert "pytorch_model.bin" in result.stderr
