"""What can't be quantized gets an error that names the culprit, the right exit code, and leaves nothing behind."""

from __future__ import annotations

import json
import math
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from app.errors import (
    ArchitectureError,
    BadInputError,
    CheckpointError,
    PestleError,
    StorageError,
    TokenizerError,
    UsageError,
    VerificationError,
)
from quantize import target
from quantize.checkpoint import Checkpoint
from quantize.pipeline import prepare, quantize, run
from tests.quantize.checkpoints import Shape, make_checkpoint, write_raw_safetensors, write_safetensors

ROOT = Path(__file__).parents[2]
SMALL = Shape(layers=1, hidden=64, heads=2, key_heads=1, feed_forward=96)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "in" / "Model", SMALL)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "model.gguf"


def edit(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in (content | changes).items() if value is not ...}))


def tensor_place(shard: Path, name: str) -> tuple[int, dict[str, Any]]:
    """Return where a tensor's bytes begin in the file, and the header."""
    content = shard.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    return 8 + length + header[name]["data_offsets"][0], header


def no_safetensors(source: Path) -> None:
    (source / "model.safetensors").rename(source / "pytorch_model.bin")


def truncated(source: Path) -> None:
    shard = source / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])


def header_cut(source: Path) -> None:
    shard = source / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:40])


def index_names_missing_file(source: Path) -> None:
    index = {"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))


def index_leaves_the_folder(source: Path) -> None:
    index = {"weight_map": {"lm_head.weight": "../Model/model.safetensors"}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))


def index_names_a_tensor_too_many(source: Path) -> None:
    _, header = tensor_place(source / "model.safetensors", "lm_head.weight")
    names = [*header, "model.layers.9.self_attn.q_proj.weight"]
    index = {"weight_map": {name: "model.safetensors" for name in names if name != "__metadata__"}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))


def a_number(bits: int) -> Callable[[Path], None]:
    def change(source: Path) -> None:
        shard = source / "model.safetensors"
        place, _ = tensor_place(shard, "model.layers.0.mlp.up_proj.weight")
        content = bytearray(shard.read_bytes())
        content[place + 200 : place + 202] = struct.pack("<H", bits)
        shard.write_bytes(content)

    return change


def rename_tensor(old: str, new: str) -> Callable[[Path], None]:
    def change(source: Path) -> None:
        shard = source / "model.safetensors"
        content = shard.read_bytes()
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        write_raw_safetensors(
            shard, {new if name == old else name: v for name, v in header.items()}, content[8 + length :]
        )

    return change


def config(**changes: Any) -> Callable[[Path], None]:
    return lambda source: edit(source / "config.json", **changes)


def replace(name: str, content: bytes) -> Callable[[Path], None]:
    def change(source: Path) -> None:
        (source / name).write_bytes(content)

    return change


CASES: dict[str, tuple[Callable[[Path], Any], type[PestleError], str]] = {
    "no folder": (shutil.rmtree, BadInputError, "no such folder"),
    "no safetensors": (no_safetensors, CheckpointError, "no model.safetensors .*pytorch_model.bin"),
    "no config": (lambda s: (s / "config.json").unlink(), CheckpointError, "no config.json"),
    "config is no JSON": (replace("config.json", b"{"), CheckpointError, "config.json: not valid JSON"),
    "config is a list": (replace("config.json", b"[]"), CheckpointError, "config.json: a JSON object"),
    "unknown architecture": (
        config(architectures=["GPTNeoXForCausalLM"]),
        ArchitectureError,
        "GPTNeoXForCausalLM is not known; known ones: LlamaForCausalLM, MistralForCausalLM",
    ),
    "no architecture": (config(architectures=...), CheckpointError, "no `architectures`"),
    "no layers": (config(num_hidden_layers=0), CheckpointError, "num_hidden_layers is 0"),
    "layers as text": (config(num_hidden_layers="1"), CheckpointError, "num_hidden_layers is '1'"),
    "a billion layers": (config(num_hidden_layers=10**9), CheckpointError, "1000000000 layers"),
    "odd heads": (config(num_key_value_heads=3), CheckpointError, "no multiple of num_key_value_heads"),
    "unknown rope": (config(rope_scaling={"rope_type": "spiral"}), CheckpointError, "rope scaling 'spiral'"),
    "rope as a list": (config(rope_scaling={"type": ["yarn"]}), CheckpointError, r"rope scaling \['yarn'\] is not"),
    "rope without length": (
        config(rope_scaling={"type": "yarn", "factor": 4.0}),
        CheckpointError,
        "lacks original_max_position_embeddings",
    ),
    "an id out of range": (config(pad_token_id=1 << 40), CheckpointError, "padding_token_id cannot hold 1099511627776"),
    "endless rope": (config(rope_theta=math.inf), CheckpointError, "rope rope_theta is inf"),
    "quantized already": (config(quantization_config={"quant_method": "awq"}), CheckpointError, "quantized already"),
    "wrong shape": (
        config(hidden_size=128),
        CheckpointError,
        r"has shape \(.*64\); config.json asks for \(.*128\)",
    ),
    "wrong vocabulary": (config(vocab_size=999), CheckpointError, r"config.json asks for \(999, 64\)"),
    "more layers than tensors": (
        config(num_hidden_layers=2),
        CheckpointError,
        "missing: model.layers.1.input_layernorm.weight",
    ),
    "missing tensor": (
        rename_tensor("lm_head.weight", "lm_tail.weight"),
        CheckpointError,
        "missing: lm_head.weight",
    ),
    "truncated": (truncated, CheckpointError, "truncated: .* ends at byte"),
    "header cut": (header_cut, CheckpointError, "model.safetensors: truncated or no safetensors"),
    "index names a missing file": (
        index_names_missing_file,
        CheckpointError,
        "names the file model-00001-of-00002.safetensors, which is missing",
    ),
    "index leaves the folder": (index_leaves_the_folder, CheckpointError, "not the name of a safetensors file"),
    "index names a tensor too many": (
        index_names_a_tensor_too_many,
        CheckpointError,
        "lacks the tensor 'model.layers.9",
    ),
    "NaN": (a_number(0x7FC0), CheckpointError, "'model.layers.0.mlp.up_proj.weight' holds NaN or infinite"),
    "infinity": (a_number(0xFF80), CheckpointError, "'model.layers.0.mlp.up_proj.weight' holds NaN or infinite"),
    "no tokenizer": (
        lambda s: (s / "tokenizer.json").unlink(),
        TokenizerError,
        "neither tokenizer.model nor tokenizer.json",
    ),
    "damaged tokenizer.model": (replace("tokenizer.model", b"rubbish"), TokenizerError, "tokenizer.model: not a Sent"),
    "damaged README": (replace("README.md", b"---\na: [\n---\n"), CheckpointError, "README.md: its front matter"),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_names_the_culprit(case: str, source: Path, out: Path) -> None:
    damage, kind, message = CASES[case]
    damage(source)
    with pytest.raises(kind, match=message) as caught:
        quantize(source, "q8_0", out)
    assert caught.value.exit_code == 3
    assert list(out.parent.iterdir()) == []


def test_a_tensor_that_no_llama_has(source: Path, out: Path) -> None:
    shard = source / "extra.safetensors"
    write_safetensors(shard, {"model.vision.weight": ("F32", (1,), bytes(4))})
    shard.rename(source / "model-extra.safetensors")
    with pytest.raises(CheckpointError, match=r"does not have: model\.vision\.weight"):
        quantize(source, "q8_0", out)


def test_weights_too_large_for_f16(source: Path, out: Path) -> None:
    a_number(0x4900)(source)  # 524288
    with pytest.raises(CheckpointError, match=r"up_proj.weight' holds weights that are too large for f16"):
        quantize(source, "f16", out)
    assert list(out.parent.iterdir()) == []
    quantize(source, "bf16", out)


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, bytes(12), "4 bytes after the last tensor"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}, bytes(12), "'a' leaves a hole"),
        (
            {
                "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
                "b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]},
            },
            bytes(12),
            "'b' overlaps",
        ),
        ({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}, bytes(8), "'a' .* has 12 bytes; its offsets"),
        ({"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}, bytes(8), r"'a' has shape \(-2,\)"),
        ({"a": {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}}, bytes(8), "'a' has shape"),
        ({"a": {"dtype": "F31", "shape": [2], "data_offsets": [0, 8]}}, bytes(8), "unknown dtype 'F31'"),
        ({"a": {"dtype": "F32", "shape": [2]}}, bytes(8), "entry of 'a' is damaged"),
        ({"a": {"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]}}, bytes(8), "unknown dtype"),
        ({"a": 7}, b"", "entry of 'a' is damaged"),
        (b'{"a": 1, "a": 2}', b"", "'a' appears twice"),
        (b"[]", b"", "not a JSON object"),
        (b"[" * 100_000, b"", "header is damaged"),
        (b"\xff\xfe{", b"", "header is damaged"),
    ],
)
def test_damaged_safetensors(header: Any, data: bytes, message: str, tmp_path: Path) -> None:
    write_raw_safetensors(tmp_path / "model.safetensors", header, data)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(tmp_path)


def test_a_header_longer_than_the_file(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes((1 << 62).to_bytes(8, "little") + b"{}")
    with pytest.raises(CheckpointError, match="truncated or no safetensors"):
        Checkpoint.open(tmp_path)


def test_the_same_tensor_in_two_shards(tmp_path: Path) -> None:
    for name in ("model-1.safetensors", "model-2.safetensors"):
        write_safetensors(tmp_path / name, {"a": ("F32", (1,), bytes(4))})
    with pytest.raises(CheckpointError, match=r"model-2.safetensors: the tensor 'a' is also in model-1.safetensors"):
        Checkpoint.open(tmp_path)


def test_an_unknown_type_lists_the_known_ones(source: Path, out: Path) -> None:
    with pytest.raises(UsageError, match=r"unknown type 'q4_9'; known types: q8_0, q6_k, q5_k_m, .*, bf16$"):
        quantize(source, "q4_9", out)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_an_input_is_never_overwritten(name: str, source: Path) -> None:
    before = (source / name).read_bytes()
    with pytest.raises(UsageError, match=f"{name}: is a file of the model itself"):
        quantize(source, "q8_0", source / name)
    (source / "link.gguf").symlink_to(source / name)
    with pytest.raises(UsageError, match="is a file of the model itself"):
        quantize(source, "q8_0", source / "link.gguf")
    assert (source / name).read_bytes() == before


def test_out_is_a_folder(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="a folder; --out names the file"):
        quantize(source, "q8_0", tmp_path)


def test_out_in_no_folder(source: Path, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="nowhere: no such folder") as caught:
        quantize(source, "q8_0", tmp_path / "nowhere" / "model.gguf")
    assert caught.value.exit_code == 4


@pytest.mark.skipif(sys.platform != "linux", reason="needs a folder that even root can't write to")
def test_out_where_nobody_may_write(source: Path) -> None:
    with pytest.raises(StorageError, match="/sys: cannot write model"):
        quantize(source, "q8_0", Path("/sys/model.gguf"))


def test_a_full_disk_is_known_at_once(source: Path, out: Path) -> None:
    needed = prepare(source, "bf16").plan.file_size
    script = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)); "
        "from quantize.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", script, str(source), "--type", "bf16", "--out", str(out)]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert finished.returncode == 4, finished.stderr
    assert f"{out.parent}: no room for model.gguf: {needed} bytes are needed" in finished.stderr
    assert list(out.parent.iterdir()) == []


def test_what_was_not_planned_is_not_published(source: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = prepare(source, "q8_0")
    real = target.verify

    def damage_first(path: Path, *arguments: Any) -> None:
        with path.open("r+b") as file:
            file.seek(len(prepared.plan.header) + 64)
            file.write(b"\x55" * 8)
        real(path, *arguments)

    monkeypatch.setattr(target, "verify", damage_first)
    out.write_bytes(b"the old file")
    with pytest.raises(VerificationError, match="differ from those that were written") as caught:
        run(prepared, out)
    assert caught.value.exit_code == 5
    assert out.read_bytes() == b"the old file"
    assert list(out.parent.iterdir()) == [out]


NUMBERS = st.one_of(st.integers(-2, 300), st.integers(), st.floats(), st.booleans(), st.none(), st.text(max_size=3))
VALUES = st.one_of(NUMBERS, st.lists(NUMBERS, max_size=2), st.dictionaries(st.text(max_size=9), NUMBERS, max_size=2))
FIELDS = st.sampled_from(
    ["architectures", "num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim",
     "intermediate_size", "vocab_size", "max_position_embeddings", "rms_norm_eps", "rope_theta", "rope_scaling",
     "rope_parameters", "tie_word_embeddings", "attention_bias", "model_type", "bos_token_id", "_name_or_path"]
)  # fmt: skip


@pytest.fixture(scope="module")
def changing_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("changing") / "Model", SMALL)


@settings(max_examples=200, deadline=None)
@given(changes=st.dictionaries(FIELDS, VALUES, min_size=1, max_size=3))
def test_no_config_ends_in_a_traceback(changing_source: Path, changes: dict[str, Any]) -> None:
    original = (changing_source / "config.json").read_text()
    try:
        edit(changing_source / "config.json", **changes)
        prepare(changing_source, "bf16")
    except BadInputError as error:
        assert len(error.message) > 20  # noqa: PT017 - some changes are harmless
    finally:
        (changing_source / "config.json").write_text(original)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_safetensors_header_ends_in_a_traceback(tmp_path: Path, data: st.DataObject) -> None:
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    entry |= data.draw(st.dictionaries(st.sampled_from(list(entry)), VALUES, max_size=2))
    write_raw_safetensors(tmp_path / "model.safetensors", {"a": entry}, bytes(8))
    try:
        Checkpoint.open(tmp_path)
    except CheckpointError as error:
        assert "model.safetensors" in error.message  # noqa: PT017 - some changes are harmless
