"""The command line without a server: help, wrong usage, wrong settings, and how each is answered."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from headrace import __version__, cli
from headrace.commands.common import interruptible
from jobs.errors import NotFound, RequestInvalid, WaitTimeout
from models.catalog import UnknownModel

COMMANDS = {
    "run",
    "up",
    "down",
    "submit",
    "status",
    "wait",
    "cancel",
    "list",
    "workers",
    "migrate",
    "worker",
    "flower",
    "failed",
    "doctor",
}
JOB_ID = "01a2087d-41ec-78fc-9d23-8e63e0e87750"


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A user without settings, in an empty folder, with a home that does not exist."""
    for variable in [name for name in os.environ if name.startswith("HEADRACE_")]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("HEADRACE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def raising(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], None]:
    """Makes every command that needs a stack fail in this way."""

    def choose(error: BaseException) -> None:
        def fail(*_: Any) -> Any:
            raise error

        monkeypatch.setattr("headrace.commands.jobs.connected_settings", fail)

    return choose


# -- help ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help_names_every_command(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Also when nothing is asked, and in 80 columns."""
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    assert set(out.replace("│", " ").split()) >= COMMANDS
    assert max(map(len, out.splitlines())) <= 80


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_has_help_and_json(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Each explains itself and offers one JSON object."""
    assert cli.main([command, "--help"]) == 0
    out = capsys.readouterr().out
    assert f"headrace {command}" in out
    assert "--json" in out


def test_help_loads_nothing_heavy() -> None:
    """Neither database, broker, validation nor model libraries are imported before a command runs."""
    code = "import sys, headrace.cli; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"celery", "kombu", "sqlalchemy", "psycopg", "redis", "pydantic", "alembic", "torch", "transformers"}
    assert not heavy & set(done.stdout.split())


def test_the_version_is_told_both_ways(capsys: pytest.CaptureFixture[str]) -> None:
    """As a line, and as JSON."""
    assert cli.main(["version"]) == 0
    assert capsys.readouterr().out == f"headrace {__version__}\n"
    assert cli.main(["version", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["headrace"] == __version__


# -- mistakes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["nope"], "nope"),
        (["submit"], "prompt"),
        (["submit", "hi", "--max-tokens", "many"], "--max-tokens"),
        (["submit", "hi", "--nope"], "--nope"),
        (["status", "not-an-id"], "ID"),
        (["list", "--state", "tired"], "--state"),
        (["list", "--limit", "0"], "--limit"),
        (["run", "missing.jsonl", "-o", "out.jsonl"], "missing.jsonl"),
        (["run", "in.jsonl"], "--output"),
        (["up", "--model", "no-such-model"], "no-such-model"),
        (["up", "--model", "empty-folder"], "empty-folder"),
        (["up", "--flower-port", "70000"], "--flower-port"),
    ],
)
def test_wrong_usage_is_one_line_that_names_it(
    arguments: list[str], names: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Exit status 2, nothing on stdout, no traceback, and nothing was started or made."""
    (tmp_path / "in.jsonl").write_text("{}")
    (tmp_path / "empty-folder").mkdir()
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("headrace: ")
    assert captured.err.count("\n") == 1
    assert names in captured.err
    assert not (tmp_path / "home").exists()


def test_wrong_usage_as_json_names_the_field(capsys: pytest.CaptureFixture[str]) -> None:
    """One object on stdout, nothing on stderr."""
    assert cli.main(["list", "--limit", "0", "--json"]) == 2
    captured = capsys.readouterr()
    error = json.loads(captured.out)["error"]
    assert (error["code"], error["field"]) == ("usage_error", "limit")
    assert captured.err == ""


def test_a_wrong_setting_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Its variable, as the user wrote it, with exit status 2."""
    monkeypatch.setenv("HEADRACE_LEASE_SECONDS", "soon")
    assert cli.main(["list", "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["field"] == "HEADRACE_LEASE_SECONDS"


@pytest.mark.parametrize("arguments", [["list"], ["status", JOB_ID], ["submit", "hi"], ["workers"], ["migrate"]])
def test_without_a_stack_the_user_is_told_what_to_do(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """How to start one, and how to name servers."""
    assert cli.main(arguments) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    for word in ("headrace up", "HEADRACE_DATABASE_URL", "HEADRACE_BROKER_URL"):
        assert word in captured.err


def test_down_without_a_stack_is_no_mistake(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """What was asked for holds already."""
    assert cli.main(["down"]) == 0
    assert str(tmp_path / "home") in capsys.readouterr().out
    assert cli.main(["down", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"stopped": False, "pid": None}


@pytest.mark.parametrize(
    ("error", "status", "fields"),
    [
        (
            RequestInvalid("messages[0].content", "must not be empty"),
            2,
            {"code": "invalid_value", "message": "must not be empty", "field": "messages[0].content"},
        ),
        (
            UnknownModel("gpt", ("echo",)),
            2,
            {"code": "unknown_model", "field": "model"},
        ),
        (NotFound("no job 7"), 1, {"code": "not_found", "message": "no job 7", "field": None}),
        (WaitTimeout("too long"), 1, {"code": "wait_timeout", "message": "too long", "field": None}),
        (PermissionError(13, "Permission denied"), 1, {"code": "permission_error", "field": None}),
    ],
)
def test_an_error_is_told_in_both_ways(
    error: Exception,
    status: int,
    fields: dict[str, Any],
    raising: Callable[[BaseException], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As a line with the field, or as JSON with code, message and field."""
    raising(error)
    assert cli.main(["list"]) == status
    captured = capsys.readouterr()
    assert (captured.out, captured.err.count("\n")) == ("", 1)
    assert (fields["field"] or "headrace") in captured.err or isinstance(error, UnknownModel)

    assert cli.main(["list", "--json"]) == status
    captured = capsys.readouterr()
    assert json.loads(captured.out)["error"].items() >= fields.items()


def test_a_mistake_of_ours_is_not_hidden(raising: Callable[[BaseException], None]) -> None:
    """What is no user's mistake keeps its traceback."""
    raising(ZeroDivisionError("a bug"))
    with pytest.raises(ZeroDivisionError):
        cli.main(["list"])


def test_ctrl_c_ends_a_command_quietly(
    raising: Callable[[BaseException], None], capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit status 130, as shells expect."""
    raising(KeyboardInterrupt())
    assert cli.main(["list"]) == 130
    assert capsys.readouterr().err == ""


def test_metadata_is_name_and_value(
    raising: Callable[[BaseException], None], capsys: pytest.CaptureFixture[str]
) -> None:
    """A pair without an equals sign is refused by name."""
    assert cli.main(["submit", "hi", "--metadata", "lonely"]) == 2
    assert "--metadata" in capsys.readouterr().err


# -- signals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_first_signal_interrupts_and_others_do_not(number: signal.Signals) -> None:
    """While a command ends in good order, neither a second SIGTERM nor a closed terminal disturbs it."""
    before = signal.getsignal(signal.SIGTERM)
    ended = []

    def command() -> None:
        with interruptible():
            try:
                signal.raise_signal(number)
            finally:
                signal.raise_signal(signal.SIGTERM)
                signal.raise_signal(signal.SIGHUP)
                ended.append("in good order")

    with pytest.raises(KeyboardInterrupt):
        command()
    assert ended == ["in good order"]
    assert signal.getsignal(signal.SIGTERM) is before


def test_an_action_goes_before_the_interrupt_and_a_second_ctrl_c_insists() -> None:
    """The first Ctrl-C does what the command wants, the second one ends it."""
    asked = []

    def command() -> None:
        with interruptible() as interrupts:
            interrupts.action = lambda: asked.append("pause")
            signal.raise_signal(signal.SIGINT)
            asked.append("still there")
            signal.raise_signal(signal.SIGINT)
            asked.append("never")

    with pytest.raises(KeyboardInterrupt):
        command()
    assert asked == ["pause", "still there"]
