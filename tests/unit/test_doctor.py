"""`pestle doctor` says what is so, and what is wrong."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from app.cli import main
from app.cli.machine import memory_limit
from app.llama import library as llama
from quantize.native.library import open_libraries

GIB = 1 << 30


def report_of(capsys: pytest.CaptureFixture[str], *, exit_code: int = 0) -> dict[str, object]:
    assert main(["doctor", "--format", "json"]) == exit_code
    report: dict[str, object] = json.loads(capsys.readouterr().out)
    return report


def test_what_it_says_is_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LLM_CACHE_DIR", str(tmp_path / "not" / "made"))
    report = report_of(capsys)
    machine, cache, native = report["machine"], report["cache"], report["native"]
    assert isinstance(machine, dict)
    assert isinstance(cache, dict)
    assert isinstance(native, dict)
    assert machine["python"].endswith(sys.version.split()[0])
    assert 0 < machine["memory_available"] < machine["memory"]
    assert 0 < machine["usable_cpus"] <= machine["cpus"] == os.cpu_count()
    assert cache["path"] == str(tmp_path / "not" / "made")
    assert cache["writable"]
    assert cache["free"] > 0
    assert native["library"] == str(llama.ggml_base_path())
    assert native["build"] == llama.build_name()
    assert native["instructions"] == [library.name for library in open_libraries()]
    assert len(native["kernels"]) == 17
    for kernel in native["kernels"]:
        assert (kernel["runs"] is None) == (kernel["why"] is not None)
        assert kernel["runs"] is None or kernel["runs"] in native["instructions"]
    assert (tmp_path / "not" / "made" / "kernels").exists() == bool(native["instructions"]), "verdicts are remembered"


def test_people_read_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LLM_CACHE_DIR", str(tmp_path))
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    for word in (llama.build_name(), str(llama.ggml_base_path()), str(tmp_path), "GiB available", "q4_K", "iq4_xs"):
        assert word in said


def test_quiet_says_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LLM_CACHE_DIR", str(tmp_path))
    assert main(["doctor", "--format", "quiet"]) == 0
    assert capsys.readouterr().out == ""


def test_a_llama_cpp_that_cannot_be_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LLM_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("LLAMA_CPP_LIB_PATH", str(tmp_path))
    report = report_of(capsys, exit_code=3)
    assert report["native"] is None
    assert "not found" in str(report["problem"])
    assert main(["doctor"]) == 3
    assert "llama.cpp     CANNOT BE USED" in capsys.readouterr().out


def test_a_cache_that_is_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("LLM_CACHE_DIR", str(tmp_path / "file"))
    assert main(["doctor"]) == 4
    assert "CANNOT BE WRITTEN" in capsys.readouterr().out


def test_the_least_limit_above_us_counts(tmp_path: Path) -> None:
    own, groups = tmp_path / "own", tmp_path / "cgroup"
    (groups / "a" / "b").mkdir(parents=True)
    own.write_text("0::/a/b\n")
    assert memory_limit(groups, own) is None
    (groups / "a" / "b" / "memory.max").write_text("max\n")
    assert memory_limit(groups, own) is None
    (groups / "a" / "memory.max").write_text(f"{3 * GIB}\n")
    assert memory_limit(groups, own) == 3 * GIB
    (groups / "a" / "b" / "memory.max").write_text(f"{2 * GIB}\n")
    assert memory_limit(groups, own) == 2 * GIB


def test_limits_of_the_first_version(tmp_path: Path) -> None:
    own, groups = tmp_path / "own", tmp_path / "cgroup"
    (groups / "memory" / "a").mkdir(parents=True)
    own.write_text("5:devices:/\n4:memory:/a\n0::/\n")
    (groups / "memory" / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    assert memory_limit(groups, own) is None
    (groups / "memory" / "a" / "memory.limit_in_bytes").write_text(f"{GIB}\n")
    assert memory_limit(groups, own) == GIB
    assert memory_limit(groups, tmp_path / "nowhere") is None
