"""Runs the server from the first bind to the exit code: uvicorn, the signals, the drain."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import signal
import socket
from typing import TYPE_CHECKING

import uvicorn

from app.errors import EngineError, InterruptedByUserError, ModelLoadError, StorageError, UsageError
from app.observability.logging import get_logger
from app.pool.request import PoolState
from app.server.application import create_app
from app.server.edge import Edge
from app.server.limits import KEEP_ALIVE_SECONDS
from app.server.protocol import BoundedHttpProtocol

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from app.config import ServeSettings
    from app.observability.metrics import Metrics
    from app.pool.pool import Pool

_LAST_WORDS_SECONDS = 2  # for answers that are ready, after the drain
_WATCH_SECONDS = 0.01
_BACKLOG = 2048

_log = get_logger(__name__)


def run(
    pool: Pool, settings: ServeSettings, metrics: Metrics, on_ready: Callable[[str], None] = lambda _url: None
) -> int:
    """Serve until a signal ends it, and return the exit code; `pool.spawn()` has been called.

    `on_ready` gets the base URL once /health answers 200.
    The first SIGTERM or SIGINT drains, a second one ends at once.
    Raises UsageError or StorageError when the address cannot be had, ModelLoadError when the model cannot be loaded,
    EngineError when it failed later.
    """
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        return runner.run(_Run(pool, settings, metrics, on_ready).serve())


class _Run:
    """One life of the server."""

    def __init__(self, pool: Pool, settings: ServeSettings, metrics: Metrics, on_ready: Callable[[str], None]) -> None:
        self._pool = pool
        self._settings = settings
        self._metrics = metrics
        self._on_ready = on_ready
        self._signals: asyncio.Queue[int] = asyncio.Queue()
        self._forced = False

    async def serve(self) -> int:
        """Bind, serve, drain; the pool is closed whatever happens."""
        try:
            listener = bind(self._settings.host, self._settings.port)
            with contextlib.closing(listener), self._signal_handlers():
                await self._pool.start()
                await self._serve_on(listener)
        finally:
            await self._pool.close()
        return InterruptedByUserError.exit_code if self._forced else 0

    async def _serve_on(self, listener: socket.socket) -> None:
        server = build_server(self._pool, self._settings, self._metrics)
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        watching = asyncio.create_task(self._watch_pool(base_url(self._settings.host, listener)))
        signalled = asyncio.create_task(self._signals.get())
        try:
            await asyncio.wait((serving, watching, signalled), return_when=asyncio.FIRST_COMPLETED)
            if signalled.done():
                await self._drain(server)
        finally:
            watching.cancel()
            signalled.cancel()
            server.should_exit = True
            results = await asyncio.gather(serving, watching, return_exceptions=True)
        for result in results:
            if isinstance(result, Exception):
                raise result

    async def _watch_pool(self, url: str) -> None:
        """Call `on_ready` when the model is loaded; raise when it has failed."""
        ready = False
        while self._pool.state is not PoolState.FAILED:
            if not ready and self._pool.state is PoolState.READY:
                ready = True
                _log.info("ready", extra={"url": url})
                self._on_ready(url)
            await asyncio.sleep(_WATCH_SECONDS if not ready else 0.25)
        reason = self._pool.failure or "the model failed"
        raise EngineError(reason) if ready else ModelLoadError(reason)

    async def _drain(self, server: uvicorn.Server) -> None:
        _log.info("draining", extra={"seconds": self._settings.drain_timeout})
        draining = asyncio.create_task(self._pool.drain(self._settings.drain_timeout))
        insisting = asyncio.create_task(self._signals.get())
        await asyncio.wait((draining, insisting), return_when=asyncio.FIRST_COMPLETED)
        if insisting.done():
            self._forced = server.force_exit = True
            _log.warning("a second signal: ending now")
        insisting.cancel()
        draining.cancel()
        await asyncio.gather(draining, insisting, return_exceptions=True)

    @contextlib.contextmanager
    def _signal_handlers(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        numbers = (signal.SIGTERM, signal.SIGINT)
        for number in numbers:
            loop.add_signal_handler(number, self._signals.put_nowait, number)
        try:
            yield
        finally:
            for number in numbers:
                loop.remove_signal_handler(number)


def build_server(pool: Pool, settings: ServeSettings, metrics: Metrics) -> uvicorn.Server:
    """Return uvicorn around the application, with our protocol and without its signal handlers."""
    app = Edge(create_app(pool, settings, metrics), warns_of_unknown_fields=settings.unknown_fields == "warn")
    config = uvicorn.Config(
        app,
        http=BoundedHttpProtocol,
        loop="none",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=_LAST_WORDS_SECONDS,
        backlog=_BACKLOG,
    )
    get_logger("uvicorn").setLevel("WARNING")
    server = _Server(config)
    app.connections = lambda: len(server.server_state.connections)
    return server


class _Server(uvicorn.Server):
    """uvicorn without its own signal handlers, which would not drain."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the signals alone."""
        yield


def bind(host: str, port: int) -> socket.socket:
    """Return a listening socket.

    Raises UsageError when the port is taken or the host is not ours, StorageError when we may not have it.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except OSError as error:
        raise UsageError(f"--host {host!r} is no address here: {error.strerror or error}", param="host") from error
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        if os.name == "posix":
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            message = f"port {port} of {host} is taken: choose another with --port, or 0 for any free one"
            raise UsageError(message, param="port") from error
        if error.errno in (errno.EACCES, errno.EPERM):
            raise StorageError(
                f"port {port} needs rights that we don't have: choose one from 1024", param="port"
            ) from error
        raise UsageError(f"cannot listen on {host}, port {port}: {error.strerror}", param="host") from error
    listener.setblocking(False)
    return listener


def base_url(host: str, listener: socket.socket) -> str:
    """Return the URL to type into a browser on this machine."""
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]", "": "127.0.0.1"}.get(host, f"[{host}]" if ":" in host else host)  # noqa: S104
    return f"http://{shown}:{listener.getsockname()[1]}"


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop  # noqa: PLC0415 - absent on Windows
    except ImportError:
        return None
    return uvloop.new_event_loop
