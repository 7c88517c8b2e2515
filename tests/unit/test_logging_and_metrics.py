"""Logs that machines and people can read and nobody can forge; metrics under the promised names."""

from __future__ import annotations

import io
import json
import logging
import re
from collections.abc import Iterator
from typing import Literal

import pytest

from app.messages import Load
from app.observability.logging import configure, get_logger, request_id
from app.observability.metrics import Metrics


@pytest.fixture(autouse=True)
def _restore_root() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def logged(log_format: Literal["auto", "human", "json"], message: str, **fields: object) -> str:
    stream = io.StringIO()
    configure(log_format, "info", stream)
    log = get_logger("app.test")
    log.debug("too quiet")
    token = request_id.set("req-7")
    try:
        log.warning(message, extra=fields)
    finally:
        request_id.reset(token)
    return stream.getvalue()


def test_json_lines_carry_request_id_and_fields() -> None:
    line = json.loads(logged("auto", "worker died", code=9, path=io.StringIO))  # not a terminal: auto is json
    assert line["message"] == "worker died"
    assert line["level"] == "warning"
    assert line["logger"] == "app.test"
    assert line["request_id"] == "req-7"
    assert line["code"] == 9
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", line["time"])


def test_people_get_one_line_without_colours_in_a_file() -> None:
    assert re.fullmatch(
        r"\d\d:\d\d:\d\d\.\d{3} warning worker died  code=9 request_id=req-7\n", logged("human", "worker died", code=9)
    )


@pytest.mark.parametrize("log_format", ["human", "json"])
def test_nothing_logged_can_fake_a_line_or_drive_a_terminal(log_format: Literal["human", "json"]) -> None:
    text = logged(log_format, "a\nb\x1b[2J\u2028", field="c\r\nd\x9b")
    assert text.count("\n") == 1
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", text.rstrip("\n"))


def test_every_promised_metric_is_there_and_labelled() -> None:
    metrics = Metrics()
    model = metrics.model("tiny")
    assert metrics.model("tiny") is model
    model.observe_token(0.008)
    model.success("stop")
    model.failure("queue_full")
    metrics.set_build("1.2.3", "llama.cpp x", "CPU")
    text = metrics.render().decode()
    for name in (
        "time_to_first_token_seconds_bucket",
        "inter_token_latency_seconds_bucket",
        "request_time_per_output_token_seconds_bucket",
        "e2e_request_latency_seconds_bucket",
        "request_queue_time_seconds_bucket",
        "request_prefill_time_seconds_bucket",
        "request_decode_time_seconds_bucket",
        "num_requests_running",
        "num_requests_waiting",
        "kv_cache_usage_ratio",
        "prefix_cache_queries_total",
        "prefix_cache_hits_total",
        "num_preemptions_total",
        "prompt_tokens_total",
        "generation_tokens_total",
        "request_success_total",
        "request_failure_total",
        "model_load_seconds",
        "worker_restarts_total",
    ):
        assert re.search(rf'^pestle_{name}{{[^}}]*model_name="tiny"', text, re.MULTILINE), name
    assert 'pestle_build_info{device="CPU",library_build="llama.cpp x",version="1.2.3"} 1.0' in text
    assert 'pestle_inter_token_latency_seconds_bucket{le="0.0075",model_name="tiny"} 0.0' in text
    assert 'pestle_inter_token_latency_seconds_bucket{le="0.01",model_name="tiny"} 1.0' in text
    assert not re.search(r"^[a-z_]*:", text, re.MULTILINE)  # colons belong to recording rules


def test_the_workers_state_becomes_gauges_and_counters() -> None:
    metrics = Metrics()
    model = metrics.model("tiny")
    model.observe_load(Load(3, 2, 25, 100, 64, 3, 1, 0.01))
    model.observe_load(Load(2, 0, 50, 100, 0, 2, 1, 0.01, guessed_tokens=7, accepted_tokens=4))
    text = metrics.render().decode()
    assert 'pestle_num_requests_running{model_name="tiny"} 2.0' in text
    assert 'pestle_kv_cache_usage_ratio{model_name="tiny"} 0.5' in text
    assert 'pestle_generation_tokens_total{model_name="tiny"} 5.0' in text
    assert 'pestle_num_preemptions_total{model_name="tiny"} 1.0' in text
    assert 'pestle_spec_decode_num_draft_tokens_total{model_name="tiny"} 7.0' in text
    assert 'pestle_spec_decode_num_accepted_tokens_total{model_name="tiny"} 4.0' in text
    model.worker_gone()
    model.observe_load(Load(0, 0, 0, 100, 0, 0, 2, 0.01))  # a fresh worker counts from zero
    assert 'pestle_num_preemptions_total{model_name="tiny"} 3.0' in metrics.render().decode()


def test_what_was_collected_is_neither_lost_nor_stale() -> None:
    metrics = Metrics()
    model = metrics.model("tiny")
    for _ in range(100):
        model.observe_token(0.008)
    model.observe_load(Load(3, 2, 25, 100, 64, 3, 0, 0.01))
    model.worker_gone()
    text = metrics.render().decode()
    assert 'pestle_inter_token_latency_seconds_count{model_name="tiny"} 100.0' in text
    assert 'pestle_generation_tokens_total{model_name="tiny"} 3.0' in text
    assert 'pestle_num_requests_running{model_name="tiny"} 0.0' in text
    model.observe_load(Load(1, 1, 25, 100, 64, 3, 0, 0.01))
    model.idle()
    text = metrics.render().decode()
    assert 'pestle_generation_tokens_total{model_name="tiny"} 6.0' in text
    assert 'pestle_num_requests_waiting{model_name="tiny"} 0.0' in text
