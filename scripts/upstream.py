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
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.config import ServeSettings, cache_folder

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

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
MATRIX_TYPES = ("bf16", "f16", "q8_0", "q4_0", "q4_k_s", "q4_k_m", "q5_k_m", "q6_k", "iq4_nl", "iq4_xs", "mxfp4_moe")
CONVERTED_TYPES = ("f32", "f16", "bf16")  # which the converter writes by itself

_QUANTIZE = """
import json, sys
from pathlib import Path
from app.llama.quantizer import quantize_file
source, threads, again, *targets = sys.argv[1:]
failures = {}
for number, target in zip(targets[::2], targets[1::2]):
    try:
        quantize_file(Path(source), Path(target), int(number), threads=int(threads), allow_requantize=again == "again")
    except Exception as error:
        failures[target] = f"{type(error).__name__}: {error}"
print(json.dumps(failures))
"""


class UpstreamError(Exception):
    """Upstream's side cannot be set up, or one of its steps failed; the message has its last lines."""


@dataclass(frozen=True)
class Upstream:
    """Where upstream's programs are."""

    python: Path
    llama_cpp: Path
    _free: list[subprocess.Popen[str]] = field(default_factory=list)

    def convert_command(self, checkpoint: Path, out: Path) -> list[str]:
        """Return the command of the first step: safetensors → GGUF in BF16."""
        script = self.llama_cpp / "convert_hf_to_gguf.py"
        return [str(self.python), str(script), str(checkpoint), "--outtype", "bf16", "--outfile", str(out)]

    def quantize_command(
        self, source: Path, outs: Mapping[str, Path], threads: int, *, requantize: bool = False
    ) -> list[str]:
        """Return the command of the second step, with the installed library: BF16 GGUF → the types asked for."""
        targets = [text for name, out in outs.items() for text in (str(FILE_TYPES[name]), str(out))]
        settings = [str(threads), "again" if requantize else ""]
        return [sys.executable, "-P", "-c", _QUANTIZE, str(source), *settings, *targets]

    def convert(self, jobs: Sequence[tuple[Path, str, Path]], pre_tokenizer: str | None = None) -> dict[Path, str]:
        """Do the first step for each (checkpoint, type, out), in one process. Returns the failures."""
        told = [[str(checkpoint), kind, str(out)] for checkpoint, kind, out in jobs]
        failures = self._ask({"do": "convert", "jobs": told, "pre_tokenizer": pre_tokenizer})
        return {Path(out): reason for out, reason in failures.items()}

    def save_model(self, folder: Path, dtype: str) -> None:
        """Let transformers write the random weights of a config.json, in torch's dtype of this name."""
        self._ask({"do": "save", "folder": str(folder), "dtype": dtype})

    def quantize(
        self, source: Path, outs: Mapping[str, Path], threads: int, *, requantize: bool = False
    ) -> dict[Path, str]:
        """Do the second step for each type → out, in one process. Returns the failures."""
        command = self.quantize_command(source, outs, threads, requantize=requantize)
        result = subprocess.run(command, env=self.environment(), capture_output=True, text=True, check=False)
        if result.returncode:
            reason = f"ended with {result.returncode}: {' '.join(result.stderr.strip().splitlines()[-1:])}"
            return dict.fromkeys(outs.values(), reason)
        told: dict[str, str] = json.loads(result.stdout.strip().splitlines()[-1])
        return {Path(out): reason for out, reason in told.items()}

    def _ask(self, task: dict[str, Any]) -> dict[str, str]:
        """Give a task to a worker that is free, or to a new one. Raises `UpstreamError` if it fails as a whole."""
        try:
            worker = self._free.pop()
        except IndexError:
            worker = self._started()
        assert worker.stdin is not None and worker.stdout is not None  # noqa: PT018 - both were asked for
        worker.stdin.write(f"{json.dumps(task)}\n")
        worker.stdin.flush()
        line = worker.stdout.readline()
        if not line:
            raise UpstreamError(f"{self.python} ended with {worker.wait()}; does it have torch and transformers?")
        self._free.append(worker)
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise UpstreamError(answer["error"])
        failures: dict[str, str] = answer["failures"]
        return failures

    def _started(self) -> subprocess.Popen[str]:
        command = [str(self.python), str(Path(__file__).with_name("upstream_worker.py")), str(self.llama_cpp)]
        return subprocess.Popen(  # it ends with its standard input
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            env=self.environment(),
        )  # fmt: skip

    def environment(self) -> dict[str, str]:
        """Return the variables that its commands run with: never online."""
        offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
        return {**os.environ, **offline, "PYTHONPATH": str(self.llama_cpp / "gguf-py")}

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
