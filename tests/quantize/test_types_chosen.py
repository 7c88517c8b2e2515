"""Types that the user chooses for single tensors: what llama-quantize makes of the same flags."""

from __future__ import annotations

from pathlib import Path

import pytest

from app.errors import ModelFileError, UsageError
from app.llama import quantizer
from app.llama.quantizer import Choices
from app.models.gguf import read_header
from app.models.gguf_types import TENSOR_TYPE_NUMBERS
from quantize.cli import main
from quantize.pipeline import prepare, quantize
from quantize.recipe import ENCODED_TYPES, NEEDS_IMPORTANCE, RECIPES, Overrides, override
from tests.quantize.checkpoints import Shape, make_checkpoint

UNTIED = Shape(layers=2, hidden=256, heads=4, key_heads=1, feed_forward=256)
TIED = Shape(layers=2, hidden=96, heads=3, key_heads=3, feed_forward=128, tied=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the checkpoints `untied` and `tied`, and their bf16 files."""
    folder = tmp_path_factory.mktemp("chosen")
    for name, shape in (("untied", UNTIED), ("tied", TIED)):
        quantize(make_checkpoint(folder / name, shape), "bf16", folder / f"{name}.gguf")
    return folder


@pytest.mark.parametrize(
    ("checkpoint", "recipe", "patterns", "output", "embedding"),
    [
        ("untied", "q4_k_m", [r"blk.*.ffn_down=q6_k"], None, None),
        ("untied", "q8_0", [r"blk\.1\.attn_(q|k)=Q4_0", r"attn=iq4_nl", "ffn_up=f16", "ffn_gate=f32"], "q5_1", "bf16"),
        ("untied", "mxfp4_moe", ["ffn_up=mxfp4", "ffn_gate=iq3_s", "ffn_down=tq2_0"], "f32", "q2_k"),
        ("tied", "q4_0", ["ffn_down=q6_k"], "q5_0", None),  # 128 is no multiple of 256: it falls back to q8_0
        ("tied", "q4_k_m", [], "q4_1", "q5_1"),
        ("tied", "q4_k_m", ["token_embd=f16"], None, None),
    ],
)
def test_the_file_is_llama_quantizes(
    checkpoint: str, recipe: str, patterns: list[str], output: str | None, embedding: str | None,
    folder: Path, tmp_path: Path,
) -> None:  # fmt: skip
    flags = [flag for pattern in patterns for flag in ("--tensor-type", pattern)]
    flags += ["--output-tensor-type", output] if output else []
    flags += ["--token-embedding-type", embedding] if embedding else []
    ours, theirs = tmp_path / "ours.gguf", tmp_path / "theirs.gguf"
    command = [str(folder / checkpoint), "--type", recipe, "--out", str(ours), "--format", "quiet"]
    assert main(command + flags) == 0
    number = {name: TENSOR_TYPE_NUMBERS[full] for name, full in ENCODED_TYPES.items()}
    pairs = [pattern.lower().split("=") for pattern in patterns]
    choices = Choices(
        tuple((pattern, number[name]) for pattern, name in pairs),
        number[output] if output else None,
        number[embedding] if embedding else None,
    )
    quantizer.quantize_file(folder / f"{checkpoint}.gguf", theirs, RECIPES[recipe].file_type, choices, threads=1)
    chosen, expected = ([(t.name, t.type_name) for t in read_header(path).tensors] for path in (ours, theirs))
    assert chosen == expected
    assert ours.read_bytes() == theirs.read_bytes()


def test_the_issues_example_reaches_every_ffn_down(folder: Path) -> None:
    chosen = prepare(folder / "untied", "q4_0", Overrides((override("blk.*.ffn_down=q6_k"),))).plan
    assert [t.spec.name for t in chosen.tensors if t.type_name == "q6_K"] == [
        "output.weight", "blk.0.ffn_down.weight", "blk.1.ffn_down.weight",
    ]  # fmt: skip


@pytest.mark.parametrize("name", sorted(set(ENCODED_TYPES) - NEEDS_IMPORTANCE))
def test_every_tensor_type_can_be_chosen(name: str, folder: Path, tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours.gguf", tmp_path / "theirs.gguf"
    quantize(folder / "untied", "q8_0", ours, overrides=Overrides((override(f"attn_v={name}"),)))
    choices = Choices((("attn_v", TENSOR_TYPE_NUMBERS[ENCODED_TYPES[name]]),))
    quantizer.quantize_file(folder / "untied.gguf", theirs, RECIPES["q8_0"].file_type, choices, threads=1)
    assert ours.read_bytes() == theirs.read_bytes()
    assert ENCODED_TYPES[name] in {tensor.type_name for tensor in read_header(ours).tensors}


def test_patterns() -> None:
    assert override("FFN_down=Q6_K") == ("ffn_down", "q6_K")
    assert override("(?=blk)x=f16") == ("(?=blk)x", "f16")
    assert override("*.ffn_?own=q4_0") == (r"^.*\.ffn_.own(\.weight)?$", "q4_0")


def test_a_shell_pattern_is_of_the_whole_name(folder: Path) -> None:
    assert quantizer.find_tensors(folder / "tied.gguf", override("*.attn_v=f32")[0]) == [
        "blk.0.attn_v.weight", "blk.1.attn_v.weight",
    ]  # fmt: skip
    assert quantizer.find_tensors(folder / "tied.gguf", override("?.attn_v=f32")[0]) == []


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--tensor-type", "ffn_down"], "'ffn_down' is not PATTERN=TYPE"),
        (["--tensor-type", "=q8_0"], "'=q8_0' is not PATTERN=TYPE"),
        (["--tensor-type", "ffn_down=q9"], "unknown tensor type 'q9'; known types: f32, f16, q4_0,"),
        (["--tensor-type", "ffn_down=q8_1"], "unknown tensor type 'q8_1'"),
        (["--tensor-type", "ffn_dwon=q8_0"], "no tensor that can be quantized has a name with 'ffn_dwon'"),
        (["--tensor-type", "attn_norm=q8_0"], "no tensor that can be quantized has a name with 'attn_norm'"),
        (["--tensor-type", f"{'(' * 2000}=q8_0"], "longer than 1000"),
        (["--output-tensor-type", "q7"], "--output-tensor-type: unknown tensor type 'q7'"),
        (["--token-embedding-type", "q6_K"], "token_embd.weight cannot be q6_K: its rows of 96 are no multiple of 256"),
    ],
)
def test_impossible_choices(flags: list[str], complaint: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(folder / "tied"), "--type", "q8_0", "--dry-run", *flags]) == 2
    assert complaint in capsys.readouterr().err


def test_a_broken_expression_is_told(folder: Path) -> None:
    with pytest.raises(ModelFileError, match="cannot quantize this model"):
        prepare(folder / "tied", "q8_0", Overrides((("attn_(q", "q4_0"),)))


def test_unquantized_files_take_no_overrides(folder: Path) -> None:
    with pytest.raises(UsageError, match="in quantized files only, not in f16"):
        prepare(folder / "tied", "f16", Overrides(output="q8_0"))
