"""Whatever JSON a client sends, it is a request that the pool can take, or a 400 that names a field."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.errors import RequestError
from app.pool.request import GenerationRequest
from app.server.schema import fields
from app.server.schema.chat import decode_chat
from app.server.schema.completions import decode_completion

ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=("Cs",)), max_size=8)
    | st.sampled_from(["user", "text", "assistant", "tool", "auto", "none"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "type", "text", "name", "1", "x"]), inner, max_size=4)
    ),
    max_leaves=8,
)
MESSAGES = [{"role": "user", "content": "x"}]
ROUTES: list[Any] = [
    (decode_chat, fields.CHAT, {"model": "m", "messages": MESSAGES}),
    (decode_completion, fields.COMPLETIONS, {"model": "m", "prompt": "x"}),
]


@pytest.mark.parametrize(("decode", "table", "base"), ROUTES, ids=["chat", "completions"])
@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_every_body_is_a_request_or_names_its_fault(decode: Any, table: dict[str, Any], base: Any, data: Any) -> None:
    changes = data.draw(st.dictionaries(st.sampled_from([*table, "made_up"]), ANYTHING, min_size=1, max_size=3))
    fault = None
    try:
        request = decode(json.dumps({**base, **changes}).encode())
        assert isinstance(request.generation_request("r"), GenerationRequest)
        assert set(request.names_without_effect()) <= set(table) | set(fields.NESTED)
    except RequestError as error:
        fault = error
    if fault is not None:
        assert fault.param is not None
        assert fault.param.partition("[")[0].partition(".")[0] in changes


@pytest.mark.parametrize(("decode", "table", "base"), ROUTES, ids=["chat", "completions"])
@settings(max_examples=300, deadline=None)
@given(body=st.binary(max_size=60) | ANYTHING.map(lambda value: json.dumps(value).encode()))
def test_bodies_that_are_no_request_are_refused(decode: Any, table: dict[str, Any], base: Any, body: bytes) -> None:
    del table, base
    with pytest.raises(RequestError) as caught:
        decode(body)
    assert caught.value.message
