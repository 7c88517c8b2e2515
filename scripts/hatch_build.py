"""Adds the kernels of `quantize/native` when Pestle is installed; without a compiler it is installed without them.

The build back end calls this. It has no say in whether an installation succeeds: whatever goes wrong is a warning (pip
shows it with -v), and ggml quantizes instead, to the same bytes.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

NAME = "quantize/native/kernels.so"


class CustomBuildHook(BuildHookInterface[Any]):
    """Adds the library to a wheel, or to the tree if that is installed as it is."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile before the wheel is filled; `version` is "editable" or "standard"."""
        root = Path(self.root)
        in_tree = root / NAME
        target = in_tree if version == "editable" else Path(tempfile.mkdtemp(prefix="pestle-")) / in_tree.name
        command = [sys.executable, str(root / "scripts" / "compile_kernels.py"), str(target)]
        finished = subprocess.run(command, capture_output=True, text=True, check=False)
        if finished.returncode != 0:
            if version == "editable":
                in_tree.unlink(missing_ok=True)  # it may be of other sources
            self.app.display_warning(f"Pestle will quantize without kernels of its own: {finished.stderr}")
        elif version != "editable":
            build_data["force_include"][str(target)] = NAME
            build_data["pure_python"] = False
            platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
            build_data["tag"] = f"py3-none-{platform}"  # opened by ctypes: any Python will do
