"""What the scripts about embeddings share: texts, the two servers, and one request of each kind."""

from __future__ import annotations

import base64
import json
import re
import sys
import urllib.request
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bench.peer import Server, free_port, running

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy.typing as npt

TEXT = Path(__file__).parents[2] / "quantize" / "texts" / "calibration.txt"
MIXED = [
    "a",
    "Été à la plage, 22 °C",
    "def f(x):\n    return x + 1",
    "to be or not to be " * 20,
    "ФРАНЦИЯ 1812",
    "  spaces  ",
]


def sentences() -> list[str]:
    """Return the sentences of our own text, in their order."""
    text = " ".join(TEXT.read_text(encoding="utf-8").split())
    return [part.strip() for part in re.split(r"(?<=[.!?]) ", text) if len(part) > 20]


@contextmanager
def both_servers(
    model: Path, llama_server: str, *, threads: int, rerank: bool, context: int = 512, slots: int = 16
) -> Iterator[tuple[Server, Server]]:
    """Run Pestle and llama-server with the same file until the block ends. Raises ServerFailedError.

    llama-server divides its context among its slots, and computes a text in one go only up to `-ub` tokens.
    """
    ours, theirs = free_port(), free_port()
    pestle = [
        *(sys.executable, "-m", "app.cli", "serve", str(model), "--port", str(ours), "--threads", str(threads)),
        *("--ctx-size", str(context)),
    ]
    peer = [
        *(llama_server, "-m", str(model), "--host", "127.0.0.1", "--port", str(theirs), "-t", str(threads)),
        *("-np", str(slots), "-c", str(slots * context), "-b", str(max(512, context)), "-ub", str(max(512, context))),
        *("--no-webui", "--rerank" if rerank else "--embeddings"),
    ]
    with running("pestle", pestle, ours) as first, running("llama-server", peer, theirs) as second:
        yield first, second


def post(server: Server, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """Send one request and return the answer's document. Raises urllib.error.HTTPError for a refusal."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{server.target.port}{path}",
        json.dumps(body).encode(),
        {"content-type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=600) as response:
        document: dict[str, Any] = json.load(response)
    return document


def model_name(server: Server) -> str:
    """Return the id of the model that a server has."""
    with urllib.request.urlopen(f"http://127.0.0.1:{server.target.port}/v1/models") as response:
        return str(json.load(response)["data"][0]["id"])


def embed(server: Server, model: str, texts: Sequence[str | list[int]]) -> npt.NDArray[np.float32]:
    """Return the embeddings of the texts, or of their token ids, shape (texts, size)."""
    body = {"model": model, "input": list(texts), "encoding_format": "base64"}
    data = post(server, "/v1/embeddings", body)["data"]
    return np.stack([np.frombuffer(base64.b64decode(item["embedding"]), "<f4") for item in data])


def scores(server: Server, body: dict[str, Any]) -> npt.NDArray[np.float64]:
    """Return the scores of a ranking in the order of its documents."""
    results = post(server, "/v1/rerank", body)["results"]
    return np.array([item["relevance_score"] for item in sorted(results, key=lambda item: int(item["index"]))])
