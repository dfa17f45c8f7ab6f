"""Logs: one JSON object a line, whatever is logged, and no secret in it."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from jobs.logs import JsonLines
from jobs.schema import JobRequest, Message

REPOSITORY = Path(__file__).parents[3]


def line(message: str, *arguments: object, exc_info: Any = None) -> str:
    record = logging.LogRecord("jobs.x", logging.WARNING, __file__, 1, message, arguments, exc_info)
    return JsonLines("tests").format(record)


@pytest.mark.parametrize("text", ["a\nb", 'a\r\n{"level":"error"}', "\0\x1b[31m\x7f", "\u2028\u2029", "\ud800", "%s%d"])
def test_whatever_is_logged_is_one_json_object_on_one_line(text: str) -> None:
    """Nobody writes a line of their own into the log, nor colours a terminal."""
    said = line("it said %s", text)
    assert said.splitlines() == [said] or text == "\u2028\u2029"
    assert not any(ord(character) < 32 for character in said)
    assert json.loads(said)["message"] == f"it said {text}".encode(errors="replace").decode()


@pytest.mark.parametrize(
    ("text", "secret"),
    [
        ("cannot reach postgresql+psycopg://me:pa55word@db:5432/x", "pa55word"),
        ("cannot reach redis://:pa55word@127.0.0.1:6379/0", "pa55word"),
        ("key hr-" + "A1b2-_" * 8, "A1b2-_A1b2"),
    ],
)
def test_a_secret_that_slips_in_is_masked(text: str, secret: str) -> None:
    """In the message, and in what is logged with it."""
    assert secret not in line(text)
    said = line("it failed", exc_info=(RuntimeError, RuntimeError(text), None))
    assert secret not in said
    assert "RuntimeError" in said


def test_an_address_without_a_password_stays() -> None:
    """What is no secret is not taken for one."""
    text = "see https://example.org:8080/a@b and user@example.org, 12:30"
    assert json.loads(line(text))["message"] == text


def test_an_error_of_validation_quotes_no_prompt() -> None:
    """What somebody asked is not in the log because it was wrong."""
    with pytest.raises(ValidationError) as refused:
        JobRequest.model_validate({"model": "echo", "messages": [{"role": "user", "content": 7, "canary": "canary"}]})
    assert "canary'" not in str(refused.value)
    with pytest.raises(ValidationError) as refused:
        Message.model_validate({"role": "canary", "content": "x"})
    assert "input_value" not in str(refused.value)


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("raise RuntimeError('a\\nb')", "RuntimeError: a\nb"),
        ("import threading; t = threading.Thread(target=lambda: 1 / 0); t.start(); t.join()", "ZeroDivisionError"),
        ("import warnings; warnings.warn('mind\\nthis')", "mind\nthis"),
        ("import logging; logging.getLogger('x').info('hello')", "hello"),
    ],
)
def test_deaths_and_warnings_are_lines_too(code: str, said: str) -> None:
    """A process's last words are JSON as well: whoever reads the logs by machine misses none."""
    program = f"from jobs.logs import set_up_logging; set_up_logging('tests')\n{code}"
    ran = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    [only] = ran.stderr.splitlines()
    fields = json.loads(only)
    assert said in fields["message"] + fields.get("exception", "")
