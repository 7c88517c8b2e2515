"""Added tokens are what transformers makes of them: tokenizer_config.json overrules tokenizer.json."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from app.models.gguf import read_header

SCRIPTS = Path(__file__).parents[2] / "scripts"
CONTROL, USER_DEFINED = 3, 4
FILE_SEPARATOR, START_OF_TURN = 5, 1  # <file_sep> does not look special, <|im_start|> does


@pytest.fixture(scope="module")
def checkpoint(default_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("added") / "tiny"
    flags = ["--shape", "tiny-llama3", "--vocab-from", str(default_checkpoint), "--truncate-vocab", "400"]
    command = [sys.executable, str(SCRIPTS / "random_checkpoint.py"), *flags, "--out", str(out)]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    return out


def set_special(folder: Path, *, tokenizer: bool, config: bool | None) -> None:
    """Say in both files whether <file_sep> and <|im_start|> are special; None: the second file does not list tokens."""
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    for entry in content["added_tokens"]:
        if entry["id"] in {FILE_SEPARATOR, START_OF_TURN}:
            entry["special"] = tokenizer
    path.write_text(json.dumps(content))
    path = folder / "tokenizer_config.json"
    content = json.loads(path.read_text())
    if config is None:
        content.pop("added_tokens_decoder", None)
    else:
        for token in (FILE_SEPARATOR, START_OF_TURN):
            content["added_tokens_decoder"][str(token)]["special"] = config
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("tokenizer", "config", "kind"),
    [(True, False, USER_DEFINED), (False, True, CONTROL), (False, None, USER_DEFINED), (True, None, CONTROL)],
)
def test_the_kind_of_an_added_token(
    checkpoint: Path, tmp_path: Path, tokenizer: bool, config: bool | None, kind: int
) -> None:
    folder = tmp_path / "tiny"
    folder.mkdir()
    for path in checkpoint.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    set_special(folder, tokenizer=tokenizer, config=config)
    out = tmp_path / "tiny.gguf"
    command = [sys.executable, "-P", "-m", "quantize", str(folder), "--type", "bf16", "--no-measure",
               "--out", str(out)]  # fmt: skip
    subprocess.run([*command, "--format", "quiet"], check=True, capture_output=True, timeout=60)
    types = read_header(out).metadata["tokenizer.ggml.token_type"]
    assert types[FILE_SEPARATOR] == kind
    assert types[START_OF_TURN] == CONTROL
