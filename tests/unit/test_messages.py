from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.messages import (
    FRAME_HEADER,
    MAX_FRAME_BYTES,
    Cancel,
    FrameReader,
    FromWorker,
    Generate,
    Load,
    Piece,
    Sampling,
    Step,
    Timings,
    TokenLogprob,
    ToWorker,
    encode_frame,
)

STEP = Step(
    pieces=[
        Piece(
            request=7, text="né", completion_tokens=3, logprobs=[TokenLogprob(5, b"n\xc3", -0.5, [(5, b"n\xc3", -0.5)])]
        ),
        Piece(request=8, text="", completion_tokens=9, finish_reason="stop", timings=Timings(0.1, 0.2, 0.3)),
    ],
    load=Load(2, 0, 100, 4096, 0, 2, 0, 0.008),
)
GENERATE = Generate(request=1, prompt=b"\1\0\0\0", max_tokens=5, sampling=Sampling(logit_bias={3: -1.0}, seed=4))


def test_a_message_survives_the_wire() -> None:
    (body,) = FrameReader().feed(encode_frame(STEP))
    assert msgspec.msgpack.decode(body, type=FromWorker) == STEP
    (body,) = FrameReader().feed(encode_frame(GENERATE))
    assert msgspec.msgpack.decode(body, type=ToWorker) == GENERATE


@given(st.lists(st.integers(1, 40), max_size=60))
def test_frames_are_found_however_the_stream_is_cut(cuts: list[int]) -> None:
    messages = [Cancel(1), GENERATE, Cancel(2**40)]
    stream = b"".join(encode_frame(message) for message in messages)
    reader, bodies, position = FrameReader(), [], 0
    for cut in [*cuts, len(stream)]:
        bodies += reader.feed(stream[position : position + cut])
        position += cut
    assert [msgspec.msgpack.decode(body, type=ToWorker) for body in bodies] == messages


def test_a_peer_that_speaks_something_else_is_noticed() -> None:
    with pytest.raises(ValueError, match="over the limit"):
        FrameReader().feed(FRAME_HEADER.pack(MAX_FRAME_BYTES + 1))
