"""What chat and text completions share: the sampling fields, stop strings and stream options."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import Meta

from app.errors import RequestError
from app.messages import Sampling
from app.server.schema.structured import NO_SCHEMA, JsonSchemaFormat, ResponseFormat, Schema, StructuredOutputs

MAX_STOPS = 4
MAX_STOP_BYTES = 256
MAX_LOGIT_BIASES = 300
MAX_TOKEN_ID = 2**31 - 1

Count = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
TopLogprobs = Annotated[int, Meta(ge=0, le=20)]


class StreamOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a stream carries beside its text."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class CommonRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The fields that both routes take; null is the same as absent."""

    model: Annotated[str, Meta(min_length=1, max_length=512)]
    max_tokens: Count | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=100_000)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repeat_penalty: Annotated[float, Meta(ge=0.01, le=10)] | None = None
    repeat_last_n: Annotated[int, Meta(ge=-1, le=1_000_000)] | None = None
    logit_bias: dict[str, Annotated[float, Meta(ge=-100, le=100)]] | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: str | list[str] | None = None
    n: Annotated[int, Meta(ge=1, le=8)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = None
    response_format: ResponseFormat | None = None
    json_schema: Schema = NO_SCHEMA
    grammar: str | None = None
    guided_json: Schema = NO_SCHEMA
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    structured_outputs: StructuredOutputs | None = None
    user: str | None = None

    @property
    def include_usage(self) -> bool:
        """Whether the stream ends with a chunk that carries the usage."""
        return self.stream_options is not None and self.stream_options.include_usage is True

    def sampling(self) -> Sampling:
        """Return how to draw tokens: OpenAI's defaults (temperature 1, top_p 1) where the client says nothing."""
        given: dict[str, Any] = {
            "temperature": self.temperature,
            "top_k": None if self.top_k is None else max(0, self.top_k),
            "top_p": self.top_p,
            "min_p": self.min_p,
            "repeat_penalty": self.repeat_penalty,
            "repeat_last_n": self.repeat_last_n,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "logit_bias": self._logit_bias(),
            "seed": self.seed,
        }
        return Sampling(**{name: value for name, value in given.items() if value is not None})

    def stops(self) -> list[str]:
        """Return the stop strings; raises RequestError for too many, or for one that is empty or too long."""
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(stops) > MAX_STOPS:
            raise RequestError(f"'stop' has {len(stops)} strings: send at most {MAX_STOPS}", param="stop")
        for index, stop in enumerate(stops):
            size = len(stop.encode())
            if not 1 <= size <= MAX_STOP_BYTES:
                param = "stop" if isinstance(self.stop, str) else f"stop[{index}]"
                raise RequestError(f"'{param}' has {size} bytes: a stop string has 1 to {MAX_STOP_BYTES}", param=param)
        return stops

    def check_stream_options(self) -> None:
        """Raise RequestError for stream options without a stream."""
        if self.stream_options is not None and not self.stream:
            raise RequestError(
                "'stream_options' only goes with \"stream\": true: set it, or leave the options out",
                param="stream_options",
            )

    def nested_without_effect(self) -> list[str]:
        """Return the names of fields within fields that were sent and cannot change the answer."""
        names = []
        if self.stream_options is not None and self.stream_options.include_obfuscation is not None:
            names.append("stream_options.include_obfuscation")
        if isinstance(self.response_format, JsonSchemaFormat):
            names.append("response_format.json_schema.name")
            if self.response_format.json_schema.description is not None:
                names.append("response_format.json_schema.description")
        return names

    def _logit_bias(self) -> dict[int, float] | None:
        if self.logit_bias is None:
            return None
        if len(self.logit_bias) > MAX_LOGIT_BIASES:
            raise RequestError(
                f"'logit_bias' has {len(self.logit_bias)} entries: send at most {MAX_LOGIT_BIASES}", param="logit_bias"
            )
        biases: dict[int, float] = {}
        for key, bias in self.logit_bias.items():
            if not (key.isascii() and key.isdigit() and len(key) <= 10 and int(key) <= MAX_TOKEN_ID):
                raise RequestError(
                    f"'logit_bias' has the key {key[:32]!r}: keys are token ids in decimal digits", param="logit_bias"
                )
            biases[int(key)] = bias
        return biases
