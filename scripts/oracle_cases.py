"""The checkpoints that scripts/oracle.py compares: real ones, and small random ones. A new one is a line."""

from __future__ import annotations

import importlib
import subprocess
import sys
import threading
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from family_checkpoint import FAMILIES, write_family
from quantized_checkpoint import METHODS, quantize_checkpoint
from rebuild_default_checkpoint import default_folder

if TYPE_CHECKING:
    from upstream import Upstream

SCRIPTS = Path(__file__).parent
DEFAULT = "SmolLM2-135M-Instruct"
_making_plain = threading.Lock()


@dataclass(frozen=True)
class Case:
    """A checkpoint to compare: how it is made, and the pre-tokenizer's name if upstream needs it.

    A `shape` of random_checkpoint.py, or a `family` of checkpoint_families; `quantized` by a method of
    quantized_checkpoint.py. `vocabulary` is that of the `ggml-vocab-NAME.gguf`, None SmolLM2's; `stands_in` says that
    it is not the family's own. `requantize` lets both sides quantize again what is quantized already.
    """

    what: str
    shape: str = ""
    family: str = ""
    vocabulary: str | None = None
    stands_in: bool = False
    flags: tuple[str, ...] = ()
    pre_tokenizer: str | None = None
    quantized: str = ""
    requantize: bool = False
    own_vocabulary: bool = False

    @property
    def vocabulary_name(self) -> str:
        """Whose vocabulary it has, for the table."""
        if self.own_vocabulary:
            return "its own"
        if self.vocabulary is None:
            return "SmolLM2's"
        return f"`{self.vocabulary}`" + (", not its own" if self.stands_in else "")


CASES = {
    DEFAULT: Case("the rebuilt default, bf16, tied embeddings, byte-level BPE", own_vocabulary=True),
    "tiny-llama3": Case(
        "Llama 3: rope scaling, grouped queries, untied, its vocabulary", "tiny-llama3", vocabulary="llama-bpe"
    ),
    "tiny-llama3-instruct": Case(
        "Llama 3 Instruct: chat template in a file of its own, list of EOS tokens, no head_dim",
        "tiny-llama3-instruct", vocabulary="llama-bpe",
    ),
    "tiny-llama3-sharded": Case("the same shape in three shards", "tiny-llama3", flags=("--shards", "3")),
    "tiny-llama3-f16": Case("f16 source", "tiny-llama3", flags=("--dtype", "f16")),
    "tiny-llama3-f32": Case(
        "f32 source; truncated vocabulary, whose pre-tokenizer upstream must be told", "tiny-llama3",
        flags=("--dtype", "f32", "--truncate-vocab", "4000"), pre_tokenizer="smollm",
    ),
    "tiny-mistral": Case(
        "Mistral: heads wider than hidden / heads, SentencePiece", "tiny-mistral", vocabulary="llama-spm",
        stands_in=True,
    ),
    "tiny-llama-spm": Case(
        "Llama 2: every head has its own key, SentencePiece", "tiny-llama-spm", vocabulary="llama-spm"
    ),
}  # fmt: skip


def _family_case(name: str) -> Case:
    family = importlib.import_module(f"checkpoint_families.{name}")
    return Case(
        family.WHAT,
        family=name,
        vocabulary=getattr(family, "VOCABULARY", None),
        stands_in=getattr(family, "STANDS_IN", False),
        pre_tokenizer=family.PRE,
        requantize=getattr(family, "REQUANTIZE", False),
        own_vocabulary=hasattr(family, "write_checkpoint"),
    )


CASES |= {f"tiny-{name}": _family_case(name) for name in FAMILIES}


def _quantized_case(method: str) -> Case:
    if "fp8" in method:  # blocks at the edges are smaller
        base = Case("", "tiny-llama3", flags=("--truncate-vocab", "4000"), pre_tokenizer="smollm")
    else:  # rows are multiples of a group
        base = Case("", "tiny-llama-spm", vocabulary="llama-spm")
    return replace(base, what=f"quantized already: {method}", quantized=method)


CASES |= {f"tiny-llama-{method}": _quantized_case(method) for method in METHODS}


def make_checkpoint(name: str, case: Case, upstream: Upstream, work: Path) -> Path:
    """Make the checkpoint's folder, or find it; returns its path. Upstream takes the model's name from the folder's."""
    if name == DEFAULT:
        _script("rebuild_default_checkpoint.py")
        return default_folder()
    folder = work / "checkpoints" / name
    if folder.exists():
        return folder
    if case.quantized:
        with _making_plain:  # several are made of the same
            plain = make_checkpoint(f"{case.shape}-plain", replace(case, quantized=""), upstream, work)
        quantize_checkpoint(plain, folder, case.quantized)
    elif case.family:
        write_family(folder, case.family, upstream)
    else:
        if case.vocabulary:
            vocabulary = ["--vocab", str(upstream.llama_cpp / "models" / f"ggml-vocab-{case.vocabulary}.gguf")]
        else:
            vocabulary = ["--vocab-from", str(default_folder())]
        _script("random_checkpoint.py", "--shape", case.shape, "--out", str(folder), *vocabulary, *case.flags)
    return folder


def _script(name: str, *arguments: str) -> None:
    subprocess.run([sys.executable, str(SCRIPTS / name), *arguments], check=True, capture_output=True, text=True)
