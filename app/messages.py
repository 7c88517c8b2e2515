"""The frames that the API process, the text child and the worker exchange, and the words they share.

A frame is four bytes (length of the body, little-endian) and one MessagePack document, tagged by its `type`. Token ids
travel as raw little-endian int32 bytes: a prompt of 8,000 tokens decodes in microseconds.

    API process → either child  LoadModel, first of all       answered by Hello, or by LoadFailed and exit
    API process → text child    RenderChat, RenderText        answered by Rendered or Refused
                                RenderInfill                  answered by Rendered or Refused
                                WriteChat, Detokenize         answered by Written or Refused
                                Tokenize                      answered by Tokenized or Refused
                                RenderInputs, RenderPairs     answered by RenderedInputs or Refused
                                CompileGrammar                answered by Compiled or Refused
    API process → worker        Generate, Embed               answered by Accepted or Refused, then by Steps' pieces
                                Cancel                        answered by a piece with finish_reason "cancelled"
"""

from __future__ import annotations

import struct
from typing import Any, Literal

import msgspec

FRAME_HEADER = struct.Struct("<I")
MAX_FRAME_BYTES = 64 * 1024 * 1024
MAX_DRY_BREAKERS = 8  # each makes the worker look through its vocabulary
MAX_DRY_BREAKER_BYTES = 40  # llama.cpp cuts longer ones off

FinishReason = Literal["stop", "length", "cancelled", "error"]
Capability = Literal["chat", "completion", "embeddings", "rerank", "infill"]
Pooling = Literal["auto", "mean", "cls", "last"]
GrammarKind = Literal["json_schema", "regex", "choice", "grammar", "tool_calls"]


class Sampling(msgspec.Struct, frozen=True, array_like=True):
    """How the next token is drawn. The defaults leave the model's distribution as it is."""

    temperature: float = 1.0  # 0: the most probable token
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    min_p: float = 0.0
    repeat_penalty: float = 1.0  # 1: none
    repeat_last_n: int = 64  # tokens that the penalties look back on; -1: the whole slot
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    seed: int | None = None  # None: drawn from the system's entropy
    typical_p: float = 1.0
    xtc_probability: float = 0.0  # 0: off
    xtc_threshold: float = 0.1
    dry_multiplier: float = 0.0  # 0: off
    dry_base: float = 1.75
    dry_allowed_length: int = 2  # tokens that may be repeated for nothing
    dry_penalty_last_n: int = 64  # tokens that DRY looks back on; -1: the whole slot
    dry_sequence_breakers: tuple[str, ...] = ("\n", ":", '"', "*")


class LoadModel(msgspec.Struct, frozen=True, tag="load_model"):
    """The API process's first frame to a child: what to load, and for how many. The text child needs the path only."""

    path: str
    slots: int = 1
    context_length: int = 0  # tokens that one slot holds; 0: as many as the model was trained for
    threads: int = 0  # 0: one for each physical core that we may use
    batch_size: int = 512  # most tokens in one llama_decode
    device: Literal["auto", "cpu", "cuda", "metal"] = "auto"
    gpu_layers: int = -1  # -1: all that the device takes
    itl_target: float | None = None  # seconds between two tokens of a stream; None: chosen from measured steps
    kv_tokens: int = 0  # tokens of one store that all slots share; 0: each slot has its own
    prefix_memory_bytes: int = 0  # of prefixes that no slot holds any more
    prefix_disk_bytes: int = 0  # the same on disk, in `prefix_folder`
    prefix_folder: str = ""
    cache_type: str = "f16"  # of the KV cache: a name of ggml's types
    flash_attention: Literal["auto", "on", "off"] = "auto"
    micro_batch_size: int = 0  # tokens that llama.cpp computes at once; 0: 512, or less in a smaller batch
    deterministic: bool = False  # every sequence is computed alone, in chunks that depend on its length only
    speculate: Literal["off", "lookup"] = "off"  # where guesses of the next tokens come from
    draft_tokens: int = 15  # most guesses of one sequence in a step
    draft_path: str = ""  # a smaller model that guesses, too
    pooling: Pooling = "auto"  # how the embeddings of a text's tokens become one; auto: as the file says


class Hello(msgspec.Struct, frozen=True, tag="hello"):
    """A child's first frame: what it has loaded. The numbers of slots and their length are the worker's."""

    child: Literal["text", "worker"]
    pid: int
    vocabulary_size: int
    context_length: int  # tokens that one slot holds (worker), or that the model was trained for (text)
    slots: int = 0
    model_name: str = ""  # general.name of the file
    architecture: str = ""
    description: str = ""  # llama.cpp's own, as "llama 135M Q8_0"
    parameters: int = 0
    model_bytes: int = 0
    has_chat_template: bool = False
    fills_in: bool = False  # the vocabulary has tokens for filling in the middle
    tool_form: str = "generic"  # how the template's model writes tool calls: a name of app.chat.formats
    reasoning_marks: tuple[str, str] | None = None  # what its reasoning begins and ends with
    template_variables: list[str] = []  # what clients may set, of what the template looks at
    library_build: str = ""
    device: str = ""
    fingerprint: str = ""  # of all that answers depend on: weights, build, back end, settings; hexadecimal
    load_seconds: float = 0.0
    capabilities: list[Capability] = []  # the worker's: what the model is for
    embedding_size: int = 0  # numbers of one embedding; 0 for models that give none


class LoadFailed(msgspec.Struct, frozen=True, tag="load_failed"):
    """A child's only frame when it can't load: why, with the last lines that llama.cpp logged."""

    message: str


class RenderChat(msgspec.Struct, frozen=True, tag="render_chat"):
    """Apply the model's own template to these messages, then tokenize."""

    request: int
    messages: list[dict[str, Any]]
    add_generation_prompt: bool = True
    template_arguments: dict[str, Any] = {}
    tools: list[dict[str, Any]] = []  # as clients of OpenAI write them
    documents: list[dict[str, Any]] = []
    continue_final_message: bool = False  # the last message is the beginning of the answer


class RenderText(msgspec.Struct, frozen=True, tag="render_text"):
    """Tokenize this text as a prompt (BOS added when the model wants one)."""

    request: int
    text: str


class Rendered(msgspec.Struct, frozen=True, tag="rendered"):
    """A prompt, ready for the worker."""

    request: int
    tokens: bytes  # int32 little-endian ids
    end: str = ""  # of a chat's text, its last characters: the answer goes on from there


class RenderInputs(msgspec.Struct, frozen=True, tag="render_inputs"):
    """Tokenize these texts as an encoder's inputs, each with the tokens that the model puts around a text."""

    request: int
    texts: list[str]


class RenderPairs(msgspec.Struct, frozen=True, tag="render_pairs"):
    """Tokenize a query with each of the documents, in the way that the reranker wants its pairs."""

    request: int
    query: str
    documents: list[str]


class RenderedInputs(msgspec.Struct, frozen=True, tag="rendered_inputs"):
    """The inputs in their order, ready for the worker."""

    request: int
    inputs: list[bytes]  # int32 little-endian ids each


class RenderInfill(msgspec.Struct, frozen=True, tag="render_infill"):
    """Make the prompt of what comes between two texts, with the model's own tokens for that."""

    request: int
    before: str
    after: str
    before_tokens: bytes | None = None  # int32 little-endian ids, in place of the text before


class WriteChat(msgspec.Struct, frozen=True, tag="write_chat"):
    """Apply the model's own template, and return the text."""

    chat: RenderChat

    @property
    def request(self) -> int:
        """The number that the answer carries."""
        return self.chat.request


class Detokenize(msgspec.Struct, frozen=True, tag="detokenize"):
    """Return the text of these tokens, control tokens as they are written."""

    request: int
    tokens: bytes  # int32 little-endian ids
    param: str  # the field that errors name


class Written(msgspec.Struct, frozen=True, tag="written"):
    """A text that was asked for."""

    request: int
    text: str


class Tokenize(msgspec.Struct, frozen=True, tag="tokenize"):
    """Return the tokens of a text, and their bytes if wanted."""

    request: int
    text: str
    add_special: bool  # BOS, and EOS, where the model wants them
    parse_special: bool  # control tokens that are written out count as such
    with_pieces: bool


class Tokenized(msgspec.Struct, frozen=True, tag="tokenized"):
    """The tokens of a text."""

    request: int
    tokens: bytes  # int32 little-endian ids
    pieces: list[bytes] | None


class CompileGrammar(msgspec.Struct, frozen=True, tag="compile_grammar"):
    """Try whether answers can be held to this grammar."""

    request: int
    kind: GrammarKind
    source: str  # a JSON schema, a regular expression, a JSON array of strings, Lark or GBNF, or a ToolGrammar
    param: str  # the field that errors name
    prompt_end: str = ""  # as Rendered has it


class ToolGrammar(msgspec.Struct, frozen=True):
    """The source of a grammar of kind "tool_calls", as JSON: calls in the form that the model's template teaches."""

    tools: list[dict[str, Any]]  # those that may be called
    required: bool  # else calls are held to their form once one has begun
    parallel: bool  # whether there may be several
    otherwise: str | None = None  # the JSON schema of an answer that is no call, unless one is required

    @property
    def schemas(self) -> list[dict[str, Any]]:
        """The schemas of the tools' arguments, and of what else there may be."""
        given = [tool["function"]["parameters"] for tool in self.tools]
        return given if self.otherwise is None else [*given, msgspec.json.decode(self.otherwise, type=dict[str, Any])]


class Trigger(msgspec.Struct, frozen=True, array_like=True):
    """Behind which token a grammar begins; it does not while the model reasons."""

    token: int
    reasoning: tuple[int, int] | None = None  # the tokens between which it does
    begins_in_reasoning: bool = False


class Compiled(msgspec.Struct, frozen=True, tag="compiled"):
    """A grammar that compiles, in the form that the worker takes."""

    request: int
    grammar: str  # empty: calls of this form are not held to it before they have begun, nor after
    trigger: Trigger | None = None  # None: it holds from the first token on


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """A child's no to one request. `error` names a class of app.errors."""

    request: int
    error: str
    message: str
    param: str | None = None


class Generate(msgspec.Struct, frozen=True, tag="generate"):
    """Continue this prompt."""

    request: int
    prompt: bytes  # int32 little-endian ids, at least one
    max_tokens: int  # prompt and answer together fit into a slot; 0: only look at the prompt
    sampling: Sampling
    stop: list[str] = []
    ignore_eos: bool = False
    top_logprobs: int | None = None  # None: no logprobs at all; 0: the drawn token's only
    request_id: str = ""  # for logs
    client: str = ""  # clients get fair shares
    scope: str = ""  # prefixes are shared within one scope only
    priority: int = 0  # the lower, the sooner
    min_tokens: int = 0  # before so many, neither the model's end of text nor stop_tokens are drawn
    stop_tokens: list[int] = []  # which end the answer as the model's own end of text does
    grammar: str | None = None  # as Compiled has it: what the answer is held to
    prompt_logprobs: int | None = None  # of the prompt's own tokens, with so many alternatives each; None: none
    end_logprobs: bool = False  # with top_logprobs: the token that ends the answer has an entry, too
    reuse_prefix: bool = True  # whether what a slot holds of the prompt may be taken; not with prompt_logprobs
    timings_per_token: bool = False  # every piece has its timings
    trigger: Trigger | None = None  # as Compiled has it
    shown: tuple[str, ...] = ()  # control tokens that the text shows as they are written


class Cancel(msgspec.Struct, frozen=True, tag="cancel"):
    """The client has gone, or a stop was seen outside: free the slot within one step."""

    request: int


class Embed(msgspec.Struct, frozen=True, tag="embed"):
    """Compute an embedding, or a reranker's score, of each input."""

    request: int
    inputs: list[bytes]  # int32 little-endian ids each, from one token to what the context holds
    dimensions: int = 0  # first numbers of each embedding to keep; 0: all
    activation: bool = True  # whether a reranker's scores become probabilities
    client: str = ""  # clients get fair shares of the engine


class Accepted(msgspec.Struct, frozen=True, tag="accepted"):
    """The request is in the worker's queue."""

    request: int


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """One token with its log probability and the most probable alternatives, best first.

    The first of a prompt has NaN: nothing precedes it.
    """

    token: int
    text: bytes
    logprob: float
    top: list[tuple[int, bytes, float]] = []


class Timings(msgspec.Struct, frozen=True, array_like=True):
    """Where a finished sequence's time went, in seconds."""

    queued: float
    prefill: float
    decode: float


class Piece(msgspec.Struct, frozen=True, array_like=True):
    """What one step gave one request. The text is whole UTF-8, with possible stop strings held back."""

    request: int
    text: str
    completion_tokens: int  # drawn so far, this step's included
    finish_reason: FinishReason | None = None
    cached_tokens: int = 0  # prompt tokens that were already in the KV cache
    logprobs: list[TokenLogprob] | None = None
    error: str | None = None  # with finish_reason "error": what went wrong with this sequence
    timings: Timings | None = None  # with a finish_reason, or as the request wishes
    error_name: str = "EngineError"  # the class of app.errors that `error` belongs to
    prompt_logprobs: list[TokenLogprob] | None = None  # of the prompt's next tokens; before any text
    vectors: bytes | None = None  # of an Embed request: float32 little-endian, input after input


class Load(msgspec.Struct, frozen=True, array_like=True):
    """The worker's state after a step, for metrics."""

    running: int
    waiting: int
    kv_tokens: int  # of running sequences
    kv_capacity: int
    prompt_tokens_computed: int  # in this step
    tokens_generated: int  # in this step
    preemptions: int  # since the start
    step_seconds: float
    guessed_tokens: int = 0  # in this step, beside the streams' own
    accepted_tokens: int = 0  # of these: they are in the answers
    inputs_embedded: int = 0  # in this step


class Step(msgspec.Struct, frozen=True, tag="step"):
    """Everything that one engine step brought forth, in one frame."""

    pieces: list[Piece]
    load: Load


TextWork = (
    RenderChat
    | RenderText
    | RenderInfill
    | RenderInputs
    | RenderPairs
    | WriteChat
    | Detokenize
    | Tokenize
    | CompileGrammar
)
TextAnswer = Rendered | RenderedInputs | Written | Tokenized | Compiled
ToText = LoadModel | TextWork
FromText = Hello | LoadFailed | TextAnswer | Refused
ToWorker = LoadModel | Generate | Embed | Cancel
FromWorker = Hello | LoadFailed | Accepted | Refused | Step


_PARAMS: dict[type[TextWork], str] = {
    RenderText: "prompt",
    RenderInfill: "prompt",
    RenderInputs: "input",
    RenderPairs: "documents",
    Tokenize: "content",
}


def param_of(work: TextWork) -> str:
    """Return the field of the HTTP request that this came in."""
    if isinstance(work, RenderChat | WriteChat):
        return "messages"
    if isinstance(work, CompileGrammar | Detokenize):
        return work.param
    return _PARAMS[type(work)]


_encoder = msgspec.msgpack.Encoder()


def encode_frame(message: msgspec.Struct) -> bytes:
    """Return the message as one frame, header included."""
    body = _encoder.encode(message)
    return FRAME_HEADER.pack(len(body)) + body


class FrameReader:
    """Cuts a byte stream back into frame bodies; feed it what the socket gave."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """Take received bytes and return the bodies that are complete now.

        Raises ValueError when a header announces more than MAX_FRAME_BYTES: the peer is not speaking frames.
        """
        if not self._buffer and len(data) > FRAME_HEADER.size:
            (length,) = FRAME_HEADER.unpack_from(data)
            if length == len(data) - FRAME_HEADER.size <= MAX_FRAME_BYTES:  # one frame, whole: what a step sends
                return [data[FRAME_HEADER.size :]]
        self._buffer += data
        bodies: list[bytes] = []
        start = 0
        while len(self._buffer) - start >= FRAME_HEADER.size:
            (length,) = FRAME_HEADER.unpack_from(self._buffer, start)
            if length > MAX_FRAME_BYTES:
                raise ValueError(f"a frame of {length} bytes is over the limit of {MAX_FRAME_BYTES}")
            end = start + FRAME_HEADER.size + length
            if len(self._buffer) < end:
                break
            bodies.append(bytes(self._buffer[start + FRAME_HEADER.size : end]))
            start = end
        del self._buffer[:start]
        return bodies
