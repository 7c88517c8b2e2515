"""A local server that speaks as much of the Hub's protocol as fetching a model takes, and lies as a test wants it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """One repository: `files` by name; the rest are faults.

    `cut` ends the first so many transfers of weights half way, `stall` waits so many seconds in the middle of the
    first, `swap` sends other bytes of a file than announced; none of these touches ranges with an end, whose bytes
    `alter` changes. `no_range` answers a range with the whole, `shift` with what lies so many bytes further on, `more`
    is sent after a file's end, `encoding` is what the answer claims. `redirect` is a host that weights are sent from,
    `loops` sends from there to itself. `extra` are names that the listing has besides, `status` is answered to every
    request.
    """

    files: dict[str, bytes]
    repo: str = "tiny/Tiny-1M-Instruct"
    token: str | None = None
    cut: int = 0
    stall: float = 0.0
    swap: dict[str, bytes] = field(default_factory=dict)
    alter: Callable[[bytes], bytes] = bytes
    no_range: bool = False
    shift: int = 0
    more: bytes = b""
    encoding: str | None = None
    redirect: str = ""
    loops: bool = False
    status: int | None = None
    extra: list[str] = field(default_factory=list)
    url: str = ""
    requests: list[str] = field(default_factory=list)
    secrets: list[str] = field(default_factory=list)  # tokens that came to the other address
    heard: Callable[[str], None] = str  # is given each request before its answer

    @classmethod
    def of(cls, folder: Path, **faults: Any) -> Hub:
        """Serve a checkpoint's folder."""
        return cls({path.name: path.read_bytes() for path in sorted(folder.iterdir())}, **faults)

    def listing(self) -> dict[str, Any]:
        """Return what the API says of the repository."""
        siblings = [self._sibling(name, content) for name, content in self.files.items()]
        siblings += [{"rfilename": name, "size": 1, "blobId": "0" * 40} for name in self.extra]
        return {
            "_id": "1",
            "id": self.repo,
            "modelId": self.repo,
            "sha": COMMIT,
            "private": False,
            "siblings": siblings,
        }

    def tree(self) -> list[dict[str, Any]]:
        """Return the listing of the tree."""
        return [
            {"type": "file", "path": item["rfilename"], "size": item["size"], "oid": item["blobId"]}
            | ({"lfs": item["lfs"]} if "lfs" in item else {})
            for item in self.listing()["siblings"]
        ]

    def etag(self, name: str) -> str:
        """Return the hash by which the Hub names a file's content."""
        content = self.files[name]
        if name.endswith(".safetensors"):
            return hashlib.sha256(content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    def _sibling(self, name: str, content: bytes) -> dict[str, Any]:
        entry: dict[str, Any] = {"rfilename": name, "size": len(content), "blobId": self.etag(name)[:40]}
        if name.endswith(".safetensors"):
            entry["lfs"] = {"sha256": self.etag(name), "size": len(content), "pointerSize": 130}
        return entry


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        hub = self.hub
        hub.requests.append(f"{self.command} {self.path} {self.headers.get('Range', '')}".strip())
        hub.heard(hub.requests[-1])
        if self.path.startswith("/elsewhere/") and "Authorization" in self.headers:
            hub.secrets.append(self.headers["Authorization"])
        if hub.status is not None:
            self._send(hub.status, b"{}", body)
        elif self.path.startswith("/elsewhere/") and hub.loops:
            self._send(302, b"", body, {"Location": self.path})
        elif self.path.startswith("/elsewhere/"):
            self._content(self.path.removeprefix("/elsewhere/"), body)
        elif hub.token is not None and self.headers.get("Authorization") != f"Bearer {hub.token}":
            self._send(401, b"{}", body, {"X-Error-Code": "RepoNotFound"})
        elif self.path.startswith(f"/api/models/{hub.repo}/tree/"):
            self._send(200, json.dumps(hub.tree()).encode(), body, {"Content-Type": "application/json"})
        elif self.path.startswith(f"/api/models/{hub.repo}"):
            self._revision(body)
        elif self.path.startswith(f"/{hub.repo}/resolve/{COMMIT}/"):
            self._file(self.path.partition(f"/{COMMIT}/")[2], body)
        else:
            self._send(404, b"{}", body, {"X-Error-Code": "RepoNotFound"})

    def _revision(self, body: bool) -> None:
        revision = self.path.partition("/revision/")[2].partition("?")[0]
        if revision in {"", "main", COMMIT}:
            self._send(200, json.dumps(self.hub.listing()).encode(), body, {"Content-Type": "application/json"})
        else:
            self._send(404, b"{}", body, {"X-Error-Code": "RevisionNotFound"})

    def _file(self, name: str, body: bool) -> None:
        hub = self.hub
        if name not in hub.files:
            self._send(404, b"", body, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        elif hub.redirect and name.endswith(".safetensors"):
            headers = {
                "Location": f"http://{hub.redirect}:{hub.url.rpartition(':')[2]}/elsewhere/{name}",
                "X-Repo-Commit": COMMIT,
                "X-Linked-Etag": f'"{hub.etag(name)}"',
                "X-Linked-Size": str(len(hub.files[name])),
            }
            self._send(302, b"", body, headers)
        else:
            self._content(name, body)

    def _content(self, name: str, body: bool) -> None:
        hub, content, status = self.hub, self.hub.files[name], 200
        headers = {"ETag": f'"{hub.etag(name)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        weights = name.endswith(".safetensors")
        start, _, last = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
        if not last:
            content = hub.swap.get(name, content)
        if "Range" in self.headers and not hub.no_range:
            first, end = int(start) + hub.shift, min(int(last) + 1 if last else len(content), len(content))
            headers["Content-Range"] = f"bytes {first}-{end - 1}/{len(content)}"
            content, status = content[first:end], 206
        if weights and last:
            content = hub.alter(content)
        if weights and hub.encoding:
            headers["Content-Encoding"] = hub.encoding
        if body and weights and hub.more and not last:
            self._chunked(status, content + hub.more, headers)
        elif body and weights and not last and (hub.cut or hub.stall):
            self._half(status, content, headers)
        else:
            self._send(status, content, body, headers)

    def _chunked(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self._head(status, None, headers | {"Transfer-Encoding": "chunked"})
        self.wfile.write(b"%x\r\n%s\r\n0\r\n\r\n" % (len(content), content))

    def _half(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        hub = self.hub
        self._head(status, len(content), headers)
        self.wfile.write(content[: len(content) // 2])
        if hub.stall:
            wait, hub.stall = hub.stall, 0.0
            time.sleep(wait)
        else:
            hub.cut -= 1
        self.close_connection = True

    def _send(self, status: int, content: bytes, body: bool, headers: dict[str, str] | None = None) -> None:
        self._head(status, len(content), headers or {})
        if body:
            self.wfile.write(content)

    def _head(self, status: int, length: int | None, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in (headers if length is None else {**headers, "Content-Length": str(length)}).items():
            self.send_header(name, value)
        self.end_headers()


def command(out: Path, *arguments: str, name: str = "tiny/Tiny-1M-Instruct") -> list[str]:
    """Return the command that quantizes a model of the Hub."""
    return [
        sys.executable,
        "-P",
        "-m",
        "quantize",
        name,
        "--type",
        "q8_0",
        "--out",
        str(out),
        "--no-measure",
        *arguments,
    ]


def environment(hub: Hub, home: Path, **variables: str) -> dict[str, str]:
    """Return an environment in which this is the Hub, `home` holds the cache, and a server may be silent for 1 s."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    ours = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DOWNLOAD_TIMEOUT": "1"}
    return {**inherited, **ours, **variables}


@contextlib.contextmanager
def running(hub: Hub) -> Iterator[Hub]:
    """Serve until the block ends."""
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
