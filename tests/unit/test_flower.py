"""Access to Flower: always behind a password, which never is on a command line."""

from __future__ import annotations

import pytest

from headrace import flower
from jobs.errors import SettingsError
from jobs.settings import Settings


def test_without_a_login_one_is_made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each time another password, on loopback, on a free port."""
    monkeypatch.delenv("FLOWER_BASIC_AUTH", raising=False)
    first, second = flower.grant(), flower.grant()
    assert first.password != second.password
    assert len(first.password) >= 20
    assert first.url == f"http://127.0.0.1:{first.port}"


def test_a_given_login_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first of several; a password may hold colons."""
    monkeypatch.setenv("FLOWER_BASIC_AUTH", "ann:a:b,bob:c")
    access = flower.grant(5555)
    assert (access.user, access.password, access.port) == ("ann", "a:b", 5555)
    assert access.environment == {"FLOWER_BASIC_AUTH": "ann:a:b,bob:c"}


@pytest.mark.parametrize("value", ["ann", "ann:", ":secret", ",", "ann:a,", "ann:a,bob"])
def test_a_login_without_user_or_password_is_refused(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    """It names the variable; nothing is opened to everybody by mistake."""
    monkeypatch.setenv("FLOWER_BASIC_AUTH", value)
    with pytest.raises(SettingsError, match="FLOWER_BASIC_AUTH"):
        flower.grant()


def test_flower_is_not_served_without_a_login(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever starts the module by hand is refused too."""
    monkeypatch.delenv("FLOWER_BASIC_AUTH", raising=False)
    with pytest.raises(SettingsError, match="FLOWER_BASIC_AUTH"):
        flower.serve(Settings.load(), 5555, "127.0.0.1")


def test_the_password_is_neither_on_the_command_line_nor_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    """It travels in the environment alone."""
    monkeypatch.setenv("FLOWER_BASIC_AUTH", "ann:secret")
    access = flower.grant()
    assert "secret" not in repr(access)
    assert not any("secret" in argument for argument in flower.arguments(access))


def test_nothing_on_the_port_is_no_answer() -> None:
    """A Flower that is not there does not answer, and that is no error."""
    assert not flower.grant().answers()
