"""What of quantized checkpoints cannot be read gets an error that names the field or the stored tensor."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from app.errors import CheckpointError
from quantize.pipeline import quantize
from tests.quantize.checkpoints import write_raw_safetensors
from tests.quantize.quantized import Make, set_settings


def settings(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"] |= changes
        (folder / "config.json").write_text(json.dumps(config))

    return change


def groups(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"]["config_groups"]["group_0"]["weights"] |= changes
        (folder / "config.json").write_text(json.dumps(config))

    return change


def tensor(name: str, *, gone: bool = False, data: bytes = b"", **changes: Any) -> Callable[[Path], None]:
    """Change a layer's tensor: its entry in the header, the first bytes of its content, or its being there."""

    def change(folder: Path) -> None:
        shard = folder / "model.safetensors"
        content = bytearray(shard.read_bytes())
        start = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:start])
        found = f"model.layers.0.{name}"
        entry = header.pop(found)
        begin = start + entry["data_offsets"][0]
        content[begin : begin + len(data)] = data
        header[found.rpartition(".")[0] + ".gone" if gone else found] = entry | changes
        write_raw_safetensors(shard, header, bytes(content[start:]))

    return change


UP, INF, NAN = "mlp.up_proj", np.float32(np.inf).tobytes(), np.float32(np.nan).tobytes()
BAD: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "AWQ": ("gptq 4", settings(quant_method="awq"), "AWQ packs .*give the revision of the model that is not quantized"),
    "bitsandbytes": ("gptq 4", settings(quant_method="bitsandbytes"), "bitsandbytes .*not quantized"),
    "unknown": ("gptq 4", settings(quant_method="quip#"), "`quant_method` 'quip#' is not read; .*gptq"),
    "no method": ("gptq 4", settings(quant_method=None), "`quant_method` None is not read"),
    "3 bits": ("gptq 4", settings(bits=3), "bits is 3; of GPTQ's, 2, 4, 8 are read"),
    "marlin": ("gptq 4", settings(checkpoint_format="marlin"), "checkpoint_format is 'marlin'"),
    "no qzeros": ("gptq 4", tensor(f"{UP}.qzeros", gone=True), rf"{UP}.qzeros' is missing; 'model.*qweight' belongs"),
    "GPTQ shapes": ("gptq 4", tensor(f"{UP}.scales", shape=[4, 96]), rf"{UP}.scales' is F16 of shape \(4, 96\)"),
    "GPTQ scale": ("gptq 4", tensor(f"{UP}.scales", data=b"\0\x7c"), rf"{UP}.scales' holds NaN or infinite"),
    "GPTQ groups": ("gptq 4", tensor(f"{UP}.g_idx", data=b"\2\0\0\0"), rf"{UP}.g_idx' names groups from 0 to 2; .* 2"),
    "GPTQ group < 0": ("gptq 4", tensor(f"{UP}.g_idx", data=b"\xff" * 4), rf"{UP}.g_idx' names groups from -1 to"),
    "nvfp4": ("packed int4", settings(format="nvfp4-pack-quantized"), "the format 'nvfp4-pack-quantized' is not read"),
    "no groups": ("packed int4", settings(config_groups=None), "config_groups is None"),
    "group size": ("packed int4", groups(group_size="x"), "group_size is 'x'"),
    "other group size": ("packed int4", groups(group_size=64), "weight_packed' .* fits none of config.json's groups"),
    "bits of levels": ("packed int4", groups(num_bits=40), "num_bits is 40; 1 to 8"),
    "transformed": ("packed int4", settings(transform_config={"config_groups": {"R1": {}}}), "transformed or sparse"),
    "sparse": ("packed int4", settings(sparsity_config={"format": "sparse-24-bitmask"}), "transformed or sparse"),
    "other shape": (
        "packed int4",
        tensor(f"{UP}.weight_shape", data=b"\1\0\0\0"),
        rf"{UP}.weight_shape' says \(1, 128",
    ),
    "order": (
        "packed int4 shuffled",
        tensor(f"{UP}.weight_g_idx", data=b"\x09\0\0\0"),
        r"names groups from 0 to 9; .* 4",
    ),
    "no scale": ("packed int4", tensor(f"{UP}.weight_scale", gone=True), rf"{UP}.weight_scale' is missing"),
    "no fp8 scale": (
        "fp8 blocks",
        tensor(f"{UP}.weight_scale_inv", gone=True),
        rf"{UP}.weight' is F8_E4M3, but has no",
    ),
    "fp8 blocks": ("fp8 blocks", settings(weight_block_size=[48, 40]), r"weight_scale_inv' has the shape .*\(48, 40\)"),
    "fp8 block": ("fp8 blocks", settings(weight_block_size=128), "weight_block_size is 128; two positive sizes"),
    "fp8 scale": (
        "fp8 blocks",
        tensor(f"{UP}.weight_scale_inv", data=INF),
        rf"{UP}.weight_scale_inv' holds NaN or inf",
    ),
    "fp8 weight": ("fp8 blocks", tensor(f"{UP}.weight", data=b"\x7f"), rf"{UP}.weight' holds NaN or infinite weights"),
    "modelopt": ("modelopt fp8", settings(quant_algo="NVFP4"), "quant_algo is 'NVFP4'; of modelopt's, FP8 is read"),
    "mxfp4 shapes": ("mxfp4", tensor(f"{UP}.weight_scale", shape=[96, 8]), rf"{UP}.weight_packed' .* is not MXFP4"),
    "mxfp4 scale": ("mxfp4", tensor(f"{UP}.weight_scale", data=b"\xff"), rf"{UP}.weight_scale' holds NaN or infinite"),
    "not an object": ("gptq 4", lambda folder: set_settings(folder, ["gptq"]), r"quantization_config is \['gptq'\]"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str, made: Make, tmp_path: Path) -> None:
    method, damage, message = BAD[case]
    shutil.copytree(made(method)[0], tmp_path / "Tiny")
    damage(tmp_path / "Tiny")
    with pytest.raises(CheckpointError, match=message):
        quantize(tmp_path / "Tiny", "q8_0", tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()
