"""The deployment files: what they promise about ports, secrets, users and commands holds in every service."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import typer.main
import yaml
from pydantic import BaseModel, ConfigDict, Field, StringConstraints
from sqlalchemy import make_url

from jobs.settings import CONFIG_VARIABLE, PREFIX, Settings

ROOT = Path(__file__).resolve().parents[2]
SECRETS = ("POSTGRES_PASSWORD", "REDIS_PASSWORD", "FLOWER_PASSWORD", "GATEWAY_PASSWORD", "HEADRACE_SECRET")

Seconds = Annotated[str, StringConstraints(pattern=r"^\d+s$")]
Variable = re.compile(r"\$\{(?P<name>\w+)(?P<rest>[^}]*)\}")


class Strict(BaseModel):
    """The part of the Compose Specification that the file may use."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Build(Strict):
    context: str
    target: str


class Healthcheck(Strict):
    test: list[str]
    interval: Seconds
    timeout: Seconds
    retries: int
    start_period: Seconds = "0s"


class Dependency(Strict):
    condition: Literal["service_started", "service_healthy", "service_completed_successfully"]


class Device(Strict):
    driver: Literal["nvidia"]
    device_ids: list[str] = Field(min_length=1)
    capabilities: list[Literal["gpu"]]


class Reservations(Strict):
    devices: list[Device]


class Resources(Strict):
    reservations: Reservations


class Deploy(Strict):
    resources: Resources


class Service(Strict):
    image: str
    build: Build | None = None
    user: str | None = None
    entrypoint: list[str] | None = None
    command: list[str] = Field(default_factory=list)
    working_dir: str | None = None
    environment: dict[str, str]
    init: bool = False
    read_only: bool
    cap_drop: list[str]
    security_opt: list[str]
    restart: Literal["unless-stopped", "on-failure"]
    networks: list[str]
    ports: list[str] = Field(default_factory=list)
    volumes: list[str] = Field(default_factory=list)
    tmpfs: list[str]
    shm_size: str | None = None
    depends_on: dict[str, Dependency] = Field(default_factory=dict)
    healthcheck: Healthcheck | None = None
    deploy: Deploy | None = None
    stop_grace_period: Seconds = "10s"


class Network(Strict):
    internal: bool = False


class Compose(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    services: dict[str, Service]
    networks: dict[str, Network | None]
    volumes: dict[str, None]


@pytest.fixture(scope="module")
def raw() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))
    return loaded


@pytest.fixture(scope="module")
def compose(raw: dict[str, Any]) -> Compose:
    return Compose.model_validate({key: value for key, value in raw.items() if not key.startswith("x-")})


def test_the_file_has_the_six_services_and_only_known_keys(compose: Compose) -> None:
    """Every key belongs to the Compose Specification, and what services refer to exists."""
    assert set(compose.services) == {"postgres", "redis", "migrate", "worker", "gateway", "flower"}
    for service in compose.services.values():
        assert set(service.networks) <= set(compose.networks)
        assert set(service.depends_on) <= set(compose.services)
        assert {volume.split(":")[0] for volume in service.volumes} <= set(compose.volumes)


def test_nothing_is_published_but_on_loopback(compose: Compose) -> None:
    """The servers publish no port at all, and any port of another service is for this host alone."""
    for server in ("postgres", "redis"):
        assert compose.services[server].ports == []
        assert compose.services[server].networks == ["servers"]
    assert compose.networks["servers"] == Network(internal=True)
    published = [port for service in compose.services.values() for port in service.ports]
    assert published
    assert all(port.startswith("127.0.0.1:") for port in published)


@pytest.mark.parametrize("secret", SECRETS)
def test_a_secret_is_required_wherever_it_is_used(raw: dict[str, Any], secret: str) -> None:
    """Compose refuses to start without it, says so, and no file gives it a value."""
    uses = [use for text in _texts(raw["services"]) for use in Variable.finditer(text) if use["name"] == secret]
    assert uses
    assert all(re.match(r":\?\w", use["rest"]) for use in uses)
    assert _example()[secret] == ""


def test_every_variable_is_in_the_example(raw: dict[str, Any]) -> None:
    """`deploy/.env.example` names exactly what the file reads."""
    used = {use["name"] for text in _texts(raw["services"]) for use in Variable.finditer(text)}
    assert used == set(_example())


def test_no_password_is_written_down(raw: dict[str, Any]) -> None:
    """Whatever looks like a password in the environment of a service comes from a variable."""
    for service in raw["services"].values():
        for name, value in service["environment"].items():
            if re.search("PASSWORD|AUTH|SECRET|_URL$", name):
                assert Variable.search(value), name


def test_everything_runs_as_an_ordinary_user_and_hardened(compose: Compose) -> None:
    """No root, no capabilities, no writable file system."""
    for name, service in compose.services.items():
        user = service.user or _image_user()
        assert int(user.split(":")[0]) > 0, name
        assert service.read_only, name
        assert service.cap_drop == ["ALL"], name
        assert service.security_opt == ["no-new-privileges:true"], name


def test_our_services_are_built_from_stages_that_exist(compose: Compose) -> None:
    """What is no server of others is built from a stage of the Dockerfile."""
    stages = set(re.findall(r"^FROM \S+ AS (\S+)$", _dockerfile(), flags=re.MULTILINE))
    ours = {name: service for name, service in compose.services.items() if service.build}
    assert set(ours) == {"migrate", "worker", "gateway", "flower"}
    assert {service.build.target for service in ours.values() if service.build} <= stages


def test_our_services_run_commands_that_exist(compose: Compose) -> None:
    """Each is a command of `headrace`, with options that it has."""
    for service in compose.services.values():
        if service.build:
            command, *arguments = service.command
            options = {argument for argument in arguments if argument.startswith("--")}
            assert options <= _options_of(command)


def test_a_healthcheck_asks_with_a_command_that_exists(compose: Compose) -> None:
    """A check that calls `headrace` calls a command that it has, with options that it has."""
    checks = [service.healthcheck.test for service in compose.services.values() if service.healthcheck]
    calls = [re.match(r"headrace (\w+)([^|]*)", part) for check in checks for part in check]
    assert any(calls)
    for command, rest in (call.groups() for call in calls if call):
        assert set(re.findall(r"--[\w-]+", rest)) <= _options_of(command)


def test_our_services_set_settings_that_exist(compose: Compose) -> None:
    """An unknown HEADRACE_* variable would be refused at start, and the values given are valid together."""
    known = {PREFIX + name.upper() for name in Settings.model_fields} | {CONFIG_VARIABLE}
    for service in compose.services.values():
        ours = {name: value for name, value in service.environment.items() if name.startswith(PREFIX)}
        assert set(ours) <= known
        Settings.model_validate({name.removeprefix(PREFIX).lower(): value for name, value in ours.items()})


def test_nothing_starts_before_what_it_needs(compose: Compose) -> None:
    """Migrations wait for Postgres; workers, the gateway and Flower for the migrations and Redis."""
    assert compose.services["migrate"].depends_on["postgres"].condition == "service_healthy"
    for name in ("worker", "gateway", "flower"):
        needs = compose.services[name].depends_on
        assert needs["migrate"].condition == "service_completed_successfully"
        assert needs["redis"].condition == "service_healthy"
    for server in ("postgres", "redis"):
        assert compose.services[server].healthcheck is not None


def test_a_worker_is_given_the_time_it_drains_in(compose: Compose) -> None:
    """Docker kills it later than it would have ended by itself: drain, one lease for each of its processes."""
    worker = compose.services["worker"]
    drain_seconds = float(worker.environment["HEADRACE_DRAIN_SECONDS"])
    lease_seconds = float(Settings.model_fields["lease_seconds"].default)
    assert int(worker.stop_grace_period.removesuffix("s")) >= drain_seconds + 2 * lease_seconds
    assert worker.init


def test_the_gateway_knows_one_way_into_postgres(compose: Compose) -> None:
    """That of its own user, which the migration admits: the owner's password is nowhere in its environment."""
    gateway, migrate = compose.services["gateway"], compose.services["migrate"]
    assert not any("POSTGRES_PASSWORD" in value for value in gateway.environment.values())
    url = gateway.environment["HEADRACE_DATABASE_URL"]
    assert url == migrate.environment["HEADRACE_GATEWAY_DATABASE_URL"]
    owner = migrate.environment["HEADRACE_DATABASE_URL"]
    assert make_url(_filled(url)).username != make_url(_filled(owner)).username
    assert make_url(_filled(url)).database == make_url(_filled(owner)).database
    others = {name for name, one in compose.services.items() if "GATEWAY_PASSWORD" in str(one.environment)}
    assert others == {"gateway", "migrate"}


def test_the_gateway_is_asked_where_it_listens(compose: Compose) -> None:
    """Port, probe and command agree, and what it publishes is not for other hosts."""
    gateway = compose.services["gateway"]
    options = dict(zip(gateway.command[1::2], gateway.command[2::2], strict=True))
    assert options == {"--address": "0.0.0.0", "--port": "8000"}
    assert gateway.ports == [f"127.0.0.1:8000:{options['--port']}"]
    assert gateway.healthcheck is not None
    assert f":{options['--port']}/ready" in gateway.healthcheck.test[-1]
    assert gateway.build is not None
    assert gateway.build.target == "server"


def test_the_gateway_ends_before_it_is_killed(compose: Compose) -> None:
    """Docker leaves it the time in which it ends its streams and lets go of the servers."""
    from headrace.stack import _GATEWAY_GRACE_SECONDS

    assert int(compose.services["gateway"].stop_grace_period.removesuffix("s")) >= _GATEWAY_GRACE_SECONDS


def test_every_image_has_what_its_services_need() -> None:
    """The extras of each environment hold those of the commands that run in it."""
    extras = [set(found.split(",")) for found in re.findall(r"\.whl\)\[([\w,]+)\]", _dockerfile())]
    assert extras == [{"flower", "gateway"}, {"flower", "gateway", "worker"}]


def test_the_worker_reserves_one_gpu(compose: Compose) -> None:
    """It gets the GPU it is told, which inside is number 0."""
    worker = compose.services["worker"]
    assert worker.deploy is not None
    (device,) = worker.deploy.resources.reservations.devices
    assert device.device_ids == ["${HEADRACE_GPU:-0}"]
    assert worker.command[-2:] == ["--gpus", "0"]


def test_the_image_takes_the_pinned_versions_and_what_the_wheel_is_made_of() -> None:
    """Every pip of the Dockerfile is constrained, and the context holds all that the wheel includes."""
    commands = _dockerfile().replace("\\\n", " ").replace("&&", "\n").splitlines()
    pips = [command for command in commands if re.search(r"-m pip (install|wheel)", command)]
    assert len(pips) >= 4
    assert all("constraint" in command for command in pips)
    context = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    for needed in ("pyproject.toml", "README.md", "LICENSE", "headrace", "alembic", "examples/tiny-chat"):
        assert f"!{needed}" in context


def _filled(text: str) -> str:
    """With something for each variable."""
    return Variable.sub("x", text)


def _dockerfile() -> str:
    return (ROOT / "Dockerfile").read_text(encoding="utf-8")


def _image_user() -> str:
    users = re.findall(r"^USER (\S+)$", _dockerfile(), flags=re.MULTILINE)
    return str(users[-1])


def _example() -> dict[str, str]:
    text = (ROOT / "deploy" / ".env.example").read_text(encoding="utf-8")
    return dict(re.findall(r"^(\w+)=(.*)$", text, flags=re.MULTILINE))


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)


def _options_of(command: str) -> set[str]:
    from headrace.cli import app

    group = typer.main.get_command(app)
    commands: dict[str, Any] = group.commands  # type: ignore[attr-defined]
    return {option for parameter in commands[command].params for option in parameter.opts}
