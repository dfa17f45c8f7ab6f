"""Every setting, in one typed object. The only place that reads the environment, and never at import."""

from __future__ import annotations

import json
import os
import re
import tomllib
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path
from typing import Annotated, Any, Self, TypeAlias
from urllib.parse import urlsplit

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, InitSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict
from pydantic_settings import SettingsError as SourceError

from jobs.errors import SettingsError

Network: TypeAlias = IPv4Network | IPv6Network

PREFIX = "HEADRACE_"
CONFIG_VARIABLE = "HEADRACE_CONFIG"
CONFIG_FILE = "headrace.toml"
HEARTBEATS_PER_LEASE = 2
TABLES = ("models", "policies", "retention_days")  # settings that are tables of the file
_WHY_NEEDED = "servers of your own need one: 32 characters or more, as `openssl rand -hex 32` makes them"
_RELATION = re.compile(r"^(?P<variable>HEADRACE_\w+): (?P<message>.*)$", re.DOTALL)


class Settings(BaseSettings):
    """From `HEADRACE_*` variables, then `headrace.toml` (or the file that `HEADRACE_CONFIG` names), then defaults."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, extra="forbid", frozen=True, allow_inf_nan=False)

    home: Path = Path("~/.local/share/headrace")
    """Folder of the one-machine stack: data of the embedded servers, `stack.json`, logs."""
    database_url: str | None = None
    """postgresql://user:password@host:port/name; absent: the embedded Postgres."""
    broker_url: str | None = None
    """redis://:password@host:port/0; absent: the embedded Redis."""
    secret: str | None = Field(None, min_length=32, repr=False)
    """Signs the messages in Redis and proves tenants to Postgres: 32 characters or more, the same for every process, as
    `openssl rand -hex 32` makes them. Absent: that of the embedded servers."""
    gateway_database_url: str | None = None
    """As `HEADRACE_DATABASE_URL`, with the user as whom a gateway connects: Postgres holds it to one tenant.
    `headrace migrate` makes that user and says what it may do."""
    key_prefix: str = Field("headrace", pattern=r"^[A-Za-z0-9_.-]{1,64}$")
    """Put before every Redis key and channel, so that several systems share one Redis."""

    heartbeat_seconds: float = Field(2.5, gt=0)
    """How often a worker renews its lease."""
    lease_seconds: float = Field(10.0, gt=0)
    """How long a worker's proof of life lasts. Its rows are taken over after that."""
    sweep_seconds: float = Field(1.0, gt=0)
    """How often lost, overdue and unpublished rows are looked for."""
    drain_seconds: float = Field(30.0, ge=0)
    """How long a stopping worker may finish what it runs before it gives rows back."""
    engine_start_seconds: float = Field(900.0, gt=0)
    """How long an engine may take to load its model."""
    engine_hang_seconds: float | None = Field(None, gt=0)
    """An engine whose step takes longer is restarted. Absent: 20 s, or four times the longest step so far if that is
    more, up to 120 s; the first steps on a machine, with what they compile, have 120 s."""
    gpu_memory_fraction: float = Field(0.9, gt=0, le=1)
    """Part of a GPU for a model's weights, keys and values, unless the model's table says otherwise."""
    submit_broker_wait_seconds: float = Field(0.5, ge=0)
    """How long a submit waits for Redis. The row is safe without it; the sweeper publishes it later."""
    store_wait_seconds: float = Field(10.0, gt=0)
    """How long a client call waits for Postgres before `StoreUnavailable`."""

    max_attempts: int = Field(3, ge=1, le=100)
    """Attempts of a job whose request names none."""
    retry_max_seconds: float = Field(60.0, gt=0)
    """Longest wait before a retry. Waits double from 1 s, jittered."""
    max_prompt_bytes: int = Field(1_000_000, ge=1)
    """Largest prompt that is accepted, in bytes of UTF-8."""

    gateway_body_bytes: int = Field(8_000_000, ge=1_000)
    """Longest body of a request to the gateway, files apart."""
    gateway_file_bytes: int = Field(200_000_000, ge=1_000)
    """Longest file that the gateway takes."""
    gateway_waiting_jobs: int = Field(1_000, ge=1)
    """So many interactive jobs may wait for one model before the gateway answers 429."""
    gateway_tenant_requests: int = Field(1_000, ge=1)
    """So many requests of one tenant, streams too, may be open at a gateway before it answers 429."""
    gateway_metrics_address: str | None = Field(None, pattern=r"^(\[[0-9A-Fa-f:]+\]|[A-Za-z0-9.-]+):[0-9]{1,5}$")
    """host:port where a gateway serves `/metrics` to whoever can reach it. Absent: only beside its other routes, to
    keys with the role admin."""
    gateway_webhook_networks: str | None = None
    """Networks that webhooks may reach besides public addresses, such as `10.0.0.0/8,fd00::/8`. Absent: none."""
    stream_seconds: float = Field(3_600.0, ge=1)
    """How long the pieces of a streamed answer are kept in Redis; after that its result tells the same pieces."""

    models: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """`[models.NAME]` tables, checked by `models.catalog`."""
    retention_days: dict[str, Annotated[float, Field(ge=0)]] = Field(default_factory=dict)
    """`[retention_days]`, by tenant, `*` for every other one: workers delete what ended longer ago. Absent: nothing."""
    policies: dict[str, dict[str, dict[str, Any]]] = Field(default_factory=dict)
    """`[policies.TENANT.RULE]` tables, checked by `producer.policy`; the tenant `*` stands for every one."""

    @classmethod
    def load(cls, **overrides: Any) -> Self:
        """Read and check everything. Raises SettingsError naming the variable (or the key of the file) at fault."""
        _refuse_unknown_variables(set(cls.model_fields))
        try:
            return cls(**{name: value for name, value in overrides.items() if value is not None})
        except ValidationError as error:
            raise _first_fault(error) from None
        except SourceError as error:  # only tables, which a variable gives as JSON, cannot even be read
            raise SettingsError(_table_of(error), "must be a JSON object") from None

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Overrides, then environment, then the file."""
        return (init_settings, env_settings, InitSettingsSource(settings_cls, init_kwargs=_read_config()))

    @field_validator("home")
    @classmethod
    def _absolute_home(cls, home: Path) -> Path:
        return home.expanduser().absolute()

    @field_validator("database_url", "gateway_database_url")
    @classmethod
    def _postgres_with_psycopg(cls, url: str | None) -> str | None:
        if url is None:
            return None
        scheme, _, rest = url.partition("://")
        if scheme not in {"postgresql", "postgres", "postgresql+psycopg"} or not rest:
            raise ValueError("must look like postgresql://user:password@host:port/name")
        return f"postgresql+psycopg://{rest}"

    @field_validator("gateway_webhook_networks")
    @classmethod
    def _networks(cls, names: str | None) -> str | None:
        _networks_of(names)
        return names

    @property
    def webhook_networks(self) -> list[Network]:
        """Those of `gateway_webhook_networks`."""
        return _networks_of(self.gateway_webhook_networks)

    @field_validator("broker_url")
    @classmethod
    def _redis(cls, url: str | None) -> str | None:
        if url is not None and urlsplit(url).scheme not in {"redis", "rediss"}:
            raise ValueError("must look like redis://:password@host:port/0")
        return url

    @model_validator(mode="after")
    def _relations(self) -> Self:
        if self.lease_seconds < HEARTBEATS_PER_LEASE * self.heartbeat_seconds:
            raise ValueError(
                f"HEADRACE_LEASE_SECONDS: a lease of {self.lease_seconds:g} s is shorter than "
                f"{HEARTBEATS_PER_LEASE} heartbeats of {self.heartbeat_seconds:g} s (HEADRACE_HEARTBEAT_SECONDS)",
            )
        if (self.database_url is None) != (self.broker_url is None):
            missing = "HEADRACE_DATABASE_URL" if self.database_url is None else "HEADRACE_BROKER_URL"
            raise ValueError(f"{missing}: is missing; set both URLs, or none to use the embedded servers")
        if self.database_url is not None and self.secret is None:
            raise ValueError(f"HEADRACE_SECRET: is missing; {_WHY_NEEDED}")
        return self

    def for_gateway(self) -> Self:
        """What a gateway runs with: it knows no other way into Postgres than its own."""
        url = self.gateway_database_url or self.database_url
        return self.model_copy(update={"database_url": url, "gateway_database_url": None})

    def environment(self) -> dict[str, str]:
        """These settings as variables, for a child process that has to see the same ones. Contains passwords."""
        plain = self.model_dump(mode="json", exclude=set(TABLES), exclude_none=True)
        variables = {PREFIX + name.upper(): str(value) for name, value in plain.items()}
        for name in TABLES:  # they may come from a stack's record instead of a file
            if table := getattr(self, name):
                variables[PREFIX + name.upper()] = json.dumps(table)
        path = config_path()
        return variables if path is None else variables | {CONFIG_VARIABLE: str(path.absolute())}


def _networks_of(names: str | None) -> list[Network]:
    return [ip_network(name.strip()) for name in names.split(",")] if names else []


def _table_of(error: SourceError) -> str:
    """The variable of the table that pydantic's message names."""
    return next((PREFIX + name.upper() for name in TABLES if f'"{name}"' in str(error)), CONFIG_VARIABLE)


def config_path() -> Path | None:
    """The file of settings in force: the one `HEADRACE_CONFIG` names, else `headrace.toml` here, else none."""
    named = os.environ.get(CONFIG_VARIABLE)
    if named:
        return Path(named).expanduser()
    here = Path(CONFIG_FILE)
    return here if here.is_file() else None


def _read_config() -> dict[str, Any]:
    path = config_path()
    if path is None:
        return {}
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SettingsError(str(path), f"cannot be read: {error}") from None


def _refuse_unknown_variables(known: set[str]) -> None:
    allowed = {PREFIX + name.upper() for name in known} | {CONFIG_VARIABLE}
    for variable in sorted(os.environ):
        if variable.upper().startswith(PREFIX) and variable.upper() not in allowed:
            raise SettingsError(variable, "is no setting of Headrace; see the README for the list")


def _first_fault(error: ValidationError) -> SettingsError:
    fault = error.errors()[0]
    message = fault["msg"].removeprefix("Value error, ")
    relation = _RELATION.match(message)
    if relation:
        return SettingsError(relation["variable"], relation["message"])
    name = ".".join(str(part) for part in fault["loc"])
    return SettingsError(PREFIX + name.upper() if name in Settings.model_fields else name, message)
