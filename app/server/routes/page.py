"""GET / and /static/...: the chat page, from files that are read once."""

import hashlib
from pathlib import Path
from typing import Any

from litestar import Request, Response, get
from litestar.handlers import HTTPRouteHandler
from litestar.params import FromPath

from app.errors import RouteNotFoundError

_FOLDER = Path(__file__).parent.parent / "static"
_MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".ico": "image/x-icon",
}
_HEADERS = {
    "content-security-policy": (
        "default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'; object-src 'none'"
    ),
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-cache",  # keep it, but ask each time: a new version shows at once
}


class _File:
    """One file with its entity tag."""

    def __init__(self, path: Path) -> None:
        self.content = path.read_bytes()
        self.etag = f'"{hashlib.sha256(self.content).hexdigest()[:32]}"'
        self.media_type = _MEDIA_TYPES[path.suffix]

    def answer(self, request: Request[Any, Any, Any]) -> Response[bytes]:
        """Return the file, or 304 when the client has this version."""
        headers = {**_HEADERS, "etag": self.etag}
        known = {tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")}
        if self.etag in known or "*" in known:
            return Response(b"", status_code=304, headers=headers)
        return Response(self.content, headers={**headers, "content-type": self.media_type})


def handlers() -> list[HTTPRouteHandler]:
    """Return the routes. Only the files that are in the folder now can be named: no path is ever built of a URL."""
    files = {path.name: _File(path) for path in sorted(_FOLDER.iterdir()) if path.suffix in _MEDIA_TYPES}

    def serve(name: str, request: Request[Any, Any, Any]) -> Response[bytes]:
        if name not in files:
            raise RouteNotFoundError(f"there is no file {name[:100]!r} here")
        return files[name].answer(request)

    @get("/", sync_to_thread=False)
    def index(request: Request[Any, Any, Any]) -> Response[bytes]:
        return serve("index.html", request)

    @get("/static/{name:str}", sync_to_thread=False)
    def static(request: Request[Any, Any, Any], name: FromPath[str]) -> Response[bytes]:
        return serve(name, request)

    return [index, static]
