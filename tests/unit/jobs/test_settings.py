"""Where settings come from, and what is said about bad ones."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from jobs.errors import SettingsError
from jobs.settings import Settings

REPOSITORY = Path(__file__).parents[3]
DATABASE = "postgresql://u:p@localhost:5432/h"
BROKER = "redis://:p@localhost:6379/0"
SECRET = "0123456789abcdef0123456789abcdef"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, and no variable of ours."""
    for name in [name for name in os.environ if name.upper().startswith("HEADRACE_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refusal(**overrides: object) -> SettingsError:
    with pytest.raises(SettingsError) as refused:
        Settings.load(**overrides)
    assert str(refused.value).startswith(f"{refused.value.variable}: ")
    return refused.value


def test_defaults() -> None:
    """Without a word from anybody everything has a value, and the servers are the embedded ones."""
    settings = Settings.load()
    assert (settings.lease_seconds, settings.heartbeat_seconds, settings.max_attempts) == (10.0, 2.5, 3)
    assert settings.database_url is None
    assert settings.broker_url is None
    assert settings.home == Path("~/.local/share/headrace").expanduser()


def test_override_over_environment_over_file_over_default(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The nearest word counts."""
    names = ("lease_seconds", "drain_seconds", "sweep_seconds", "max_attempts")
    (folder / "headrace.toml").write_text("lease_seconds = 21\ndrain_seconds = 22\nsweep_seconds = 23\n")
    monkeypatch.setenv("HEADRACE_LEASE_SECONDS", "31")
    monkeypatch.setenv("HEADRACE_DRAIN_SECONDS", "32")
    settings = Settings.load(lease_seconds=41)
    assert [getattr(settings, name) for name in names] == [41, 32, 23, 3]


def test_override_by_none_is_none() -> None:
    """An option that was not given leaves the setting as it is."""
    assert Settings.load(lease_seconds=None).lease_seconds == 10.0


def test_config_variable_names_the_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """HEADRACE_CONFIG goes before the file that lies here."""
    (folder / "headrace.toml").write_text("max_attempts = 4\n")
    (folder / "other.toml").write_text("max_attempts = 5\n")
    monkeypatch.setenv("HEADRACE_CONFIG", str(folder / "other.toml"))
    assert Settings.load().max_attempts == 5


def test_models_of_the_file(folder: Path) -> None:
    """`[models.NAME]` tables arrive as they are; the catalog checks them."""
    (folder / "headrace.toml").write_text('[models.fast]\nengine = "echo"\nslots = 4\n')
    assert Settings.load().models == {"fast": {"engine": "echo", "slots": 4}}


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("HEADRACE_LEASE_SECONDS", "soon"),
        ("HEADRACE_LEASE_SECONDS", "nan"),
        ("HEADRACE_LEASE_SECONDS", "inf"),
        ("HEADRACE_HEARTBEAT_SECONDS", "0"),
        ("HEADRACE_SWEEP_SECONDS", "-1"),
        ("HEADRACE_DRAIN_SECONDS", "-1"),
        ("HEADRACE_SUBMIT_BROKER_WAIT_SECONDS", "-0.1"),
        ("HEADRACE_STORE_WAIT_SECONDS", "0"),
        ("HEADRACE_MAX_ATTEMPTS", "0"),
        ("HEADRACE_MAX_ATTEMPTS", "2.5"),
        ("HEADRACE_MAX_PROMPT_BYTES", "0"),
        ("HEADRACE_KEY_PREFIX", "two words"),
        ("HEADRACE_KEY_PREFIX", ""),
        ("HEADRACE_DATABASE_URL", ""),
        ("HEADRACE_DATABASE_URL", "mysql://localhost/h"),
        ("HEADRACE_DATABASE_URL", "localhost"),
        ("HEADRACE_BROKER_URL", "amqp://localhost"),
        ("HEADRACE_MODELS", "{"),
        ("HEADRACE_MODELS", "[]"),
        ("HEADRACE_POLICIES", "{"),
    ],
)
def test_bad_value_names_the_variable(variable: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bad value is an error that begins with the variable's name."""
    monkeypatch.setenv("HEADRACE_DATABASE_URL", DATABASE)
    monkeypatch.setenv("HEADRACE_BROKER_URL", BROKER)
    monkeypatch.setenv("HEADRACE_SECRET", SECRET)
    monkeypatch.setenv(variable, value)
    assert refusal().variable == variable


def test_bad_value_in_the_file(folder: Path) -> None:
    """A bad value of the file is known by the variable that would set it."""
    (folder / "headrace.toml").write_text('max_attempts = "many"\n')
    assert refusal().variable == "HEADRACE_MAX_ATTEMPTS"


@pytest.mark.parametrize(
    ("file", "key"),
    [
        ("leese_seconds = 10\n", "leese_seconds"),
        ("[model.fast]\nslots = 1\n", "model"),
        ("[models]\na = 3\n", "models.a"),
    ],
)
def test_unknown_key_of_the_file(file: str, key: str, folder: Path) -> None:
    """A key that means nothing is an error that begins with it."""
    (folder / "headrace.toml").write_text(file)
    assert refusal().variable == key


@pytest.mark.parametrize("content", [b"x = [", b"\xff\xfe"])
def test_broken_file(content: bytes, folder: Path) -> None:
    """A file that cannot be read is an error that names it."""
    (folder / "headrace.toml").write_bytes(content)
    assert refusal().variable == "headrace.toml"


def test_missing_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that HEADRACE_CONFIG names has to be there."""
    monkeypatch.setenv("HEADRACE_CONFIG", str(folder / "none.toml"))
    assert refusal().variable == str(folder / "none.toml")


@pytest.mark.parametrize("variable", ["HEADRACE_LEASE", "HEADRACE_LEASE_SECOND", "headrace_leese_seconds"])
def test_unknown_variable(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable that looks like ours and is none is an error: it is misspelt."""
    monkeypatch.setenv(variable, "1")
    assert refusal().variable == variable


def test_unknown_override() -> None:
    """So is an override."""
    assert refusal(leese_seconds=1).variable == "leese_seconds"


def test_lease_holds_two_heartbeats(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lease below two heartbeats would end between them; two exactly will do."""
    monkeypatch.setenv("HEADRACE_HEARTBEAT_SECONDS", "5.5")
    error = refusal()
    assert error.variable == "HEADRACE_LEASE_SECONDS"
    assert "HEADRACE_HEARTBEAT_SECONDS" in str(error)
    assert Settings.load(lease_seconds=11).lease_seconds == 11


@pytest.mark.parametrize(
    ("given", "value", "missing"),
    [
        ("HEADRACE_DATABASE_URL", DATABASE, "HEADRACE_BROKER_URL"),
        ("HEADRACE_BROKER_URL", BROKER, "HEADRACE_DATABASE_URL"),
    ],
)
def test_one_url_without_the_other(given: str, value: str, missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One server of the user's and one embedded is a mistake; the error names the URL that is missing."""
    monkeypatch.setenv(given, value)
    assert refusal().variable == missing


@pytest.mark.parametrize("scheme", ["postgres", "postgresql", "postgresql+psycopg"])
def test_any_way_to_write_postgres(scheme: str) -> None:
    """Every usual spelling of a Postgres URL comes to the one driver."""
    settings = Settings.load(database_url=f"{scheme}://u:p@h/d", broker_url=BROKER, secret=SECRET)
    assert settings.database_url == "postgresql+psycopg://u:p@h/d"


def test_home_is_absolute(folder: Path) -> None:
    """The home is the same place for a child that works in another folder."""
    assert Settings.load(home=Path("here")).home == folder / "here"
    assert Settings.load(home=Path("~/there")).home == Path.home() / "there"


def test_environment_round_trip(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A child that gets the environment sees the same settings, models too, wherever it works."""
    (folder / "headrace.toml").write_text('max_attempts = 7\n[models.fast]\nengine = "echo"\n')
    settings = Settings.load(
        home=Path("here"),
        database_url=DATABASE,
        broker_url=BROKER,
        secret=SECRET,
        key_prefix="a.b",
        lease_seconds=12.25,
    )
    (folder / "elsewhere").mkdir()
    monkeypatch.chdir(folder / "elsewhere")
    # As it was made before the folder changed.
    monkeypatch.setenv("HEADRACE_CONFIG", str(folder / "headrace.toml"))
    for name, value in settings.environment().items():
        monkeypatch.setenv(name, value)
    assert Settings.load() == settings


def test_environment_names_the_file_in_force(folder: Path) -> None:
    """The file that lies here reaches a child by its whole path, and without one no variable says so."""
    assert "HEADRACE_CONFIG" not in Settings.load().environment()
    (folder / "headrace.toml").write_text("max_attempts = 7\n")
    assert Settings.load().environment()["HEADRACE_CONFIG"] == str(folder / "headrace.toml")


def test_immutable() -> None:
    """What was checked stays."""
    with pytest.raises(ValidationError, match="frozen"):
        Settings.load().lease_seconds = 1.0


def test_nothing_is_read_at_import(folder: Path) -> None:
    """Importing any module of the contract minds neither a bad variable nor a broken file."""
    (folder / "headrace.toml").write_text("x = [")
    modules = ", ".join(f"jobs.{path.stem}" for path in (REPOSITORY / "jobs").glob("[a-z]*.py"))
    mistakes = {"HEADRACE_LEASE_SECONDS": "x", "HEADRACE_NONSENSE": "1"}
    asked = subprocess.run(
        [sys.executable, "-c", f"import {modules}; print('fine')"],
        env=os.environ | mistakes | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (asked.stdout, asked.stderr) == ("fine\n", "")


def test_servers_of_ones_own_need_a_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing passes through a Redis of one's own unsigned: without a secret, nothing starts."""
    monkeypatch.setenv("HEADRACE_DATABASE_URL", DATABASE)
    monkeypatch.setenv("HEADRACE_BROKER_URL", BROKER)
    assert refusal().variable == "HEADRACE_SECRET"
    monkeypatch.setenv("HEADRACE_SECRET", SECRET[:-1])
    assert refusal().variable == "HEADRACE_SECRET"
    monkeypatch.setenv("HEADRACE_SECRET", SECRET)
    assert Settings.load().secret == SECRET


def test_no_secret_is_shown_by_accident() -> None:
    """Whoever prints the settings tells no secret."""
    assert SECRET not in repr(Settings.load(database_url=DATABASE, broker_url=BROKER, secret=SECRET))


def test_a_gateway_knows_no_way_into_postgres_but_its_own() -> None:
    """Its settings, and the environment made from them, do not hold the owner's URL."""
    settings = Settings.load(
        database_url=DATABASE,
        gateway_database_url="postgresql://gateway:q@localhost:5432/h",
        broker_url=BROKER,
        secret=SECRET,
    ).for_gateway()
    assert settings.database_url == "postgresql+psycopg://gateway:q@localhost:5432/h"
    assert "u:p@" not in str(settings.environment())
