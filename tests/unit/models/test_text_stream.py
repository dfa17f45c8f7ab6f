"""Tokens to text, piece by piece."""

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.text import TextStream

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def decode(token_ids: Sequence[int]) -> str:
    return bytes(token_ids).decode(errors="replace")


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    edges = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    return [data[start:end] for start, end in itertools.pairwise(edges)]


@given(st.binary(max_size=40), st.lists(st.integers(0, 40)))
def test_pieces_join_to_what_decoding_at_once_gives(data: bytes, cuts: list[int]) -> None:
    """However the tokens arrive, and even if they are no text at all, the pieces join to the decoded whole."""
    stream = TextStream(decode)
    shown = [stream.push(piece) for piece in pieces(data, cuts)]
    shown.append(stream.finish(cut=False))
    assert "".join(shown) == stream.text == decode(data)


@given(st.text(max_size=20), st.integers(0, 80))
def test_cut_text_never_ends_in_a_piece_of_a_character(text: str, length: int) -> None:
    """Cut anywhere, the text is made of whole characters."""
    data = text.encode()[:length]
    stream = TextStream(decode)
    for byte in data:
        stream.push([byte])
    stream.finish(cut=True)
    assert stream.text == data.decode(errors="ignore").rstrip(REPLACEMENT)


@given(
    st.text("abc", max_size=30),
    st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
    st.lists(st.integers(0, 40)),
)
def test_nothing_of_a_stop_string_is_shown(text: str, stop: list[str], cuts: list[int]) -> None:
    """The text ends before the stop string that is complete first, and no piece shown has to be taken back."""
    stream = TextStream(decode, stop)
    for piece in pieces(text.encode(), cuts):
        if not stream.stopped:
            stream.push(piece)
    if not stream.stopped:
        stream.finish(cut=False)
    ends = [(at + len(word), at) for word in stop if (at := text.find(word)) >= 0]
    assert stream.stopped == bool(ends)
    assert stream.text == (text[: min(ends)[1]] if ends else text)


def test_text_that_may_become_a_stop_string_waits() -> None:
    """What could begin a stop string is held until the next token decides, and no longer."""
    stream = TextStream(decode, ["END"])
    assert [stream.push(token.encode()) for token in ("xE", "N", "E", "x")] == ["x", "", "EN", "Ex"]


@given(
    st.text("abc", max_size=30),
    st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
    st.lists(st.integers(0, 40)),
    st.integers(0, 12),
)
def test_a_stop_string_within_min_tokens_is_text(text: str, stop: list[str], cuts: list[int], min_tokens: int) -> None:
    """The first stop string that a later token completes ends the text, wherever it began; none is shown in part."""
    stream = TextStream(decode, stop, min_tokens)
    for piece in pieces(text.encode(), cuts):
        if not stream.stopped:
            stream.push(piece)
    if not stream.stopped:
        stream.finish(cut=False)
    ends = [
        (at + len(word), at)
        for word in stop
        for at in range(len(text))
        if text.startswith(word, at) and at + len(word) > min_tokens
    ]
    assert stream.stopped == bool(ends)
    assert stream.text == (text[: min(ends)[1]] if ends else text)


@pytest.mark.parametrize("token", [b"\x80", b"\xe2\x82", b"\xf0", b"a", b"\xc3"])
def test_a_token_costs_the_same_however_many_came_before(token: bytes) -> None:
    """Text, or bytes that never become any: what is decoded at a token stays short, and nothing is lost."""
    longest = 0

    def measured(token_ids: Sequence[int]) -> str:
        nonlocal longest
        longest = max(longest, len(token_ids))
        return b"".join(token for _ in token_ids).decode(errors="replace")

    stream = TextStream(measured, ["\N{REPLACEMENT CHARACTER}x"])
    for _ in range(500):
        stream.push([0])
    assert longest <= 32
    stream.finish(cut=False)
    assert stream.text == (token * 500).decode(errors="replace")


@given(st.lists(st.sampled_from(["é", "€", "😀", "a", "\x80", "\xe2"]), max_size=40))
def test_garbage_between_characters_splits_none(parts: list[str]) -> None:
    """Bytes that are no text do not spoil the characters around them."""
    data = b"".join(part.encode("latin-1") if part in "\x80\xe2" else part.encode() for part in parts)
    stream = TextStream(decode)
    shown = [stream.push([byte]) for byte in data]
    shown.append(stream.finish(cut=False))
    assert "".join(shown) == data.decode(errors="replace")
