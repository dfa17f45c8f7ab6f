"""From the bytes of a bulk input to requests and rejections, and the file that ties an output to its batch."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.batches import Line, Rejection
from jobs.errors import RequestInvalid
from jobs.schema import JobRequest
from jobs.settings import Settings
from producer.bulk import BulkOptions, BulkRefused
from producer.bulk.reading import CHUNK_LINES, FIRST_CHUNK_LINES, AsTheyAre, LineReader, RawLine, chunks
from producer.bulk.sidecar import Link, Sidecar, digest
from producer.openai.requests import CHAT, COMPLETIONS, RESPONSES
from producer.validation import Validator

SETTINGS = Settings.load(max_prompt_bytes=1000)
VALIDATOR = Validator(SETTINGS)


def lines_of(content: bytes, max_bytes: int = 1000, start: int = 0, last_line: int = 0) -> list[RawLine]:
    found = chunks(io.BytesIO(content), start, len(content), last_line, max_bytes)
    return [line for chunk in found for line in chunk]


def reader(**options: Any) -> LineReader:
    asked = BulkOptions(Path("in.jsonl"), Path("out.jsonl"), **options)
    return LineReader(asked, VALIDATOR.check, SETTINGS.max_prompt_bytes, max_attempts=3)


def none_known(_: Sequence[str]) -> set[str]:
    return set()


def read(
    *contents: bytes | dict[str, Any], known: Sequence[str] = (), **options: Any
) -> tuple[list[Line], list[Rejection]]:
    raw = [content if isinstance(content, bytes) else json.dumps(content).encode() for content in contents]
    chunk = [RawLine(number, 0, content) for number, content in enumerate(raw, start=1)]
    return reader(**options).read(chunk, lambda ids: set(known) & set(ids))


def rejected(content: bytes | dict[str, Any], **options: Any) -> Rejection:
    lines, rejections = read(content, **options)
    assert not lines
    (rejection,) = rejections
    return rejection


def request_line(custom_id: str | None = None, url: str = CHAT, **body: Any) -> dict[str, Any]:
    prompt = {COMPLETIONS: {"prompt": "Hi"}, RESPONSES: {"input": "Hi"}}.get(
        url, {"messages": [{"role": "user", "content": "Hi"}]}
    )
    line = {"method": "POST", "url": url, "body": {"model": "echo", **prompt, **body}}
    return line if custom_id is None else line | {"custom_id": custom_id}


# -- bytes ------------------------------------------------------------------------------------------------------


def test_lines_know_their_number_and_end() -> None:
    """Each line has its number from 1 and the offset behind it; the last one needs no line end."""
    assert lines_of(b"one\n\ntwo\r\n three") == [
        RawLine(1, 4, b"one"),
        RawLine(2, 5, b""),
        RawLine(3, 10, b"two"),
        RawLine(4, 16, b" three"),
    ]


def test_a_byte_order_mark_is_no_content() -> None:
    """A BOM at the start of the file is passed over, and only there."""
    mark = b"\xef\xbb\xbf"
    assert [line.content for line in lines_of(mark + b"{}\n" + mark + b"{}")] == [b"{}", mark + b"{}"]


def test_an_overlong_line_is_passed_over_unread() -> None:
    """A line above the limit has no content, and the line behind it is whole."""
    content = b"x" * 10 + b"\n" + b"y" * 5_000_000 + b"\n" + b"z" * 10
    assert lines_of(content, max_bytes=10) == [
        RawLine(1, 11, b"x" * 10),
        RawLine(2, 5_000_012, None),
        RawLine(3, 5_000_022, b"z" * 10),
    ]


def test_an_overlong_last_line() -> None:
    """A line above the limit may end with the file."""
    assert lines_of(b"a\n" + b"y" * 11, max_bytes=10) == [RawLine(1, 2, b"a"), RawLine(2, 13, None)]


@given(st.lists(st.binary(max_size=30).map(lambda line: line.replace(b"\n", b"")), max_size=20), st.data())
def test_reading_on_gives_the_same_lines(contents: list[bytes], data: st.DataObject) -> None:
    """Wherever reading stopped behind a line, going on from there gives exactly the lines that were left."""
    content = b"\n".join(contents)
    whole = lines_of(content, max_bytes=20)
    stop = data.draw(st.integers(0, len(whole)))
    end, number = (whole[stop - 1].end, whole[stop - 1].number) if stop else (0, 0)
    assert lines_of(content, max_bytes=20, start=end, last_line=number) == whole[stop:]
    assert (whole[-1].end if whole else 0) == len(content)


def test_what_was_appended_meanwhile_is_not_read() -> None:
    """Reading ends at the size the file had when its digest was taken."""
    (chunk,) = chunks(io.BytesIO(b"a\nb\nc\n"), 0, 4, 0, 100)
    assert [line.content for line in chunk] == [b"a", b"b"]


def test_chunks_are_bounded_in_lines_and_bytes() -> None:
    """The first chunk is small, for workers to begin; later ones hold a thousand lines, or fewer if they are long."""
    content = b"{}\n" * (3 * CHUNK_LINES)
    sizes = [len(chunk) for chunk in chunks(io.BytesIO(content), 0, len(content), 0, 100)]
    assert sizes == [125, 250, 500, 1000, 1000, 125]
    assert (sizes[0], max(sizes)) == (FIRST_CHUNK_LINES, CHUNK_LINES)
    long = (b"x" * 2_500_000 + b"\n") * 5
    assert [len(chunk) for chunk in chunks(io.BytesIO(long), 0, len(long), 0, 3_000_000)] == [2, 2, 1]


# -- lines of a batch file --------------------------------------------------------------------------------------


def test_a_good_line_becomes_a_request() -> None:
    """A line keeps its number, its custom_id and the route it was written for."""
    lines, rejections = read(request_line("a"), b"", request_line(url=COMPLETIONS), request_line("c", RESPONSES))
    assert not rejections
    assert [(line.number, line.custom_id, line.endpoint) for line in lines] == [
        (1, "a", CHAT),
        (3, "line-3", COMPLETIONS),
        (4, "c", RESPONSES),
    ]
    assert all(line.request.model == "echo" and line.request.max_tokens and line.max_attempts == 3 for line in lines)


def test_options_go_before_the_body() -> None:
    """Model, limit and temperature of the command replace those of every line, under whatever name."""
    bodies = [request_line(max_tokens=1, model="nope"), request_line(url=RESPONSES), request_line(url=COMPLETIONS)]
    lines, rejections = read(*bodies, model="echo", max_tokens=7, temperature=0.25)
    assert not rejections
    assert {(line.request.model, line.request.max_tokens, line.request.temperature) for line in lines} == {
        ("echo", 7, 0.25)
    }


@pytest.mark.parametrize(
    ("content", "field", "code"),
    [
        (b"not json", "line", "invalid_json_line"),
        (b'{"a": 1', "line", "invalid_json_line"),
        (b"[1]", "line", "invalid_json_line"),
        (b"null", "line", "invalid_json_line"),
        (b'{"a": NaN}', "line", "invalid_json_line"),
        (b'{"a": "\\ud800"}', "line", "invalid_json_line"),
        (b'{"a": "\xe9"}', "line", "invalid_utf8"),
        (b"\xff\xfe", "line", "invalid_utf8"),
        ({}, "method", "missing_required_parameter"),
        (request_line("a") | {"method": "GET"}, "method", "invalid_method"),
        (request_line("a") | {"url": "/v1/embeddings"}, "url", "invalid_url"),
        (request_line("a") | {"body": None}, "body", "missing_required_parameter"),
        (request_line("a") | {"body": []}, "body", "invalid_type"),
        (request_line("") | {"custom_id": ""}, "custom_id", "invalid_value"),
        (request_line() | {"custom_id": 5}, "custom_id", "invalid_type"),
        (request_line() | {"custom_id": "x" * 513}, "custom_id", "invalid_value"),
        (request_line(model=None), "body.model", "missing_required_parameter"),
        (request_line(model="nope"), "body.model", "model_not_found"),
        (request_line(temperature=3), "body.temperature", "invalid_value"),
        (request_line(max_completion_tokens=0), "body.max_completion_tokens", "invalid_value"),
        (
            request_line(max_completion_tokens=1_000_001),
            "body.max_completion_tokens",
            "context_length_exceeded",
        ),
        (request_line(messages=[]), "body.messages", "invalid_value"),
        (request_line(messages=[{"role": "user", "content": ""}]), "body.messages", "invalid_value"),
        (request_line(url=COMPLETIONS, prompt=""), "body.prompt", "invalid_value"),
        (request_line(url=RESPONSES, input="x" * 1001), "body.input", "invalid_value"),
    ],
)
def test_a_bad_line_names_its_field(content: bytes | dict[str, Any], field: str, code: str) -> None:
    """What is wrong with a line is said with the field's own name and a code."""
    rejection = rejected(content)
    assert (rejection.number, rejection.field, rejection.error.code) == (1, field, code)
    assert rejection.error.message.startswith(f"{field}: ")


def test_an_unreadable_byte_is_named() -> None:
    """Invalid UTF-8 is found to the byte."""
    assert "line 1 is not UTF-8: byte 8 of it, 0xe9" in rejected(b'{"a": "\xe9"}').error.message


def test_a_line_that_is_too_long_is_refused() -> None:
    """What was passed over for its length is named as such."""
    _, rejections = reader().read([RawLine(7, 0, None)], none_known)
    assert [(r.number, r.custom_id, r.error.code) for r in rejections] == [(7, "line-7", "line_too_long")]


def test_a_null_character_is_text() -> None:
    """A NUL in a prompt is as good as any other character; in a custom_id it cannot be kept."""
    lines, _ = read(request_line(messages=[{"role": "user", "content": "a\0b"}]))
    assert lines[0].request.messages is not None
    assert lines[0].request.messages[0].content == "a\0b"
    assert rejected(request_line("a\0b")).field == "custom_id"


def test_bad_lines_do_not_stop_good_ones() -> None:
    """Every line gets its own verdict, and blank ones none."""
    lines, rejections = read(request_line("a"), b"oops", b"", request_line("b", temperature=9), request_line("c"))
    assert [line.custom_id for line in lines] == ["a", "c"]
    assert [(r.number, r.custom_id) for r in rejections] == [(2, "line-2"), (4, "b")]


def test_a_missing_model_is_looked_for_once() -> None:
    """However many lines name a model that is not there, it is looked for once."""
    looked = []

    def check(request: JobRequest) -> JobRequest:
        looked.append(request.model)
        raise RequestInvalid("model", "no such model", "model_not_found")

    options = BulkOptions(Path("in.jsonl"), Path("out.jsonl"))
    chunk = [RawLine(number, 0, orjson.dumps(request_line(model="far/away"))) for number in range(1, 6)]
    _, rejections = LineReader(options, check, 1000, 3).read(chunk, none_known)
    assert [r.error.code for r in rejections] == ["model_not_found"] * 5
    assert looked == ["far/away"]


# -- names ------------------------------------------------------------------------------------------------------


def names(found: tuple[list[Line], list[Rejection]]) -> tuple[list[str], list[tuple[str | None, str]]]:
    lines, rejections = found
    return [line.custom_id for line in lines], [(r.custom_id, r.error.code) for r in rejections]


def test_a_name_belongs_to_the_first_line() -> None:
    """The second line of a name is rejected and called by its number, so that each name is there once."""
    found = read(request_line("a"), request_line("a"), request_line("b"))
    assert names(found) == (["a", "b"], [("line-2", "duplicate_custom_id")])
    assert found[1][0].field == "custom_id"
    assert "'a'" in found[1][0].error.message


def test_a_name_may_be_taken_by_an_earlier_chunk() -> None:
    """Names of lines read before, in another chunk, are taken too."""
    assert names(read(request_line("a"), request_line("b"), known=["a"])) == (
        ["b"],
        [("line-1", "duplicate_custom_id")],
    )


def test_a_rejected_line_keeps_its_name() -> None:
    """A bad line has its name all the same; its own fault goes before that of a duplicate."""
    found = read(request_line("a", temperature=9), request_line("a"), request_line("a", n=0))
    assert names(found) == (
        [],
        [("a", "invalid_value"), ("line-2", "duplicate_custom_id"), ("line-3", "invalid_value")],
    )


def test_a_line_may_be_left_without_a_name() -> None:
    """Where even its number is another line's name, a rejected line has none."""
    found = read(request_line("line-2"), request_line())
    assert names(found) == (["line-2"], [(None, "duplicate_custom_id")])


@given(st.lists(st.sampled_from(["a", "b", "line-1", "line-2", "line-3", None]), max_size=8))
def test_each_name_is_there_once(custom_ids: list[str | None]) -> None:
    """However lines are named, every line is accounted for and no name is there twice."""
    good, bad = names(read(*(request_line(custom_id) for custom_id in custom_ids)))
    given_names = [*good, *(name for name, _ in bad if name is not None)]
    assert len(set(given_names)) == len(given_names)
    assert len(good) + len(bad) == len(custom_ids)


# -- lines of one's own -----------------------------------------------------------------------------------------


def test_a_field_is_the_prompt() -> None:
    """With a prompt field any object asks what stands in it, and answers come as chats."""
    rows = [{"question": "Why?", "answer": "So."}, {"question": "How?", "custom_id": "q", "id": 5}]
    lines, rejections = read(*rows, prompt_field="question", model="echo", max_tokens=9, temperature=0.5)
    assert not rejections
    assert [(line.custom_id, line.endpoint) for line in lines] == [("line-1", CHAT), ("q", CHAT)]
    first = lines[0].request
    assert first.messages is not None
    assert [(m.role, m.content) for m in first.messages] == [("user", "Why?")]
    assert (first.model, first.max_tokens, first.temperature) == ("echo", 9, 0.5)


@pytest.mark.parametrize(
    ("row", "code"),
    [
        ({"answer": "So."}, "missing_required_parameter"),
        ({"question": None}, "missing_required_parameter"),
        ({"question": 5}, "invalid_type"),
        ({"question": ["Why?"]}, "invalid_type"),
        ({"question": ""}, "invalid_value"),
        ({"question": "x" * 1001}, "invalid_value"),
    ],
)
def test_a_bad_prompt_field_is_named(row: dict[str, Any], code: str) -> None:
    """A row whose prompt is missing, no text, empty or too long is refused by the field's name."""
    rejection = rejected(row, prompt_field="question", model="echo")
    assert (rejection.field, rejection.error.code, rejection.custom_id) == ("question", code, "line-1")


def test_a_custom_id_of_another_kind_is_not_one() -> None:
    """In rows of one's own a custom_id that is no string means something else."""
    lines, _ = read({"question": "Why?", "custom_id": 5}, prompt_field="question", model="echo")
    assert [line.custom_id for line in lines] == ["line-1"]


# -- options ----------------------------------------------------------------------------------------------------


@pytest.fixture
def question(tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    path.write_text('{"question": "Why?"}\n')
    return path


def checked(question: Path, **options: Any) -> BulkOptions:
    asked = BulkOptions(question, **({"output": question.with_name("out.jsonl")} | options))
    asked.check(VALIDATOR.check)
    return asked


@pytest.mark.parametrize(
    ("output", "errors"),
    [("out.jsonl", "out.errors.jsonl"), ("out", "out.errors.jsonl"), ("out.json", "out.json.errors.jsonl")],
)
def test_errors_lie_beside_the_output(question: Path, output: str, errors: str) -> None:
    """Unless named, the errors file has the output's name."""
    assert checked(question, output=question.with_name(output)).errors_path == question.with_name(errors)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"model": "nope"}, "model"),
        ({"prompt_field": "question"}, "model"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"model": "echo", "max_tokens": 2_000_000}, "max_tokens"),
        ({"temperature": 3.0}, "temperature"),
    ],
)
def test_what_every_line_would_be_refused_for_is_refused_first(
    question: Path, options: dict[str, Any], field: str
) -> None:
    """A bad option is one error that names it, not one for each line."""
    with pytest.raises(RequestInvalid) as refusal:
        checked(question, **options)
    assert refusal.value.field == field


def test_files_are_checked_first(question: Path) -> None:
    """Input, output and errors must be what a run needs, and three different files."""
    empty = question.with_name("empty")
    empty.touch()
    for message, options in {
        "is no file": {"input": question.with_name("missing")},
        "cannot be a pipe": {"input": Path(os.devnull)},
        "is empty": {"input": empty},
        "there is no folder": {"output": question / "none" / "out.jsonl"},
        "no regular file": {"output": Path(os.devnull)},
        "three different": {"output": question},
        "different files": {"errors": question.parent / "." / "in.jsonl"},
    }.items():
        with pytest.raises(BulkRefused, match=message):
            BulkOptions(**({"input": question, "output": question.with_name("out")} | options)).check(VALIDATOR.check)


# -- the sidecar ------------------------------------------------------------------------------------------------


def link(**options: Any) -> Link:
    return Link(uuid4(), "ab" * 32, 5, options)


def test_a_sidecar_keeps_its_link(tmp_path: Path) -> None:
    """What one command wrote the next one finds, until the run is finished."""
    output, written = tmp_path / "out.jsonl", link(model="echo", temperature=0.5)
    sidecar = Sidecar(output)
    assert sidecar.lock() is None
    sidecar.write(written)
    sidecar.release()

    again = Sidecar(output)
    assert again.lock() == written
    again.remove()
    again.release()
    assert not list(tmp_path.iterdir())


def test_a_sidecar_without_a_batch_goes(tmp_path: Path) -> None:
    """A command that began nothing leaves nothing."""
    sidecar = Sidecar(tmp_path / "out.jsonl")
    sidecar.lock()
    sidecar.release()
    assert not list(tmp_path.iterdir())


def test_one_command_at_a_time(tmp_path: Path) -> None:
    """While one command has an output, another is refused; afterwards it is not."""
    first, second = Sidecar(tmp_path / "out.jsonl"), Sidecar(tmp_path / "out.jsonl")
    first.lock()
    with pytest.raises(BulkRefused, match="another command"):
        second.lock()
    first.release()
    assert second.lock() is None
    second.release()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b'{"batch_id": "x"}', b'{"batch_id": 5}', b"\xff"])
def test_a_torn_sidecar_is_none(tmp_path: Path, content: bytes) -> None:
    """What a crash left half written names no batch."""
    sidecar = Sidecar(tmp_path / "out.jsonl")
    sidecar.path.write_bytes(content)
    assert sidecar.lock() is None
    sidecar.release()


def test_differences_are_named() -> None:
    """What another command asks differently is told in words."""
    before = link(model="echo", max_tokens=5)
    assert before.differences(before) == []
    after = Link(before.batch_id, "cd" * 32, 5, {"model": "echo", "max_tokens": None})
    assert before.differences(after) == ["the input's content", "max_tokens (it was 5, now not given)"]


def test_a_digest_is_of_the_content(tmp_path: Path) -> None:
    """The same bytes under another name have the same digest."""
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(b"x" * 3_000_000)
    blocks: list[None] = []
    assert digest(tmp_path / "a", lambda: blocks.append(None)) == digest(tmp_path / "b", lambda: None)
    assert len(blocks) == 3


def test_a_line_over_which_we_stumble_stops_no_other() -> None:
    """It is refused like a bad one, and the log has what happened."""

    def stumble(request: JobRequest) -> JobRequest:
        if request.messages and request.messages[0].content == "stumble":
            raise RuntimeError
        return request

    good, bad = (request_line(name, messages=[{"role": "user", "content": name}]) for name in ("walk", "stumble"))
    content = b"\n".join(orjson.dumps(line) for line in (bad, good))
    clumsy = LineReader(AsTheyAre(), stumble, SETTINGS.max_prompt_bytes, max_attempts=3)
    lines, rejections = clumsy.read(lines_of(content), none_known)
    assert [line.custom_id for line in lines] == ["walk"]
    assert [(one.custom_id, one.error.code) for one in rejections] == [("stumble", "server_error")]
