"""Settings: a default, under a TOML file, under the environment (`LLM_<FLAG>`), under a flag.

Every setting is one field of `ServeSettings`; the flag, the variable, the TOML key and the help all come from there.
"""

from __future__ import annotations

import argparse
import os
import sys
import tomllib
import typing
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from app.errors import StorageError, UsageError

Device = Literal["auto", "cpu", "cuda", "metal"]
CacheType = Literal["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"]
Switch = Literal["auto", "on", "off"]
Speculate = Literal["off", "lookup"]
Pooling = Literal["auto", "mean", "cls", "last"]
Origin = Literal["default", "file", "environment", "flag"]


class ServeSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What `pestle serve` can be told."""

    model_path: Annotated[
        str, Meta(description="a GGUF file, or a folder of safetensors or a name on the Hub, to quantize first")
    ] = ""
    host: Annotated[str, Meta(description="address to listen on")] = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535, description="port to listen on; 0 takes a free one")] = 8080
    parallel: Annotated[int, Meta(ge=1, le=256, description="slots: sequences that are decoded together")] = 4
    ctx_size: Annotated[int, Meta(ge=0, le=10_000_000, description="tokens a slot holds; 0: what the model knows")] = (
        4096
    )
    threads: Annotated[int, Meta(ge=0, le=1024, description="threads that compute; 0: one a physical core")] = 0
    batch_size: Annotated[int, Meta(ge=32, le=16384, description="most tokens in one decode step")] = 512
    ubatch_size: Annotated[
        int, Meta(ge=0, le=16384, description="tokens that llama.cpp computes at once; 0: 512, or batch_size if less")
    ] = 0
    itl_target: Annotated[
        str,
        Meta(
            pattern=r"^(auto|[0-9]{1,6}(\.[0-9]{1,3})?(ms|s))$",
            examples=["auto", "100ms", "0.2s"],
            description="time that prompts may keep a stream waiting for its next token; auto: from measured steps",
        ),
    ] = "auto"
    kv_tokens: Annotated[
        int,
        Meta(ge=0, le=1_000_000_000, description="tokens of one KV cache for all slots; 0: each has its ctx_size"),
    ] = 0
    cache_ram: Annotated[
        int, Meta(ge=0, le=10_000_000, description="MiB of memory for prefixes that no slot holds any more; 0: none")
    ] = 512
    cache_disk: Annotated[
        int,
        Meta(ge=0, le=100_000_000, description="MiB of prefixes on disk, in cache_dir, for after a restart; 0: none"),
    ] = 0
    cache_type: Annotated[CacheType, Meta(description="type of the KV cache; quantized ones need flash attention")] = (
        "f16"
    )
    flash_attn: Annotated[Switch, Meta(description="flash attention")] = "auto"
    deterministic: Annotated[
        bool,
        Meta(description="equal requests get equal answers whatever else runs; one at a time, all computed anew"),
    ] = False
    speculate: Annotated[
        Speculate,
        Meta(description="guess next tokens, and compute several in one step; lookup: from the text so far"),
    ] = "lookup"
    draft_model: Annotated[
        str, Meta(description="a small GGUF with the same vocabulary, which guesses next tokens as well")
    ] = ""
    draft_tokens: Annotated[int, Meta(ge=1, le=31, description="most guesses of one sequence in a step")] = 15
    pooling: Annotated[
        Pooling,
        Meta(description="make embeddings, a text's from its tokens' in this way; auto: if and as the file says"),
    ] = "auto"
    queue: Annotated[int, Meta(ge=0, le=100_000, description="requests that may wait for a slot; more get a 429")] = 64
    request_timeout: Annotated[
        float, Meta(ge=0, le=604_800, description="seconds that a request may take, waiting included; 0: no limit")
    ] = 0.0
    unknown_fields: Annotated[
        Literal["refuse", "warn"],
        Meta(description="fields of a request that nobody knows; warn: left out, and named in a response header"),
    ] = "refuse"
    device: Annotated[Device, Meta(description="where to compute")] = "auto"
    gpu_layers: Annotated[int, Meta(ge=-1, le=10_000, description="layers on the GPU; -1: all")] = -1
    quantization: Annotated[str, Meta(description="type that a folder of safetensors is quantized to")] = "q8_0"
    cache_dir: Annotated[str, Meta(description="where quantized models are kept; empty: the platform's folder")] = ""
    drain_timeout: Annotated[
        float, Meta(ge=0, le=3600, description="seconds that streams get to finish on SIGTERM")
    ] = 8.0
    log_format: Annotated[Literal["auto", "human", "json"], Meta(description="auto: human on a terminal")] = "auto"
    log_level: Annotated[Literal["debug", "info", "warning", "error"], Meta(description="least level to log")] = "info"


class Resolved(msgspec.Struct, frozen=True):
    """Settings with the place that each value came from."""

    settings: ServeSettings
    origins: dict[str, Origin]


def flag_name(field: str) -> str:
    """Return the command-line flag of a field: `ctx_size` is `--ctx-size`."""
    return "--" + field.replace("_", "-")


def variable_name(field: str) -> str:
    """Return the environment variable of a field: `ctx_size` is `LLM_CTX_SIZE`."""
    return "LLM_" + field.upper()


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add one flag for each setting, and `--config`; a flag that isn't given stays absent from the namespace."""
    hints = typing.get_type_hints(ServeSettings, include_extras=True)
    for field in msgspec.structs.fields(ServeSettings):
        meta = next(m for m in typing.get_args(hints[field.name]) if isinstance(m, Meta))
        choices = typing.get_args(typing.get_args(hints[field.name])[0])
        name = variable_name(field.name)
        if isinstance(field.default, bool):
            parser.add_argument(
                flag_name(field.name),
                action=argparse.BooleanOptionalAction,
                default=argparse.SUPPRESS,
                help=f"{meta.description} (default: no; {name}=true)",
            )
            continue
        parser.add_argument(
            flag_name(field.name),
            metavar="|".join(choices) or field.name.split("_")[-1].upper(),
            default=argparse.SUPPRESS,
            help=f"{meta.description} (default: {field.default!s}; {name})".replace("(default: ;", "("),
        )
    parser.add_argument("--config", metavar="FILE", help="TOML file with the same names as keys (LLM_CONFIG)")


def resolve(flags: dict[str, str], environment: dict[str, str] | None = None, file: str | None = None) -> Resolved:
    """Merge the four sources.

    Raises UsageError that names the flag, variable or key whose value is wrong, StorageError for an unreadable file.
    """
    environment = dict(os.environ) if environment is None else environment
    file = file or environment.get("LLM_CONFIG")
    names = [field.name for field in msgspec.structs.fields(ServeSettings)]
    values: dict[str, Any] = {}
    origins: dict[str, Origin] = dict.fromkeys(names, "default")
    for key, value in (_read_toml(Path(file)) if file else {}).items():
        if key not in names:
            raise UsageError(f"{file}: unknown key {key!r}; known are {', '.join(names)}", param=key)
        values[key], origins[key] = _convert(key, value, f"{file}: key {key!r}", strict=True), "file"
    for name in names:
        if text := environment.get(variable_name(name)):
            values[name] = _convert(name, text, f"environment variable {variable_name(name)}", strict=False)
            origins[name] = "environment"
    for name, text in flags.items():
        values[name], origins[name] = _convert(name, text, flag_name(name), strict=False), "flag"
    return Resolved(ServeSettings(**values), origins)


def seconds(duration: str) -> float | None:
    """Return the seconds of `100ms` or `0.2s`; None of `auto`."""
    if duration == "auto":
        return None
    return float(duration[:-2]) / 1000 if duration.endswith("ms") else float(duration[:-1])


def cache_folder(settings: ServeSettings) -> Path:
    """Return the folder for quantized models: the setting's, or the platform's own place for caches."""
    if settings.cache_dir:
        return Path(settings.cache_dir).expanduser().absolute()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "pestle"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pestle"


def _convert(field: str, value: object, where: str, *, strict: bool) -> object:
    hint = typing.get_type_hints(ServeSettings, include_extras=True)[field]
    try:
        return msgspec.convert(value, hint, strict=strict)
    except msgspec.ValidationError as error:
        raise UsageError(f"{where}: {value!r} is wrong, it takes {_takes(hint)}", param=field) from error


def _takes(hint: Any) -> str:
    """Return the values of a setting in words: its choices, or its kind and range."""
    kind, meta = typing.get_args(hint)
    if choices := typing.get_args(kind):
        return ", ".join(choices[:-1]) + f" or {choices[-1]}"
    if kind is str:
        return f"a text such as {' or '.join(meta.examples)}" if meta.examples else "a string"
    if kind is bool:
        return "true or false"
    noun = "an integer" if kind is int else "a number"
    return f"{noun} from {meta.ge} to {meta.le}"


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise StorageError(f"cannot read the configuration {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not valid TOML: {error}") from error
