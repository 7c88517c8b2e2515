"""Runs one of our modules as a process of its own: what loads a model's file may end its process."""

from __future__ import annotations

import subprocess
import sys


def run_module(module: str, *arguments: str, silent: bool = False) -> int:
    """Run `python -P -m module` and return its exit code, negative if a signal ended it; `silent`: no standard output.

    It is asked to end when we are interrupted, and then has the time to clean up.
    """
    command = [sys.executable, "-P", "-m", module, *arguments]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL if silent else None) as process:  # noqa: S603 - no shell
        try:
            return process.wait()
        except BaseException:
            process.terminate()  # subprocess.run would kill it
            raise


def run_native(module: str, *arguments: str) -> int:
    """Run a module that computes with llama.cpp; returns its exit code, 3 when llama.cpp ended it, which is told."""
    exit_code = run_module(module, *arguments)
    if exit_code < 0:
        print(
            f"pestle: llama.cpp ended with signal {-exit_code}: a file is damaged, or memory ran out", file=sys.stderr
        )
        return 3
    return exit_code
