"""Which of several types is the best one here: the rule of `--auto`. Pure."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

from app.errors import UsageError

CANDIDATES = ("q8_0", "q6_k", "q5_k_m", "q4_k_m", "q4_0", "q3_k_m")
"""The types that are tried: one for each size, and none that takes minutes to encode."""

GOOD_KLD = 0.05
"""Nats; what the rule asks for when the user does not: some 9 of 10 tokens then are the source's first choice."""

_AS_FAST = 0.95
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?", re.IGNORECASE)
_UNITS = {"": 1} | {
    letter + suffix: base ** (power + 1)
    for power, letter in enumerate("kmgt")
    for suffix, base in (("", 1000), ("i", 1024))
}


@dataclasses.dataclass(frozen=True, slots=True)
class Candidate:
    """A type that was tried: the file's size in bytes, the mean divergence in nats, decoding in tokens a second."""

    type_name: str
    bytes: int
    kld: float
    decode_speed: float


@dataclasses.dataclass(frozen=True, slots=True)
class Limits:
    """What the user asks for; None: nothing."""

    kld: float | None = None
    bytes: int | None = None


def choose(candidates: Sequence[Candidate], limits: Limits) -> tuple[Candidate, str]:
    """Return the best candidate and why it is that.

    With a limit of divergence: the smallest file that keeps it. With one of size only: the least divergence. With none:
    of those that diverge by no more than `GOOD_KLD`, the fastest to decode (5% are no difference, then the smaller
    one); if there is none, the one that diverges least. Raises `UsageError` if nothing keeps the limits.
    """
    fitting = [one for one in candidates if limits.bytes is None or one.bytes <= limits.bytes]
    if limits.kld is not None:
        near = [one for one in fitting if one.kld <= limits.kld]
        if not near:
            best = min(fitting, key=lambda one: one.kld)
            raise UsageError(
                f"--max-kld: no type diverges by {limits.kld:g} nats or less; {best.type_name} comes nearest, with "
                f"{best.kld:.4g}",
                param="max-kld",
            )
        return min(near, key=lambda one: one.bytes), f"the smallest with a KLD of {limits.kld:g} or less"
    if limits.bytes is not None:
        return min(fitting, key=lambda one: one.kld), f"the least KLD with {limits.bytes:,} bytes or less"
    near = [one for one in fitting if one.kld <= GOOD_KLD]
    if not near:
        return min(fitting, key=lambda one: one.kld), f"the least KLD; none has {GOOD_KLD:g} or less"
    fastest = max(one.decode_speed for one in near)
    fast = [one for one in near if one.decode_speed >= _AS_FAST * fastest]
    return min(fast, key=lambda one: one.bytes), f"the fastest to decode with a KLD of {GOOD_KLD:g} or less"


def parse_size(text: str) -> int:
    """Return the bytes that `4000000`, `4.5GB` or `4GiB` mean. Raises `UsageError`."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise UsageError(f"--max-bytes: {text!r} is no size, such as 4000000, 4.5GB or 4GiB", param="max-bytes")
    return int(float(match[1]) * _UNITS[(match[2] or "").lower()])
