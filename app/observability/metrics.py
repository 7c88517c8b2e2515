"""Prometheus metrics: vLLM's nouns under the prefix `pestle_`, in base units, labelled by `model_name`.

Requests are counted by choice: a request with n = 2 is two sequences, and each has its own latencies and finish reason.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)

if TYPE_CHECKING:
    from app.messages import Load

CONTENT_TYPE = CONTENT_TYPE_LATEST

_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04, 0.06, 0.08, 0.1, 0.15, 0.2, 0.3, 0.5, 1)
_FIRST_TOKEN_SECONDS = (0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.15, 0.25, 0.5, 0.75, 1, 1.5, 2.5, 5, 10, 20, 40, 80)
_REQUEST_SECONDS = (0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)

_HISTOGRAMS = {
    "time_to_first_token_seconds": ("From the request's admission to its first token.", _FIRST_TOKEN_SECONDS),
    "inter_token_latency_seconds": ("Between two tokens of one sequence.", _TOKEN_SECONDS),
    "request_time_per_output_token_seconds": ("Mean of a finished sequence, the first token left out.", _TOKEN_SECONDS),
    "e2e_request_latency_seconds": ("From admission to the last token.", _REQUEST_SECONDS),
    "request_queue_time_seconds": ("Waiting for a slot.", _REQUEST_SECONDS),
    "request_prefill_time_seconds": ("Computing the prompt.", _REQUEST_SECONDS),
    "request_decode_time_seconds": ("Drawing the answer.", _REQUEST_SECONDS),
}
_GAUGES = {
    "num_requests_running": "Sequences in a slot.",
    "num_requests_waiting": "Sequences that wait for a slot.",
    "kv_cache_usage_ratio": "Part of the KV cache that running sequences use, 0 to 1.",
    "model_load_seconds": "How long the newest worker took to load the model.",
}
_COUNTERS = {
    "prefix_cache_queries_total": "Prompt tokens looked up in the prefix cache.",
    "prefix_cache_hits_total": "Prompt tokens found there.",
    "num_preemptions_total": "Sequences put back because the KV cache was full.",
    "prompt_tokens_total": "Prompt tokens of requests that fit; each prompt once.",
    "generation_tokens_total": "Tokens drawn.",
    "spec_decode_num_draft_tokens_total": "Tokens guessed and computed beside the streams' own.",
    "spec_decode_num_accepted_tokens_total": "Of these, tokens that are in the answers.",
    "worker_restarts_total": "Workers started in place of one that died.",
}
_LABELS = ("model_name",)
_LATENCIES_AT_ONCE = 64


class Metrics:
    """All metrics of the API process, in a registry of their own."""

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # a `_created` series beside each counter would only double the page
        self.registry = CollectorRegistry()
        self._histograms = {
            name: Histogram(f"pestle_{name}", text, _LABELS, buckets=buckets, registry=self.registry)
            for name, (text, buckets) in _HISTOGRAMS.items()
        }
        self._gauges = {
            name: Gauge(f"pestle_{name}", text, _LABELS, registry=self.registry) for name, text in _GAUGES.items()
        }
        self._counters = {
            name: Counter(f"pestle_{name}", text, _LABELS, registry=self.registry) for name, text in _COUNTERS.items()
        }
        self._success = Counter(
            "pestle_request_success_total",
            "Sequences that ended, by finish reason.",
            (*_LABELS, "finished_reason"),
            registry=self.registry,
        )
        self._failure = Counter(
            "pestle_request_failure_total",
            "Requests that got an error, by its code.",
            (*_LABELS, "error_type"),
            registry=self.registry,
        )
        self._build = Gauge(
            "pestle_build_info", "Always 1.", ("version", "library_build", "device"), registry=self.registry
        )
        self.model = functools.cache(self._model)
        self._models: list[ModelMetrics] = []

    def set_build(self, version: str, library_build: str, device: str) -> None:
        """Say which build runs, as labels of `pestle_build_info`."""
        self._build.clear()
        self._build.labels(version, library_build, device).set(1)

    def render(self) -> bytes:
        """Return the text that Prometheus scrapes; its media type is CONTENT_TYPE."""
        for model in self._models:
            model.flush()
        return generate_latest(self.registry)

    def _model(self, model_name: str) -> ModelMetrics:
        model = ModelMetrics(
            {name: metric.labels(model_name) for name, metric in self._histograms.items()},
            {name: metric.labels(model_name) for name, metric in self._gauges.items()},
            {name: metric.labels(model_name) for name, metric in self._counters.items()},
            self._success,
            self._failure,
            model_name,
        )
        self._models.append(model)
        return model


class ModelMetrics:
    """The metrics of one model, bound to its label once.

    What comes with every token is collected, and observed in one go: between two steps the caches have forgotten this
    code, and a few microseconds would become fifty.
    """

    def __init__(
        self,
        histograms: dict[str, Histogram],
        gauges: dict[str, Gauge],
        counters: dict[str, Counter],
        success: Counter,
        failure: Counter,
        model_name: str,
    ) -> None:
        self.time_to_first_token = histograms["time_to_first_token_seconds"]
        self.inter_token_latency = histograms["inter_token_latency_seconds"]
        self.time_per_output_token = histograms["request_time_per_output_token_seconds"]
        self.e2e_latency = histograms["e2e_request_latency_seconds"]
        self.queue_time = histograms["request_queue_time_seconds"]
        self.prefill_time = histograms["request_prefill_time_seconds"]
        self.decode_time = histograms["request_decode_time_seconds"]
        self.running = gauges["num_requests_running"]
        self.waiting = gauges["num_requests_waiting"]
        self.kv_usage = gauges["kv_cache_usage_ratio"]
        self.load_seconds = gauges["model_load_seconds"]
        self.prefix_queries = counters["prefix_cache_queries_total"]
        self.prefix_hits = counters["prefix_cache_hits_total"]
        self.preemptions = counters["num_preemptions_total"]
        self.prompt_tokens = counters["prompt_tokens_total"]
        self.generation_tokens = counters["generation_tokens_total"]
        self.draft_tokens = counters["spec_decode_num_draft_tokens_total"]
        self.accepted_tokens = counters["spec_decode_num_accepted_tokens_total"]
        self.worker_restarts = counters["worker_restarts_total"]
        self._success = functools.cache(functools.partial(success.labels, model_name))
        self._failure = functools.cache(functools.partial(failure.labels, model_name))
        self._preemptions_seen = 0
        self._latencies: list[float] = []
        self._generated = 0
        self._load: Load | None = None  # the newest that is not observed

    def success(self, finish_reason: str) -> None:
        """Count a sequence that ended: stop, length or cancelled."""
        self._success(finish_reason).inc()

    def failure(self, error_type: str) -> None:
        """Count a request that got an error of this code."""
        self._failure(error_type).inc()

    def observe_load(self, load: Load) -> None:
        """Take the worker's state after a step."""
        self._load = load
        self._generated += load.tokens_generated
        if load.guessed_tokens:
            self.draft_tokens.inc(load.guessed_tokens)
            self.accepted_tokens.inc(load.accepted_tokens)

    def observe_token(self, seconds: float) -> None:
        """Take the time between two tokens of a stream."""
        self._latencies.append(seconds)
        if len(self._latencies) >= _LATENCIES_AT_ONCE:
            self._observe_latencies()

    def idle(self) -> None:
        """Take notice that nothing runs and nothing waits: an idle worker sends no steps that would say so."""
        self.flush()
        self.running.set(0)
        self.waiting.set(0)

    def flush(self) -> None:
        """Observe what was collected."""
        self._observe_latencies()
        load, self._load = self._load, None
        if load is None:
            return
        self.running.set(load.running)
        self.waiting.set(load.waiting)
        self.kv_usage.set(load.kv_tokens / load.kv_capacity if load.kv_capacity else 0.0)
        self.generation_tokens.inc(self._generated)
        self._generated = 0
        if load.preemptions > self._preemptions_seen:
            self.preemptions.inc(load.preemptions - self._preemptions_seen)
            self._preemptions_seen = load.preemptions

    def worker_gone(self) -> None:
        """Forget the state of a worker that is no more."""
        self.flush()
        for gauge in (self.running, self.waiting, self.kv_usage):
            gauge.set(0)
        self._preemptions_seen = 0

    def _observe_latencies(self) -> None:
        for seconds in self._latencies:
            self.inter_token_latency.observe(seconds)
        self._latencies.clear()
