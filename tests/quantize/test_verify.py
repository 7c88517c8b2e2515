"""`pestle verify`: damage is noticed and named, by the card and by the source; what can't be judged is said plainly."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from app.cli import main
from app.models.card import card_path, read_card
from app.models.gguf import read_header
from quantize.pipeline import quantize

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def source(checkpoint_of: Callable[[str], Path]) -> Path:
    return checkpoint_of("llama3")


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a Q4_K_M and its card. Tests take a copy."""
    out = tmp_path_factory.mktemp("whole") / "model.gguf"
    make(source, "q4_k_m", out)
    return out


def make(source: Path, type_name: str, out: Path, *flags: str) -> None:
    command = ["quantize", str(source), "--type", type_name, "--out", str(out), "--no-measure", "--format", "quiet"]
    assert main([*command, *flags]) == 0


@pytest.fixture
def file(whole: Path, tmp_path: Path) -> Path:
    shutil.copytree(whole.parent, tmp_path, dirs_exist_ok=True)
    return tmp_path / whole.name


Verify = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture
def verify(capsys: pytest.CaptureFixture[str]) -> Verify:
    """Return a function that runs the command; its exit code and its last line."""

    def run(*arguments: str | Path) -> tuple[int, dict[str, Any]]:
        capsys.readouterr()
        code = main(["verify", *map(str, arguments), "--format", "json"])
        return code, json.loads(capsys.readouterr().out.splitlines()[-1])

    return run


def flip(path: Path, place: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << bit
    path.write_bytes(content)


def test_a_whole_file(file: Path, source: Path, verify: Verify) -> None:
    for arguments, judges in (((), ["structure", "card"]), ((source,), ["structure", "card", "source"])):
        code, said = verify(file, *arguments)
        assert (code, said["event"], said["ok"], said["differences"]) == (0, "verified", True, [])
        assert (said["judges"], said["content_judged"]) == (judges, True)
        card = read_card(file)
        assert card is not None
        assert said["sha256"] == card.file.sha256


def test_without_card_and_source_the_content_is_not_judged(
    file: Path, verify: Verify, capsys: pytest.CaptureFixture[str]
) -> None:
    card_path(file).unlink()
    code, said = verify(file)
    assert (code, said["ok"], said["content_judged"], said["judges"]) == (0, True, False, ["structure"])
    assert main(["verify", str(file)]) == 0
    assert "nothing says what its weights should be: it has no card, and no SOURCE was given" in capsys.readouterr().out


def test_the_damaged_tensor_is_named(file: Path, source: Path, verify: Verify) -> None:
    whole = file.read_bytes()
    header, draw = read_header(file), random.Random(0)
    for tensor in draw.sample(header.tensors, 6):
        place = header.data_offset + tensor.offset + draw.randrange(tensor.nbytes)
        flip(file, place, draw.randrange(8))
        code, said = verify(file)
        assert (code, said["ok"]) == (5, False)
        (found,) = said["differences"]
        assert (found["judge"], found["place"], found["name"]) == ("card", "tensor", tensor.name)
        code, said = verify(file, source)
        assert code == 5
        by_source = [found for found in said["differences"] if found["judge"] == "source"]
        assert [found["name"] for found in by_source] == [tensor.name]
        assert by_source[0]["message"].endswith(f"from byte {place} of the file on")
        file.write_bytes(whole)


def test_every_place_is_covered(file: Path, verify: Verify) -> None:
    """Flip bits and cut the file everywhere, also in the header and in what only fills up."""
    whole, draw = file.read_bytes(), random.Random(1)
    header = read_header(file)
    padding = [place for place in range(len(whole)) if _is_padding(header, place)]
    header_places = [*range(0, 24, 2), *(draw.randrange(header.data_offset) for _ in range(20))]
    for place in [*header_places, *draw.sample(padding, min(len(padding), 8)), len(whole) - 1]:
        flip(file, place, draw.randrange(8))
        code, said = verify(file)
        assert (code, said["ok"]) == (5, False), place
        file.write_bytes(whole)
    for length in [0, 3, 24, *(draw.randrange(len(whole)) for _ in range(12)), len(whole) - 1]:
        file.write_bytes(whole[:length])
        assert verify(file)[0] == 5, length
    file.write_bytes(whole + bytes(32))
    code, said = verify(file)
    assert code == 5
    assert said["differences"][0]["message"] == "32 bytes behind the last tensor belong to none"


def _is_padding(header: Any, place: int) -> bool:
    ends = [header.data_offset + tensor.offset + tensor.nbytes for tensor in header.tensors]
    starts = [*(header.data_offset + tensor.offset for tensor in header.tensors[1:]), header.file_size]
    return any(end <= place < start for end, start in zip(ends, starts, strict=True))


def test_a_source_says_which_key_differs(file: Path, source: Path, verify: Verify) -> None:
    card_path(file).unlink()
    content = file.read_bytes()
    assert content.count(b"Instruct") >= 1
    file.write_bytes(content.replace(b"Instruct", b"instruct", 1))
    code, said = verify(file, source)
    assert code == 5
    assert all(found["place"] == "header" for found in said["differences"])
    assert "instruct" in said["differences"][0]["message"]
    assert said["differences"][0]["name"].startswith("general.")


def test_another_source(file: Path, checkpoint_of: Callable[[str], Path], verify: Verify) -> None:
    code, said = verify(file, checkpoint_of("biased"))
    assert code == 5
    assert {found["judge"] for found in said["differences"]} == {"source"}


def test_the_recipe_comes_from_the_card(
    source: Path, tmp_path: Path, verify: Verify, capsys: pytest.CaptureFixture[str]
) -> None:
    out, flags = tmp_path / "mixed.gguf", ("--tensor-type", "ffn_down=q6_k", "--output-tensor-type", "q8_0")
    make(source, "q4_0", out, *flags)
    assert verify(out, source)[0] == 0
    card = json.loads(card_path(out).read_text())
    card["recipe"]["imatrix"] = {"name": "imatrix.gguf", "sha256": "0" * 64}
    card_path(out).write_text(json.dumps(card))
    capsys.readouterr()
    assert main(["verify", str(out), str(source)]) == 2
    assert "was made with the importance matrix imatrix.gguf: give it with --imatrix" in capsys.readouterr().err
    card_path(out).unlink()
    assert verify(out, source)[0] == 5
    assert verify(out, source, *flags)[0] == 0


def test_a_card_in_the_file(source: Path, whole: Path, tmp_path: Path, verify: Verify) -> None:
    out = tmp_path / "model.gguf"
    make(source, "q4_k_m", out, "--embed-card")
    assert list(tmp_path.iterdir()) == [out]
    code, said = verify(out, source)
    assert (code, said["judges"], said["differences"]) == (0, ["structure", "card", "source"], [])
    assert said["sha256"] == hashlib.sha256(whole.read_bytes()).hexdigest()
    content, header = out.read_bytes(), read_header(out)
    tensor = header.tensors[9]
    flip(out, header.data_offset + tensor.offset + 5)
    code, said = verify(out)
    assert (code, said["differences"][0]["name"]) == (5, tensor.name)
    for place in (30, header.keys_end - 1, header.keys_end - 200):  # a key of the model; the card itself
        out.write_bytes(content)
        flip(out, place, 7)
        assert verify(out)[0] == 5


@pytest.mark.parametrize("type_name", ["bf16", "f32", "q8_0"])
def test_types_in_another_order(type_name: str, source: Path, tmp_path: Path, verify: Verify) -> None:
    out = tmp_path / "model.gguf"
    quantize(source, type_name, out)
    assert verify(out, source)[0] == 0
    flip(out, read_header(out).data_offset + 70000)
    assert verify(out)[0] == 0
    assert verify(out, source)[0] == 5


def test_a_gguf_as_the_source(source: Path, tmp_path: Path, verify: Verify) -> None:
    first, second = tmp_path / "bf16.gguf", tmp_path / "q4_k_m.gguf"
    quantize(source, "bf16", first)
    quantize(first, "q4_k_m", second)
    assert verify(second, first)[0] == 0


@pytest.mark.parametrize(
    ("content", "code", "kind"), [(None, 3, "BadInputError"), (b"PK\3\4" + bytes(90), 3, "ModelFileError")]
)
def test_what_is_no_gguf(content: bytes | None, code: int, kind: str, tmp_path: Path, verify: Verify) -> None:
    path = tmp_path / "model.gguf"
    if content is not None:
        path.write_bytes(content)
    found, said = verify(path)
    assert (found, said["kind"], said["exit_code"]) == (code, kind, code)
    (tmp_path / "folder").mkdir()
    assert verify(tmp_path / "folder")[0] == 3


def test_a_damaged_card(file: Path, verify: Verify) -> None:
    card_path(file).write_text('{"version": 1}')
    code, said = verify(file)
    assert (code, said["kind"]) == (3, "ModelFileError")
    assert "a damaged card" in said["message"]


def test_another_files_card(file: Path, source: Path, verify: Verify) -> None:
    card = card_path(file).read_bytes()
    quantize(source, "q8_0", file)
    assert not card_path(file).exists()
    card_path(file).write_bytes(card)
    code, said = verify(file)
    assert code == 5
    assert said["differences"][0]["place"] == "file"
    assert "the card is of a file of" in said["differences"][0]["message"]


def test_for_people(file: Path, source: Path) -> None:
    command = [sys.executable, "-P", "-m", "app.cli", "verify", str(file), str(source)]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout == f"{file}: whole: byte for byte what the source gives, and its card's\n"
    flip(file, file.stat().st_size // 2)
    finished = subprocess.run(command[:-1], cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    assert finished.returncode == 5
    assert "damaged, says the card: the first damage is in blk." in finished.stderr
    assert finished.stdout == ""
