"""The chart of the README shows what the table of docs/benchmarks.md says."""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import draw_benchmarks  # noqa: E402

PAGE = """# Benchmarks

## Quantization

| model | type | upstream, s | Pestle, s | ratio (spread) |
| --- | --- | --- | --- | --- |
| small | q8_0 | 6.06 (5.48 + 0.58) | 0.90 | **0.15** |
| a < b | q8_0 | 30.00 (20.00 + 10.00) | 6.00 | **0.20** |
| a < b | q4_0, q8_0 from one read | 60.00 (40.00 + 20.00) | 7.50 | **0.12** |

## Another

| other | q8_0 | 1.00 (0.50 + 0.50) | 1.00 | **1** |
"""


def test_the_table_is_read_and_nothing_after_it() -> None:
    times = draw_benchmarks.read_times(PAGE)
    assert list(times) == ["small", "a < b"]
    assert times["small"] == [draw_benchmarks.Times("q8_0", 5.48, 0.58, 0.90)]


def test_bars_are_as_long_as_the_times() -> None:
    drawing = ET.fromstring(draw_benchmarks.draw("a < b", draw_benchmarks.read_times(PAGE)["a < b"]))
    bars = [node for node in drawing if node.tag.endswith("rect") and node.get("height") != "10"]
    widths = [float(bar.get("width", "")) for bar in bars]
    assert widths == pytest.approx([width * widths[-1] / 7.5 for width in (20, 10, 6, 40, 20, 7.5)], abs=0.5)
    said = [node.text for node in drawing if node.tag.endswith("text")]
    assert "6.0 s, 5.0 times as fast" in said
    assert "60.0 s" in said


def test_the_chart_is_the_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "chart.svg"
    page = ROOT / "docs" / "benchmarks.md"
    monkeypatch.setattr(sys, "argv", ["draw_benchmarks", "--page", str(page), "--out", str(out)])
    assert draw_benchmarks.main() == 0
    again = "run: python scripts/draw_benchmarks.py"
    assert out.read_text("utf-8") == (ROOT / "docs" / "quantization.svg").read_text("utf-8"), again


def test_a_page_without_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "page.md").write_text("# Benchmarks\n")
    monkeypatch.setattr(
        sys, "argv", ["draw_benchmarks", "--page", str(tmp_path / "page.md"), "--out", str(tmp_path / "x.svg")]
    )
    assert draw_benchmarks.main() == 2
    assert "no times" in capsys.readouterr().err
    assert not (tmp_path / "x.svg").exists()
