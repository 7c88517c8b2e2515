"""From outcomes to figures, and from figures to tables. Times are in milliseconds from here on."""

from __future__ import annotations

import os
import platform
import statistics
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from bench.client import Outcome
    from bench.load import Run

PERCENTILES = (50, 90, 95, 99)
COLUMNS = ("p50", "p90", "p95", "p99", "max")
NOTES = """\
TTFT: from the moment a request was due to its first event with text. ITL: between events with text; an event may carry
several tokens (held-back UTF-8, merged pieces), and events read at once have 0 between them. TPOT: first to last event
over the server's count of tokens less one. A request with an error counts in no latency and no rate."""

Spread = dict[str, float]


@dataclass(frozen=True, slots=True)
class Figures:
    """One run in numbers. Spreads are in ms, with keys p50, p90, p95, p99 and max; empty where nothing was measured."""

    requests: int
    completed: int
    wall_s: float
    tokens_out: int
    tokens_per_s: float
    requests_per_s: float
    events: int
    tokens_are_events: bool
    prompt_tokens_mean: float
    cached_tokens: int
    ttft_ms: Spread
    itl_ms: Spread
    tpot_ms: Spread
    end_to_end_ms: Spread
    errors: dict[str, int]
    error_samples: dict[str, str]
    finish_reasons: dict[str, int]
    generator_cpu: float
    server_cpu_s: float | None = None


def spread(values: Sequence[float]) -> Spread:
    """Percentiles (linear between neighbours) and maximum, of seconds, in milliseconds."""
    if not len(values):
        return {}
    array = np.asarray(values, dtype=np.float64) * 1000.0
    found = [*np.percentile(array, PERCENTILES).tolist(), float(array.max())]
    return dict(zip(COLUMNS, found, strict=True))


def summarize(run: Run) -> Figures:
    """Reduce a run to its figures."""
    good = [outcome for outcome in run.outcomes if outcome.error is None]
    bad = [outcome for outcome in run.outcomes if outcome.error is not None]
    gaps: list[float] = []
    for outcome in good:
        gaps.extend(np.diff(np.asarray(outcome.text_times)).tolist())
    tokens = sum(outcome.tokens for outcome in good)
    prompts = [outcome.prompt_tokens for outcome in good if outcome.prompt_tokens is not None]
    return Figures(
        requests=len(run.outcomes),
        completed=len(good),
        wall_s=run.wall_s,
        tokens_out=tokens,
        tokens_per_s=tokens / run.wall_s if run.wall_s > 0 else 0.0,
        requests_per_s=len(good) / run.wall_s if run.wall_s > 0 else 0.0,
        events=sum(outcome.text_events for outcome in good),
        tokens_are_events=any(outcome.completion_tokens is None for outcome in good),
        prompt_tokens_mean=statistics.fmean(prompts) if prompts else 0.0,
        cached_tokens=sum(outcome.cached_tokens or 0 for outcome in good),
        ttft_ms=spread([outcome.text_times[0] - outcome.due for outcome in good]),
        itl_ms=spread(gaps),
        tpot_ms=spread([_time_per_output_token(outcome) for outcome in good if outcome.tokens > 1]),
        end_to_end_ms=spread([outcome.ended - outcome.due for outcome in good]),
        errors=dict(Counter(outcome.error or "" for outcome in bad)),
        error_samples={outcome.error or "": outcome.error_detail for outcome in reversed(bad)},
        finish_reasons=dict(Counter(outcome.finish_reason or "none" for outcome in good)),
        generator_cpu=run.generator_cpu,
    )


def _time_per_output_token(outcome: Outcome) -> float:
    return (outcome.text_times[-1] - outcome.text_times[0]) / (outcome.tokens - 1)


def table(title: str, figures: Figures) -> str:
    """Lay one run out as text."""
    unit = "events/s (no usage from the server)" if figures.tokens_are_events else "tokens/s out"
    rates = f"{figures.tokens_per_s:10.1f} {unit}   {figures.requests_per_s:.2f} requests/s"
    sizes = (
        f"{figures.tokens_out} tokens in {figures.events} events; prompts of {figures.prompt_tokens_mean:.0f} tokens"
    )
    lines = [
        title,
        f"  {rates}   {figures.completed}/{figures.requests} done in {figures.wall_s:.2f} s",
        f"  {sizes} on average, {figures.cached_tokens} tokens from a cache",
        f"  the generator used {figures.generator_cpu:.1%} of one core",
        "  " + f"{'ms':<14}" + "".join(f"{name:>10}" for name in COLUMNS),
    ]
    rows = {
        "TTFT": figures.ttft_ms,
        "ITL": figures.itl_ms,
        "TPOT": figures.tpot_ms,
        "end to end": figures.end_to_end_ms,
    }
    for name, values in rows.items():
        cells = "".join(f"{values[column]:>10.2f}" if values else f"{'-':>10}" for column in COLUMNS)
        lines.append(f"  {name:<14}{cells}")
    reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(figures.finish_reasons.items()))
    if figures.server_cpu_s is not None and figures.tokens_out:
        each = figures.server_cpu_s / figures.tokens_out * 1000
        lines.append(f"  the server used {figures.server_cpu_s:.2f} s of CPU, {each:.2f} ms a token")
    lines.append(f"  finish reasons: {reasons or 'none'}")
    if figures.errors:
        lines.append("  errors:")
        lines += [
            f"    {count} x {kind}: {figures.error_samples.get(kind, '')}" for kind, count in figures.errors.items()
        ]
    else:
        lines.append("  errors: none")
    return "\n".join(lines)


def comparison(subject: str, peer: str, pairs: Sequence[tuple[Figures, Figures]]) -> list[dict[str, Any]]:
    """Compare, for each figure that both have: medians, their ratio, and the least and greatest ratio of a pair."""
    rows = []
    readers: dict[str, Callable[[Figures], float]] = {
        "tokens/s out": lambda figures: figures.tokens_per_s,
        "requests/s": lambda figures: figures.requests_per_s,
        "TTFT p50 ms": lambda figures: figures.ttft_ms.get("p50", 0.0),
        "TTFT p95 ms": lambda figures: figures.ttft_ms.get("p95", 0.0),
        "ITL p50 ms": lambda figures: figures.itl_ms.get("p50", 0.0),
        "ITL p99 ms": lambda figures: figures.itl_ms.get("p99", 0.0),
        "ITL max ms": lambda figures: figures.itl_ms.get("max", 0.0),
        "end to end p50 ms": lambda figures: figures.end_to_end_ms.get("p50", 0.0),
        "server CPU s": lambda figures: figures.server_cpu_s or 0.0,
    }
    for name, read in readers.items():
        ours, theirs = [read(pair[0]) for pair in pairs], [read(pair[1]) for pair in pairs]
        if min(theirs) <= 0 or min(ours) <= 0:
            continue
        ratios = [mine / other for mine, other in zip(ours, theirs, strict=True)]
        medians = statistics.median(ours), statistics.median(theirs)
        rows.append(
            {
                "figure": name,
                subject: medians[0],
                peer: medians[1],
                "ratio_of_medians": medians[0] / medians[1],
                "least_paired_ratio": min(ratios),
                "greatest_paired_ratio": max(ratios),
            }
        )
    return rows


def comparison_table(subject: str, peer: str, rows: Sequence[dict[str, Any]], runs: int) -> str:
    """Lay the comparison out as text."""
    width = max(14, len(subject) + 2, len(peer) + 2)
    lines = [
        f"{subject} / {peer}: medians of {runs} paired runs, and the paired ratios from least to greatest",
        f"  {'':<20}{subject:>{width}}{peer:>{width}}{'ratio':>9}   spread",
    ]
    lines += [
        f"  {row['figure']:<20}{row[subject]:>{width}.2f}{row[peer]:>{width}.2f}{row['ratio_of_medians']:>8.3f}x"
        f"   {row['least_paired_ratio']:.3f}..{row['greatest_paired_ratio']:.3f}"
        for row in rows
    ]
    return "\n".join(lines)


def machine() -> dict[str, Any]:
    """Tell what a reader needs to judge the figures: processor, cores, and how busy the machine was before."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
        name = names[0] if names else name
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    return {"processor": name, "cores": os.cpu_count(), "system": platform.system(), "load_before": round(load, 2)}


def as_json(figures: Figures) -> dict[str, Any]:
    """Turn the figures into JSON-able values."""
    return asdict(figures)
