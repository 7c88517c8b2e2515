"""Upstream's two steps, to compare and measure against: convert_hf_to_gguf.py, and llama-quantize.

The converter's environment is made on first use, outside the repository (in Pestle's cache folder), from the source of
the llama-cpp-python release that is installed here, so that both sides are the same llama.cpp. Variables name what is
there already: PESTLE_LLAMA_CPP (llama.cpp's source folder), PESTLE_ORACLE_PYTHON (a Python with torch, transformers).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from app.config import ServeSettings, cache_folder

REQUIREMENTS = (
    "torch>=2.6",
    "transformers==4.57.6",  # what llama.cpp's requirements/requirements-convert_hf_to_gguf.txt pins
    "numpy~=2.2.6",
    "sentencepiece>=0.1.98,<0.2.1",  # later ones need protobuf 5
    "protobuf>=4.21,<5",
    "safetensors",
    "pyyaml",
    "tqdm",
    "requests",
)
FILE_TYPES = {  # llama_ftype
    "f32": 0, "bf16": 32, "f16": 1, "q8_0": 7, "q6_k": 18, "q5_k_m": 17, "q5_k_s": 16, "q5_1": 9, "q5_0": 8,
    "q4_k_m": 15, "q4_k_s": 14, "q4_1": 3, "q4_0": 2, "iq4_nl": 25, "iq4_xs": 30, "q3_k_m": 12, "q2_k": 10,
    "mxfp4_moe": 38,
}  # fmt: skip
# the matrix of the oracle when no type is asked for
MATRIX_TYPES = ("bf16", "f16", "q8_0", "q4_0", "q4_k_s", "q4_k_m", "q5_k_m", "q6_k", "iq4_nl", "iq4_xs")
CONVERTED_TYPES = ("f32", "f16", "bf16")  # which the converter writes by itself

# Gives the converter the pre-tokenizer's name where its hash of one string cannot know it (a truncated vocabulary).
_CONVERT_WITH_NAME = """
import runpy, sys
vendor, name = sys.argv[1:3]
sys.path[:0] = [vendor, vendor + "/gguf-py"]
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda self, tokenizer: name
sys.argv = [vendor + "/convert_hf_to_gguf.py", *sys.argv[3:]]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
_QUANTIZE = """
import sys
from pathlib import Path
from app.llama.quantizer import quantize_file
quantize_file(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), threads=int(sys.argv[4]))
"""


class UpstreamError(Exception):
    """Upstream's side cannot be set up, or one of its steps failed; the message has its last lines."""


@dataclass(frozen=True)
class Upstream:
    """Where upstream's programs are."""

    python: Path
    llama_cpp: Path

    def convert_command(
        self, checkpoint: Path, out: Path, *, out_type: str = "bf16", pre_tokenizer: str | None = None
    ) -> list[str]:
        """Return the command of the first step: safetensors → GGUF of a 16-bit type."""
        arguments = [str(checkpoint), "--outtype", out_type, "--outfile", str(out)]
        if pre_tokenizer:
            return [str(self.python), "-c", _CONVERT_WITH_NAME, str(self.llama_cpp), pre_tokenizer, *arguments]
        return [str(self.python), str(self.llama_cpp / "convert_hf_to_gguf.py"), *arguments]

    def quantize_command(self, source: Path, out: Path, type_name: str, threads: int) -> list[str]:
        """Return the command of the second step, with the installed library: BF16 GGUF → the type asked for."""
        arguments = [str(source), str(out), str(FILE_TYPES[type_name]), str(threads)]
        return [sys.executable, "-P", "-c", _QUANTIZE, *arguments]

    def environment(self) -> dict[str, str]:
        """Return the variables that its commands run with: never online."""
        offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
        return {**os.environ, **offline, "PYTHONPATH": str(self.llama_cpp / "gguf-py")}

    def run(self, command: list[str]) -> None:
        """Run one of its commands to the end."""
        result = subprocess.run(command, env=self.environment(), capture_output=True, text=True, check=False)
        if result.returncode:
            last = "\n".join((result.stdout + result.stderr).strip().splitlines()[-8:])
            raise UpstreamError(f"{command[0]} ended with {result.returncode}:\n{last}")

    def versions(self) -> dict[str, str]:
        """Return the versions of the packages that decide over the converter's result."""
        code = (
            "import json, platform; from importlib.metadata import version;"
            "print(json.dumps({'python': platform.python_version()}"
            " | {n: version(n) for n in ('torch', 'transformers', 'tokenizers', 'numpy', 'sentencepiece')}))"
        )
        finished = subprocess.run([str(self.python), "-c", code], capture_output=True, text=True, check=True)
        versions: dict[str, str] = json.loads(finished.stdout)
        return versions


def find_upstream() -> Upstream:
    """Return upstream's programs; downloads and installs what the variables do not name."""
    llama_cpp = find_source()
    python = Path(os.environ.get("PESTLE_ORACLE_PYTHON") or _environment(_folder()))
    if not python.is_file():
        raise UpstreamError(f"PESTLE_ORACLE_PYTHON: no such file: {python}")
    return Upstream(python, llama_cpp)


def find_source() -> Path:
    """Return llama.cpp's source folder; downloads it if no variable names it."""
    llama_cpp = Path(os.environ.get("PESTLE_LLAMA_CPP") or _source(_folder()))
    if not (llama_cpp / "convert_hf_to_gguf.py").is_file():
        raise UpstreamError(f"PESTLE_LLAMA_CPP: no convert_hf_to_gguf.py in {llama_cpp}")
    return llama_cpp


def _folder() -> Path:
    return cache_folder(ServeSettings(cache_dir=os.environ.get("LLM_CACHE_DIR", ""))) / "oracle"


def _source(folder: Path) -> Path:
    release = f"llama_cpp_python-{version('llama-cpp-python')}"
    target = folder / release
    if not target.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        _say(f"downloading the source of {release}")
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            requirement = release.replace("-", "==").replace("_", "-")
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
            _checked([*command, "--dest", temporary, requirement])
            with tarfile.open(next(Path(temporary).glob("*.tar.gz"))) as archive:
                archive.extractall(temporary, filter="data")
            (Path(temporary) / release).rename(target)
    return target / "vendor" / "llama.cpp"


def _environment(folder: Path) -> Path:
    target = folder / "venv"
    python = target / "bin" / "python"
    marker = target / "requirements.txt"
    wanted = "\n".join(REQUIREMENTS)
    if not marker.is_file() or marker.read_text(encoding="utf-8") != wanted:
        _say(f"making upstream's environment in {target} (torch: some minutes)")
        _checked([sys.executable, "-m", "venv", "--clear", str(target)])
        _checked([str(python), "-m", "pip", "install", "--quiet", *REQUIREMENTS])
        marker.write_text(wanted, encoding="utf-8")
    return python


def _checked(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UpstreamError(f"{' '.join(command[:5])} ... failed: {reason}")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
