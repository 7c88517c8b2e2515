"""What the server asks the pool for: pure data, already validated and normalised."""

from __future__ import annotations

import enum
from typing import Any

import msgspec

from app.chat.formats import ToolForm
from app.messages import Capability, GrammarKind, Sampling


class PoolState(enum.StrEnum):
    """What the pool can do for a request now."""

    LOADING = "loading"  # the model is being loaded, or a worker that died is being replaced
    READY = "ready"
    DRAINING = "draining"
    FAILED = "failed"


class ModelInfo(msgspec.Struct, frozen=True, kw_only=True):
    """One served model, as `/v1/models` shows it. What only the loaded model knows is 0 or empty until then."""

    id: str
    created: int  # Unix seconds, constant: when the file was written
    owned_by: str = "pestle"
    context_length: int = 0  # tokens that prompt and answer may have together
    slots: int = 0
    architecture: str = ""
    parameters: int = 0
    description: str = ""
    bytes: int = 0
    fingerprint: str = ""  # of all that the worker's answers depend on
    type: str = ""  # of its weights: the recipe that its card names, else the type that most of its bytes have
    file_bytes: int = 0
    trained_context: int = 0  # tokens of context that it was trained for
    vocabulary_size: int = 0
    card: dict[str, Any] | None = None  # of the quantization, without its tensors
    capabilities: tuple[Capability, ...] = ()
    embedding_size: int = 0  # numbers of one embedding; 0 for models that give none
    tool_form: ToolForm = "generic"
    reasoning_marks: tuple[str, str] | None = None
    template_variables: frozenset[str] = frozenset()  # what clients may set, of what its chat template looks at
    ready: bool = False


class ChatPrompt(msgspec.Struct, frozen=True):
    """Messages for the model's own chat template, and what else that gets."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] = []
    documents: list[dict[str, Any]] = []
    template_arguments: dict[str, Any] = {}
    add_generation_prompt: bool = True
    continue_final_message: bool = False


class TextPrompt(msgspec.Struct, frozen=True):
    """Text to tokenize as it is; special tokens in it count as such, BOS is added when the model wants one."""

    text: str


class TokenPrompt(msgspec.Struct, frozen=True):
    """Token ids, taken as they are."""

    tokens: list[int]


class InfillPrompt(msgspec.Struct, frozen=True):
    """What the answer comes between."""

    before: TextPrompt | TokenPrompt
    after: str


Prompt = ChatPrompt | TextPrompt | TokenPrompt | InfillPrompt


class GrammarSource(msgspec.Struct, frozen=True):
    """What every answer is held to, as the client wrote it, and the field that it came in."""

    kind: GrammarKind
    source: str
    param: str


class Patience(msgspec.Struct, frozen=True):
    """How long the client waits, and the header that says so."""

    header: str
    seconds: float


class ToolUse(msgspec.Struct, frozen=True):
    """What the model may call."""

    tools: list[dict[str, Any]]  # as templates show them
    required: bool  # whether the answer must be a call
    parallel: bool  # whether it may be several

    @property
    def schemas(self) -> dict[str, dict[str, Any]]:
        """The functions' parameters by their names."""
        return {tool["function"]["name"]: tool["function"]["parameters"] for tool in self.tools}


class GenerationRequest(msgspec.Struct, frozen=True, kw_only=True):
    """`len(prompts) * n` sequences to generate; the index of a choice is `prompt_index * n + k`."""

    prompts: list[Prompt]
    n: int = 1
    max_tokens: int | None  # None: what is left of the slot
    sampling: Sampling
    stop: list[str]
    ignore_eos: bool
    top_logprobs: int | None  # None: no logprobs; 0: the drawn token's only
    request_id: str
    client: str = ""  # clients get fair shares of the engine
    priority: int = 0  # the lower, the sooner
    min_tokens: int = 0
    stop_tokens: list[int] = []  # which end the answer as the model's own end of text does
    grammar: GrammarSource | None = None
    tools: ToolUse | None = None
    echo: bool = False  # the generation tells the prompts' texts
    prompt_logprobs: int | None = None  # of the prompts' own tokens, with so many alternatives each; None: none
    end_logprobs: bool = False  # with top_logprobs: the token that ends the answer has an entry, too
    reuse_prefix: bool = True
    timings_per_token: bool = False
    streams: bool = False  # the first token is what the client waits for, else the whole answer
    patience: Patience | None = None  # None: the client says nothing
    max_tokens_param: str = "max_tokens"  # the field that errors about the answer's length name

    @property
    def shape(self) -> tuple[int, int]:
        """The prompts, and the choices of each."""
        return len(self.prompts), self.n


class Pairs(msgspec.Struct, frozen=True):
    """A query and what is to be scored against it."""

    query: str
    documents: list[str]


class EmbeddingRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Texts to embed, all as strings or all as token ids, or documents to score. To the engine it is one sequence."""

    inputs: list[str] | list[list[int]] | Pairs
    single: bool = False  # the client sent one input, not a list of them
    dimensions: int | None = None  # None: all that the model has
    activation: bool = True  # whether scores become probabilities
    request_id: str
    client: str = ""  # clients get fair shares of the engine

    @property
    def shape(self) -> tuple[int, int]:
        """One prompt with one choice: what a request takes of the queue."""
        return 1, 1
