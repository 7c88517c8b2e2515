import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS))

from bench import peer, report, self_test, source  # noqa: E402
from bench.client import BEARS_TEXT, EventStream, Outcome, Target, send  # noqa: E402
from bench.load import Pace, Run, drive, run_async  # noqa: E402
from bench.workload import PATHS, Sizing, Workload, build_bodies, measure_sizing, model_name  # noqa: E402

PARSED = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nTransfer-Encoding: chunked\r\n\r\n"
    + source.FIRST
    + source.chunk(": heartbeat")
    + source.EVENT * 3
    + source.last_chunks(3)
)


class Sink(asyncio.Transport):
    """Takes what the client writes."""

    def write(self, data: object) -> None: ...

    def close(self) -> None: ...


def read_stream(pieces: list[bytes], *, eof: bool = True) -> Outcome:
    async def work() -> Outcome:
        outcome = Outcome(due=0.0)
        finished: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        stream = EventStream(b"", outcome, finished)
        stream.connection_made(Sink())
        for piece in pieces:
            stream.data_received(piece)
        if eof:
            stream.eof_received()
        await asyncio.wait_for(finished, 1)
        return outcome

    return asyncio.run(work())


@pytest.mark.parametrize("size", [1, 2, 7, 64, 10_000])
def test_the_stream_is_read_the_same_however_it_is_cut(size: int) -> None:
    outcome = read_stream([PARSED[at : at + size] for at in range(0, len(PARSED), size)], eof=False)
    assert outcome.error is None
    assert (outcome.text_events, outcome.completion_tokens, outcome.finish_reason) == (3, 3, "length")


@pytest.mark.parametrize("size", [1, 3, 10_000])
def test_crlf_events_in_a_body_that_ends_with_the_connection(size: int) -> None:
    event = b'data: {"choices":[{"index":0,"text":"a","finish_reason":null}]}\r\n\r\n'
    answer = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n" + b": hi\r\n\r\n" + event * 2
    answer += b"data: [DONE]\r\n\r\n"
    outcome = read_stream([answer[at : at + size] for at in range(0, len(answer), size)])
    assert (outcome.error, outcome.text_events, outcome.tokens) == (None, 2, 2)


def test_an_empty_delta_and_quoted_keys_bear_no_text() -> None:
    assert BEARS_TEXT(b'{"delta":{"content": "x"}}')
    assert not BEARS_TEXT(b'{"delta":{"role":"assistant","content":""}}')
    assert not BEARS_TEXT(b'{"delta":{"refusal":"\\"content\\":\\"x"}}')
    assert not BEARS_TEXT(b'{"delta":{"content":null}}')


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"


@pytest.mark.parametrize(
    ("answer", "error", "detail"),
    [
        (
            b'HTTP/1.1 429 Full\r\nContent-Length: 55\r\n\r\n{"error":{"message":"the queue is full","code":"full"}}',
            "http 429 full",
            "the queue is full",
        ),
        (b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 4\r\n\r\noops", "http 502", "oops"),
        (
            HEAD + b'data: {"error":{"message":"gone","code":"engine_crashed"}}\n\n',
            "stream error engine_crashed",
            "gone",
        ),
        (HEAD + b'data: {"choices":[{"text":"a"}]}\n\n', "cut short", "without [DONE]"),
        (HEAD + b"data: [DONE]\n\n", "no text", "no text"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}", "not an event stream", "{}"),
        (b"nonsense\r\n\r\n", "bad http", ""),
    ],
)
def test_what_went_wrong_is_named(answer: bytes, error: str, detail: str) -> None:
    outcome = read_stream([answer])
    assert outcome.error == error
    assert detail in outcome.error_detail


def test_url_forms() -> None:
    assert Target.parse("http://127.0.0.1:8080/v1/").url == "http://127.0.0.1:8080"
    assert Target.parse("https://host/base/v1") == Target("host", 443, tls=True, base_path="/base")
    assert Target.parse("localhost:99").port == 99
    assert b"\r\nHost: [::1]:8080\r\n" in Target.parse("http://[::1]:8080").request_bytes("/v1/completions", b"{}")
    with pytest.raises(ValueError, match="not of the form"):
        Target.parse("ftp://host")


def prompts(workload: Workload, run: int, sizing: Sizing | None = None, count: int = 20) -> list[str]:
    bodies = [json.loads(body) for body in build_bodies(workload, sizing or Sizing(), "m", count=count, run=run)]
    return [body["prompt"] if "prompt" in body else body["messages"][0]["content"] for body in bodies]


def test_prompts_repeat_for_a_run_and_differ_between_runs() -> None:
    workload = Workload(prompt_tokens=40)
    assert prompts(workload, 1) == prompts(workload, 1)
    assert not set(prompts(workload, 1)) & set(prompts(workload, 2))
    assert {len(prompt.split()) for prompt in prompts(workload, 1)} == {40}
    assert {len(prompt.split()) for prompt in prompts(workload, 1, Sizing(2.0, 20.0, measured=True))} == {10}


def test_a_shared_prefix_is_shared_within_a_run_only() -> None:
    workload = Workload(kind="shared-prefix", endpoint="completions", prefix_tokens=30, prompt_tokens=5)
    first, second = prompts(workload, 1), prompts(workload, 2)
    assert len({tuple(prompt.split()[:30]) for prompt in first}) == 1
    assert len({tuple(prompt.split()[30:]) for prompt in first}) == len(first)
    assert first[0].split()[:5] != second[0].split()[:5]


def test_mixed_lengths_stay_within_their_bounds() -> None:
    workload = Workload(kind="mixed", prompt_tokens=10, prompt_tokens_max=100, max_tokens=32, max_tokens_min=8)
    lengths = {len(prompt.split()) for prompt in prompts(workload, 0, count=100)}
    wanted = {json.loads(body)["max_tokens"] for body in build_bodies(workload, Sizing(), "m", count=100, run=0)}
    assert 10 <= min(lengths) < 20
    assert 70 < max(lengths) <= 100
    assert (min(wanted), max(wanted)) == (8, 32)


def test_figures_of_known_outcomes() -> None:
    def outcome(start: float, times: list[float], tokens: int) -> Outcome:
        found = Outcome(
            due=start, ended=times[-1] + 0.1, text_events=len(times), completion_tokens=tokens, prompt_tokens=10
        )
        found.text_times.extend(times)
        return found

    failed = Outcome(due=0.0, ended=9.0, error="http 429", error_detail="full")
    run = Run([outcome(0.0, [0.5, 0.7, 1.0], 5), outcome(1.0, [1.2, 1.3], 2), failed], 2.0, 0.1)
    figures = report.summarize(run)
    assert (figures.completed, figures.requests, figures.tokens_out, figures.events) == (2, 3, 7, 5)
    assert figures.tokens_per_s == pytest.approx(3.5)
    assert figures.ttft_ms["p50"] == pytest.approx(350)
    assert figures.itl_ms["p50"] == pytest.approx(200)
    assert figures.itl_ms["max"] == pytest.approx(300)
    assert figures.tpot_ms["max"] == pytest.approx(125)
    assert figures.end_to_end_ms["max"] == pytest.approx(1100)
    assert figures.errors == {"http 429": 1}
    assert "1 x http 429: full" in report.table("title", figures)


def test_the_ratio_is_of_medians_and_the_spread_of_pairs() -> None:
    def figures(tokens: int) -> report.Figures:
        return report.summarize(Run([done(tokens)], 1.0, 0.0))

    def done(tokens: int) -> Outcome:
        found = Outcome(due=0.0, ended=1.0, text_events=1, completion_tokens=tokens)
        found.text_times.append(0.5)
        return found

    rows = report.comparison(
        "a", "b", [(figures(10), figures(20)), (figures(30), figures(20)), (figures(24), figures(30))]
    )
    row = next(row for row in rows if row["figure"] == "tokens/s out")
    assert (row["a"], row["b"], row["ratio_of_medians"]) == (24, 20, pytest.approx(1.2))
    assert (row["least_paired_ratio"], row["greatest_paired_ratio"]) == (0.5, 1.5)


def test_closed_and_open_loop_against_a_real_socket() -> None:
    bodies = build_bodies(Workload(max_tokens=5), Sizing(), "m", count=12, run=0)
    with self_test.source(0.01) as target:
        closed = run_async(drive(target, PATHS["chat"], bodies, Pace(clients=3, timeout_s=20)))
        open_loop = run_async(drive(target, PATHS["chat"], bodies, Pace(rate=50.0, timeout_s=20)))
        brief = run_async(drive(target, PATHS["chat"], bodies, Pace(clients=1, duration_s=0.01, timeout_s=20)))
    for run in (closed, open_loop):
        figures = report.summarize(run)
        assert (figures.completed, figures.tokens_out, figures.errors) == (12, 60, {})
        assert 5 < figures.itl_ms["p50"] < 100
    assert closed.wall_s >= 4 * 0.05
    dues = sorted(outcome.due for outcome in open_loop.outcomes)
    assert 0 < dues[-1] - dues[0] < 2
    assert len(brief.outcomes) == 1


def test_a_server_that_never_answers_and_a_closed_port() -> None:
    with self_test.source(30.0) as target:
        body = build_bodies(Workload(), Sizing(), "m", count=1, run=0)[0]
        request = target.request_bytes(PATHS["chat"], body)
        assert run_async(send(target, request, due=0.0, timeout_s=0.2)).error == "timeout"
    gone = Target("127.0.0.1", peer.free_port(), tls=False, base_path="")
    assert run_async(send(gone, b"", due=0.0, timeout_s=5)).error == "connect ConnectionRefusedError"


def test_ten_thousand_events_a_second_cost_well_under_one_core() -> None:
    """Counted in CPU time, so that a busy machine doesn't decide: 100 us an event would be all of one core."""
    (_, paced, cost), (_, flat_out, _) = self_test.measure(streams=50, events=200)
    assert paced.completed == flat_out.completed == 50
    assert paced.events == flat_out.events == 10_000
    assert cost["cpu_us_per_event"] < 60


STAND_IN = """
import http.server, json, sys
from pathlib import Path
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.answer({"data": [{"id": "stand-in"}]})
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with Path(__file__).with_name(str(self.server.server_port)).open("a") as log:
            log.write(body["messages"][0]["content"] + "\\\\n")
        if not body.get("stream"):
            words = len(body["messages"][0]["content"].split())
            return self.answer({"usage": {"prompt_tokens": 2 * words + 7}})
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.end_headers()
        for event in ({"choices": [{"delta": {"content": "x"}}]}, {"choices": [], "usage": {"completion_tokens": 4}}):
            self.wfile.write(b"data: " + json.dumps(event).encode() + b"\\\\n\\\\n")
        self.wfile.write(b"data: [DONE]\\\\n\\\\n")
    def answer(self, value):
        text = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)
    def log_message(self, *_): pass
port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
""".replace("\\\\", "\\")


@pytest.fixture
def stand_in(tmp_path: Path) -> Path:
    """Return a program that takes both servers' flags and streams one word: it shows who is asked what."""
    program = tmp_path / "server"
    program.write_text(f"#!{sys.executable}\n{STAND_IN}")
    program.chmod(0o755)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    return program


def bench(*flags: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPTS / "bench_serving.py"), *flags]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=60, env=os.environ | environment, check=False
    )


def test_pairs_get_the_same_prompts_and_others_in_each_run(stand_in: Path) -> None:
    model = stand_in.with_name("model.gguf")
    flags = ["--peer", "--model", str(model), "--pestle", str(stand_in), "--requests", "2", "--runs", "2", "--json"]
    done = bench(*flags, LLAMA_SERVER=str(stand_in))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert list(found["runs"]) == ["pestle", "llama-server"]
    assert [figures["tokens_out"] for figures in found["runs"]["pestle"]] == [8, 8]
    assert "ratio" in done.stderr
    assert all(isinstance(figures["server_cpu_s"], float) for figures in found["runs"]["pestle"])
    ports = {name: command[command.index("--port") + 1] for name, command in found["commands"].items()}
    asked = {name: stand_in.with_name(port).read_text().splitlines() for name, port in ports.items()}
    sizing, ours, theirs = asked["llama-server"][:2], asked["pestle"], asked["llama-server"][2:]
    assert [len(text.split()) for text in sizing] == [100, 300]
    assert ours == theirs
    assert len(set(ours)) == 1 + 2 * 2
    assert all(len(text.split()) == round((128 - 7) / 2) for text in ours)


def test_both_commands_ask_for_the_same(tmp_path: Path) -> None:
    shape = peer.ServerShape(tmp_path / "m.gguf", threads=2, slots=8, context=512)
    theirs = " ".join(peer.llama_server_command("llama-server", shape, 5, ["--x"]))
    ours = " ".join(peer.pestle_command("pestle", shape, 5, []))
    assert "-t 2 -np 8 -c 4096 --no-webui --x" in theirs
    assert "--threads 2 --parallel 8 --ctx-size 512" in ours


def wait_for(condition: Callable[[], bool], seconds: float = 15) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_ends_its_children(stand_in: Path, number: signal.Signals) -> None:
    text = stand_in.read_text().replace(
        'self.wfile.write(b"data: [DONE]', 'import time; time.sleep(50)\n        self.wfile.write(b"data: [DONE]'
    )
    stand_in.write_text(text)
    flags = ["--peer", "--model", str(stand_in.with_name("model.gguf")), "--pestle", str(stand_in)]
    command = [sys.executable, str(SCRIPTS / "bench_serving.py"), *flags]
    environment = os.environ | {"LLAMA_SERVER": str(stand_in)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        commands = (line for line in process.stdout if "--port " in line)  # others come on a busy machine only
        ports = [next(commands).split("--port ")[1].split()[0] for _ in range(2)]
        assert wait_for(lambda: stand_in.with_name(ports[0]).exists())
        process.send_signal(number)
        assert process.wait(20) == 130
    for port in ports:
        gone = Target("127.0.0.1", int(port), tls=False, base_path="")
        assert run_async(send(gone, b"", due=0.0, timeout_s=5)).error == "connect ConnectionRefusedError"


@pytest.mark.parametrize(
    ("flags", "words", "code"),
    [
        ([], "give --url, --peer or --self-test", 2),
        (["--url", "http://127.0.0.1:1", "--clients", "0"], "--clients must be greater than 0", 2),
        (["--peer", "--model", "/nonexistent.gguf"], "is not a file", 2),
        (["--url", "http://127.0.0.1:1"], "Connection refused", 3),
        (["--url", "ftp://x"], "not of the form", 3),
    ],
)
def test_bad_usage_is_named(flags: list[str], words: str, code: int) -> None:
    done = bench(*flags, LLAMA_SERVER="/bin/false")
    assert done.returncode == code
    assert words in done.stderr


def test_a_server_that_ends_at_once_is_reported_with_its_last_lines(tmp_path: Path) -> None:
    program = tmp_path / "broken"
    program.write_text("#!/bin/sh\necho 'no such model' >&2\nexit 7\n")
    program.chmod(0o755)
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    done = bench("--peer", "--model", str(tmp_path / "m.gguf"), LLAMA_SERVER=str(program))
    assert done.returncode == 3
    assert "llama-server ended with 7" in done.stderr
    assert "no such model" in done.stderr


def test_model_name_and_sizing_of_a_server(stand_in: Path) -> None:
    port = peer.free_port()
    with peer.running("stand-in", [str(stand_in), "--port", str(port)], port) as server:
        assert model_name(server.target) == "stand-in"
        assert measure_sizing(server.target, Workload(), "stand-in") == Sizing(2.0, 7.0, measured=True)
