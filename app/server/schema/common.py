"""What chat and text completions share: the sampling fields, stop strings and stream options."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import Meta

from app.errors import RequestError
from app.messages import MAX_DRY_BREAKER_BYTES, MAX_DRY_BREAKERS, Sampling
from app.server.schema.structured import NO_SCHEMA, JsonSchemaFormat, ResponseFormat, Schema, StructuredOutputs

MAX_STOPS = 4
MAX_STOP_BYTES = 256
MAX_LOGIT_BIASES = 300
MAX_TOKEN_ID = 2**31 - 1
MAX_STOP_TOKENS = 64

Count = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
LastN = Annotated[int, Meta(ge=-1, le=1_000_000)]
Probability = Annotated[float, Meta(ge=0, le=1)]
RepeatPenalty = Annotated[float, Meta(ge=0.01, le=10)]
TokenId = Annotated[int, Meta(ge=0, le=MAX_TOKEN_ID)]
TopLogprobs = Annotated[int, Meta(ge=0, le=20)]


_AS_THEY_ARE = (
    "typical_p",
    "xtc_probability",
    "xtc_threshold",
    "dry_multiplier",
    "dry_base",
    "dry_allowed_length",
    "dry_penalty_last_n",
)


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
    min_p: Probability | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repeat_penalty: RepeatPenalty | None = None
    repetition_penalty: RepeatPenalty | None = None
    repeat_last_n: LastN | None = None
    typical_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    xtc_probability: Probability | None = None
    xtc_threshold: Probability | None = None
    dry_multiplier: Annotated[float, Meta(ge=0, le=100)] | None = None
    dry_base: Annotated[float, Meta(ge=1, le=100)] | None = None
    dry_allowed_length: Annotated[int, Meta(ge=0, le=1_000_000)] | None = None
    dry_penalty_last_n: LastN | None = None
    dry_sequence_breakers: Annotated[list[str], Meta(max_length=MAX_DRY_BREAKERS)] | None = None
    logit_bias: dict[str, Annotated[float, Meta(ge=-100, le=100)]] | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: str | list[str] | None = None
    n: Annotated[int, Meta(ge=1, le=8)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = None
    cache_prompt: bool | None = None
    timings_per_token: bool | None = None
    priority: Annotated[int, Meta(ge=-1000, le=1000)] | None = None
    min_tokens: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = None
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=MAX_STOP_TOKENS)] | None = None
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
        """Return how to draw tokens: OpenAI's defaults (temperature 1, top_p 1) where the client says nothing.

        Raises RequestError for fields that contradict each other or are out of range.
        """
        repeat_penalty, repeat_last_n = self._repetition()
        given: dict[str, Any] = {
            "temperature": self.temperature,
            "top_k": None if self.top_k is None else max(0, self.top_k),
            "top_p": self.top_p,
            "min_p": self.min_p,
            "repeat_penalty": repeat_penalty,
            "repeat_last_n": repeat_last_n,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "logit_bias": self._logit_bias(),
            "seed": self.seed,
            "dry_sequence_breakers": self._breakers(),
        }
        given |= {name: getattr(self, name) for name in _AS_THEY_ARE}
        return Sampling(**{name: value for name, value in given.items() if value is not None})

    def least_tokens(self, max_tokens: int | None) -> int:
        """Return how many tokens an answer has at least; raises RequestError when that is more than at most."""
        if max_tokens is not None and (self.min_tokens or 0) > max_tokens:
            raise RequestError(
                f"'min_tokens' is {self.min_tokens}, but the answer has at most {max_tokens} tokens", param="min_tokens"
            )
        return self.min_tokens or 0

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

    def _repetition(self) -> tuple[float | None, int | None]:
        old, other = self.repeat_penalty, self.repetition_penalty
        if other is None:
            return old, self.repeat_last_n
        if old is not None and old != other:
            raise RequestError(
                f"'repeat_penalty' is {old} and 'repetition_penalty' is {other}: they mean the same, send one",
                param="repetition_penalty",
            )
        return other, -1 if self.repeat_last_n is None else self.repeat_last_n

    def _breakers(self) -> tuple[str, ...] | None:
        for index, text in enumerate(self.dry_sequence_breakers or ()):
            if not 1 <= len(text.encode()) <= MAX_DRY_BREAKER_BYTES:
                param = f"dry_sequence_breakers[{index}]"
                raise RequestError(
                    f"'{param}' has {len(text.encode())} bytes: a breaker has 1 to {MAX_DRY_BREAKER_BYTES}", param=param
                )
        return None if self.dry_sequence_breakers is None else tuple(self.dry_sequence_breakers)

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
