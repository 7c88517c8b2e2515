"""What the fingerprint of a loaded model follows from."""

from __future__ import annotations

from pathlib import Path

import pytest

from app.messages import LoadModel
from app.worker.main import load


def fingerprint(path: Path, **settings: object) -> str:
    command = LoadModel(path=str(path), slots=2, context_length=256, threads=1, batch_size=64, device="cpu")
    changed = LoadModel(**{name: getattr(command, name) for name in command.__struct_fields__} | settings)  # type: ignore[arg-type]
    model, context, hello = load(changed)
    with model, context:
        return hello.fingerprint


@pytest.mark.parametrize(
    "settings",
    [
        {"slots": 3},
        {"context_length": 512},
        {"threads": 2},
        {"batch_size": 128},
        {"micro_batch_size": 32},
        {"flash_attention": "off"},
        {"kv_tokens": 512},
        {"gpu_layers": 3},
        {"slots": 1, "deterministic": True},
    ],
    ids=str,
)
def test_it_changes_with_what_answers_depend_on(default_model: Path, settings: dict[str, object]) -> None:
    assert fingerprint(default_model, **settings) != fingerprint(default_model)


def test_it_changes_with_the_file_and_with_nothing_else(default_model: Path, tmp_path: Path) -> None:
    copy = tmp_path / "another-name.gguf"
    content = bytearray(default_model.read_bytes())
    copy.write_bytes(content)
    assert fingerprint(copy) == fingerprint(default_model)
    content[-1] ^= 1
    copy.write_bytes(content)
    assert fingerprint(copy) != fingerprint(default_model)
