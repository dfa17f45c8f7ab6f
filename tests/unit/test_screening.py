"""What is looked at in a process of its own: what it refuses, and that nobody is hurt if it dies of it."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable
from typing import Any

import orjson
import pytest

from jobs.errors import RequestInvalid
from jobs.schema import JobRequest
from models import screening as inside
from producer.gateway import screening
from producer.gateway.errors import ApiError
from producer.gateway.screening import MOST_NAMES, MOST_VALUES, Screen

HELLO = [{"role": "user", "content": "Hello"}]
# It can be begun, and `max_tokens` ends it.
ENDLESS = {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}


def asked(**structure: Any) -> JobRequest:
    return JobRequest.parse({"model": "tiny-chat", "messages": HELLO} | structure)


def schema(value: dict[str, Any]) -> JobRequest:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": value}}
    return asked(response_format=form)


def screened(work: Callable[[Screen], Awaitable[None]]) -> None:
    async def run() -> None:
        async with Screen() as screen:
            await work(screen)

    asyncio.run(run())


def refused(request: JobRequest, screen: Screen) -> Awaitable[RequestInvalid]:
    async def run() -> RequestInvalid:
        with pytest.raises(RequestInvalid) as error:
            await screen.check_structure("acme", request)
        return error.value

    return run()


def test_both_sides_speak_of_the_same() -> None:
    """They share no code: one of them loads nothing of the other."""
    ours = (screening._QUESTION.format, screening._ANSWER.format, screening._BODY, screening._STRUCTURE)
    assert ours == (inside.QUESTION.format, inside.ANSWER.format, inside.BODY, inside.STRUCTURE)


def test_structures() -> None:
    """What no text can satisfy, or cannot be compiled, is refused by its field; the rest is not."""

    async def work(screen: Screen) -> None:
        for good in (
            asked(),
            asked(response_format={"type": "json_object"}),
            asked(regex="[0-9]{4}"),
            asked(regex="(a{1,1000}){1,1000}"),
            asked(choice=["yes", "no"]),
            schema({"type": "object", "properties": {"a": {"type": "integer"}}}),
            schema({"type": "array", "items": {"$ref": "#"}}),
            schema(ENDLESS),
        ):
            await screen.check_structure("acme", good)
        for bad, field in (
            (asked(regex="(?=a)b"), "regex"),
            (asked(regex="(" * 2_000), "regex"),
            (schema({"$ref": "#"}), "response_format"),
            (schema({"not": {}}), "response_format"),
            (schema({"type": "nothing"}), "response_format"),
            (
                schema({"allOf": [{"properties": {f"{i}.{j}": {} for j in range(60)}} for i in range(40)]}),
                "response_format",
            ),
        ):
            assert (await refused(bad, screen)).field == field

    screened(work)


@pytest.mark.parametrize(
    "body",
    [b"[" + b"[]," * 500_000 + b"1]", b'{"a":' * 100_000, b"[" + b"1," * 500_000 + b"1]", b'"\\" ' + b"[" * 60_000],
    ids=["lists", "names", "values", "unended"],
)
def test_a_body_of_too_many_values(body: bytes) -> None:
    """It takes seconds to read, in which nobody else would be served."""

    async def work(screen: Screen) -> None:
        with pytest.raises(RequestInvalid) as error:
            await screen.check_body("acme", body)
        assert error.value.field == "body"

    screened(work)


def test_what_stands_in_strings_does_not_count() -> None:
    """A prompt of brackets is a prompt."""

    async def work(screen: Screen) -> None:
        prompt = '[{,:"\\' * 2 * max(MOST_NAMES, MOST_VALUES)
        await screen.check_body("acme", orjson.dumps({"prompt": prompt, "other": [1, 2]}))
        await screen.check_body("acme", orjson.dumps({"prompt": [[7] * 1_000] * 128}))

    screened(work)


def test_what_takes_too_long_ends_the_process_and_the_next_one_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused, by the field; and whoever comes then is served."""

    async def work(screen: Screen) -> None:
        await screen.check_structure("acme", asked(regex="a"))
        first = screen._process._child
        assert first is not None
        monkeypatch.setattr(screening, "_ANSWER_SECONDS", 0.0)
        first.send_signal(signal.SIGSTOP)
        assert "too much time" in (await refused(asked(regex="b"), screen)).message
        assert first.returncode == -signal.SIGKILL
        monkeypatch.undo()
        await screen.check_structure("acme", asked(regex="c"))

    screened(work)


def test_the_kernel_ends_what_uses_too_much() -> None:
    """Time of a processor, whatever the clock says, and memory."""
    loop = "from models import screening as s; s.CPU_SECONDS = 0; s._limit_time()\nwhile True: pass"
    assert subprocess.run([sys.executable, "-c", loop], check=False).returncode == -signal.SIGXCPU
    child = subprocess.Popen(
        [sys.executable, "-m", "models.screening"],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    _, said = child.communicate(inside.QUESTION.pack(inside.BODY, 2**32 - 1))
    assert b"MemoryError" in said
    assert child.returncode == 1


def test_tenants_come_in_turns_and_wait_for_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    """One tenant's many questions delay another's by one; and there is an end to how many wait."""

    async def work(screen: Screen) -> None:
        order: list[bytes] = []
        monkeypatch.setattr(screen._process, "ask", lambda _, content: order.append(content))
        many = [asyncio.create_task(screen._ask("many", 0, b"many")) for _ in range(screening._MOST_WAITING)]
        await asyncio.sleep(0)  # all of them have asked
        with pytest.raises(ApiError) as error:
            await screen._ask("many", 0, b"one more")
        assert (error.value.status, error.value.headers) == (429, {"Retry-After": "1"})
        await screen._ask("few", 0, b"few")
        await asyncio.gather(*many)
        assert order.index(b"few") <= 2
        assert len(order) == screening._MOST_WAITING + 1

    screened(work)


def test_it_knows_what_it_has_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same structure is compiled once, good or bad, and what is remembered has an end."""

    async def work(screen: Screen) -> None:
        asked_for: list[bytes] = []

        def ask(_: int, content: bytes) -> str | None:
            asked_for.append(content)
            return "bad" if b"bad" in content else None

        monkeypatch.setattr(screen._process, "ask", ask)
        monkeypatch.setattr(screening, "_REMEMBERED", 2)
        for _ in range(2):
            await screen.check_structure("acme", asked(regex="good"))
            assert (await refused(asked(regex="bad"), screen)).message == "bad"
        assert len(asked_for) == 2
        await screen.check_structure("acme", asked(regex="third"))
        await screen.check_structure("acme", asked(regex="good"))
        assert len(asked_for) == 4

    screened(work)
