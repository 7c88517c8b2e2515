"""The card: what it says, that it belongs to its file, and that it can live in the file."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import msgspec
import numpy as np
import pytest

from app.cli import main
from app.errors import ModelFileError, StorageError, VerificationError
from app.llama.model import VocabularyModel
from app.models.card import Card, card_path, decode_card, mismatch, read_card
from app.models.embedded_card import CARD_KEY, embedded_card, find_card, plain_header
from app.models.gguf import read_header
from quantize.card import write_card
from quantize.card_embedding import embed_card
from quantize.card_making import SourceFile, describe_source, make_card, source_files
from quantize.pipeline import Result, prepare, quantize, run_all
from quantize.prepared import Prepared
from quantize.recipe import Overrides
from quantize.writer import AtomicFile
from tests.quantize.test_family_gpt_oss import packed

ROOT = Path(__file__).parents[2]
Checkpoints = Callable[[str], Path]


def carded(
    source: Path, type_names: list[str], folder: Path, **options: Any
) -> tuple[Prepared, list[Result], list[Card]]:
    """Make files with errors, and their cards, which are not written."""
    prepared = prepare(source, type_names, **options)
    outs = [folder / f"{name}.gguf" for name in type_names]
    results = run_all(prepared, outs, threads=2, with_losses=True)
    about = describe_source(prepared, source_files(prepared), hashed=True)
    pairs = zip(prepared.outputs, results, strict=True)
    return prepared, results, [make_card(prepared, output, result, about) for output, result in pairs]


def test_digests_are_those_of_the_files(checkpoint_of: Checkpoints, tmp_path: Path) -> None:
    """Also where files have their tensors in another order than the first one, and are read again."""
    source = checkpoint_of("smollm")
    _, _, cards = carded(source, ["q4_k_m", "bf16", "q8_0"], tmp_path)
    for card in cards:
        raw = (tmp_path / card.file.name).read_bytes()
        assert card.file.sha256 == hashlib.sha256(raw).hexdigest()
        header = read_header(tmp_path / card.file.name)
        assert card.file.header_bytes == header.data_offset
        assert card.file.header_sha256 == hashlib.sha256(raw[: header.data_offset]).hexdigest()
        for tensor, entry in zip(card.tensors, header.tensors, strict=True):
            end = header.data_offset + entry.offset + entry.nbytes
            assert tensor.sha256_through == hashlib.sha256(raw[:end]).hexdigest(), tensor.name
        assert mismatch(card, header) is None
    shard = source / "model.safetensors"
    known = {file.name: file for file in cards[0].source.files}
    assert known["model.safetensors"].sha256 == hashlib.sha256(shard.read_bytes()).hexdigest()
    assert known["model.safetensors"].bytes == shard.stat().st_size
    assert "config.json" in known


@pytest.mark.parametrize("by_turns", [False, True])
def test_what_is_written_is_not_read_to_be_hashed(
    by_turns: bool, checkpoint_of: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even gates and ups that are written by turns."""
    source, types = (packed(tmp_path), ["mxfp4_moe"]) if by_turns else (checkpoint_of("llama3"), ["q8_0", "q4_k_m"])
    monkeypatch.setattr(AtomicFile, "read_back", lambda *_: pytest.fail("the file was read"))
    outs = [tmp_path / f"{name}.gguf" for name in types]
    results = run_all(prepare(source, types), outs)
    assert [result.digest.sha256 for result in results] == [
        hashlib.sha256(out.read_bytes()).hexdigest() for out in outs
    ]


def decoded(raw: bytes, type_name: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return what the blocks of a type stand for, as the format says."""
    if type_name in {"f32", "f16"}:
        return np.frombuffer(raw, {"f32": np.float32, "f16": np.float16}[type_name]).astype(np.float64)
    kind: Any = (np.int8, 32) if type_name == "q8_0" else (np.uint8, 16)
    blocks = np.frombuffer(raw, np.dtype([("scale", np.float16), ("q", *kind)]))
    if type_name == "q8_0":
        numbers = blocks["q"].astype(np.float64)
    else:
        numbers = np.concatenate([blocks["q"] & 15, blocks["q"] >> 4], axis=1).astype(np.float64) - 8
    return (numbers * blocks["scale"].astype(np.float64)[:, None]).ravel()


def weights_of(path: Path) -> dict[str, np.ndarray[Any, np.dtype[np.float64]]]:
    header, raw = read_header(path), path.read_bytes()
    starts = {tensor.name: header.data_offset + tensor.offset for tensor in header.tensors}
    return {each.name: decoded(raw[starts[each.name] :][: each.nbytes], each.type_name) for each in header.tensors}


@pytest.mark.parametrize("shape", ["smollm", "from f16"])
def test_errors_are_those_of_float64(shape: str, checkpoint_of: Checkpoints, tmp_path: Path) -> None:
    """Against the same weights in f32; the blocks are decoded here."""
    overrides = Overrides((), "q8_0", "q8_0")
    _, _, (card, exact) = carded(checkpoint_of(shape), ["q4_0", "f32"], tmp_path, overrides=overrides)
    assert {tensor.relative_error for tensor in exact.tensors} == {0.0}
    before, after = (weights_of(tmp_path / f"{name}.gguf") for name in ("f32", "q4_0"))
    assert {"q4_0", "q8_0", "f32"} <= {tensor.type for tensor in card.tensors}
    for tensor in card.tensors:
        lost, whole = after[tensor.name] - before[tensor.name], before[tensor.name]
        expected = np.sqrt(np.mean(lost**2) / np.mean(whole**2))
        assert tensor.relative_error == pytest.approx(expected, rel=1e-5), tensor.name


def test_errors_do_not_depend_on_threads(checkpoint_of: Checkpoints, tmp_path: Path) -> None:
    prepared = prepare(checkpoint_of("llama3"), "q4_k_m")
    found = []
    for threads in (1, 4):
        (result,) = run_all(prepared, [tmp_path / "a.gguf"], threads=threads, with_losses=True)
        assert result.losses is not None
        found.append([result.losses.relative_error(tensor.spec.name) for tensor in prepared.plan.tensors])
    assert found[0] == found[1]
    assert max(error or 0 for error in found[0]) > 0.01


def test_a_card_can_be_read_back_and_is_for_people_too(checkpoint_of: Checkpoints, tmp_path: Path) -> None:
    _, _, (card,) = carded(checkpoint_of("llama3"), ["q4_k_m"], tmp_path)
    file = tmp_path / "q4_k_m.gguf"
    assert read_card(file) is None
    assert write_card(card, file) == card_path(file)
    assert read_card(file) == card
    page = (tmp_path / "q4_k_m.gguf.card.md").read_text()
    assert card.file.sha256 in page
    assert "(<q4_k_m.gguf.card.svg>)" in page
    texts = [each.text for each in ET.parse(tmp_path / "q4_k_m.gguf.card.svg").iter() if each.tag.endswith("text")]
    assert {"ffn_down", "attn_q", "layer", "relative error, %"} <= set(texts)


def test_another_files_card_is_known_for_one(checkpoint_of: Checkpoints, tmp_path: Path) -> None:
    _, _, (q8, q4) = carded(checkpoint_of("llama3"), ["q8_0", "q4_0"], tmp_path)
    write_card(q8, tmp_path / "q4_0.gguf")
    found = find_card(read_header(tmp_path / "q4_0.gguf"))
    assert found is not None
    assert "bytes, this one has" in str(found[1])
    same_size = msgspec.structs.replace(q8, file=q4.file)
    assert "other tensors" in str(mismatch(same_size, read_header(tmp_path / "q4_0.gguf")))


def test_a_new_file_takes_the_old_card_away(checkpoint_of: Checkpoints, tmp_path: Path) -> None:
    _, _, (card,) = carded(checkpoint_of("llama3"), ["q8_0"], tmp_path)
    write_card(card, tmp_path / "q8_0.gguf")
    assert len(list(tmp_path.iterdir())) == 4
    quantize(checkpoint_of("smollm"), "q8_0", tmp_path / "q8_0.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["q8_0.gguf"]


def test_a_run_that_fails_leaves_file_and_card(
    checkpoint_of: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, _, (card,) = carded(checkpoint_of("llama3"), ["q8_0"], tmp_path)
    file = tmp_path / "q8_0.gguf"
    write_card(card, file)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    from quantize import target  # noqa: PLC0415

    def refuse(*_: Any) -> None:
        raise VerificationError("no")

    monkeypatch.setattr(target, "verify", refuse)
    with pytest.raises(VerificationError):
        quantize(checkpoint_of("llama3"), "q8_0", file)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_card_that_cannot_be_written_is_told(
    checkpoint_of: Checkpoints, tmp_path: Path, quantize_command: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    (tmp_path / "out.gguf.card.md" / "in the way").mkdir(parents=True)
    out = tmp_path / "out.gguf"
    finished = quantize_command(checkpoint_of("llama3"), "--type", "q8_0", "--no-measure", "--out", out)
    assert finished.returncode == 4
    assert "out.gguf.card.md" in finished.stderr
    assert "Traceback" not in finished.stderr


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "a damaged card"),
        (b"[]", "a damaged card"),
        (b'{"version":2}', "version 2"),
        (b'{"version":1}', "damaged"),
    ],
)
def test_damaged_cards(content: bytes, message: str, tmp_path: Path) -> None:
    card_path(tmp_path / "a.gguf").write_bytes(content)
    with pytest.raises(ModelFileError, match=message):
        read_card(tmp_path / "a.gguf")


def test_a_card_in_the_file(checkpoint_of: Checkpoints, tmp_path: Path) -> None:
    _, _, (card,) = carded(checkpoint_of("llama3"), ["q4_k_m"], tmp_path)
    file = tmp_path / "q4_k_m.gguf"
    plain = file.read_bytes()
    write_card(card, file)
    embed_card(card, file)
    assert [path.name for path in tmp_path.iterdir()] == ["q4_k_m.gguf"]
    header = read_header(file)
    assert embedded_card(header) == card
    assert find_card(header) == (card, None)
    assert plain_header(header) + file.read_bytes()[header.data_offset :] == plain
    with VocabularyModel(file) as model:  # llama.cpp reads it
        assert json.loads(model.metadata[CARD_KEY])["file"]["sha256"] == card.file.sha256


def test_a_card_is_not_put_into_another_file(checkpoint_of: Checkpoints, tmp_path: Path) -> None:
    _, _, (card,) = carded(checkpoint_of("llama3"), ["q4_k_m"], tmp_path)
    file = tmp_path / "q4_k_m.gguf"
    with file.open("r+b") as changed:
        changed.seek(-40, 2)
        changed.write(b"\x11")
    before = file.read_bytes()
    with pytest.raises(VerificationError, match="not its own"):
        embed_card(card, file)
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]


def test_no_room_for_a_card_in_the_file(
    checkpoint_of: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os  # noqa: PLC0415

    _, _, (card,) = carded(checkpoint_of("llama3"), ["q8_0"], tmp_path)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(StorageError, match="no room"):
        embed_card(card, tmp_path / "q8_0.gguf")
    assert hashlib.sha256((tmp_path / "q8_0.gguf").read_bytes()).hexdigest() == card.file.sha256


def test_a_source_with_a_card_does_not_hand_it_on(checkpoint_of: Checkpoints, tmp_path: Path) -> None:
    _, _, (card,) = carded(checkpoint_of("llama3"), ["bf16"], tmp_path)
    source = tmp_path / "bf16.gguf"
    quantize(source, "q4_0", tmp_path / "from plain.gguf")
    embed_card(card, source)
    quantize(source, "q4_0", tmp_path / "from carded.gguf")
    assert (tmp_path / "from carded.gguf").read_bytes() == (tmp_path / "from plain.gguf").read_bytes()


def test_what_was_chosen_stands_in_the_card(checkpoint_of: Checkpoints, tmp_path: Path) -> None:
    chosen = Overrides((("ffn_down", "q6_K"),), "q8_0", "q5_0")
    prepared, _, (card,) = carded(checkpoint_of("llama3"), ["q4_k_m"], tmp_path, overrides=chosen)
    assert Overrides(tuple(card.recipe.overrides), card.recipe.output, card.recipe.embedding) == chosen
    assert {tensor.type for tensor in card.tensors if "ffn_down" in tensor.name} == {"q6_K"}
    assert (card.source.kind, card.source.name) == ("folder", prepared.source.folder.name)
    assert card.weights == sum(tensor.spec.weights for tensor in prepared.plan.tensors)
    again = prepare(tmp_path / "q4_k_m.gguf", "q4_k_m", allow_requantize=True)
    about = describe_source(again, source_files(again), hashed=False)
    assert (about.kind, about.name, about.files[0].sha256) == ("gguf", "q4_k_m.gguf", None)


def test_the_digest_of_a_hub_file_is_in_its_name(tmp_path: Path) -> None:
    blob = tmp_path / "blobs" / ("0123456789abcdef" * 4)
    blob.parent.mkdir()
    blob.write_bytes(b"weights")
    link = tmp_path / "model.safetensors"
    link.symlink_to(blob)
    assert SourceFile.look_at(link, is_weights=True).identity(hashed=False).sha256 == blob.name


def test_a_source_that_changes_has_no_digest(tmp_path: Path) -> None:
    shard = tmp_path / "model.safetensors"
    shard.write_bytes(b"before")
    seen = SourceFile.look_at(shard, is_weights=True)
    assert seen.identity(hashed=True).sha256 == hashlib.sha256(b"before").hexdigest()
    shard.write_bytes(b"after it")
    assert seen.identity(hashed=True).sha256 is None


def test_show(checkpoint_of: Checkpoints, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, _, (card,) = carded(checkpoint_of("llama3"), ["q4_k_m"], tmp_path)
    file = tmp_path / "q4_k_m.gguf"
    assert main(["show", str(file)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "no card"
    write_card(card, file)
    assert main(["show", str(file)]) == 0
    text = capsys.readouterr().out
    for expected in ("llama", "q6_K", "chat template yes", card.file.sha256, "largest relative errors"):
        assert expected in text
    assert "NOT THIS FILE'S" not in text
    assert main(["show", str(file), "--format", "json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert decode_card(json.dumps(shown["card"]), "show") == card
    assert (shown["card_from"], shown["problem"]) == ("q4_k_m.gguf.card.json", None)
    assert shown["file"]["bytes"] == file.stat().st_size
    assert shown["file"]["tokens"] == len(read_header(file).metadata["tokenizer.ggml.tokens"])
    embed_card(card, file)
    assert main(["show", str(file)]) == 0
    assert "card, from the file itself" in capsys.readouterr().out


def test_show_says_what_is_wrong(
    checkpoint_of: Checkpoints, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, _, (q8, _) = carded(checkpoint_of("llama3"), ["q8_0", "q4_0"], tmp_path)
    file = tmp_path / "q4_0.gguf"
    write_card(q8, file)
    assert main(["show", str(file)]) == 0
    assert "NOT THIS FILE'S: the card is of a file of" in capsys.readouterr().out
    card_path(file).write_text("{}")
    assert main(["show", str(file)]) == 0
    assert "no usable card" in capsys.readouterr().out
    file.write_bytes(file.read_bytes()[:1000])
    assert main(["show", str(file)]) == 3
    assert main(["show", str(tmp_path / "nothing.gguf")]) == 2


def test_a_card_is_shown_without_llama_cpp() -> None:
    command = [sys.executable, "-P", "-c", "import sys, app.cli.show; print(*sys.modules)"]
    modules = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, timeout=60).stdout.split()
    assert not {"numpy", "llama_cpp"} & {name.partition(".")[0] for name in modules}


def test_mxfp4_that_is_moved_has_lost_nothing(tmp_path: Path) -> None:
    source = packed(tmp_path)
    _, _, (card, eight) = carded(source, ["mxfp4_moe", "q8_0"], tmp_path, allow_requantize=True)
    moved = {tensor.name: tensor.relative_error for tensor in card.tensors if tensor.type == "mxfp4"}
    assert moved
    assert set(moved.values()) == {0.0}
    again = {tensor.name: tensor.relative_error for tensor in eight.tensors if tensor.name in moved}
    assert all(error is not None and 0 < error < 0.02 for error in again.values())
