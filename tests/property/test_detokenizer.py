"""However the bytes are split into tokens, the text is the same."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from app.worker.detokenizer import Detokenizer

texts = st.text(max_size=40)
few_letters = st.text(alphabet="ab\né", max_size=30)


def split(data: bytes, cuts: list[int]) -> list[bytes]:
    edges = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    return [data[start:end] for start, end in itertools.pairwise(edges)]


def joined(data: bytes, cuts: list[int], stop: list[str]) -> tuple[str, bool]:
    detokenizer = Detokenizer(stop)
    text = "".join(detokenizer.push(piece) for piece in split(data, cuts))
    return text + detokenizer.flush(), detokenizer.stopped


@given(texts, st.lists(st.integers(0, 200)))
def test_pieces_join_to_the_whole_text(text: str, cuts: list[int]) -> None:
    assert joined(text.encode(), cuts, []) == (text, False)


@given(st.binary(max_size=60), st.lists(st.integers(0, 200)))
def test_any_bytes_become_what_python_makes_of_them(data: bytes, cuts: list[int]) -> None:
    assert joined(data, cuts, [])[0] == data.decode("utf-8", "replace")


@given(
    few_letters, st.lists(st.integers(0, 100)), st.lists(st.text(alphabet="ab\né", min_size=1, max_size=4), max_size=4)
)
def test_stops_never_leak_and_nothing_else_is_lost(text: str, cuts: list[int], stop: list[str]) -> None:
    got, stopped = joined(text.encode(), cuts, stop)
    ends = [(text.find(word) + len(word), text.find(word)) for word in stop if word in text]
    assert stopped == bool(ends)
    assert got == (text[: min(ends)[1]] if ends else text)
    assert not any(word in got for word in stop)
