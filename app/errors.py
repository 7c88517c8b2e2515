"""The tree of errors that Pestle shows to people and to clients.

Every error says what was wrong, names the field or the file at fault, and says what to do. The HTTP status, the OpenAI
`type` and `code`, and the exit code of the command line belong to the class; `param` belongs to the instance.

    PestleError                     500 server_error           exit 1
    ├── UsageError                                             exit 2   a wrong flag, or a wrong value of one
    ├── BadInputError                                          exit 3   a file that can't be used
    │   ├── CheckpointError                                             safetensors, index or config.json
    │   ├── ArchitectureError                                           a family that we don't know
    │   ├── TokenizerError                                              a vocabulary that we can't carry over
    │   └── ModelFileError                                              a GGUF
    ├── StorageError                                           exit 4   disk full, no permission
    │   └── HubUnreachableError                                         the Hub does not answer
    ├── VerificationError                                      exit 5   the result is not what was planned
    ├── InterruptedByUserError                                exit 130
    ├── RequestError                400 invalid_request_error           what the client did wrong
    │   ├── UnsupportedFieldError       unsupported_parameter           known to OpenAI, not honoured here
    │   ├── UnknownFieldError           unknown_parameter
    │   ├── ContextLengthError          context_length_exceeded
    │   ├── TemplateRefusedError        template_refused                the model's template refuses the messages
    │   ├── PromptRefusedError          prompt_refused                  template or tokenizer died or ran out of time
    │   ├── GrammarRefusedError         grammar_refused                 a schema or grammar that cannot be followed
    │   ├── WrongModelError             model_not_capable               the model is not for this route
    │   ├── ModelNotFoundError      404 model_not_found
    │   ├── RouteNotFoundError      404 route_not_found
    │   │   └── UnsupportedRouteError   unsupported_route           OpenAI's, and nothing that Pestle does
    │   ├── DeadlineTooShortError       deadline_too_short          the client does not wait long enough
    │   ├── MethodNotAllowedError   405 method_not_allowed
    │   ├── BodyTooLargeError       413 body_too_large
    │   ├── BodyTimeoutError        408 body_timeout
    │   └── ContentTypeError        415 content_type
    ├── QueueFullError              429 rate_limit_error  queue_full            with Retry-After
    │   └── DeadlineUnreachableError    deadline_unreachable        not in the time that the client waits
    ├── UnavailableError            503 server_error      with Retry-After
    │   ├── LoadingError                model_loading
    │   ├── DrainingError               draining
    │   ├── EngineCrashedError          engine_crashed
    │   ├── DeadlineExceededError   504 deadline_exceeded
    │   └── ModelFailedError            model_failed
    └── EngineError                 500 server_error      engine_error
        ├── ModelLoadError              model_load_failed      exit 3
        ├── DecodeError                 decode_failed
        └── NoKvSlotError               kv_exhausted
"""

from __future__ import annotations

from typing import ClassVar


class PestleError(Exception):
    """The root of everything that Pestle raises on purpose."""

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    code: ClassVar[str | None] = None
    exit_code: int = 1

    def __init__(self, message: str, *, param: str | None = None, retry_after: float | None = None) -> None:
        """Keep the message, the field at fault, and the seconds after which trying again makes sense."""
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after = retry_after


class UsageError(PestleError):
    """A flag, environment variable or configuration key is wrong."""

    exit_code = 2


class BadInputError(PestleError):
    """A file or folder cannot be used as it is."""

    exit_code = 3


class CheckpointError(BadInputError):
    """The safetensors, their index or their config.json are missing, damaged or contradict each other."""


class ArchitectureError(BadInputError):
    """The checkpoint is of a family that Pestle does not know."""


class TokenizerError(BadInputError):
    """The checkpoint's vocabulary cannot be carried over exactly."""


class ModelFileError(BadInputError):
    """A GGUF is truncated, damaged or hostile."""


class StorageError(PestleError):
    """The disk is full, or a file may not be read or written."""

    exit_code = 4


class HubUnreachableError(StorageError):
    """The Hub does not answer, or not as it should; trying again may help."""


class VerificationError(PestleError):
    """The written file is not what was planned."""

    exit_code = 5


class InterruptedByUserError(PestleError):
    """Someone pressed Ctrl-C, or the process was asked to end."""

    exit_code = 130


class RequestError(PestleError):
    """The client's request is wrong; trying the same again cannot help."""

    status = 400
    type = "invalid_request_error"
    code = "invalid_value"
    exit_code = 2


class UnsupportedFieldError(RequestError):
    """The field, or this value of it, would change the answer and is not honoured here."""

    code = "unsupported_parameter"


class UnknownFieldError(RequestError):
    """No such field."""

    code = "unknown_parameter"

    def __init__(self, message: str, *, param: str | None = None, path: tuple[str, ...] = ()) -> None:
        """Keep the names that lead to the field, its own last; arrays in between have none."""
        super().__init__(message, param=param)
        self.path = path


class ContextLengthError(RequestError):
    """Prompt and answer do not fit into one slot."""

    code = "context_length_exceeded"


class TemplateRefusedError(RequestError):
    """The model's chat template refuses these messages."""

    code = "template_refused"


class PromptRefusedError(RequestError):
    """Rendering or tokenizing this prompt ran out of time or memory, or ended its process."""

    code = "prompt_refused"


class GrammarRefusedError(RequestError):
    """The schema, grammar or regular expression cannot be compiled or followed; the message says why."""

    code = "grammar_refused"


class ModelNotFoundError(RequestError):
    """No model of that name is served here."""

    status = 404
    code = "model_not_found"


class WrongModelError(RequestError):
    """The model is not for this: a chat with an embedding model, embeddings of one that gives none."""

    code = "model_not_capable"


class RouteNotFoundError(RequestError):
    """No such path."""

    status = 404
    code = "route_not_found"


class UnsupportedRouteError(RouteNotFoundError):
    """OpenAI has such a route; Pestle doesn't do what it is for."""

    code = "unsupported_route"


class DeadlineTooShortError(RequestError):
    """The request's own work takes longer than its client waits, by the rates that were measured."""

    code = "deadline_too_short"


class MethodNotAllowedError(RequestError):
    """The path exists, the method does not."""

    status = 405
    code = "method_not_allowed"


class BodyTooLargeError(RequestError):
    """The body is larger than the limit."""

    status = 413
    code = "body_too_large"


class BodyTimeoutError(RequestError):
    """The body did not arrive in time."""

    status = 408
    code = "body_timeout"


class ContentTypeError(RequestError):
    """The body is not announced as JSON."""

    status = 415
    code = "content_type"


class QueueFullError(PestleError):
    """The one bounded queue is full."""

    status = 429
    type = "rate_limit_error"
    code = "queue_full"


class DeadlineUnreachableError(QueueFullError):
    """Behind what waits already, the request would take longer than its client waits."""

    code = "deadline_unreachable"


class UnavailableError(PestleError):
    """The server cannot answer now; later it may."""

    status = 503
    code = "unavailable"


class LoadingError(UnavailableError):
    """The model is being loaded."""

    code = "model_loading"


class DrainingError(UnavailableError):
    """The server finishes its streams and takes no new request."""

    code = "draining"


class EngineCrashedError(UnavailableError):
    """The worker died under this request; it is being restarted."""

    code = "engine_crashed"


class DeadlineExceededError(UnavailableError):
    """The request took longer than `--request-timeout` allows, waiting included."""

    status = 504
    code = "deadline_exceeded"


class ModelFailedError(UnavailableError):
    """The worker died too often, or the model cannot be loaded; the reason is in the message."""

    code = "model_failed"


class EngineError(PestleError):
    """llama.cpp reported a failure."""

    code = "engine_error"


class ModelLoadError(EngineError):
    """llama.cpp cannot load the model; its last log lines are in the message."""

    code = "model_load_failed"
    exit_code = 3


class DecodeError(EngineError):
    """`llama_decode` failed for this batch; its return code is in the message."""

    code = "decode_failed"


class NoKvSlotError(DecodeError):
    """`llama_decode` returned 1: the KV cache has no room for this batch."""

    code = "kv_exhausted"
