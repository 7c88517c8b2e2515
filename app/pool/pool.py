"""The model that is served: its two children, and the way of a request from its admission to its stream."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import time
from typing import TYPE_CHECKING, Any, cast

import msgspec

from app.errors import (
    DeadlineExceededError,
    DrainingError,
    LoadingError,
    ModelFailedError,
    ModelNotFoundError,
    PestleError,
)
from app.messages import (
    Compiled,
    CompileGrammar,
    FromText,
    FromWorker,
    Generate,
    Hello,
    Rendered,
    RenderInfill,
    RenderText,
)
from app.observability.logging import get_logger
from app.pool.admission import Admission
from app.pool.chat_request import grammar_asked, render_chat, shown_tokens
from app.pool.child import python_module
from app.pool.context_check import answer_tokens, check_ids, check_scored, token_prompt
from app.pool.embedding import capabilities, check_capability, count_tokens, embed_command
from app.pool.forecast import Forecast
from app.pool.generation import Generation
from app.pool.load_command import load_command
from app.pool.model_info import model_info
from app.pool.request import (
    ChatPrompt,
    EmbeddingRequest,
    GenerationRequest,
    InfillPrompt,
    ModelInfo,
    PoolState,
    Prompt,
    TextPrompt,
)
from app.pool.supervisor import Breaker, Supervisor
from app.pool.text_client import TextClient
from app.pool.text_service import TextService
from app.pool.worker_client import Sequence, WorkerClient

if TYPE_CHECKING:
    from collections.abc import Sequence as AbstractSequence
    from pathlib import Path

    from app.chat.formats import ToolForm
    from app.config import ServeSettings
    from app.observability.metrics import Metrics

log = get_logger(__name__)

_RETRY_AFTER_LOADING_SECONDS = 2.0
_BYTES_PER_TOKEN = 4


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """Times and counts that guard the children."""

    text_deadline: float = 10.0  # seconds that one prompt may take to render and tokenize
    restart_wait: float = 30.0  # seconds that sequences of a dead worker wait for the next one
    breaker: Breaker = Breaker()


@dataclasses.dataclass(slots=True)
class _Open:
    permits: int
    deadline: asyncio.TimerHandle | None = None


class Pool:
    """One model, a text child and a worker. Everything but `spawn` runs on one event loop.

    A request goes: permits → text child → does it fit → worker → `Generation`, which gives the permits back.
    """

    def __init__(
        self,
        settings: ServeSettings,
        model_file: Path,
        model_id: str,
        metrics: Metrics,
        *,
        limits: Limits | None = None,
        commands: tuple[AbstractSequence[str], AbstractSequence[str]] | None = None,
    ) -> None:
        limits = limits or Limits()
        text_command, worker_command = commands or (python_module("app.text"), python_module("app.worker"))
        self.failure: str | None = None
        self._info = model_info(model_file, model_id)
        self._metrics = metrics.model(model_id)
        self._all_metrics = metrics
        self._load = load_command(settings, model_file)
        self._admission = Admission(self._load.slots, settings.queue)
        self._forecast = Forecast(self._admission, keeps_on_disk=self._load.prefix_disk_bytes > 0)
        self._text = TextClient(limits.text_deadline)
        self._worker = WorkerClient(self._metrics, self._admission.pace, limits.restart_wait)
        self._text_child = self._supervise("text child", text_command, FromText, self._text, limits.breaker)
        self._worker_child = self._supervise("worker", worker_command, FromWorker, self._worker, limits.breaker)
        self._text.supervisor = self._text_child
        self._worker.supervisor = self._worker_child
        self._vocabulary_size = 0
        self._draining = False
        self._drained = False
        self._request_numbers = itertools.count(1)
        self.text = TextService(self._text, self._request_numbers, self._check_state)
        self._request_timeout = settings.request_timeout
        self._open: dict[Generation, _Open] = {}
        self._empty = asyncio.Event()

    # ---- life ----

    def spawn(self) -> None:
        """Start both children; they load while the caller goes on importing. Needs no event loop."""
        self._worker_child.spawn()
        self._text_child.spawn()

    async def start(self) -> None:
        """Attach the children to the running event loop and supervise them; returns before they have loaded."""
        self._text_child.start()
        self._worker_child.start()

    async def drain(self, timeout: float) -> None:  # noqa: ASYNC109 - what is late gets an error, not a cancellation
        """Take no new request, let the running ones finish for `timeout` seconds, then fail the rest."""
        self._draining = True
        if self._open:
            self._empty.clear()
            log.info("draining", extra={"requests": len(self._open), "timeout": timeout})
            try:
                await asyncio.wait_for(self._empty.wait(), timeout)
            except TimeoutError:
                log.warning("the drain ran out of time", extra={"requests": len(self._open)})
        self._drained = True
        self._fail_all(_cut_off_error())

    async def close(self) -> None:
        """End both children, within two seconds; what still runs fails."""
        self._draining = self._drained = True
        self._fail_all(_cut_off_error())
        await asyncio.gather(self._text_child.close(), self._worker_child.close())

    # ---- what there is ----

    @property
    def state(self) -> PoolState:
        """What the pool can do for a request now."""
        if self.failure is not None:
            return PoolState.FAILED
        if self._draining:
            return PoolState.DRAINING
        ready = self._info.ready and self._worker_child.hello is not None  # a text child's restart is not seen outside
        return PoolState.READY if ready else PoolState.LOADING

    def model(self, model_id: str) -> ModelInfo:
        """Return what is known of a model. Raises ModelNotFoundError that names the one there is."""
        if model_id != self._info.id:
            raise ModelNotFoundError(
                f"the model {model_id!r} does not exist here; this server has {self._info.id!r}", param="model"
            )
        return msgspec.structs.replace(self._info, ready=self.state is PoolState.READY)

    def models(self) -> list[ModelInfo]:
        """Return all models."""
        return [self.model(self._info.id)]

    @property
    def child_pids(self) -> dict[str, int | None]:
        """Process ids of the children that run now."""
        return {"text": self._text_child.pid, "worker": self._worker_child.pid}

    # ---- what its parts tell it ----

    def child_ready(self, hello: Hello) -> None:
        """Take what a fresh child knows; both together are the model's description."""
        text, worker = self._text_child.hello, self._worker_child.hello
        if hello.child == "worker":
            if self._worker_child.restarts:
                self._metrics.worker_restarts.inc()
            self._all_metrics.set_build(_version(), hello.library_build, hello.device)
        log.info("%s ready", hello.child, extra={"child_pid": hello.pid, "load_seconds": round(hello.load_seconds, 3)})
        if text is None or worker is None:
            return
        self._vocabulary_size = self.text.vocabulary_size = worker.vocabulary_size
        self._info = msgspec.structs.replace(
            self._info,
            context_length=worker.context_length,
            slots=worker.slots,
            architecture=worker.architecture,
            parameters=worker.parameters,
            description=worker.description,
            bytes=worker.model_bytes,
            fingerprint=worker.fingerprint,
            vocabulary_size=worker.vocabulary_size,
            capabilities=capabilities(worker, fills_in=text.fills_in),
            embedding_size=worker.embedding_size,
            tool_form=cast("ToolForm", text.tool_form),
            reasoning_marks=text.reasoning_marks,
            template_variables=frozenset(text.template_variables),
            ready=True,
        )

    def child_failed(self, reason: str) -> None:
        """Mark the model failed, with the reason; what runs and waits gets an error."""
        if self.failure is None:
            self.failure = reason
            self._fail_all(self._failed_error())

    def finished(self, generation: Generation) -> None:
        """Give a generation's permits back and cancel what still runs of it."""
        for _ in range(self._worker.drop(generation)):
            if generation.error is None:
                self._metrics.success("cancelled")
        opened = self._open.pop(generation)
        self._admission.give_back(opened.permits)
        if opened.deadline is not None:
            opened.deadline.cancel()
        if not self._open:
            self._empty.set()

    # ---- one request ----

    async def open(self, request: GenerationRequest | EmbeddingRequest) -> Generation:
        """Admit a request, make tokens of its prompts, check that they fit, and have the worker accept it.

        A request for embeddings or scores gets one piece, which carries its vectors.

        Everything that can fail before the HTTP status fails here. Raises LoadingError, DrainingError,
        ModelFailedError, QueueFullError, RequestError and its kin, EngineCrashedError. Cancelling it at any point
        leaves nothing behind.
        """
        try:
            self._check_state()
            check_capability(request, self._info)
            prompts, n = request.shape
            permits = prompts * n
            self._admission.take(permits)
        except PestleError as error:
            self._count_failure(error)
            raise
        generation = Generation(self, prompts, n)
        opened = self._open[generation] = _Open(permits)
        try:
            await self._begin_in_time(opened, generation, request)
        except BaseException as error:
            if isinstance(error, PestleError) and generation.error is None:
                self._count_failure(error)
            generation.close()
            raise
        return generation

    async def _begin_in_time(
        self, opened: _Open, generation: Generation, request: GenerationRequest | EmbeddingRequest
    ) -> None:
        """Begin, and see to it that the whole request ends in time. Raises DeadlineExceededError, too."""
        if not (seconds := self._request_timeout):
            await self._begin(generation, request)
            return
        error = DeadlineExceededError(f"the request took longer than the {seconds:g} s that this server allows")
        loop = asyncio.get_running_loop()
        deadline = loop.time() + seconds
        try:
            async with asyncio.timeout_at(deadline):
                await self._begin(generation, request)
        except TimeoutError:
            raise error from None
        opened.deadline = loop.call_at(deadline, self._worker.fail, generation, error)

    async def _begin(self, generation: Generation, request: GenerationRequest | EmbeddingRequest) -> None:
        admitted = time.monotonic()
        if isinstance(request, EmbeddingRequest):
            await self._begin_embedding(generation, request, admitted)
            return
        check_ids(list(request.sampling.logit_bias), self._vocabulary_size, "logit_bias")
        context_length = self._info.context_length
        rendered = [await self._rendered(prompt) for prompt in request.prompts]
        prompts = [prompt.tokens for prompt in rendered]
        grammar = await self._grammar(request, rendered[0].end)
        budgets = [
            answer_tokens(prompt, tokens, context_length, request)
            for prompt, tokens in zip(request.prompts, prompts, strict=True)
        ]
        check_scored(prompts, request)
        self._check_served()
        if request.echo:
            generation.echoes = [await self.text.echo(prompt) for prompt in request.prompts]
        generation.prompt_tokens = sum(map(len, prompts)) // _BYTES_PER_TOKEN
        generation.prompt_end = rendered[0].end
        generation.has_certain_calls = bool(request.tools and grammar and grammar.grammar)
        self._metrics.prompt_tokens.inc(generation.prompt_tokens)
        choices = itertools.product(zip(prompts, budgets, strict=True), range(request.n))
        messages = [self._generate(request, tokens, budget, k, grammar) for (tokens, budget), k in choices]
        self._forecast.check(request, messages)
        for index, message in enumerate(messages):
            self._forecast.seen.add(message.prompt)
            self._worker.start(Sequence(generation, index, message, admitted))
        await generation.accepted()

    async def _begin_embedding(self, generation: Generation, request: EmbeddingRequest, admitted: float) -> None:
        number = self._request_numbers.__next__
        command = await embed_command(request, self._text, number, self._info, self._vocabulary_size)
        self._check_served()
        generation.prompt_tokens = count_tokens(command)
        self._metrics.prompt_tokens.inc(generation.prompt_tokens)
        self._worker.start(Sequence(generation, 0, command, admitted))
        await generation.accepted()

    def _check_served(self) -> None:
        """Raise the error of what happened while a prompt was tokenized."""
        if self.failure is not None:
            raise self._failed_error()
        if self._drained:
            raise self._draining_error()

    async def _rendered(self, prompt: Prompt) -> Rendered:
        number = next(self._request_numbers)
        if isinstance(prompt, ChatPrompt):
            return await self._text.render(render_chat(number, prompt))
        if isinstance(prompt, TextPrompt):
            return await self._text.render(RenderText(number, prompt.text))
        if isinstance(prompt, InfillPrompt):
            if isinstance(prompt.before, TextPrompt):
                return await self._text.render(RenderInfill(number, prompt.before.text, prompt.after))
            ids = token_prompt(prompt.before.tokens, self._vocabulary_size)
            return await self._text.render(RenderInfill(number, "", prompt.after, ids))
        return Rendered(number, token_prompt(prompt.tokens, self._vocabulary_size))

    async def _grammar(self, request: GenerationRequest, prompt_end: str) -> Compiled | None:
        if (asked := grammar_asked(request)) is None:
            return None
        number = next(self._request_numbers)
        return await self._text.compile(CompileGrammar(number, asked.kind, asked.source, asked.param, prompt_end))

    def _generate(
        self, request: GenerationRequest, tokens: bytes, budget: int, k: int, grammar: Compiled | None
    ) -> Generate:
        sampling = request.sampling
        seed = 0 if sampling.seed is None and self._load.deterministic else sampling.seed
        if seed is not None:
            sampling = msgspec.structs.replace(sampling, seed=seed + k)
        return Generate(
            request=next(self._request_numbers),
            prompt=tokens,
            max_tokens=budget,
            sampling=sampling,
            stop=request.stop,
            ignore_eos=request.ignore_eos,
            top_logprobs=request.top_logprobs,
            request_id=request.request_id,
            client=request.client,
            priority=request.priority,
            min_tokens=request.min_tokens,
            stop_tokens=request.stop_tokens,
            grammar=(grammar.grammar or None) if grammar else None,
            trigger=grammar.trigger if grammar else None,
            shown=shown_tokens(request, self._info),
            prompt_logprobs=request.prompt_logprobs,
            end_logprobs=request.end_logprobs,
            reuse_prefix=request.reuse_prefix,
            timings_per_token=request.timings_per_token,
        )

    # ---- inside ----

    def _check_state(self) -> None:
        state = self.state
        if state is PoolState.FAILED:
            raise self._failed_error()
        if state is PoolState.DRAINING:
            raise self._draining_error()
        if state is PoolState.LOADING:
            raise LoadingError(
                f"the model {self._info.id!r} is being loaded; try again in a moment",
                retry_after=_RETRY_AFTER_LOADING_SECONDS,
            )

    def _failed_error(self) -> ModelFailedError:
        return ModelFailedError(f"the model {self._info.id!r} has failed and is not served; the server's log says why")

    def _draining_error(self) -> DrainingError:
        return DrainingError(
            "the server is shutting down and takes no new work", retry_after=_RETRY_AFTER_LOADING_SECONDS
        )

    def _count_failure(self, error: PestleError) -> None:
        self._metrics.failure(error.code or error.type)

    def _fail_all(self, error: PestleError) -> None:
        self._text.fail_all(error)
        self._worker.fail_all(error)

    def _supervise(
        self,
        name: str,
        command: AbstractSequence[str],
        messages: Any,
        client: TextClient | WorkerClient,
        breaker: Breaker,
    ) -> Supervisor:
        return Supervisor(name, command, self._load, msgspec.msgpack.Decoder(messages), client, self, breaker)


def _cut_off_error() -> DrainingError:
    return DrainingError(
        "the server shut down before this answer was complete", retry_after=_RETRY_AFTER_LOADING_SECONDS
    )


def _version() -> str:
    from importlib.metadata import version  # noqa: PLC0415 - once a worker

    return version("pestle")
