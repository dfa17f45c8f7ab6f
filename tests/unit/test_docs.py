"""The documents agree with the code: settings, models, commands, modules, links."""

from __future__ import annotations

import importlib.util
import re
from decimal import Decimal
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer.main

from jobs.batches import Batches
from jobs.dispatch import Dispatcher
from jobs.leases import Leases
from jobs.settings import CONFIG_VARIABLE, PREFIX, TABLES, Settings
from jobs.states import State
from jobs.store import Store
from jobs.tables import metadata
from models.catalog import ModelSpec
from producer.client import Producer

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("deploy/*.md"), *ROOT.glob("examples/**/*.md")])
PACKAGES = ("headrace", "producer", "jobs", "workers", "models")


def _name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def _text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_settings", ROOT / "docs" / "generate_settings.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_of_settings_is_that_of_the_code(generator: ModuleType) -> None:
    """`make docs` would change nothing."""
    assert _text("docs/settings.md") == generator.page()


@pytest.mark.parametrize("name", sorted(Settings.model_fields))
def test_every_setting_is_documented(name: str) -> None:
    """A setting that is in the code is in the page of settings."""
    expected = f"[{name}" if name in TABLES else f"`{PREFIX}{name.upper()}`"
    assert expected in _text("docs/settings.md")


@pytest.mark.parametrize("name", sorted(set(ModelSpec.model_fields) - {"name"}))
def test_every_key_of_a_model_is_documented_with_its_default(name: str) -> None:
    """A key that a `[models.NAME]` table may have is in the page, and its default is the code's."""
    row = re.search(rf"^\| `{name}` \| (?P<default>\S+) \|", _text("docs/settings.md"), flags=re.MULTILINE)
    assert row is not None
    default = ModelSpec.model_fields[name].default
    written = row["default"].strip("`")
    assert (written == "none") if default is None else (_plain(written) == _plain(str(default)))


def _plain(value: str) -> str | Decimal:
    return Decimal(value) if re.fullmatch(r"[\d.]+", value) else value


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_a_variable_that_a_page_names_is_a_setting(page: Path) -> None:
    """No page tells of a HEADRACE_* variable that would be refused."""
    known = {PREFIX + name.upper() for name in Settings.model_fields} | {CONFIG_VARIABLE, "HEADRACE_NAME"}
    compose = {"HEADRACE_MODEL", "HEADRACE_GPU"}  # read by docker-compose.yml, see deploy/.env.example
    named = set(re.findall(r"\bHEADRACE_[A-Z_]*[A-Z]", page.read_text(encoding="utf-8")))
    assert named <= known | compose


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_a_link_leads_somewhere(page: Path) -> None:
    """A relative link names a file of the repository."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    links = re.findall(r"\]\((?!\w+:|#)([^)#\s]+)", text)
    missing = [link for link in links if not (page.parent / link).exists()]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_a_command_that_a_page_shows_exists(page: Path) -> None:
    """Each `headrace COMMAND` is a command, and its options are options of it."""
    commands = _commands()
    for command, rest in _shown(page):
        assert command in commands, f"headrace {command}"
        options = set(re.findall(r"(?<!\S)\[?(--[a-z-]+)", rest.split("#")[0]))
        assert options <= commands[command] | {"--help"}, f"headrace {command}{rest}"


def test_the_readme_shows_every_command() -> None:
    """Whatever `headrace --help` lists has its place in the README."""
    assert {command for command, _ in _shown(ROOT / "README.md")} >= _commands().keys() - {"version"}


def _commands() -> dict[str, set[str]]:
    """The options of each command."""
    from headrace.cli import app

    group = typer.main.get_command(app)
    return {name: _options(command) for name, command in group.commands.items()}  # type: ignore[attr-defined]


def _options(command: Any) -> set[str]:
    """Its own, and those of the commands within it."""
    own = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    return own.union(*(_options(one) for one in getattr(command, "commands", {}).values()))


def _shown(page: Path) -> list[tuple[str, str]]:
    """Each `headrace COMMAND` in the code of a page, and what follows it."""
    pattern = re.compile(r"(?:^|`|/|&& |worker )headrace ([a-z]+)([^`\n|]*)", flags=re.MULTILINE)
    return pattern.findall(_code(page))


def _code(page: Path) -> str:
    """Only what is set as code: fenced blocks and spans."""
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"```.*?```", text, flags=re.DOTALL)
    spans = re.findall(r"`[^`\n]+`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    return "\n".join([*blocks, *spans])


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_a_make_target_that_a_page_names_exists(page: Path) -> None:
    """`make TARGET` works."""
    targets = set(re.findall(r"^([a-z-]+):.*##", _text("Makefile"), flags=re.MULTILINE))
    for line in re.findall(r"(?:^|`)make ((?:[a-z-]+ ?)+)", _code(page), flags=re.MULTILINE):
        assert set(line.split()) <= targets


@pytest.mark.parametrize("package", PACKAGES)
def test_the_architecture_names_every_module(package: str) -> None:
    """`docs/architecture.md` has a line for each module, and for no other."""
    said = set(re.findall(rf"^\| `({package}/[\w/]+\.py)` \|", _text("docs/architecture.md"), flags=re.MULTILINE))
    there = {
        str(path.relative_to(ROOT))
        for path in (ROOT / package).rglob("*.py")
        if path.name not in {"__init__.py", "__main__.py"}
    }
    assert said == there


def test_the_architecture_names_every_table_and_state() -> None:
    """What Postgres holds is explained where people look for it."""
    text = _text("docs/architecture.md")
    assert all(f"`{table}`" in text for table in metadata.tables)
    assert all(f"`{state}`" in text or f"{state}" in text for state in State)


def test_the_architecture_names_calls_that_exist() -> None:
    """The methods behind the arrows are methods."""
    classes = {"Store": Store, "Batches": Batches, "Leases": Leases, "Producer": Producer, "Dispatcher": Dispatcher}
    named = re.findall(rf"`({'|'.join(classes)})\.(\w+)`", _text("docs/architecture.md"))
    assert {owner for owner, _ in named} == set(classes)
    assert all(callable(getattr(classes[owner], method, None)) for owner, method in named)


def test_the_readme_says_early_how_to_run_and_test() -> None:
    """Both commands are on the first screen."""
    first_screen = "\n".join(_text("README.md").splitlines()[:40])
    assert "make run" in first_screen
    assert "make test" in first_screen


def test_the_changelog_has_the_version() -> None:
    """The version of the code is the newest heading of the changelog."""
    from headrace import __version__

    assert re.search(rf"^## \[{re.escape(__version__)}\]", _text("CHANGELOG.md"), flags=re.MULTILINE)


def test_every_promise_of_access_names_tests_that_exist() -> None:
    """Whoever doubts a promise finds its test: each name in the page is a test's."""
    named = set(re.findall(r"`(test_\w+)`", _text("docs/access.md")))
    there = {
        name
        for path in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    }
    assert len(named) > 30
    assert named <= there
