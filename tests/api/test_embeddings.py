"""OpenAI's own client against a real server with small real models that embed and rerank."""

from __future__ import annotations

import asyncio
import json
import socket
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from openai.types import CreateEmbeddingResponse, Model

from tests.api.conftest import eventually
from tests.conftest import RunningServer, start_server
from tests.embedding_models import CAT, CLS, CONTEXT, SEP, SIZE, write_embedder, write_reranker, write_unpooled

TEXTS = ["the cat", "unbelievable!", "a"]


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    model = write_embedder(tmp_path_factory.mktemp("embedder"))
    with start_server(model, "--queue", "0", "--parallel", "2") as running:
        yield running


@pytest.fixture(scope="module")
def reranker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with start_server(write_reranker(tmp_path_factory.mktemp("reranker"))) as running:
        yield running


@pytest.fixture
def client(embedder: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{embedder.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


def post(server: str, path: str, body: dict[str, Any]) -> tuple[int, dict[str, str], Any]:
    request = urllib.request.Request(f"{server}{path}", json.dumps(body).encode(), {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, dict(response.headers), json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, dict(error.headers), json.load(error)


def metric(server: str, name: str) -> float:
    with urllib.request.urlopen(f"{server}/metrics", timeout=10) as response:
        lines = response.read().decode().splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name + "{"))


def in_engine(server: str) -> float:
    return metric(server, "pestle_num_requests_running") + metric(server, "pestle_num_requests_waiting")


class TestEmbeddings:
    def test_base64_and_float_are_the_same(self, client: openai.OpenAI) -> None:
        usual = client.embeddings.create(model="embedder", input=TEXTS)  # the client asks for base64 by itself
        plain = client.embeddings.create(model="embedder", input=TEXTS, encoding_format="float")
        for answer in (usual, plain):
            CreateEmbeddingResponse.model_validate(answer.model_dump(), strict=True)
            assert [item.index for item in answer.data] == [0, 1, 2]
            assert [len(item.embedding) for item in answer.data] == [SIZE] * 3
            assert answer.usage.prompt_tokens == answer.usage.total_tokens > 6
        one, other = (np.array([item.embedding for item in answer.data]) for answer in (usual, plain))
        np.testing.assert_allclose(one, other, atol=1e-6)
        np.testing.assert_allclose(np.linalg.norm(one, axis=1), 1, atol=1e-6)
        assert not np.allclose(one[0], one[1], atol=1e-3)

    def test_texts_and_their_tokens_are_the_same(self, client: openai.OpenAI) -> None:
        cat = [CLS, CAT - 1, CAT, SEP]
        text = client.embeddings.create(model="embedder", input="the cat")
        tokens = client.embeddings.create(model="embedder", input=cat)
        lists = client.embeddings.create(model="embedder", input=[cat, [CLS, SEP]])
        vector = np.array(text.data[0].embedding)
        for answer in (tokens, lists):
            np.testing.assert_allclose(answer.data[0].embedding, vector, atol=2e-3)
        assert [answer.usage.prompt_tokens for answer in (text, tokens, lists)] == [4, 4, 6]

    def test_dimensions(self, client: openai.OpenAI) -> None:
        whole = np.array(client.embeddings.create(model="embedder", input="the cat").data[0].embedding)
        short = client.embeddings.create(model="embedder", input="the cat", dimensions=7).data[0].embedding
        np.testing.assert_allclose(short, whole[:7] / np.linalg.norm(whole[:7]), atol=1e-5)
        assert len(client.embeddings.create(model="embedder", input="a", dimensions=SIZE).data[0].embedding) == SIZE
        with pytest.raises(openai.BadRequestError) as caught:
            client.embeddings.create(model="embedder", input="a", dimensions=SIZE + 1)
        assert caught.value.param == "dimensions"
        assert str(SIZE) in caught.value.message

    def test_async_and_many_at_once(self, embedder: RunningServer) -> None:
        async def scenario() -> list[CreateEmbeddingResponse]:
            async with openai.AsyncOpenAI(base_url=f"{embedder.url}/v1", api_key="none", timeout=60) as client:
                many = [client.embeddings.create(model="embedder", input=[text] * 20) for text in TEXTS]
                return await asyncio.gather(*many)

        answers = asyncio.run(scenario())
        first = [np.array(answer.data[0].embedding) for answer in answers]
        for answer, vector in zip(answers, first, strict=True):
            assert len(answer.data) == 20
            np.testing.assert_allclose([item.embedding for item in answer.data], [vector] * 20, atol=2e-3)

    def test_an_input_that_is_too_long_is_named_and_not_cut(self, client: openai.OpenAI) -> None:
        longest = " ".join(["cat"] * (CONTEXT - 2))
        assert client.embeddings.create(model="embedder", input=longest).usage.prompt_tokens == CONTEXT
        for given, param in ((["a", "a", "a", f"{longest} cat"], "input[3]"), (f"{longest} cat", "input")):
            with pytest.raises(openai.BadRequestError) as caught:
                client.embeddings.create(model="embedder", input=given)
            assert (caught.value.code, caught.value.param) == ("context_length_exceeded", param)
            assert f"{CONTEXT} tokens" in caught.value.message
            assert f"has {CONTEXT + 1}" in caught.value.message

    @pytest.mark.parametrize(
        ("changes", "param", "code"),
        [
            ({"input": []}, "input", "invalid_value"),
            ({"input": [10_000]}, "input", "invalid_value"),
            ({"input": [[CLS], [10_000]]}, "input[1]", "invalid_value"),
            ({"input": ["a", "b" * (1024 * 1024 + 1)]}, "input[1]", "prompt_refused"),
            ({"dimensions": 0}, "dimensions", "invalid_value"),
            ({"encoding_format": "ubinary"}, "encoding_format", "invalid_value"),
            ({"embd_normalize": -1}, "embd_normalize", "unsupported_parameter"),
            ({"truncate_prompt_tokens": 8}, "truncate_prompt_tokens", "unsupported_parameter"),
            ({"input_type": "query"}, "input_type", "unknown_parameter"),
        ],
    )
    def test_bad_requests(self, embedder: RunningServer, changes: dict[str, Any], param: str, code: str) -> None:
        status, _, body = post(embedder.url, "/v1/embeddings", {"model": "embedder", "input": "a", **changes})
        assert status == 400
        assert set(body["error"]) == {"message", "type", "param", "code"}
        assert (body["error"]["param"], body["error"]["code"]) == (param, code)

    def test_what_has_no_effect_is_named(self, embedder: RunningServer) -> None:
        status, headers, _ = post(embedder.url, "/v1/embeddings", {"model": "embedder", "input": "a", "user": "u"})
        assert (status, headers["x-pestle-no-effect"]) == (200, "user")

    def test_the_model_says_what_it_is_for(self, client: openai.OpenAI) -> None:
        model = client.models.retrieve("embedder")
        Model.model_validate(model.model_dump(), strict=True)
        extra = model.model_dump()
        assert (extra["capabilities"], extra["embedding_size"]) == (["embeddings"], SIZE)
        assert extra["context_length"] == CONTEXT

    def test_it_does_nothing_else(self, client: openai.OpenAI, embedder: RunningServer) -> None:
        calls: list[Callable[[], object]] = [
            lambda: client.chat.completions.create(model="embedder", messages=[{"role": "user", "content": "Hi"}]),
            lambda: client.completions.create(model="embedder", prompt="Hi", stream=True),
        ]
        for call in calls:
            with pytest.raises(openai.BadRequestError) as caught:
                call()
            assert (caught.value.code, caught.value.param) == ("model_not_capable", "model")
            assert "/v1/embeddings" in caught.value.message
        status, _, body = post(embedder.url, "/v1/rerank", {"model": "embedder", "query": "a", "documents": ["b"]})
        assert (status, body["error"]["code"]) == (400, "model_not_capable")

    def test_the_metrics_count_its_tokens(self, client: openai.OpenAI, embedder: RunningServer) -> None:
        before = metric(embedder.url, "pestle_prompt_tokens_total")
        tokens = client.embeddings.create(model="embedder", input=TEXTS).usage.prompt_tokens
        assert metric(embedder.url, "pestle_prompt_tokens_total") - before == tokens
        assert metric(embedder.url, "pestle_num_requests_running") == 0
        assert metric(embedder.url, "pestle_prefix_cache_queries_total") == 0

    def test_who_leaves_is_cancelled_and_a_full_queue_is_a_429(
        self, embedder: RunningServer, eventually: Callable[..., None]
    ) -> None:
        body = json.dumps({"model": "embedder", "input": [" ".join(["cat"] * 60)] * 2048}).encode()
        headers = ("host: x", "content-type: application/json", f"content-length: {len(body)}", "", "")
        head = "\r\n".join(("POST /v1/embeddings HTTP/1.1", *headers))
        address = embedder.url.removeprefix("http://").split(":")
        before = metric(embedder.url, "pestle_request_success_total")
        busy = [socket.create_connection((address[0], int(address[1])), timeout=60) for _ in range(2)]
        for connection in busy:
            connection.sendall(head.encode() + body)
        eventually(lambda: in_engine(embedder.url) == 2, 50)
        status, headers_of_refusal, refusal = post(embedder.url, "/v1/embeddings", {"model": "embedder", "input": "a"})
        assert (status, refusal["error"]["code"]) == (429, "queue_full")
        assert int(headers_of_refusal["retry-after"]) >= 1
        for connection in busy:
            connection.close()
        eventually(lambda: in_engine(embedder.url) == 0, 30)
        assert post(embedder.url, "/v1/embeddings", {"model": "embedder", "input": "a"})[0] == 200
        with urllib.request.urlopen(f"{embedder.url}/metrics", timeout=10) as response:
            assert 'finished_reason="cancelled"' in response.read().decode()
        assert metric(embedder.url, "pestle_request_success_total") == before + 3


class TestRerank:
    DOCUMENTS: tuple[Any, ...] = ("the cat sits", {"text": "hello there"}, "la fin", "zzz 22")

    def rank(self, server: RunningServer, path: str = "/v1/rerank", **changes: Any) -> Any:
        body = {"model": "reranker", "query": "the cat", "documents": self.DOCUMENTS, **changes}
        status, _, answer = post(server.url, path, body)
        assert status == 200, answer
        return answer

    def test_scores_are_those_of_the_pairs(self, reranker: RunningServer) -> None:
        answer = self.rank(reranker)
        scores = [result["relevance_score"] for result in answer["results"]]
        assert scores == sorted(scores, reverse=True)
        assert all(0 < score < 1 for score in scores)
        assert sorted(result["index"] for result in answer["results"]) == [0, 1, 2, 3]
        texts = ["the cat sits", "hello there", "la fin", "zzz 22"]
        assert [result["document"] for result in answer["results"]] == [
            {"text": texts[result["index"]]} for result in answer["results"]
        ]
        raw = self.rank(reranker, use_activation=False, return_documents=False)["results"]
        logits = {result["index"]: result["relevance_score"] for result in raw}
        for result in answer["results"]:
            assert result["relevance_score"] == pytest.approx(1 / (1 + np.exp(-logits[result["index"]])), abs=1e-3)
        assert all(set(result) == {"index", "relevance_score"} for result in raw)
        assert answer["usage"]["total_tokens"] > 4 * 4

    def test_other_paths_and_the_best(self, reranker: RunningServer) -> None:
        best = self.rank(reranker)["results"][:2]
        for path in ("/v1/rerank", "/rerank", "/v2/rerank"):
            results = self.rank(reranker, path, top_n=2)["results"]
            assert [result["index"] for result in results] == [result["index"] for result in best]

    def test_a_document_that_is_too_long_is_named(self, reranker: RunningServer) -> None:
        body = {"model": "reranker", "query": "the cat", "documents": ["a", "the cat sits " * 40]}
        status, _, answer = post(reranker.url, "/v1/rerank", body)
        assert status == 400
        assert (answer["error"]["code"], answer["error"]["param"]) == ("context_length_exceeded", "documents[1]")

    def test_a_query_times_its_documents_is_bounded(self, reranker: RunningServer) -> None:
        body = {"model": "reranker", "query": "cat " * 9000, "documents": ["a"] * 2000}
        status, _, answer = post(reranker.url, "/v1/rerank", body)
        assert (status, answer["error"]["param"]) == (400, "documents")
        assert "come to more than" in answer["error"]["message"]

    def test_it_gives_no_embeddings(self, reranker: RunningServer) -> None:
        with (
            openai.OpenAI(base_url=f"{reranker.url}/v1", api_key="none", max_retries=0) as client,
            pytest.raises(openai.BadRequestError) as caught,
        ):
            client.embeddings.create(model="reranker", input="a")
        assert caught.value.code == "model_not_capable"
        assert "/v1/rerank" in caught.value.message


def test_unknown_fields_and_the_log(tmp_path: Path) -> None:
    body = {"model": "embedder", "input": TEXTS, "num_ctx": 1}
    with start_server(write_embedder(tmp_path), "--unknown-fields", "warn") as running:
        status, headers, answer = post(running.url, "/v1/embeddings", body)
        assert (status, headers["x-pestle-unknown-fields"], len(answer["data"])) == (200, "num_ctx", 3)
        eventually(lambda: [line for line in list(running.stderr) if '"/v1/embeddings"' in line])
        lines = [json.loads(line) for line in list(running.stderr) if '"/v1/embeddings"' in line]
    (line,) = (line for line in lines if line["message"] == "request")
    assert (line["model"], line["prompt_tokens"]) == ("embedder", answer["usage"]["prompt_tokens"])


def test_a_generative_model_says_how_it_could_embed(server: str) -> None:
    with openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0) as client:
        (model,) = client.models.list().data
        assert model.model_dump()["capabilities"] == ["chat", "completion"]
        with pytest.raises(openai.BadRequestError) as caught:
            client.embeddings.create(model=model.id, input="a")
    assert (caught.value.code, caught.value.param) == ("model_not_capable", "model")
    assert "--pooling" in caught.value.message


def test_a_file_that_is_for_nothing_is_not_served(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="--pooling mean, cls or last"), start_server(write_unpooled(tmp_path)):
        pass
