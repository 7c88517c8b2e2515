"""What a quantization costs, measured by the run that makes it; and the choice of a type by that."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from app.errors import StorageError, UsageError
from app.models.card import Card, read_card
from app.models.gguf import read_header
from quantize import measuring
from quantize.auto import CandidateFolder
from quantize.carded import Measurement
from quantize.choice import GOOD_KLD, Candidate, Limits, choose, parse_size
from quantize.cli import main
from quantize.measuring import SMALL_SOURCE_BYTES, NotMeasuredError, Subjects, judge, reference_type
from quantize.pipeline import prepare, quantize
from quantize.quality import measure
from quantize.text_file import open_text

ROOT = Path(__file__).parents[2]
Checkpoints = Callable[[str], Path]
Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep references out of the user's own cache; returns where they are."""
    monkeypatch.setenv("LLM_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "measuring"


def card_of(path: Path) -> Card:
    card = read_card(path)
    assert card is not None
    return card


def test_the_figures_are_those_of_compare(
    checkpoint_of: Checkpoints, tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = checkpoint_of("smollm"), tmp_path / "out"
    command = [str(source), "--type", "q4_0,q8_0", "--out", str(out), "--chunks", "2", "--threads", "1"]
    assert main([*command, "--format", "json"]) == 0
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert list(cache.iterdir()) == []
    quantize(source, "bf16", tmp_path / "bf16.gguf")
    files = sorted(out.glob("*.gguf"))
    text = open_text(None)
    reference, *found = measure(tmp_path / "bf16.gguf", files, text.content, threads=1, most_chunks=2)
    for path, expected in zip(files, found, strict=True):
        card = card_of(path)
        assert card.quality is not None
        for name in ("perplexity", "perplexity_error", "kld_mean", "kld_error", "kld_99", "kld_max", "same_top"):
            assert getattr(card.quality, name) == pytest.approx(getattr(expected, name), rel=1e-6), name
        assert card.quality.reference_perplexity == pytest.approx(reference.perplexity, rel=1e-6)
        assert (card.quality.chunks, card.quality.predictions) == (2, 510)
        assert (card.quality.text, card.quality.text_sha256) == ("Pestle's everyday.txt", text.sha256)
        assert card.quality.reference == "the source's weights in bf16"
        assert card.quality.decode_speed > 1
        assert any(tensor.relative_error for tensor in card.tensors)
        assert all(file.sha256 for file in card.source.files)
    told = {event["path"]: event["quality"]["kld_mean"] for event in events if event["event"] == "card"}
    assert told == {str(path): card_of(path).quality.kld_mean for path in files}  # type: ignore[union-attr]


def test_a_gguf_is_its_own_reference(checkpoint_of: Checkpoints, tmp_path: Path, cache: Path) -> None:
    source, out = tmp_path / "f16.gguf", tmp_path / "out.gguf"
    quantize(checkpoint_of("smollm"), "f16", source)
    command = [str(source), "--type", "q4_0", "--out", str(out), "--chunks", "2", "--threads", "1"]
    assert main([*command, "--embed-card", "--format", "quiet"]) == 0
    assert not cache.exists()
    assert read_card(out) is None
    quality = json.loads(read_header(out).metadata["pestle.card"])["quality"]
    assert quality["reference"] == "the source itself, f16.gguf"
    assert 0 < quality["kld_mean"] < quality["kld_max"]


def test_a_file_in_the_sources_type_is_the_reference(checkpoint_of: Checkpoints, tmp_path: Path, cache: Path) -> None:
    command = [str(checkpoint_of("smollm")), "--type", "bf16", "--out", str(tmp_path / "out.gguf")]
    assert main([*command, "--chunks", "2", "--threads", "1", "--format", "quiet"]) == 0
    assert not cache.exists()
    quality = card_of(tmp_path / "out.gguf").quality
    assert quality is not None
    assert (quality.kld_max, quality.same_top) == (0, 1)


def test_what_cannot_be_measured_harms_nothing(
    checkpoint_of: Checkpoints, tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "short.txt").write_text("hello")
    out = tmp_path / "out.gguf"
    command = [str(checkpoint_of("smollm")), "--type", "q8_0", "--out", str(out), "--text", str(tmp_path / "short.txt")]
    assert main([*command, "--format", "quiet"]) == 0
    assert "warning: the quality was not measured: the text has" in capsys.readouterr().err
    assert card_of(out).quality is None
    assert list(cache.iterdir()) == []


def test_the_end_of_the_process_is_told(checkpoint_of: Checkpoints, tmp_path: Path) -> None:
    path = tmp_path / "q8_0.gguf"
    quantize(checkpoint_of("smollm"), "q8_0", path)

    def kill(*_: int) -> None:
        for child in psutil.Process().children():
            if "quantize.measure_child" in command_of(child):
                child.send_signal(signal.SIGSEGV)

    with pytest.raises(NotMeasuredError, match="signal 11"):
        judge(Subjects(path, "itself", [path]), open_text(None), None, threads=1, progress=kill)


def start_measuring(source: Path, out: Path) -> subprocess.Popen[str]:
    """Start a run and return when its file is there and is being measured."""
    command = [sys.executable, "-P", "-m", "quantize", str(source), "--type", "q8_0", "--out", str(out)]
    process = subprocess.Popen([*command, "--format", "json"], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if json.loads(line)["event"] == "done":
            return process
    raise AssertionError("the run ended early")


def test_an_interrupt_leaves_file_and_card(checkpoint_of: Checkpoints, tmp_path: Path, cache: Path) -> None:
    process = start_measuring(checkpoint_of("smollm"), tmp_path / "out.gguf")
    process.send_signal(signal.SIGINT)
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted while measuring" in json.loads(rest.splitlines()[-1])["message"]
    assert card_of(tmp_path / "out.gguf").quality is None
    assert list(cache.iterdir()) == []


def command_of(process: psutil.Process) -> str:
    try:
        return str(process.cmdline())
    except psutil.Error:  # it has just ended
        return ""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the next run takes it away")
def test_a_killed_run_leaves_no_reference(checkpoint_of: Checkpoints, tmp_path: Path, cache: Path) -> None:
    process = start_measuring(checkpoint_of("smollm"), tmp_path / "out.gguf")
    for _ in range(600):
        children = [each for each in psutil.Process(process.pid).children() if "measure_child" in command_of(each)]
        if children:
            break
        time.sleep(0.05)
    process.kill()
    process.communicate(timeout=60)
    assert card_of(tmp_path / "out.gguf").quality is None
    assert list(cache.iterdir()) == []
    psutil.wait_procs(children, timeout=60)
    assert not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children)


def test_left_references_are_swept(cache: Path) -> None:
    cache.mkdir(parents=True)
    (cache / "left.gguf").write_bytes(b"of a killed run")
    with measuring.TemporaryReference() as reference:
        reference.path.write_bytes(b"weights")
        path, _ = reference.hide()
        with measuring.TemporaryReference():  # of another run
            assert path.read_bytes() == b"weights"
    assert list(cache.iterdir()) == []


def test_small_sources_are_measured_without_being_asked() -> None:
    assert Measurement(None).wants(SMALL_SOURCE_BYTES)
    assert not Measurement(None).wants(SMALL_SOURCE_BYTES + 1)
    assert Measurement(True).wants(1 << 50)
    assert not Measurement(False).wants(1)


def test_without_room_for_the_reference(checkpoint_of: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    unasked = Measurement(None)
    prepared = prepare(checkpoint_of("smollm"), "q8_0", reference=unasked.reference)
    assert len(prepared.outputs) == 1
    assert "1000 are free" in unasked.notes[0]
    assert not unasked.wants(1)
    with pytest.raises(StorageError, match="--no-measure"):
        prepare(checkpoint_of("smollm"), "q8_0", reference=Measurement(True).reference)


@pytest.mark.parametrize(("shape", "expected"), [("smollm", "bf16"), ("from f16", "f16"), ("from f32", "f32")])
def test_the_reference_loses_nothing(shape: str, expected: str, checkpoint_of: Checkpoints) -> None:
    prepared = prepare(checkpoint_of(shape), "q8_0")
    specs = [tensor.spec for tensor in prepared.plan.tensors]
    assert reference_type(specs, prepared.checkpoint.tensors) == expected


FOUR = [Candidate("q8_0", 800, 0.001, 50), Candidate("q6_k", 600, 0.01, 60), Candidate("q4_k_m", 480, 0.04, 79),
        Candidate("q4_0", 440, 0.2, 90)]  # fmt: skip


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        (Limits(kld=0.02), "q6_k"),
        (Limits(kld=1), "q4_0"),
        (Limits(kld=0.04), "q4_k_m"),
        (Limits(bytes=600), "q6_k"),
        (Limits(bytes=599), "q4_k_m"),
        (Limits(kld=0.05, bytes=700), "q4_k_m"),
        (Limits(), "q4_k_m"),
    ],
)
def test_the_rule(limits: Limits, expected: str) -> None:
    assert choose(FOUR, limits)[0].type_name == expected


def test_the_rule_without_limits() -> None:
    nearly_as_fast = [Candidate("q8_0", 800, 0.001, 78), *FOUR[1:]]
    assert choose(nearly_as_fast, Limits())[0].type_name == "q4_k_m"  # the smaller one
    faster = [Candidate("q8_0", 800, 0.001, 90), *FOUR[1:]]
    assert choose(faster, Limits())[0].type_name == "q8_0"
    poor = [Candidate("q4_0", 440, GOOD_KLD * 4, 90), Candidate("q3_k_m", 400, GOOD_KLD * 8, 99)]
    assert choose(poor, Limits())[0].type_name == "q4_0"
    with pytest.raises(UsageError, match=r"q8_0 comes nearest, with 0\.001"):
        choose(FOUR, Limits(kld=0.0001))


@pytest.mark.parametrize(
    ("text", "expected"), [("5", 5), ("4.5GB", 4_500_000_000), ("4 GiB", 4 << 30), ("10k", 10_000), ("1MB", 1_000_000)]
)
def test_sizes(text: str, expected: int) -> None:
    assert parse_size(text) == expected
    with pytest.raises(UsageError, match="is no size"):
        parse_size(text + "?")


def test_auto_keeps_one_file(
    checkpoint_of: Checkpoints, tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = checkpoint_of("llama3"), tmp_path / "out" / "best.gguf"
    out.parent.mkdir()
    quantize(source, "q4_k_m", tmp_path / "expected.gguf")
    limit = (tmp_path / "expected.gguf").stat().st_size
    command = [str(source), "--auto", "--max-bytes", str(limit), "--out", str(out), "--chunks", "2", "--threads", "1"]
    assert main([*command, "--format", "json"]) == 0
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    (choice,) = [event for event in events if event["event"] == "choice"]
    tried = {one["type_name"]: one for one in choice["candidates"]}
    assert choice["type"] == min(tried, key=lambda name: tried[name]["kld"])
    assert set(tried) < {"q8_0", "q6_k", "q5_k_m", "q4_k_m", "q4_0", "q3_k_m"}
    assert "q8_0" not in tried, "it was known to be too large"
    quantize(source, choice["type"], tmp_path / "expected.gguf")
    assert out.read_bytes() == (tmp_path / "expected.gguf").read_bytes()
    card = card_of(out)
    assert (card.file.name, card.type) == ("best.gguf", choice["type"])
    assert card.quality is not None
    assert {path.name.removeprefix("best.gguf") for path in out.parent.iterdir()} == {
        "", ".card.json", ".card.md", ".card.svg",
    }  # fmt: skip
    assert list(cache.iterdir()) == []
    done = [event for event in events if event["event"] in {"done", "card"}]
    assert [event["path"] for event in done] == [str(out), str(out)]


def test_auto_that_finds_nothing_leaves_nothing(
    checkpoint_of: Checkpoints, tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out" / "best.gguf"
    out.parent.mkdir()
    command = [str(checkpoint_of("llama3")), "--auto", "--out", str(out), "--chunks", "2", "--threads", "1"]
    assert main([*command, "--max-kld", "0", "--max-bytes", "1.25MB"]) == 2
    shown = capsys.readouterr()
    assert "q3_k_m comes nearest, with" in shown.err
    assert "q3_k_m" in shown.out
    assert list(out.parent.iterdir()) == []
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--type", "q8_0", "--max-kld", "0.1"], "--max-kld is for --auto"),
        (["--auto", "--no-measure"], "take --no-measure away"),
        (["--auto", "--max-kld", "-1"], "--max-kld is -1.0"),
        (["--auto", "--max-bytes", "3"], "no type makes a file of 3 bytes or less"),
        (["--type", "q8_0", "--chunks", "0"], "--chunks is 0"),
    ],
)
def test_impossible_wishes(
    flags: list[str], said: str, checkpoint_of: Checkpoints, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(checkpoint_of("smollm")), *flags]) == 2
    assert said in capsys.readouterr().err


def test_type_and_auto_exclude_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    for flags in (["--auto", "--type", "q8_0"], []):
        with pytest.raises(SystemExit) as caught:
            main(["folder", *flags])
        assert caught.value.code == 2
    assert "--auto" in capsys.readouterr().err


def test_leftovers_of_a_killed_choice_are_swept(tmp_path: Path) -> None:
    left = tmp_path / ".0123456789abcdef.pestle-auto"
    (left / "q8_0").mkdir(parents=True)
    with CandidateFolder(tmp_path) as mine:
        place = mine.place("q8_0", "a.gguf")
        assert not left.exists()
        place.write_bytes(b"weights")
        with CandidateFolder(tmp_path):  # of another run
            assert place.read_bytes() == b"weights"
    assert list(tmp_path.iterdir()) == []
