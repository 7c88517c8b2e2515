"""Loads llama.cpp once per process, and keeps what it says.

llama.cpp explains its failures only in its log, so the last lines are kept here for the error that the user will see.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import functools
import importlib.util
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_KEPT_LINES = 200
_LEVEL_WARNING = 3
_LEVEL_CONTINUATION = 5  # GGML_LOG_LEVEL_CONT: goes on with the line before


class LogTail:
    """The last lines that llama.cpp logged; safe to use from its threads."""

    def __init__(self, lines: int = _KEPT_LINES) -> None:
        self._lines: collections.deque[tuple[int, str]] = collections.deque(maxlen=lines)
        self._captures: list[list[str]] = []
        self._lock = threading.Lock()

    def write(self, level: int, text: str) -> None:
        """Take a piece of log text at a ggml level (1 debug, 2 info, 3 warning, 4 error, 5 continuation)."""
        with self._lock:
            for pieces in self._captures:
                pieces.append(text)
            if level == _LEVEL_CONTINUATION and self._lines:
                last_level, last = self._lines.pop()
                self._lines.append((last_level, last + text))
            else:
                self._lines.append((level, text))

    def lines(self, minimum_level: int = 1) -> list[str]:
        """Return the kept lines of at least this level, oldest first."""
        with self._lock:
            return [text.rstrip("\n") for level, text in self._lines if level >= minimum_level and text.strip()]

    def summary(self, count: int = 8) -> str:
        """Return the last different lines that matter (warnings and errors, or any when there are none)."""
        lines = self.lines(minimum_level=_LEVEL_WARNING) or self.lines()
        return "\n".join(list(dict.fromkeys(line.strip() for line in lines))[-count:])

    def clear(self) -> None:
        """Forget everything, before a call whose own lines are wanted."""
        with self._lock:
            self._lines.clear()

    @contextlib.contextmanager
    def captured(self) -> Iterator[list[str]]:
        """Collect all the text that is logged meanwhile, however long; the pieces joined are the log, word for word."""
        pieces: list[str] = []
        with self._lock:
            self._captures.append(pieces)
        try:
            yield pieces
        finally:
            with self._lock:
                self._captures = [kept for kept in self._captures if kept is not pieces]


log_tail = LogTail()
_loading = threading.Lock()  # the first to need llama.cpp may be several threads at once


def _preload_libstdcxx() -> None:
    # CUDA builds linked with NCCL resolve C++ symbols to the wrong library when Python loads them, and crash in
    # std::regex; the system's libstdc++ must come first and be global.
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            ctypes.CDLL("libstdc++.so.6", mode=ctypes.RTLD_GLOBAL)


def _bindings() -> Any:
    # The package's own __init__ imports Jinja, multiprocessing and chat formats that nothing here uses: two thirds of
    # the start-up of each process. The bindings need none of it, so they are imported under an empty package.
    if "llama_cpp" in sys.modules:
        return importlib.import_module("llama_cpp.llama_cpp")
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None:
        raise ModuleNotFoundError("llama-cpp-python is not installed", name="llama_cpp")
    sys.modules["llama_cpp"] = importlib.util.module_from_spec(spec)
    try:
        return importlib.import_module("llama_cpp.llama_cpp")
    finally:
        del sys.modules["llama_cpp"]  # who imports the package later gets the real one


def load() -> Any:
    """Return the module `llama_cpp.llama_cpp` with its back ends initialised and its log captured in `log_tail`."""
    with _loading:
        return _load()


@functools.cache
def _load() -> Any:
    _preload_libstdcxx()
    os.environ.setdefault("GGML_NO_BACKTRACE", "1")
    llama_cpp = _bindings()
    llama_cpp.llama_log_set(_log_callback(llama_cpp), None)
    llama_cpp.llama_backend_init()
    return llama_cpp


@functools.cache
def _log_callback(llama_cpp: Any) -> Any:
    def keep(level: int, text: bytes, _user_data: Any) -> None:
        log_tail.write(level, text.decode("utf-8", "replace"))

    return llama_cpp.llama_log_callback(keep)  # cached: llama.cpp holds the pointer for as long as the process lives


@functools.cache
def ggml_base() -> ctypes.CDLL:
    """Open libggml-base, the library that holds the quantization kernels, beside the libllama that is in use."""
    return _open_beside_llama("ggml-base")


def ggml_base_path() -> Path:
    """Return the file of that library."""
    return _path_beside_llama("ggml-base")


@functools.cache
def ggml() -> ctypes.CDLL:
    """Open libggml, the library that knows the devices, beside the libllama that is in use."""
    return _open_beside_llama("ggml")


def _open_beside_llama(name: str) -> ctypes.CDLL:
    return ctypes.CDLL(str(_path_beside_llama(name)))


def _path_beside_llama(name: str) -> Path:
    llama_cpp = load()
    folder = Path(os.environ.get("LLAMA_CPP_LIB_PATH") or Path(llama_cpp.__file__).parent / "lib")
    pattern = {"darwin": f"lib{name}*.dylib", "win32": f"*{name}.dll"}.get(sys.platform, f"lib{name}.so*")
    found = sorted(folder.glob(pattern), key=lambda path: (len(path.name), path.name))
    if not found:
        raise OSError(f"no {pattern} in {folder}: llama-cpp-python is not installed as Pestle expects")
    return found[0]


def build_name() -> str:
    """Name the library build: version of llama-cpp-python and the CPU features it uses."""
    from importlib.metadata import version  # noqa: PLC0415 - only for the one caller that asks

    info: bytes = load().llama_print_system_info()
    return f"llama-cpp-python {version('llama-cpp-python')}; {info.decode().strip()}"
