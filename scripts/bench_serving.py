"""Measure an OpenAI-compatible server under load, alone or in pairs with llama-server.

    python scripts/bench_serving.py --url http://127.0.0.1:8080 --clients 8 --requests 64
    python scripts/bench_serving.py --url http://127.0.0.1:8080 --rate 2 --requests 100 --workload mixed
    LLAMA_SERVER=.../llama-server python scripts/bench_serving.py --peer [--model FILE.gguf] --clients 8 --runs 5
    python scripts/bench_serving.py --peer --against "--speculate off" --pestle-args "--speculate lookup" --clients 8
    python scripts/bench_serving.py --self-test

Exit codes: 0 all requests answered, 1 some were not, 2 usage, 3 a server did not come up or refuses, 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shlex
import signal
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from bench import peer, report, self_test
from bench.client import Target
from bench.load import Pace, drive, run_async
from bench.workload import PATHS, Sizing, Workload, build_bodies, measure_sizing, model_name

if TYPE_CHECKING:
    from bench.report import Figures


def build_parser() -> argparse.ArgumentParser:
    """Describe the flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    where = parser.add_argument_group("what is measured")
    where.add_argument(
        "--url", help="an OpenAI-compatible server, as http://host:port; with --peer: instead of starting Pestle"
    )
    where.add_argument("--model-name", help="the `model` of the requests (default: the first of /v1/models)")
    where.add_argument("--api-key", help="sent as Authorization: Bearer")
    where.add_argument(
        "--self-test", action="store_true", help="measure the generator itself against a trivial local server"
    )
    load = parser.add_argument_group("load")
    load.add_argument("--clients", type=int, default=1, help="closed loop: streams at a time (default 1)")
    load.add_argument("--rate", type=float, help="open loop: requests a second, Poisson arrivals")
    load.add_argument("--requests", type=int, help="requests in a run (default 4 a client, at least 8)")
    load.add_argument("--duration", type=float, help="start no request after so many seconds")
    load.add_argument("--timeout", type=float, default=300.0, help="seconds for one request (default 300)")
    load.add_argument("--seed", type=int, default=0, help="of prompts and arrivals (default 0)")
    work = parser.add_argument_group("workload; lengths in tokens")
    work.add_argument("--endpoint", choices=["chat", "completions"], default="chat")
    work.add_argument("--workload", choices=["distinct", "shared-prefix", "mixed"], default="distinct")
    work.add_argument(
        "--prompt-tokens", type=int, default=128, help="prompt, or own tail after a shared prefix, or least mixed"
    )
    work.add_argument(
        "--prompt-tokens-max", type=int, default=1024, help="mixed: greatest prompt; lengths are log-uniform"
    )
    work.add_argument("--prefix-tokens", type=int, default=512, help="shared-prefix: the common part (default 512)")
    work.add_argument("--max-tokens", type=int, default=64)
    work.add_argument("--max-tokens-min", type=int, help="mixed: least max_tokens (default a quarter of --max-tokens)")
    work.add_argument("--temperature", type=float, default=0.0)
    work.add_argument("--top-k", type=int, help="default: what each server takes by itself")
    work.add_argument("--top-p", type=float, help="default: what each server takes by itself")
    work.add_argument("--ignore-eos", action="store_true", help="always generate --max-tokens (not in OpenAI's API)")
    work.add_argument(
        "--fields", type=json_object, default={}, metavar="JSON", help="more fields for every request, as one object"
    )
    pairs = parser.add_argument_group("pairs")
    pairs.add_argument(
        "--peer", action="store_true", help="start llama-server (its path in LLAMA_SERVER) beside Pestle and compare"
    )
    pairs.add_argument(
        "--noise-floor",
        action="store_true",
        help="with --peer: llama-server on both sides, to see what a ratio of 1 looks like",
    )
    pairs.add_argument(
        "--against", metavar="FLAGS", help="with --peer: Pestle with these flags (may be none) in llama-server's place"
    )
    pairs.add_argument("--model", type=Path, help="the GGUF that both serve (default: the embedded model, Q8_0)")
    pairs.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    pairs.add_argument("--slots", type=int, help="slots of each server (default: --clients)")
    pairs.add_argument("--ctx", type=int, default=2048, help="tokens a slot (default 2048)")
    pairs.add_argument(
        "--runs", type=int, default=1, help="runs, or pairs of runs, after a warm-up; prompts differ between runs"
    )
    pairs.add_argument(
        "--pestle", default=peer.pestle_binary(), help="the pestle command (default: beside this Python)"
    )
    pairs.add_argument("--pestle-args", default="", help="more flags for Pestle, in one string")
    pairs.add_argument("--llama-args", default="", help="more flags for llama-server, in one string")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    return parser


def json_object(text: str) -> dict[str, Any]:
    """Decode an argument. Raises ArgumentTypeError."""
    try:
        value = json.loads(text)
    except ValueError as fault:
        raise argparse.ArgumentTypeError(f"is not JSON: {fault}") from fault
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError("must be a JSON object")
    return value


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse what makes no sense, and fill in the defaults that depend on other flags."""
    if not (args.url or args.peer or args.self_test):
        parser.error("give --url, --peer or --self-test")
    for name in (
        "clients",
        "requests",
        "prompt_tokens",
        "prefix_tokens",
        "max_tokens",
        "threads",
        "slots",
        "ctx",
        "runs",
        "rate",
    ):
        value = getattr(args, name)
        if value is not None and value <= 0:
            parser.error(f"--{name.replace('_', '-')} must be greater than 0, not {value}")
    if args.workload == "mixed" and args.prompt_tokens_max < args.prompt_tokens:
        parser.error(f"--prompt-tokens-max {args.prompt_tokens_max} is less than --prompt-tokens {args.prompt_tokens}")
    if args.max_tokens_min is None:
        args.max_tokens_min = max(1, args.max_tokens // 4)
    if not 0 < args.max_tokens_min <= args.max_tokens:
        parser.error(f"--max-tokens-min must be from 1 to --max-tokens, not {args.max_tokens_min}")
    args.requests = args.requests or max(8, 4 * args.clients)
    args.slots = args.slots or args.clients
    if args.peer:
        if args.against is None and not os.environ.get("LLAMA_SERVER"):
            parser.error("--peer needs the path of llama-server in the environment variable LLAMA_SERVER")
        if args.model is not None and not args.model.is_file():
            parser.error(f"--model {args.model} is not a file")


LLAMA = "llama-server"


class Bench:
    """The workload and pace of one invocation, run against one server after another."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.workload = Workload(
            kind=args.workload,
            endpoint=args.endpoint,
            prompt_tokens=args.prompt_tokens,
            prompt_tokens_max=args.prompt_tokens_max,
            prefix_tokens=args.prefix_tokens,
            max_tokens=args.max_tokens,
            max_tokens_min=args.max_tokens_min,
            temperature=args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
            ignore_eos=args.ignore_eos,
            fields=args.fields,
            seed=args.seed,
        )
        self.pace = Pace(args.clients, args.rate, args.duration, args.timeout)

    def say(self, text: str) -> None:
        """Print for people only; --json keeps standard output for one object."""
        print(text, file=sys.stderr if self.args.json else sys.stdout, flush=True)

    def size(self, target: Target) -> tuple[str, Sizing]:
        """Learn the model's name and how many tokens a word costs."""
        model = self.args.model_name or model_name(target)
        sizing = measure_sizing(target, self.workload, model)
        if not sizing.measured:
            self.say("the server counts no prompt tokens: prompts are sized as one token a word")
        return model, sizing

    def run(self, target: Target, model: str, sizing: Sizing, run: int) -> Figures:
        """Run number `run`: the same prompts for every server, others for every number."""
        bodies = build_bodies(self.workload, sizing, model, count=self.args.requests, run=run)
        done = run_async(drive(target, PATHS[self.workload.endpoint], bodies, self.pace, seed=self.args.seed + run))
        return report.summarize(done)

    def warm_up(self, target: Target, model: str, sizing: Sizing) -> None:
        """Send one short round, measured by nobody. Raises ServerFailedError when nothing is answered."""
        bodies = build_bodies(self.workload, sizing, model, count=self.args.clients, run=-1)
        done = run_async(
            drive(target, PATHS[self.workload.endpoint], bodies, Pace(self.args.clients, timeout_s=self.pace.timeout_s))
        )
        figures = report.summarize(done)
        if not figures.completed:
            raise peer.ServerFailedError(f"{target.url} answers no request:\n{report.table('warm-up', figures)}")


def bench_url(bench: Bench) -> tuple[dict[str, Any], list[Figures]]:
    """Measure one server that somebody else has started."""
    target = Target.parse(bench.args.url, bench.args.api_key)
    model, sizing = bench.size(target)
    bench.warm_up(target, model, sizing)
    runs = []
    for run in range(bench.args.runs):
        runs.append(bench.run(target, model, sizing, run))
        bench.say(report.table(f"{target.url}, {model}, run {run + 1} of {bench.args.runs}", runs[-1]))
    return {"url": target.url, "model": model, "runs": [report.as_json(figures) for figures in runs]}, runs


def start_sides(bench: Bench, stack: ExitStack) -> list[tuple[str, Target, peer.Server | None]]:
    """Start the subject and the peer; both stay up, idle, while the other works."""
    args = bench.args
    shape = peer.ServerShape(args.model or peer.default_model(), args.threads, args.slots, args.ctx)

    def pestle(name: str, flags: str) -> peer.Server:
        port = peer.free_port()
        return stack.enter_context(
            peer.running(name, peer.pestle_command(args.pestle, shape, port, shlex.split(flags)), port)
        )

    def llama_server(name: str) -> peer.Server:
        port = peer.free_port()
        command = peer.llama_server_command(os.environ["LLAMA_SERVER"], shape, port, shlex.split(args.llama_args))
        return stack.enter_context(peer.running(name, command, port))

    other = LLAMA if args.against is None else "peer"
    theirs = llama_server(other) if args.against is None else pestle(other, args.against)
    if args.url:
        subject: tuple[str, Target, peer.Server | None] = ("subject", Target.parse(args.url, args.api_key), None)
    else:
        name = f"{LLAMA}-again" if args.noise_floor else "pestle"
        server = llama_server(name) if args.noise_floor else pestle(name, args.pestle_args)
        subject = (name, server.target, server)
    sides = [subject, (other, theirs.target, theirs)]
    for name, _, server_or_none in sides:
        if server_or_none is not None:
            bench.say(f"{name}: {shlex.join(server_or_none.command)}")
    return sides


def bench_peer(bench: Bench) -> tuple[dict[str, Any], list[Figures]]:
    """Alternate between both servers, the first of a pair changing each time, and compare pair by pair."""
    results: dict[str, list[Figures]] = {}
    with ExitStack() as stack:
        sides = start_sides(bench, stack)
        # Sized once, by the peer: both get the same text.
        models = {name: bench.args.model_name or model_name(target) for name, target, _ in sides}
        sizing = measure_sizing(sides[1][1], bench.workload, models[sides[1][0]])
        for name, target, _ in sides:
            results[name] = []
            bench.warm_up(target, models[name], sizing)
        for run in range(bench.args.runs):
            for name, target, server in sides if run % 2 == 0 else sides[::-1]:
                before = server.cpu_seconds() if server is not None else 0.0
                figures = bench.run(target, models[name], sizing, run)
                if server is not None:
                    server.check_alive()
                    figures = replace(figures, server_cpu_s=server.cpu_seconds() - before)
                results[name].append(figures)
                bench.say(report.table(f"{name}, run {run + 1} of {bench.args.runs}", results[name][-1]))
    subject, other = sides[0][0], sides[1][0]
    pairs = list(zip(results[subject], results[other], strict=True))
    rows = report.comparison(subject, other, pairs)
    bench.say(report.comparison_table(subject, other, rows, bench.args.runs))
    commands = {name: server.command for name, _, server in sides if server is not None}
    runs = {name: [report.as_json(figures) for figures in side] for name, side in results.items()}
    return {"commands": commands, "runs": runs, "comparison": rows}, [*results[subject], *results[other]]


def bench_self(bench: Bench) -> tuple[dict[str, Any], list[Figures]]:
    """Measure the generator itself."""
    found, runs = {}, []
    for name, figures, cost in self_test.measure():
        bench.say(report.table(f"self-test, {name}", figures))
        bench.say(
            f"  {cost['events_per_s']:,.0f} events/s, {cost['cpu_us_per_event']:.1f} us of the generator's CPU an event"
        )
        found[name] = {**report.as_json(figures), **cost}
        runs.append(figures)
    return found, runs


def _end(_number: int, _frame: object) -> NoReturn:
    raise KeyboardInterrupt


def main() -> int:
    """Parse, run, print. Children are ended on every way out."""
    parser = build_parser()
    args = parser.parse_args()
    check(parser, args)
    for ending in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(ending, _end)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    bench = Bench(args)
    machine = report.machine()
    bench.say(", ".join(f"{name} {value}" for name, value in machine.items()))
    if machine["load_before"] > 0.5:
        bench.say("the machine is busy already: figures will scatter")
    measure = bench_self if args.self_test else bench_peer if args.peer else bench_url
    try:
        found, runs = measure(bench)
    except KeyboardInterrupt:
        bench.say("interrupted")
        return 130
    except (RuntimeError, ValueError, OSError) as fault:
        print(f"bench_serving: {fault}", file=sys.stderr)
        return 3
    bench.say(report.NOTES)
    if args.json:
        settings = {
            key: str(value) if isinstance(value, Path) else value
            for key, value in vars(args).items()
            if key != "api_key"
        }
        print(json.dumps({"machine": machine, "settings": settings, **found}, indent=2))
    return 0 if all(figures.completed == figures.requests for figures in runs) else 1


if __name__ == "__main__":
    sys.exit(main())
