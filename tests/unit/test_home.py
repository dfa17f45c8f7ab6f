"""The home of a stack: one holder at a time, and a record that counts only while it is held."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest

from jobs import home as home_module
from jobs.home import Home, NoStack, Record, StackError, StackTaken, child_environment, connected_settings
from jobs.settings import Settings

RECORD = Record(
    pid=os.getpid(),
    database_url="postgresql+psycopg://headrace:secret@127.0.0.1:5/headrace",
    gateway_database_url="postgresql+psycopg://headrace_gateway:secret@127.0.0.1:5/headrace",
    broker_url="redis://:secret@127.0.0.1:6/0",
    secret="its own secret of at least 32 characters",
    key_prefix="its-prefix",
    flower_url=None,
    flower_user=None,
    flower_password=None,
    models=["echo"],
    model_tables={"slow": {"engine": "echo"}},
    policies={"*": {"short": {"max_characters": 9, "action": "flag"}}},
    started_at="2026-01-01T00:00:00+00:00",
)


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No settings but those of the test, and no patience with locks."""
    for variable in [name for name in os.environ if name.startswith("HEADRACE_")]:
        monkeypatch.delenv(variable)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(home_module, "_LOCK_PAUSE_SECONDS", 0.0)


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home")


def test_a_home_has_one_holder_at_a_time(home: Home) -> None:
    """A second holder is refused and told who the first is; afterwards the home is free again."""
    with home.hold("run"):
        assert home.holder() == home_module.Holder(os.getpid(), "run")
        with pytest.raises(StackTaken, match=f"`headrace run`, pid {os.getpid()}"), Home(home.folder).hold("up"):
            pass
    assert home.holder() is None
    with home.hold("up"):
        assert home.holder() == home_module.Holder(os.getpid(), "up")


def test_a_home_is_private(home: Home) -> None:
    """The folder, its lock and its record are for the owner alone."""
    with home.hold("up"):
        home.publish(RECORD)
        modes = {path.name: path.stat().st_mode & 0o777 for path in [home.folder, *home.folder.iterdir()]}
    assert modes == {"home": 0o700, "stack.lock": 0o600, "stack.json": 0o600}


def test_a_record_is_read_back_while_the_home_is_held(home: Home) -> None:
    """What was published is what others read, until it is withdrawn."""
    with home.hold("up"):
        assert home.record() is None
        home.publish(RECORD)
        assert home.record() == RECORD
        home.withdraw()
        assert home.record() is None


def test_a_record_that_a_killed_stack_left_behind_counts_for_nothing(home: Home) -> None:
    """With the lock free, or taken by the next stack, the old record is not believed."""
    with home.hold("up"):
        home.publish(RECORD)
    assert home.stack_file.exists()
    assert home.record() is None
    with home.hold("up"):
        assert home.record() is None


def test_a_record_of_another_version_is_an_error(home: Home) -> None:
    """A record that cannot be understood is told, not guessed at."""
    with home.hold("up"):
        home.stack_file.write_text(json.dumps({"pid": 1, "from": "the future"}))
        with pytest.raises(StackError, match="another version"):
            home.record()


def test_a_lock_that_nobody_signed_names_no_process(home: Home) -> None:
    """Who is about to sign the lock cannot be named yet; nobody else is named instead."""
    with home.hold("up"):
        (home.folder / "stack.lock").write_text("")
        with pytest.raises(StackError, match="did not sign"):
            home.holder()


def test_passwords_are_not_in_what_is_logged_of_a_record() -> None:
    """The printed form of a record has no secret."""
    assert "secret" not in repr(dataclasses.replace(RECORD, flower_password="secret"))


def test_settings_with_servers_are_taken_as_they_are(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """Configured servers go before a stack that is up."""
    monkeypatch.setenv("HEADRACE_DATABASE_URL", "postgresql://u:p@db/own")
    monkeypatch.setenv("HEADRACE_BROKER_URL", "redis://own")
    monkeypatch.setenv("HEADRACE_SECRET", "own secret of at least 32 characters")
    with home.hold("up"):
        home.publish(RECORD)
        assert connected_settings(Settings.load(home=home.folder)).database_url == "postgresql+psycopg://u:p@db/own"


def test_settings_without_servers_take_those_of_the_stack(home: Home) -> None:
    """URLs, key prefix and models come from the stack; a model of one's own goes before the stack's."""
    own = {"slow": {"engine": "echo", "slots": 3}, "mine": {"engine": "echo"}}
    with home.hold("up"):
        home.publish(RECORD)
        settings = connected_settings(Settings.load(home=home.folder, models=own))
    assert (settings.database_url, settings.broker_url) == (RECORD.database_url, RECORD.broker_url)
    assert settings.key_prefix == "its-prefix"
    assert settings.models == own


@pytest.mark.parametrize(
    ("command", "reason"), [(None, "headrace up"), ("run", "for itself alone"), ("up", "starting or stopping")]
)
def test_without_a_stack_the_error_says_what_to_do(home: Home, command: str | None, reason: str) -> None:
    """No stack, a stack that starts, and the private stack of a run are told apart."""
    settings = Settings.load(home=home.folder)
    if command is None:
        with pytest.raises(NoStack, match=reason):
            connected_settings(settings)
    else:
        with home.hold(command), pytest.raises(NoStack, match=reason):
            connected_settings(settings)


def test_a_child_sees_the_same_settings(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """The variables that a program of the stack gets make the settings that they were made from."""
    models = {"slow": {"engine": "echo", "seconds_per_token": 0.5}}
    settings = Settings.load(
        home=home.folder,
        database_url=RECORD.database_url,
        broker_url=RECORD.broker_url,
        secret=RECORD.secret,
        models=models,
    )
    for name, value in child_environment(settings).items():
        monkeypatch.setenv(name, value)
    assert Settings.load() == settings


def test_the_log_of_any_model_is_one_file_in_the_home(home: Home) -> None:
    """A model's name with slashes makes no folders; a log that has grown long is set aside."""
    log = home.log("worker-/models/a b")
    assert log.parent == home.folder / "logs"
    assert home.folder.stat().st_mode & 0o777 == 0o700
    log.write_bytes(b"x" * (home_module._LOG_BYTES + 1))
    assert home.log("worker-/models/a b") == log
    assert not log.exists()
    assert log.with_suffix(".log.old").stat().st_size == home_module._LOG_BYTES + 1
