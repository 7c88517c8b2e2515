"""Kill quantizations at their system calls, fill the disk under them, damage what they made; print what was left.

    python scripts/faults_quantize.py [--kills 200] [--full 100] [--truncations 256] [--flips 1000] [--jobs 2]
                                      [--seed 0]

A process of its own is killed (or told that the disk is full) at a system call by strace. Then its target must be
absent or whole; the next run must make the same bytes as one that nothing happened to and leave nothing else; and so
must a run with --resume, of a copy of what the killed one left. The file that comes out is then damaged, and
`pestle verify` must notice. Exit codes: 0 all held, 1 something did not, 3 the tools are missing.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import contextlib
import hashlib
import io
import json
import multiprocessing
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fault_damage import damage_report
from fault_points import KILLED, Point, Run, full_points, kill_points, run_with, traced_calls
from fault_tmpfs import tmpfs_report
from random_checkpoint import SHAPES, vocabulary_of_checkpoint, write_checkpoint
from rebuild_default_checkpoint import default_folder

from quantize.cli import main as quantize

VOCABULARY = 512
MEMORY = Path("/dev/shm")


@dataclass(frozen=True)
class Scene:
    """What a fault happens to: a run, what was there before, and the sha256 of each file that should come."""

    title: str
    run: Run
    expected: dict[str, str]
    before: Path | None = None
    """A folder whose content is there when the run begins."""
    work: Path = Path()
    """Where folders can be made."""

    def target(self, folder: Path) -> Path:
        """Return what --out is told."""
        return folder if len(self.expected) > 1 else folder / next(iter(self.expected))


@dataclass
class Outcome:
    """What one fault left."""

    point: Point
    happened: bool = True
    left: str = "absent"
    resumed: bool = False
    failures: list[str] = field(default_factory=list)


def strike(scene: Scene, point: Point) -> Outcome:
    """Let a fault happen and see what is left and what the next runs make of it."""
    with tempfile.TemporaryDirectory(prefix="pestle-faults-", dir=scene.work) as work:
        folder, copy = Path(work, "a"), Path(work, "b")
        shutil.copytree(scene.before, folder) if scene.before else folder.mkdir()
        old = digests(folder)
        finished = run_with(scene.run, scene.target(folder), [point])
        outcome = Outcome(point)
        killed = point.effect.startswith("signal")
        outcome.happened = finished.returncode == KILLED if killed else finished.returncode != 0
        if not outcome.happened and killed:
            return outcome
        found = digests(folder)
        outcome.left = judge(found, old, scene.expected)
        if outcome.left == "partial":
            outcome.failures.append(f"partial target: {found}")
        if not killed:
            check_refusal(outcome, finished.returncode, finished.stderr, folder, scene)
        shutil.copytree(folder, copy)
        outcome.failures += rerun(scene, folder, [])[0]
        if killed:
            failures, taken = rerun(scene, copy, ["--resume"])
            outcome.failures += failures
            outcome.resumed = taken > 0
        return outcome


def judge(found: dict[str, str], old: dict[str, str], expected: dict[str, str]) -> str:
    """Say what became of the targets."""
    states = set()
    for name, digest in expected.items():
        if name not in found and name not in old:
            states.add("absent")
        elif found.get(name) == digest:
            states.add("new")
        else:
            states.add("old" if name in old and found.get(name) == old[name] else "partial")
    return "partial" if "partial" in states else " and ".join(sorted(states))


def check_refusal(outcome: Outcome, code: int, said: str, folder: Path, scene: Scene) -> None:
    """Make sure that the full disk was an error of its own kind that left nothing, or that it did not matter."""
    unheard = outcome.point.call == "write" and not said  # what it would have said met the full disk as well
    if code not in {0, 4} and not unheard:
        outcome.failures.append(f"exit code {code}: {said[-300:]}")
    if others := sorted(digests(folder).keys() - scene.expected.keys()):
        outcome.failures.append(f"left at once: {others}")
    if code == 4 and not unheard and not said.startswith("error: "):
        outcome.failures.append(f"no message: {said[-300:]}")


def rerun(scene: Scene, folder: Path, flags: list[str]) -> tuple[list[str], int]:
    """Run again without a fault; return what is wrong with the result, and the bytes that were taken over."""
    out = io.StringIO()
    arguments = [flag if flag != "quiet" else "json" for flag in scene.run.flags(scene.target(folder))]
    with contextlib.redirect_stdout(out):
        code = quantize([*(flag for flag in arguments if flag != "--resume"), *flags])
    events = [json.loads(line) for line in out.getvalue().splitlines()]
    taken = sum(event.get("resumed_bytes") or 0 for event in events if event["event"] == "done")
    found = digests(folder)
    how = " ".join(["rerun", *flags])
    failures = [f"{how}: exit code {code}: {out.getvalue()[-300:]}"] if code else []
    if found != scene.expected:
        failures.append(f"{how}: {found}")
    return failures, taken


def digests(folder: Path) -> dict[str, str]:
    """Return the sha256 of every file of a folder but cards, which say when they were made."""
    files = [path for path in folder.iterdir() if ".card." not in path.name]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def collect(scene: Scene, points: Sequence[Point], wanted: int, pool: concurrent.futures.Executor) -> list[Outcome]:
    """Strike until so many faults have happened, as points allow; a call that is not reached does not count."""
    outcomes: list[Outcome] = []
    rest = list(points) * 3  # threads take turns in their own way: what was not reached may be, the next time
    while rest and len(outcomes) < wanted:
        batch, rest = rest[: wanted - len(outcomes)], rest[wanted - len(outcomes) :]
        struck = pool.map(strike, [scene] * len(batch), batch)
        outcomes += [outcome for outcome in struck if outcome.happened or outcome.failures]
    return outcomes


def table(title: str, rows: Iterable[tuple[Scene, list[Outcome]]]) -> tuple[str, list[str]]:
    """Return the table of a kind of fault, and every failure."""
    columns = (("faults", 7), ("places", 7), ("absent", 7), ("old", 5), ("new", 5), ("partial", 8), ("went on", 8))
    lines = ["".join([f"{title:<44}", *(f"{name:>{width}}" for name, width in columns), "  failed"])]
    failures: list[str] = []
    for scene, outcomes in rows:
        left = collections.Counter(outcome.left for outcome in outcomes)
        mixed = sum(count for state, count in left.items() if " and " in state)
        failed = [outcome for outcome in outcomes if outcome.failures]
        failures += [f"{scene.title}: {outcome.point}: {why}" for outcome in failed for why in outcome.failures]
        places = len({outcome.point for outcome in outcomes})
        resumed = sum(outcome.resumed for outcome in outcomes)
        lines.append(
            f"{scene.title:<44}{len(outcomes):>7}{places:>7}{left['absent']:>7}{left['old']:>5}"
            f"{left['new'] + mixed:>5}{left['partial']:>8}{resumed:>8}{len(failed):>8}"
        )
    return "\n".join(lines), failures


def make_scenes(work: Path) -> list[Scene]:
    """Make the checkpoint, and what should come of it."""
    model = work / "Model"
    vocabulary = vocabulary_of_checkpoint(default_folder()).truncated(VOCABULARY)
    write_checkpoint(model, SHAPES["tiny-llama3"], vocabulary, "bf16", 2, 0)
    whole, old, begun = work / "whole", work / "old", work / "begun"
    for types, folder in (("q8_0,q4_0", whole), ("q4_0", old / "one.gguf")):
        folder.parent.mkdir(exist_ok=True)
        if quantize([str(model), "--type", types, "--out", str(folder), "--no-measure", "--format", "quiet"]):
            raise RuntimeError("the run without faults failed")
    both = digests(whole)
    one = {"one.gguf": both["Model-Q8_0.gguf"]}
    single = Run((str(model), "--type", "q8_0"))
    double = Run((str(model), "--type", "q8_0,q4_0"))
    begun.mkdir()
    reached = full_points(*traced_calls(single, work / "trace.gguf", work / "log"), 0)
    late = max(point.number for point in reached if point.call == "pwrite64") * 3 // 4
    run_with(single, begun / "one.gguf", [Point("pwrite64", late, "signal=KILL")])
    return [
        Scene("one type, no file before", single, one, work=work),
        Scene("one type, over a file", single, one, old, work),
        Scene("two types at once", double, both, work=work),
        Scene("killed again while it goes on (--resume)", Run((*single.arguments, "--resume")), one, begun, work),
    ]


def shares(count: int, parts: int) -> list[int]:
    """Cut a number into parts that differ by one at most."""
    return [count // parts + (place < count % parts) for place in range(parts)]


def main() -> int:
    """Run from the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    for name, count in (("kills", 200), ("full", 100), ("truncations", 256), ("flips", 1000), ("jobs", 2), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=count, metavar="N")
    arguments = parser.parse_args()
    if shutil.which("strace") is None:
        print("strace is needed: apt-get install strace", file=sys.stderr)
        return 3
    began = time.monotonic()
    if MEMORY.is_dir():
        tempfile.tempdir = str(MEMORY)  # a thousand runs that wait for a disk prove no more
    failures: list[str] = []
    context = multiprocessing.get_context("spawn")
    with (
        tempfile.TemporaryDirectory(prefix="pestle-faults-") as work,
        concurrent.futures.ProcessPoolExecutor(arguments.jobs, mp_context=context) as pool,
    ):
        scenes = make_scenes(Path(work))
        calls = [_calls(scene, Path(work)) for scene in scenes]
        for title, wanted, choose, chosen in (
            ("kills", arguments.kills, kill_points, scenes),
            ("full disks", arguments.full, full_points, scenes[:3]),
        ):
            rows = [
                (scene, collect(scene, choose(*counted, arguments.seed), count, pool))
                for scene, counted, count in zip(chosen, calls, shares(wanted, len(chosen)), strict=False)
            ]
            text, failed = table(title, rows)
            failures += failed
            print(text, f"\n{time.monotonic() - began:.0f} s\n", flush=True)
        for report in (
            tmpfs_report(scenes[1].run, Path(work)),
            damage_report(Path(work), arguments.truncations, arguments.flips, arguments.seed, pool),
        ):
            print(report.text, f"\n{time.monotonic() - began:.0f} s\n", flush=True)
            failures += report.failures
    for failure in failures:
        print(f"FAILED {failure}")
    print(f"{len(failures)} failures, {time.monotonic() - began:.0f} s")
    return 1 if failures else 0


def _calls(scene: Scene, work: Path) -> tuple[collections.Counter[str], collections.Counter[str]]:
    with tempfile.TemporaryDirectory(dir=work) as folder:
        place = Path(folder, "traced")
        shutil.copytree(scene.before, place) if scene.before else place.mkdir()
        return traced_calls(scene.run, scene.target(place), work / "log")


if __name__ == "__main__":
    sys.exit(main())
