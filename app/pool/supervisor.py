"""Keeps one child alive: starts it, notices its death, replaces it with back-off, gives up when it dies too often."""

from __future__ import annotations

import asyncio
import collections
import time
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from app.messages import Hello, LoadFailed, LoadModel
from app.observability.logging import get_logger
from app.pool.child import ChildProcess

if TYPE_CHECKING:
    from collections.abc import Sequence

    from app.pool.link import Link

log = get_logger(__name__)

_FIRST_BACKOFF_SECONDS = 0.1
_LONGEST_BACKOFF_SECONDS = 5.0
_GRACE_AFTER_EOF_SECONDS = 1.0
_GRACE_AT_CLOSE_SECONDS = 1.5


class Breaker(msgspec.Struct, frozen=True):
    """How many deaths without a culprit, in how many seconds, mark the model failed."""

    deaths: int = 3
    window: float = 60.0


class Client(Protocol):
    """What a child works for. Calls come from the event loop and must not block."""

    def on_ready(self, hello: Hello) -> None:
        """Take notice that a fresh child has loaded the model."""

    def on_message(self, message: Any) -> None:
        """Take any other frame."""

    def on_down(self) -> bool:
        """Take notice of a child's death; return whether a request is to blame: such a death doesn't count."""


class Owner(Protocol):
    """Whoever wants to know what children there are."""

    def child_ready(self, hello: Hello) -> None:
        """Take notice that a fresh child has loaded the model; its client hears of it next."""

    def child_failed(self, reason: str) -> None:
        """Take notice that no child will be started any more."""


class Supervisor:
    """One child and its successors."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        load: LoadModel,
        decoder: msgspec.msgpack.Decoder[Any],
        client: Client,
        owner: Owner,
        breaker: Breaker,
    ) -> None:
        self.hello: Hello | None = None  # of the child that runs now; None while there is none
        self.restarts = 0
        self._name = name
        self._command = command
        self._load = load
        self._decoder = decoder
        self._client = client
        self._owner = owner
        self._breaker = breaker
        self._child: ChildProcess | None = None
        self._task: asyncio.Task[None] | None = None
        self._deaths: collections.deque[float] = collections.deque()
        self._deaths_in_load = 0  # in a row
        self._loaded = False  # the child that runs now, or ran last, has said Hello
        self._load_failure: str | None = None
        self._spawn_failure: str | None = None
        self._closing = False

    @property
    def pid(self) -> int | None:
        """Process id of the child that runs now."""
        return self._child.pid if self._child is not None else None

    def spawn(self) -> None:
        """Start the first child; needs no event loop. Raises OSError when no process can be started."""
        self._child = ChildProcess(self._name, self._command, self._load)

    def start(self) -> None:
        """Begin to supervise, in the running event loop."""
        self._task = asyncio.get_running_loop().create_task(self._run(), name=f"supervise {self._name}")

    def send(self, message: msgspec.Struct) -> None:
        """Send a frame to the child that runs now; without one it goes nowhere."""
        if self._child is not None and self._child.link is not None:
            self._child.link.send(message)

    def kill(self) -> None:
        """Kill the child that runs now; a new one follows."""
        if self._child is not None:
            self._child.kill()

    async def close(self) -> None:
        """End the child for good, within two seconds."""
        self._closing = True
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        self.hello = None
        await self._reap(_GRACE_AT_CLOSE_SECONDS)

    async def _run(self) -> None:
        try:
            while not self._closing:
                link = await self._begin()
                if link is not None:
                    await link.closed
                self.hello = None
                blamed = self._client.on_down()  # before anything waits: nothing more may be sent to the dead
                reason = await self._ending()
                delay = self._backoff(blamed=blamed)
                if delay is None:
                    log.error("%s has failed", self._name, extra={"reason": reason})
                    self._owner.child_failed(self._load_failure or reason)
                    return
                log.warning(
                    "%s died, starting another",
                    self._name,
                    extra={"reason": reason, "blamed": blamed, "backoff": delay},
                )
                await asyncio.sleep(delay)
                self.restarts += 1
        except Exception:
            log.exception("the supervision of %s broke", self._name)
            self._owner.child_failed(f"the supervision of {self._name} broke; the log has the traceback")

    async def _begin(self) -> Link | None:
        """Start a child, if none was spawned, and attach it; None when no process can be started."""
        self._loaded = False
        if self._child is None:
            try:
                self.spawn()
            except OSError as error:
                self._spawn_failure = error.strerror
                return None
        child = self._child
        assert child is not None  # noqa: S101 - spawned above
        return await child.attach(self._decoder, self._on_message)

    async def _ending(self) -> str:
        """Return why the child that is gone ended."""
        if self._child is None:
            return f"{self._name} cannot be started: {self._spawn_failure}"
        return f"{self._name} died: {await self._reap(_GRACE_AFTER_EOF_SECONDS)}"

    async def _reap(self, grace: float) -> str:
        child = self._child
        if child is None:
            return ""
        ending = await child.reap(grace)
        self._child = None
        lines = child.last_lines()
        return f"{ending}; its last lines were:\n{lines}" if lines else ending

    def _on_message(self, message: Any) -> None:
        if isinstance(message, Hello):
            self.hello = message
            self._deaths_in_load, self._loaded = 0, True
            self._owner.child_ready(message)
            self._client.on_ready(message)
        elif isinstance(message, LoadFailed):
            self._load_failure = message.message
        else:
            self._client.on_message(message)

    def _backoff(self, *, blamed: bool) -> float | None:
        """Return the seconds until the next start, None when there shall be none."""
        if self._load_failure is not None:
            return None
        now = time.monotonic()
        if not blamed:
            self._deaths.append(now)
            self._deaths_in_load += 0 if self._loaded else 1  # loading may take longer than the window
        while self._deaths and self._deaths[0] < now - self._breaker.window:
            self._deaths.popleft()
        if max(len(self._deaths), self._deaths_in_load) >= self._breaker.deaths:
            return None
        doublings = max(len(self._deaths) - 1, 0)
        return min(_FIRST_BACKOFF_SECONDS * float(2**doublings), _LONGEST_BACKOFF_SECONDS)
