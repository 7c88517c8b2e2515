"""What the tests of HTTP's edge say and hear."""

from __future__ import annotations

import json
import socket
from typing import Any

import msgspec

CHAT = "/v1/chat/completions"
MODEL = "org/scripted"


def chat(**changes: Any) -> bytes:
    return msgspec.json.encode({"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], **changes})


def error_of(body: bytes) -> dict[str, Any]:
    document = json.loads(body)
    assert set(document) == {"error"}
    assert set(document["error"]) == {"message", "type", "param", "code"}
    error: dict[str, Any] = document["error"]
    assert isinstance(error["message"], str)
    assert error["message"]
    return error


def post_bytes(body: bytes, extra: str = "") -> bytes:
    head = (
        f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n{extra}"
    )
    return head.encode() + b"\r\n" + body


def read_all(connection: socket.socket) -> bytes:
    data = b""
    while chunk := connection.recv(65536):
        data += chunk
    return data
