"""The engine: one thread that turns waiting requests into tokens, one `llama_decode` after the other.

`submit` may be called from any thread; everything else belongs to the thread that calls `run`.
"""

from __future__ import annotations

import queue
import time
from typing import TYPE_CHECKING

import numpy as np

from app.errors import DecodeError, EngineError, NoKvSlotError, RequestError
from app.llama.batch import Batch
from app.messages import Accepted, Cancel, Generate, Load, Piece, Refused, Step
from app.worker.budget import FixedBudget, StepBudget
from app.worker.drawing import Drawing
from app.worker.grammar import Grammars
from app.worker.kv import KvCache
from app.worker.prefix_store import PrefixStore
from app.worker.prefixes import Prefixes, PrefixLoaded
from app.worker.request import new_sequence
from app.worker.sampling.batch import NO_TOKEN
from app.worker.sampling.breakers import BreakerTable
from app.worker.scheduler import Scheduler
from app.worker.scoring import first_token, score_prompts
from app.worker.sequence import Sequence
from app.worker.token_names import TokenNames
from app.worker.verification import joined

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt

    from app.llama.context import Context
    from app.llama.model import Model
    from app.messages import Embed, FinishReason, TokenLogprob
    from app.worker.draft import DraftModel
    from app.worker.kv import Placement
    from app.worker.prefix_files import PrefixFiles
    from app.worker.sampling.logprobs import RowLogprobs
    from app.worker.scheduler import Chunk, Schedule
    from app.worker.speculation import Speculation

_COMPUTE_FAILED = -3
_FAILURES_IN_A_ROW = 3


class Engine:
    """One context's slots, queue and step loop."""

    def __init__(
        self,
        model: Model,
        context: Context,
        publish: Callable[[Accepted | Refused | Step], None],
        itl_target: float | None = None,
        store: PrefixStore | None = None,
        files: PrefixFiles | None = None,
        speculation: Speculation | None = None,
        draft: DraftModel | None = None,
        *,
        deterministic: bool = False,
    ) -> None:
        """Serve `context`; `publish` is called from the engine's thread and from those that submit.

        `itl_target`: seconds between two tokens of a stream; None chooses it from measured steps. `store` and `files`
        keep prefixes that slots lose. `speculation` guesses tokens, with the `draft` model if there is one; the context
        must have rows of logits for them. `deterministic`: a sequence's computation depends on itself alone; takes a
        context of one slot, and no speculation.
        """
        self._vocabulary = model.vocabulary
        self._pieces = model.vocabulary.pieces
        self._names = TokenNames(model.vocabulary)
        self._eog = model.vocabulary.eog
        self._eog_ids = np.array(sorted(self._eog), np.int32)
        self._breakers = BreakerTable(lambda: model.vocabulary.words, model.vocabulary.tokenize)
        self._context = context
        self._batch = Batch(context.batch_size)
        self._cache = KvCache(
            context.slots, can_rewind=model.can_rewind, capacity=context.shared_tokens, reuses=not deterministic
        )
        budget = FixedBudget(context.batch_size) if deterministic else StepBudget(itl_target)
        self._scheduler = Scheduler(self._cache, context.batch_size, budget, speculation, context.prompt_rows)
        self._commands: queue.SimpleQueue[Sequence | Cancel | PrefixLoaded] = queue.SimpleQueue()
        store = PrefixStore(0) if store is None else store
        self._draft = draft
        self._prefixes = Prefixes(context, store, files, self._commands.put)
        self._grammars = Grammars(model.vocabulary, self._commands.put)
        self._drawing = Drawing(self._grammars, self._settle)
        self._publish = publish
        self._pieces_of_step: list[Piece] = []
        self._accepted = 0  # guesses of this step that came true
        self._failures = 0  # decodes that failed, one after the other
        self._fatal: DecodeError | None = None
        self._no_logits = np.empty((0, self._vocabulary.size), np.float32)
        self._capacity = context.shared_tokens or context.slots * context.context_length

    def submit(self, command: Generate | Embed | Cancel) -> None:
        """Queue a request, answering Accepted or Refused at once; or cancel one."""
        if isinstance(command, Cancel):
            self._commands.put(command)
            return
        try:
            sequence = new_sequence(
                command,
                self._vocabulary.size,
                self._context.context_length,
                self._eog_ids,
                time.perf_counter(),
                self._breakers,
                can_score=self._context.prompt_rows > 0,
            )
        except RequestError as error:
            self._publish(Refused(command.request, type(error).__name__, error.message, error.param))
            return
        sequence.shown = self._names.shown(command.shown if isinstance(command, Generate) else ())
        self._publish(Accepted(command.request))
        self._commands.put(sequence)

    def warm_up(self) -> None:
        """Compute two tokens and forget them: a broken graph shows before Hello, and how long a step takes.

        The first one pages the weights in. Raises DecodeError.
        """
        for position in range(2):
            self._batch.clear()
            self._batch.add(0, position, np.zeros(1, np.int32), wants_logits=True)
            started = time.perf_counter()
            self._context.decode(self._batch)
        self._scheduler.budget.observe_streams(time.perf_counter() - started)
        self._context.memory.clear_all()

    def run(self) -> None:
        """Step for ever; sleeps when there is nothing to do. Raises EngineError when the context is beyond repair."""
        while True:
            self.step()

    def step(self) -> None:
        """Drain commands, schedule, decode, sample, update, publish one frame."""
        self._drain_commands()
        started = time.perf_counter()
        self._prepare_slots(self._scheduler.admit(), started)
        schedule = self._scheduler.schedule()
        drawn = self._drawing.draw(schedule, *self._decode(schedule))
        now = time.perf_counter()
        generated = 0
        for sequence, token, detail in drawn:
            if sequence.slot is not None:  # else it has ended before the tokens that came out of its guesses
                self._update(sequence, token, detail, now)
                generated += 1
        self._grammars.advance([sequence for sequence, _, _ in drawn])
        self._publish_step(schedule, generated, started)

    def check_integrity(self) -> None:
        """Compare the books with llama.cpp's memory; call it between steps. Raises EngineError."""
        memory = self._context.memory
        if differences := self._cache.differences([memory.length(slot.index) for slot in self._cache.slots]):
            raise EngineError("the KV cache is not what its books say: " + "; ".join(differences))

    def _drain_commands(self) -> None:
        idle = not self._scheduler.has_work
        while idle or not self._commands.empty():
            command = self._commands.get()
            idle = False
            if isinstance(command, Sequence):
                if self._grammars.is_compiled(command):
                    self._add(command)
            elif isinstance(command, PrefixLoaded):
                self._prefixes.take(command)
            elif self._grammars.cancel(command.request):
                self._pieces_of_step.append(Piece(command.request, "", 0, "cancelled"))
            elif sequence := self._scheduler.find(command.request):
                self._end(sequence, "cancelled")

    def _add(self, sequence: Sequence) -> None:
        self._scheduler.add(sequence)
        if sequence.score is not None:
            entries = [first_token(sequence, self._names)]
            self._pieces_of_step.append(Piece(sequence.request, "", 0, prompt_logprobs=entries))
        if sequence.is_full and (sequence.score is None or sequence.n_prompt == 1):  # there is nothing to compute
            self._end(sequence, "length")
        elif sequence.reuses_prefix:
            known = sequence.tokens[: sequence.n_tokens]
            self._prefixes.offer(sequence, self._cache.longest_prefix(known, sequence.scope))

    def _prepare_slots(self, admitted: list[tuple[Sequence, Placement]], now: float) -> None:
        memory = self._context.memory
        for sequence, placement in admitted:
            index = placement.slot.index
            self._prefixes.rescue(placement, self._scheduler.budget.prompt_token_seconds)
            if sequence.reuses_prefix and (restored := self._prefixes.restore(sequence, placement)):
                self._scheduler.set_prefix(sequence, restored)
            else:
                if placement.donor is not None:
                    memory.copy(placement.donor.index, index)
                if not memory.rewind(index, placement.cached):
                    memory.clear(index)
                    self._scheduler.set_prefix(sequence, 0)
            if not sequence.admitted:  # else it was preempted
                sequence.admitted, sequence.n_cached = now, sequence.n_computed

    def _decode(self, schedule: Schedule) -> tuple[list[Sequence], npt.NDArray[np.float32]]:
        chunks, batch = schedule.chunks, self._batch
        if not chunks:
            return [], self._no_logits
        batch.clear()
        drafting = self._draft.write(schedule) if schedule.drafted and self._draft is not None else 0.0
        _fill(batch, chunks)
        started = time.perf_counter()
        try:
            logits = self._context.decode(batch)
        except NoKvSlotError as error:
            self._make_room(error)
            return [], self._no_logits
        except DecodeError as error:
            self._drop(chunks, error)
            return [], self._no_logits
        self._failures = 0
        self._scheduler.observe(chunks, drafting + time.perf_counter() - started)
        self._scheduler.advance(chunks)
        if schedule.scoring:
            logits = self._score(chunks, logits)
        return [chunk.sequence for chunk in chunks if chunk.wants_logits], logits

    def _score(self, chunks: list[Chunk], logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Pass on the log probabilities of prompts' tokens; return the rows that are drawn from."""
        scored, logits = score_prompts(chunks, logits, self._names, self._drawing.threads)
        for sequence, entries in scored:
            self._pieces_of_step.append(Piece(sequence.request, "", 0, prompt_logprobs=entries))
        for chunk in chunks:
            if chunk.sequence.is_full and not chunk.sequence.n_pending:  # nothing is to be drawn
                self._end(chunk.sequence, "length")
        return logits

    def _settle(self, chunk: Chunk, accepted: int) -> None:
        """Cut from the memory the guesses that did not come true."""
        self._accepted += accepted
        length = self._scheduler.settle(chunk, accepted)
        if accepted < chunk.guesses:
            self._context.memory.rewind(chunk.slot.index, length)

    def _make_room(self, error: NoKvSlotError) -> None:
        """Free what nobody uses, so that the next step can try again; else put the youngest sequence back."""
        idle = [slot for slot in self._cache.slots if not slot.busy and slot.length]
        for slot in idle:
            self._context.memory.clear(slot.index)
            self._cache.clear(slot)
        if idle:
            return
        youngest = self._scheduler.youngest()
        if len(self._scheduler.running) == 1:
            self._fail(youngest, error.message)
        else:
            self._context.memory.clear(self._scheduler.preempt(youngest).index)

    def _drop(self, chunks: list[Chunk], error: DecodeError) -> None:
        self._failures += 1
        if self._context.last_code == _COMPUTE_FAILED or self._failures >= _FAILURES_IN_A_ROW:
            self._fatal = error
        for chunk in chunks:
            self._fail(chunk.sequence, error.message)

    def _update(self, sequence: Sequence, token: int, detail: RowLogprobs | None, now: float) -> None:
        grammar = sequence.grammar
        if grammar is not None and grammar.failure is not None:
            self._fail(sequence, f"the grammar cannot be followed: {grammar.failure}", "GrammarRefusedError")
            return
        if token == NO_TOKEN:
            if grammar is not None and grammar.is_at_end(self._eog_ids):  # which ignore_eos forbids
                self._end(sequence, "stop", sequence.detokenizer.flush())
            else:
                self._fail(sequence, "the model's logits hold no finite number; its file or the device may be damaged")
            return
        if sequence.n_drawn == 0:
            sequence.first_token = now
        sequence.append(token)
        detokenizer = sequence.detokenizer
        entries = None if detail is None else [self._names.logprob(token, detail)]
        if token in self._eog or token in sequence.stop_tokens:
            self._end(sequence, "stop", detokenizer.flush(), entries if sequence.end_logprobs else None)
            return
        text = detokenizer.push(self._pieces[token] or sequence.shown.get(token, b""))
        complete = grammar is not None and grammar.accept(token)
        if complete or sequence.is_full:
            text += detokenizer.flush()
        if complete or detokenizer.stopped:
            self._end(sequence, "stop", text, entries)
        elif sequence.is_full:
            self._end(sequence, "length", text, entries)
        else:
            timings = sequence.timings(now) if sequence.timings_per_token else None
            self._pieces_of_step.append(
                Piece(sequence.request, text, sequence.n_drawn, None, sequence.n_cached, entries, timings=timings)
            )

    def _end(
        self,
        sequence: Sequence,
        reason: FinishReason,
        text: str = "",
        entries: list[TokenLogprob] | None = None,
        error: str | None = None,
        error_name: str = "EngineError",
    ) -> None:
        slot = sequence.slot
        self._scheduler.remove(sequence)
        if slot is not None and reason != "error":
            self._prefixes.keep(slot)
        timings = sequence.timings(time.perf_counter())
        done = (reason, sequence.n_cached, entries, error, timings, error_name)
        self._pieces_of_step.append(Piece(sequence.request, text, sequence.n_drawn, *done))

    def _fail(self, sequence: Sequence, error: str, name: str = "EngineError") -> None:
        slot = sequence.slot
        self._end(sequence, "error", error=error, error_name=name)
        if slot is not None:
            self._context.memory.clear(slot.index)
            self._cache.clear(slot)

    def _publish_step(self, schedule: Schedule, generated: int, started: float) -> None:
        pieces, self._pieces_of_step = self._pieces_of_step, []
        if schedule.guesses:
            pieces = joined(pieces)
        if pieces or schedule.prompt_tokens:
            load = Load(
                running=len(self._scheduler.running),
                waiting=len(self._scheduler.waiting),
                kv_tokens=self._cache.tokens_in_use,
                kv_capacity=self._capacity,
                prompt_tokens_computed=schedule.prompt_tokens,
                tokens_generated=generated,
                preemptions=self._scheduler.preemptions,
                step_seconds=time.perf_counter() - started,
                guessed_tokens=schedule.guesses,
                accepted_tokens=self._accepted,
            )
            self._publish(Step(pieces, load))
        self._accepted = 0
        if self._fatal is not None:
            raise EngineError(f"llama.cpp's context is beyond repair: {self._fatal.message}") from self._fatal


def _fill(batch: Batch, chunks: list[Chunk]) -> None:
    if all(chunk.count == 1 and chunk.wants_logits for chunk in chunks):
        batch.add_streams(
            [chunk.slot.index for chunk in chunks],
            [chunk.start for chunk in chunks],
            [chunk.sequence.newest for chunk in chunks],
        )
        return
    for chunk in chunks:
        tokens = chunk.sequence.tokens[chunk.start : chunk.start + chunk.count]
        batch.add(chunk.slot.index, chunk.start, tokens, wants_logits=chunk.rows)
