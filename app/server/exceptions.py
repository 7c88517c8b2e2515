"""Every failure in OpenAI's shape: an object `error` with message, type, param and code."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import msgspec
from litestar.exceptions import HTTPException
from litestar.response import Response

from app.errors import MethodNotAllowedError, PestleError, RequestError, RouteNotFoundError, UnsupportedRouteError
from app.observability.logging import get_logger
from app.server.disconnect import ClientGoneError
from app.server.exchange import exchange_of
from app.server.routes.elsewhere import not_done

if TYPE_CHECKING:
    from litestar import Litestar
    from litestar.connection import Request
    from litestar.types import ExceptionHandlersMap

CLIENT_CLOSED_REQUEST = 499  # nginx's number, for logs; nobody receives it
_RETRY_STATUSES = (429, 503)

_log = get_logger(__name__)


def error_document(error: PestleError) -> dict[str, Any]:
    """Return the error as clients see it, also in the middle of a stream."""
    return {"error": {"message": error.message, "type": error.type, "param": error.param, "code": error.code}}


def retry_headers(error: PestleError) -> dict[str, str]:
    """Return when trying again makes sense, for the errors of which that is true."""
    if error.status not in _RETRY_STATUSES:
        return {}
    seconds = max(0.05, error.retry_after if error.retry_after is not None else 1.0)
    return {"retry-after": str(math.ceil(seconds)), "retry-after-ms": str(math.ceil(seconds * 1000))}


def error_response(error: PestleError, headers: dict[str, str] | None = None) -> Response[bytes]:
    """Return the answer for an error."""
    return Response(
        msgspec.json.encode(error_document(error)),
        status_code=error.status,
        media_type="application/json",
        headers=retry_headers(error) | (headers or {}),
    )


def unexpected(error: Exception) -> PestleError:
    """Log what should not have happened, with its traceback; return what the client may know of it."""
    _log.error("an unexpected error", exc_info=error)
    return PestleError("an internal error: the server's log has the details under this x-request-id")


def _on_pestle_error(request: Request[Any, Any, Any], error: PestleError) -> Response[bytes]:
    exchange_of(request.scope).error_code = error.code or error.type
    closing = {"connection": "close"} if error.status == 408 else None
    return error_response(error, closing)


def _on_client_gone(request: Request[Any, Any, Any], _error: ClientGoneError) -> Response[bytes]:
    exchange_of(request.scope).error_code = "client_gone"
    return Response(b"", status_code=CLIENT_CLOSED_REQUEST, media_type="application/json")


def _on_http_exception(request: Request[Any, Any, Any], error: HTTPException) -> Response[bytes]:
    """Translate the framework's own refusals."""
    path = request.scope["path"][:200]
    if error.status_code == 404:
        if (what := not_done(request.scope["path"])) is not None:
            text = f"Pestle serves text models and does not do {what}: there is no {path!r}"
            return _on_pestle_error(request, UnsupportedRouteError(text))
        return _on_pestle_error(request, RouteNotFoundError(f"there is no {path!r} here: the API is under /v1"))
    if error.status_code == 405:
        methods = _allowed_methods(request.app, request.scope["path"])
        refusal = MethodNotAllowedError(f"{path!r} takes {methods}, not {request.scope['method'][:20]}")
        response = _on_pestle_error(request, refusal)
        response.set_header("allow", methods)
        return response
    if error.status_code < 500:
        return _on_pestle_error(request, RequestError(error.detail))
    return _on_unexpected(request, error)


def _on_unexpected(request: Request[Any, Any, Any], error: Exception) -> Response[bytes]:
    return _on_pestle_error(request, unexpected(error))


def _allowed_methods(app: Litestar, path: str) -> str:
    wanted = "/" + path.strip("/")
    methods = {
        str(method)
        for route in app.routes
        for method in getattr(route, "methods", ())
        if route.path == wanted or (route.path.endswith("{model_id:path}") and wanted.startswith("/v1/models/"))
    }
    if "GET" in methods:
        methods.add("HEAD")
    return ", ".join(sorted(methods)) or "GET"


HANDLERS: ExceptionHandlersMap = {
    PestleError: _on_pestle_error,
    ClientGoneError: _on_client_gone,
    HTTPException: _on_http_exception,
    Exception: _on_unexpected,
}
