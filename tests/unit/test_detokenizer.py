"""Bytes become whole text; stop strings never leak."""

from __future__ import annotations

import pytest

from app.worker.detokenizer import Detokenizer


def push_all(detokenizer: Detokenizer, pieces: list[bytes]) -> list[str]:
    return [detokenizer.push(piece) for piece in pieces]


def test_holds_back_a_character_until_its_last_byte() -> None:
    detokenizer = Detokenizer()
    assert push_all(detokenizer, [b"\xf0\x9f", b"\x98", b"\x80!"]) == ["", "", "😀!"]
    assert detokenizer.flush() == ""


def test_bytes_that_cannot_become_a_character_are_replaced_at_once() -> None:
    detokenizer = Detokenizer()
    assert detokenizer.push(b"a\xffb") == "a�b"
    assert detokenizer.push(b"\xe2\x82") == ""
    assert detokenizer.push(b"x") == "�x"


def test_an_unfinished_character_is_replaced_at_the_end() -> None:
    detokenizer = Detokenizer()
    assert detokenizer.push(b"ok\xe2\x82") == "ok"
    assert detokenizer.flush() == "�"


def test_a_stop_string_across_tokens_cuts_before_it() -> None:
    detokenizer = Detokenizer(["END"])
    assert push_all(detokenizer, [b"one E", b"N", b"D two"]) == ["one ", "", ""]
    assert detokenizer.stopped
    assert detokenizer.push(b"more") == ""
    assert detokenizer.flush() == ""


def test_a_false_start_of_a_stop_string_is_given_out() -> None:
    detokenizer = Detokenizer(["END"])
    assert push_all(detokenizer, [b"EN", b"OUGH"]) == ["", "ENOUGH"]
    assert not detokenizer.stopped


def test_what_was_held_back_comes_at_the_end() -> None:
    detokenizer = Detokenizer(["\n\nQ:"])
    assert detokenizer.push(b"answer\n\n") == "answer"
    assert detokenizer.flush() == "\n\n"
    assert not detokenizer.stopped


@pytest.mark.parametrize("split", [True, False])
def test_the_stop_that_is_complete_first_wins(split: bool) -> None:
    detokenizer = Detokenizer(["abcd", "c"])
    text = b"xabcd"
    pieces = [bytes([byte]) for byte in text] if split else [text]
    assert "".join(push_all(detokenizer, pieces)) == "xab"


def test_empty_stop_strings_are_ignored() -> None:
    detokenizer = Detokenizer([""])
    assert detokenizer.push(b"text") == "text"
    assert not detokenizer.stopped


def test_a_stop_that_overlaps_itself_is_found() -> None:
    detokenizer = Detokenizer(["aab"])
    assert "".join(push_all(detokenizer, [b"a"] * 3 + [b"b"])) == "a"
    assert detokenizer.stopped
