"""Compare Pestle's embeddings and scores with llama-server's, of the same GGUF, and with transformers', of its source.

    LLAMA_SERVER=.../llama-server python scripts/compare_embeddings.py FILE.gguf [--source FOLDER]

For development: transformers runs in upstream's environment (see upstream.py). Exit codes: 0 equal, 1 not, 2 usage,
3 something cannot be run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from bench.embedding import MIXED, both_servers, embed, model_name, scores, sentences
from bench.peer import Server, ServerFailedError
from upstream import UpstreamError, find_upstream

from app.models.gguf import read_header
from app.models.kind import model_kind

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    Numbers = npt.NDArray[np.float64]

LEAST_COSINE_PEER = 1 - 1e-5
LEAST_COSINE_BATCHED = 1 - 1e-4  # what else is in a batch decides which of ggml's kernels multiplies
LEAST_COSINE_SOURCE = 0.999  # f16 against the source's own numbers
MOST_SCORE_PEER = 2e-3
MOST_SCORE_SOURCE = 2e-2
_TEXTS = 40
_LABELS = 1024

# Embeddings as sentence-transformers makes them: pooled as modules.json says, then of length 1; or a head's one score.
_TRANSFORMERS = """
import json, sys, torch
from pathlib import Path
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer
torch.set_num_threads(1)
task = json.load(sys.stdin)
folder = Path(task["folder"])
tokenizer = AutoTokenizer.from_pretrained(folder)
kind = AutoModelForSequenceClassification if task["query"] else AutoModel
model = kind.from_pretrained(folder, dtype=torch.float32).eval()
found, tokens = [], []
with torch.no_grad():
    for text in task["texts"]:
        pair = [task["query"], text] if task["query"] else [text]
        inputs = tokenizer(*pair, return_tensors="pt")
        tokens.append(inputs["input_ids"][0].tolist())
        if task["query"]:
            found.append([model(**inputs).logits[0, 0].item()])
            continue
        states = model(**inputs).last_hidden_state[0]
        pooled = {"mean": states.mean(0), "cls": states[0], "last": states[-1]}[task["pooling"]]
        found.append(torch.nn.functional.normalize(pooled, dim=0).tolist())
print(json.dumps([found, tokens]))
"""


def main() -> int:
    """Run from the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("model", type=Path, metavar="FILE.gguf")
    parser.add_argument("--source", type=Path, metavar="FOLDER", help="the checkpoint that the file was made of")
    parser.add_argument(
        "--tokens", action="store_true", help="send the token ids of the source's tokenizer, where llama.cpp's differ"
    )
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    kind = model_kind(read_header(arguments.model, largest_array=_LABELS))
    if kind.generates:
        print(f"{arguments.model} neither embeds nor reranks", file=sys.stderr)
        return 2
    binary = os.environ.get("LLAMA_SERVER", "llama-server")
    texts = sentences()[:_TEXTS]
    texts += [] if kind.reranks else [*MIXED, " ".join(texts)[:1500]]
    if arguments.tokens and (kind.reranks or arguments.source is None):
        parser.error("--tokens needs --source, and a model that embeds")
    try:
        with both_servers(arguments.model, binary, threads=arguments.threads, rerank=kind.reranks) as servers:
            if kind.reranks:
                return _compare_scores(*servers, texts, arguments.source, raw=not kind.gives_probabilities)
            pooling = kind.pooling.name.lower()
            return _compare_vectors(*servers, texts, arguments.source, pooling, as_tokens=arguments.tokens)
    except (ServerFailedError, UpstreamError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 3


def _compare_vectors(
    ours: Server, theirs: Server, texts: list[str], source: Path | None, pooling: str, *, as_tokens: bool
) -> int:
    inputs: Sequence[str | list[int]] = texts
    if source is not None:
        expected, tokens = _from_transformers(source, texts, "", pooling)
        inputs = tokens if as_tokens else texts
    together = embed(ours, model_name(ours), inputs)
    alone = np.concatenate([embed(ours, model_name(ours), [each]) for each in inputs])
    peer = np.concatenate([embed(theirs, model_name(theirs), [each]) for each in inputs])
    least = {
        "llama-server's, each alone": (_cosines(alone, peer).min(), LEAST_COSINE_PEER),
        "our own, all at once and each alone": (_cosines(together, alone).min(), LEAST_COSINE_BATCHED),
    }
    if source is not None:
        least["transformers'"] = (_cosines(together, expected).min(), LEAST_COSINE_SOURCE)
    print(f"least cosines over {len(texts)} texts")
    for name, (cosine, limit) in least.items():
        print(f"  with {name}: 1 - {1 - cosine:.1e} (limit 1 - {1 - limit:.0e})")
    return int(any(cosine < limit for cosine, limit in least.values()))


def _compare_scores(ours: Server, theirs: Server, texts: list[str], source: Path | None, *, raw: bool) -> int:
    query = "Who refused to board the ferry?"
    found = scores(ours, {"model": model_name(ours), "query": query, "documents": texts, "use_activation": not raw})
    peer = np.concatenate([scores(theirs, {"query": query, "documents": [text]}) for text in texts])
    most = {"llama-server": (np.abs(found - peer).max(), MOST_SCORE_PEER)}
    if source is not None:
        expected = _from_transformers(source, texts, query, "")[0][:, 0]
        most["transformers"] = (np.abs(found - expected).max(), MOST_SCORE_SOURCE)
    print(f"scores from {found.min():.4f} to {found.max():.4f}")
    for name, (difference, limit) in most.items():
        print(f"greatest difference from {name} over {len(texts)} documents: {difference:.1e} (limit {limit:.0e})")
    return int(any(difference > limit for difference, limit in most.values()))


def _cosines(one: npt.NDArray[Any], other: npt.NDArray[Any]) -> Numbers:
    one, other = one.astype(np.float64), other.astype(np.float64)
    products = (one * other).sum(axis=1)
    cosines: Numbers = products / np.linalg.norm(one, axis=1) / np.linalg.norm(other, axis=1)
    return cosines


def _from_transformers(folder: Path, texts: list[str], query: str, pooling: str) -> tuple[Numbers, list[list[int]]]:
    """Return transformers' vectors, or scores in rows of one, and the token ids that it made of the texts."""
    upstream = find_upstream()
    task = json.dumps({"folder": str(folder.absolute()), "texts": texts, "query": query, "pooling": pooling})
    result = subprocess.run(
        [str(upstream.python), "-c", _TRANSFORMERS], input=task, env=upstream.environment(), text=True,
        capture_output=True, check=False,
    )  # fmt: skip
    if result.returncode:
        raise UpstreamError(f"transformers failed: {' '.join(result.stderr.strip().splitlines()[-2:])}")
    found, tokens = json.loads(result.stdout)
    return np.array(found), tokens


if __name__ == "__main__":
    sys.exit(main())
