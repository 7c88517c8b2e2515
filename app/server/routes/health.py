"""GET /livez: the process lives. GET /health: it can answer requests."""

from typing import Any

from litestar import Response, get
from litestar.handlers import HTTPRouteHandler

from app.errors import DrainingError, LoadingError, ModelFailedError, PestleError
from app.pool.pool import Pool
from app.pool.request import PoolState
from app.server.exceptions import error_document, retry_headers

_NO_STORE = {"cache-control": "no-store"}


def handlers(pool: Pool) -> list[HTTPRouteHandler]:
    """Return the routes."""

    @get("/livez", sync_to_thread=False)
    def livez() -> Response[dict[str, str]]:
        return Response({"status": "alive"}, headers=_NO_STORE)

    @get("/health", sync_to_thread=False)
    def health() -> Response[dict[str, Any]]:
        state = pool.state
        models = [model.id for model in pool.models()]
        if state is PoolState.READY:
            return Response({"status": state.value, "models": models}, headers=_NO_STORE)
        error = _reason(state, pool.failure)
        return Response(
            {"status": state.value, "models": models, **error_document(error)},
            status_code=error.status,
            headers=_NO_STORE | retry_headers(error),
        )

    return [livez, health]


def _reason(state: PoolState, failure: str | None) -> PestleError:
    if state is PoolState.LOADING:
        return LoadingError("the model is being loaded", retry_after=1)
    if state is PoolState.DRAINING:
        return DrainingError("the server finishes its streams and takes no new request", retry_after=1)
    return ModelFailedError(failure or "the model failed", retry_after=30)
