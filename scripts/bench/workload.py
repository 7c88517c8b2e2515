"""Prompts: built from common words, sized by the server's own count of tokens, the same for a seed and a run number."""

from __future__ import annotations

import http.client
import json
import math
import random
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Mapping

    from bench.client import Target

COMMON_WORDS = (
    "time year people way day man thing woman life child world school state family student group country "
    "problem hand part place case week company system program question work government number night point home "
    "water room mother area money story fact month lot right study book eye job word business issue side kind "
    "head house service friend father power hour game line end member law car city name team minute idea body "
    "back parent face others level office door health person art war history party result change morning "
    "reason research girl guy moment air teacher force education foot boy age policy music market sense nation "
    "plan college interest death experience effect use class control field development role effort rate heart "
    "drug show leader light voice wife police mind price report decision son view town road arm difference "
    "value building action season society tax director position player record paper space ground form event "
    "official matter center couple site project activity star table need court oil situation cost industry "
    "figure street image phone data picture practice piece land product doctor wall patient worker news test "
    "movie north love"
)
WORDS = COMMON_WORDS.split()

Endpoint = Literal["chat", "completions"]
Kind = Literal["distinct", "shared-prefix", "mixed"]
PATHS: dict[Endpoint, str] = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}
SETUP_TIMEOUT_S = 120.0
SIZING_WORDS = (100, 300)


@dataclass(frozen=True, slots=True)
class Workload:
    """What is asked of the server. Lengths are in tokens."""

    kind: Kind = "distinct"
    endpoint: Endpoint = "chat"
    prompt_tokens: int = 128
    prompt_tokens_max: int = 1024
    prefix_tokens: int = 512
    max_tokens: int = 64
    max_tokens_min: int = 16
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    ignore_eos: bool = False
    fields: Mapping[str, Any] = field(default_factory=dict)  # more of the requests' bodies
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Sizing:
    """Tokens that a word costs and that the template adds; `measured` is False where the server gave no usage."""

    tokens_per_word: float = 1.0
    overhead_tokens: float = 0.0
    measured: bool = False

    def words(self, tokens: int) -> int:
        """Count the words of a prompt of that many tokens, at least one."""
        return max(1, round((tokens - self.overhead_tokens) / self.tokens_per_word))


def call(target: Target, method: str, path: str, body: bytes | None = None) -> tuple[int, dict[str, Any]]:
    """Make one plain request outside the measured part. Returns status and JSON object ({} where it is none)."""
    connect = http.client.HTTPSConnection if target.tls else http.client.HTTPConnection
    connection = connect(target.host, target.port, timeout=SETUP_TIMEOUT_S)
    headers = {"Content-Type": "application/json", "Connection": "close"}
    if target.api_key:
        headers["Authorization"] = f"Bearer {target.api_key}"
    try:
        connection.request(method, target.base_path + path, body, headers)
        answer = connection.getresponse()
        text = answer.read()
    finally:
        connection.close()
    try:
        value = json.loads(text)
    except ValueError:
        value = {}
    return answer.status, value if isinstance(value, dict) else {}


def model_name(target: Target) -> str:
    """Ask the server which model it serves first. Raises RuntimeError."""
    status, answer = call(target, "GET", "/v1/models")
    models = answer.get("data") or []
    if status != 200 or not models:
        raise RuntimeError(f"{target.url}/v1/models answered {status} and names no model; give one with --model-name")
    return str(models[0]["id"])


def measure_sizing(target: Target, workload: Workload, model: str) -> Sizing:
    """Ask for two prompts of known length and take the tokens of a word from the difference. Raises RuntimeError."""
    counts = []
    for words in SIZING_WORDS:
        text = _text(random.Random(f"sizing-{workload.seed}-{words}-{time.time_ns()}"), words)
        body = encode_body(workload, model, text, max_tokens=1, seed=0, stream=False)
        status, answer = call(target, "POST", PATHS[workload.endpoint], body)
        if status != 200:
            raise RuntimeError(f"{target.url} answered {status} to a first request: {answer.get('error', answer)}")
        counts.append(int((answer.get("usage") or {}).get("prompt_tokens") or 0))
    per_word = (counts[1] - counts[0]) / (SIZING_WORDS[1] - SIZING_WORDS[0])
    if per_word <= 0:
        return Sizing()
    return Sizing(per_word, max(0.0, counts[0] - per_word * SIZING_WORDS[0]), measured=True)


def encode_body(workload: Workload, model: str, text: str, *, max_tokens: int, seed: int, stream: bool = True) -> bytes:
    """Encode one request's JSON."""
    body: dict[str, Any] = {"model": model, "max_tokens": max_tokens, "temperature": workload.temperature}
    if workload.endpoint == "chat":
        body["messages"] = [{"role": "user", "content": text}]
    else:
        body["prompt"] = text
    if workload.temperature > 0:
        body["seed"] = seed
    for name in ("top_k", "top_p"):
        if (value := getattr(workload, name)) is not None:
            body[name] = value
    if workload.ignore_eos:
        body["ignore_eos"] = True
    body |= workload.fields
    if stream:
        body["stream"] = True
        body["stream_options"] = {"include_usage": True}
    return json.dumps(body).encode()


def build_bodies(workload: Workload, sizing: Sizing, model: str, *, count: int, run: int) -> list[bytes]:
    """Build the bodies of one run: the same bytes for the same run number, no prompt in common with another."""
    prefix = ""
    if workload.kind == "shared-prefix":
        words = max(1, round(workload.prefix_tokens / sizing.tokens_per_word))
        prefix = _text(random.Random(f"{workload.seed}/{run}/prefix"), words) + " "
    bodies = []
    for index in range(count):
        rng = random.Random(f"{workload.seed}/{run}/{index}")
        tokens, max_tokens = workload.prompt_tokens, workload.max_tokens
        if workload.kind == "mixed":
            low, high = math.log(workload.prompt_tokens), math.log(workload.prompt_tokens_max)
            tokens = round(math.exp(rng.uniform(low, high)))
            max_tokens = rng.randint(workload.max_tokens_min, workload.max_tokens)
        text = prefix + _text(rng, sizing.words(tokens))
        bodies.append(encode_body(workload, model, text, max_tokens=max_tokens, seed=rng.getrandbits(31)))
    return bodies


def _text(rng: random.Random, words: int) -> str:
    return " ".join(rng.choices(WORDS, k=words))
