"""Truncates a finished file and flips its bits, and asks `pestle verify` each time whether it notices."""

from __future__ import annotations

import concurrent.futures
import contextlib
import io
import json
import random
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from fault_tmpfs import Report

from app.cli import main as pestle
from app.models.card import card_path
from app.models.gguf import Header, read_header

FAILED = 5
AGAINST_SOURCE = 10  # one in so many flips is also judged by the source alone
NAME = "Model-Q8_0.gguf"

Damage = tuple[str, int, int]
"""`cut` and the length that is left, or `flip`, the byte and the bit."""


def damage_report(work: Path, truncations: int, flips: int, seed: int, pool: concurrent.futures.Executor) -> Report:
    """Damage copies of the Q8_0 in `work`/whole, whose source is `work`/Model."""
    file = work / "whole" / NAME
    draw, size = random.Random(seed), file.stat().st_size
    damages: list[Damage] = [("cut", draw.randrange(size), 0) for _ in range(truncations)]
    damages += [("flip", draw.randrange(size), draw.randrange(8)) for _ in range(flips)]
    groups = [damages[first::16] for first in range(16)]
    results = [each for found in pool.map(_judge_all, [work] * 16, groups) for each in found]
    by_card = [caught for caught, _, _ in results]
    named = [right for _, right, _ in results if right is not None]
    by_source = [caught for _, _, caught in results if caught is not None]
    failures = [f"damage not caught: {by_card.count(False)}"] if False in by_card else []
    failures += [f"damage not caught by the source: {by_source.count(False)}"] if False in by_source else []
    failures += [f"another tensor named: {named.count(False)}"] if False in named else []
    text = (
        f"damage to a file of {size} bytes: {truncations} truncations and {flips} bit flips; caught by its card "
        f"{sum(by_card)} of {len(by_card)}; the damaged tensor named {sum(named)} of {len(named)}; caught by the "
        f"source alone, without a card, {sum(by_source)} of {len(by_source)}"
    )
    return Report(text, failures)


def _judge_all(work: Path, damages: Sequence[Damage]) -> list[tuple[bool, bool | None, bool | None]]:
    """Return for each damage whether it was caught, whether its tensor was named, and whether the source caught it."""
    source = work / "whole" / NAME
    header = read_header(source)
    results = []
    with tempfile.TemporaryDirectory(dir=work) as folder:
        copy = Path(folder, source.name)
        for number, damage in enumerate(damages):
            shutil.copyfile(source, copy)
            shutil.copyfile(card_path(source), card_path(copy))
            _damage(copy, damage)
            code, said = _verify(copy)
            tensor = _damaged_tensor(header, damage)
            right = None if tensor is None else _named(said) == tensor
            card_path(copy).unlink()
            again = None if number % AGAINST_SOURCE else _verify(copy, work / "Model", "--type", "q8_0")[0] == FAILED
            results.append((code == FAILED, right, again))
    return results


def _damage(path: Path, damage: Damage) -> None:
    kind, place, bit = damage
    with path.open("r+b") as file:
        if kind == "cut":
            file.truncate(place)
        else:
            file.seek(place)
            byte = file.read(1)[0]
            file.seek(place)
            file.write(bytes([byte ^ 1 << bit]))


def _damaged_tensor(header: Header, damage: Damage) -> str | None:
    """Return the tensor that a flipped bit is in; None for what is in none."""
    kind, place, _ = damage
    for tensor in header.tensors if kind == "flip" else ():
        if 0 <= place - header.data_offset - tensor.offset < tensor.nbytes:
            return tensor.name
    return None


def _verify(*arguments: str | Path) -> tuple[int, str]:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = pestle(["verify", *map(str, arguments), "--format", "json"])
    return code, out.getvalue()


def _named(said: str) -> str | None:
    event = json.loads(said.splitlines()[-1])
    return next((str(found["name"]) for found in event.get("differences", ()) if found["place"] == "tensor"), None)
