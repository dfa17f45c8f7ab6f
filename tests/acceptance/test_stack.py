"""The stack on one machine as real processes: it comes up, mends itself, ends, and leaves nothing behind."""

from __future__ import annotations

import base64
import json
import os
import signal
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any
from uuid import UUID

import openai
import psutil
import psycopg
import pytest
import redis
from sqlalchemy import make_url

from headrace.stack import Stack
from jobs.home import Home, Record, StackError
from jobs.settings import Settings
from kit.commands import PATIENCE_SECONDS, Background, User, user
from kit.databases import SECRET
from kit.homes import temporary_home
from kit.waiting import wait_until

# So that what is lost is noticed in seconds.
QUICK = {"HEADRACE_DRAIN_SECONDS": "2", "HEADRACE_LEASE_SECONDS": "4", "HEADRACE_HEARTBEAT_SECONDS": "1"}


@pytest.fixture(scope="module")
def ann() -> Iterator[User]:
    """A user whose stack is up for all tests of this module that only look at it or mend it."""
    with user(**QUICK) as one:
        yield one


@pytest.fixture(scope="module")
def up(ann: User) -> Iterator[Background]:
    """Her stack: echo, Flower and the gateway."""
    with ann.up("--model", "echo") as command:
        yield command


@pytest.fixture
def record(ann: User, up: Background) -> Record:
    """What her stack.json says."""
    found = ann.record_of(up)
    assert found is not None, up.said
    return found


# == while it is up ==============================================================================================


def test_the_record_is_private_and_what_it_names_answers(ann: User, record: Record) -> None:
    """stack.json is for its owner alone, and its credentials open Postgres, Redis and Flower."""
    assert Home(ann.home).stack_file.stat().st_mode & 0o777 == 0o600
    with psycopg.connect(_plain(record.database_url)) as connection:
        assert connection.execute("SELECT count(*) FROM alembic_version").fetchone() == (1,)
    with redis.Redis.from_url(record.broker_url) as client:
        assert client.ping()
    assert "echo" in _flower(record, "/api/workers?refresh=1")
    assert record.models == ["echo"]


def test_a_gateways_user_is_admitted_and_held(record: Record) -> None:
    """The stack makes the user as whom a gateway connects; Postgres holds it to row security."""
    with psycopg.connect(_plain(str(record.gateway_database_url))) as connection:
        held = "SELECT current_user, row_security_active('jobs'), has_table_privilege('api_keys', 'SELECT')"
        assert connection.execute(held).fetchone() == ("headrace_gateway", True, False)
    assert len(record.secret) >= 32


def test_whoever_is_let_into_flower_ends_jobs(ann: User, record: Record) -> None:
    """Its revoke is signed like our own messages, so that workers heed it; here of a job that nobody serves."""
    job = ann.call("submit", "x", "--model", "tiny-chat", "--json").json["id"]
    _flower(record, f"/api/task/revoke/{job}", body=b"")
    ended = lambda: ann.call("status", job, "--json").json["state"] == "cancelled"  # noqa: E731
    wait_until(ended, PATIENCE_SECONDS, "the job is cancelled")


def test_its_addresses_are_told_without_passwords(record: Record, up: Background) -> None:
    """What is on the screen may be seen by others."""
    assert str(record.flower_url) in up.said
    assert str(make_url(record.database_url).port) in up.said
    assert not [secret for secret in _secrets(record) if secret in up.said]


def test_no_password_is_on_a_command_line(ann: User, record: Record) -> None:
    """A process list gives nothing away."""
    lines = [" ".join(process.cmdline()) for process in ann.processes()]
    assert len(lines) >= 6
    assert not [line for line in lines for secret in _secrets(record) if secret in line]


@pytest.mark.parametrize("path", ["/", "/workers", "/tasks", "/broker", "/api/workers", "/api/tasks"])
@pytest.mark.parametrize("login", [None, "headrace:wrong", ":"])
def test_flower_lets_nobody_in_without_the_password(record: Record, path: str, login: str | None) -> None:
    """Neither its pages nor its API."""
    with pytest.raises(urllib.error.HTTPError) as refused:
        _get(f"{record.flower_url}{path}", login)
    refused.value.close()
    assert refused.value.code == 401


def test_flower_listens_on_loopback_alone(ann: User, record: Record) -> None:
    """No other machine reaches it."""
    listening = [one.laddr for one in ann.program("headrace.flower").net_connections() if one.status == "LISTEN"]
    assert [(address.ip, address.port) for address in listening] == [("127.0.0.1", _port(record.flower_url))]


def test_flower_shows_a_job_under_its_id(ann: User, record: Record) -> None:
    """With its state and how long it ran."""
    job = ann.call("submit", "watch me", "--model", "echo", "--wait", "--json").json

    def shown() -> dict[str, Any]:
        task = json.loads(_flower(record, "/api/tasks")).get(job["id"])
        return task if task and task["state"] == "SUCCESS" else {}

    task = wait_until(shown, PATIENCE_SECONDS, "Flower shows the job as done")
    assert task["name"] == "headrace.run_job"
    assert task["runtime"] >= 0
    assert "watch me" not in json.dumps(task)


def test_the_gateway_answers_to_the_key_of_the_record(ann: User, record: Record) -> None:
    """The official client works with what stack.json says, and the job is one of the stack's."""
    with openai.OpenAI(base_url=f"{record.gateway_url}/v1", api_key=record.gateway_key, max_retries=0) as client:
        made = client.responses.create(model="echo", input="over HTTP")
    assert made.output_text == "over HTTP"
    shown = ann.call("status", str(UUID(made.id.removeprefix("resp_"))), "--json").json
    assert (shown["state"], shown["text"]) == ("succeeded", "over HTTP")


def test_the_gateways_process_has_no_other_way_into_postgres(ann: User, record: Record) -> None:
    """It knows the user that Postgres holds to one tenant, and not the tables' owner."""
    environment = ann.program("producer.gateway").environ()
    owner = make_url(record.database_url)
    assert make_url(environment["HEADRACE_DATABASE_URL"]).username != owner.username
    assert not [name for name, value in environment.items() if str(owner.password) in value]


def test_flower_knows_the_queues_of_the_worker(record: Record) -> None:
    """Their lengths are on its broker page from the start, and that of the one in which the worker proves itself."""
    names = {queue["name"] for queue in json.loads(_flower(record, "/api/queues/length"))["active_queues"]}
    assert {"echo.interactive", "echo.bulk"} <= names
    assert [name.partition("-")[0] for name in names - {"echo.interactive", "echo.bulk"}] == ["echo.proof"]


def test_a_second_stack_on_the_same_home_is_told_who_has_it(ann: User, record: Record) -> None:
    """Neither in the foreground nor in the background does it disturb the first."""
    for arguments in (["up", "--model", "echo"], ["up", "--model", "echo", "--detach"]):
        done = ann.headrace(*arguments)
        assert done.status == 1
        assert f"`headrace up`, pid {record.pid}" in done.err
    assert ann.call("submit", "hi", "--model", "echo", "--wait").out == "hi\n"


def test_another_home_has_a_stack_of_its_own(ann: User, record: Record) -> None:
    """Two stacks on one machine share neither ports nor passwords."""
    with user(**QUICK) as bob, bob.up("--model", "echo", "--no-flower") as command:
        other = bob.record_of(command)
        assert other is not None
        assert other.flower_url is None
        assert {other.database_url, other.broker_url}.isdisjoint({record.database_url, record.broker_url})
        assert bob.call("list", "--json").json == {"jobs": []}
        assert bob.call("submit", "bob", "--model", "echo", "--wait").out == "bob\n"
        assert command.interrupt() == 0
        bob.await_gone()
    assert ann.call("submit", "ann", "--model", "echo", "--wait").out == "ann\n"


@pytest.mark.parametrize(
    ("name", "title"),
    [
        ("workers.supervisor", "worker echo"),
        ("headrace.flower", "Flower"),
        ("producer.gateway", "gateway"),
        ("redis-server", "Redis"),
        ("postgres", "Postgres"),
    ],
)
def test_what_is_killed_is_started_again(ann: User, up: Background, record: Record, name: str, title: str) -> None:
    """Whatever part dies comes back where it was, and the stack serves as before."""
    victim = _program(ann, record, name)
    assert victim is not None
    victim.kill()
    up.await_until(lambda: _program(ann, record, name) not in {None, victim}, f"{title} runs again")
    up.await_until(lambda: ann.call("submit", "again", "--model", "echo", "--wait").out == "again\n", "a job ends")
    up.await_until(lambda: _answers(record), "Flower answers")
    up.await_until(lambda: _is_healthy(record), "the gateway answers")
    assert f"{title} ended; starting it again" in up.said


def test_configured_servers_are_used_and_none_is_started(servers: Any, database_url: str, key_prefix: str) -> None:
    """`up` migrates and serves on them; a run after it brings its own worker; neither stops them."""
    urls = {"HEADRACE_DATABASE_URL": database_url, "HEADRACE_BROKER_URL": servers.broker_url, "HEADRACE_SECRET": SECRET}
    with user(**QUICK, **urls, HEADRACE_KEY_PREFIX=key_prefix) as one:
        with one.up("--model", "echo", "--no-flower") as command:
            record = one.record_of(command)
            assert record is not None
            assert (record.database_url, record.key_prefix) == (database_url, key_prefix)
            assert one.call("submit", "there", "--model", "echo", "--wait").out == "there\n"
            assert not [process for process in one.processes() if process.name() in {"postgres", "redis-server"}]
            assert command.interrupt() == 0
        (one.folder / "in.jsonl").write_text('{"q": "again"}\n')
        options = ["-o", "out.jsonl", "--prompt-field", "q", "--model", "echo", "--json"]
        assert one.call("run", "in.jsonl", *options).json["succeeded"] == 1
        assert len(one.call("list", "--json").json["jobs"]) == 2


# == its end =====================================================================================================


def test_a_stack_in_the_background_is_ended_by_down_and_its_data_stay() -> None:
    """`up --detach` returns when all is up; `down` leaves no process; the next `up` knows the jobs of before."""
    with user(**QUICK) as one:
        done = one.headrace("up", "--detach", "--model", "echo", "--no-flower", "--json")
        assert done.status == 0, done.err
        assert done.json["models"] == ["echo"]
        job = one.call("submit", "remember", "--model", "echo", "--wait", "--json").json

        assert one.headrace("down", "--json").json == {"stopped": True, "pid": done.json["pid"]}
        one.await_gone()
        assert not Home(one.home).stack_file.exists()

        assert one.headrace("up", "--detach", "--model", "echo", "--no-flower").status == 0
        assert one.call("status", job["id"], "--json").json["text"] == "remember"
        assert one.headrace("down").status == 0


def test_after_sigkill_nothing_stays_behind_and_the_next_start_works() -> None:
    """The children end on their own, the record left behind is not believed, and `up` works at once."""
    with user(**QUICK) as one:
        with one.up("--model", "echo", "--no-flower") as first:
            first.kill()
            assert Home(one.home).stack_file.exists()
            assert one.call("list").status == 1
            with one.up("--model", "echo", "--no-flower") as second:
                assert one.call("submit", "next", "--model", "echo", "--wait").out == "next\n"
                second.kill()
        one.await_gone()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_starting_or_running_ends_it_cleanly(number: signal.Signals) -> None:
    """In mid-start and when up: in good order, with nothing left."""
    with user(**QUICK) as one:
        with one.background("up", "--model", "echo", "--no-flower") as starting:
            starting.await_until(lambda: "Postgres and Redis" in starting.said, "the servers are up")
            assert starting.interrupt(number) == 130
        one.await_gone()
        with one.up("--model", "echo", "--no-flower") as running:
            assert running.interrupt(number) == 0
            assert "Traceback" not in running.said
        assert one.processes() == []
        assert sorted(path.name for path in one.home.iterdir()) == ["logs", "stack.lock"]


def test_a_part_that_cannot_start_ends_the_start_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its last words are in the error, and what had been started is stopped."""
    monkeypatch.setattr("headrace.workforce.SUPERVISOR", "no_such_module")
    for variable in [name for name in os.environ if name.startswith("HEADRACE_")]:
        monkeypatch.delenv(variable)
    with temporary_home() as home:
        stack = Stack(Settings.load(home=home), ["echo"], with_flower=False)
        with pytest.raises(StackError, match=r"(?s)worker echo ended while starting.*No module named no_such_module"):
            stack.__enter__()
        assert Home(home).holder() is None
        with pytest.raises(psycopg.OperationalError):
            psycopg.connect(_plain(str(stack.settings.database_url)))


def test_a_start_in_the_background_that_fails_says_why() -> None:
    """What it would have said in the foreground is shown, and nothing keeps running."""
    with user(**QUICK, FLOWER_BASIC_AUTH="no password") as one:
        done = one.headrace("up", "--detach", "--model", "echo")
        assert (done.status, done.out) == (1, "")
        assert "the stack ended while starting" in done.err
        assert "headrace: FLOWER_BASIC_AUTH: must look like user:password" in done.err
        one.await_gone()


def _plain(url: str) -> str:
    """For psycopg alone."""
    return make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)


def _secrets(record: Record) -> list[str]:
    urls = (record.database_url, str(record.gateway_database_url), record.broker_url)
    passwords = [make_url(url).password for url in urls]
    others = [record.flower_password, record.gateway_key, record.secret]
    return [str(password) for password in [*passwords, *others] if password]


def _port(url: str | None) -> int:
    return int(str(url).rpartition(":")[2])


def _program(one: User, record: Record, name: str) -> psutil.Process | None:
    """The running process of that name; of Postgres, the one that listens."""
    if name == "postgres":
        port = make_url(record.database_url).port
    elif name == "redis-server":
        port = make_url(record.broker_url).port
    else:
        return one.program(name)
    return next((process for process in one.processes() if port in _ports(process)), None)


def _ports(process: psutil.Process) -> set[int]:
    try:
        return {one.laddr.port for one in process.net_connections() if one.status == "LISTEN"}
    except psutil.Error:
        return set()


def _answers(record: Record) -> bool:
    try:
        return bool(_flower(record, "/workers"))
    except OSError:
        return False


def _is_healthy(record: Record) -> bool:
    try:
        return bool(_get(f"{record.gateway_url}/health", None))
    except OSError:
        return False


def _flower(record: Record, path: str, body: bytes | None = None) -> str:
    return _get(f"{record.flower_url}{path}", f"{record.flower_user}:{record.flower_password}", body)


def _get(url: str, login: str | None, body: bytes | None = None) -> str:
    headers = {} if login is None else {"Authorization": f"Basic {base64.b64encode(login.encode()).decode()}"}
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(urllib.request.Request(url, body, headers), timeout=30) as reply:
        return str(reply.read(), "utf-8")
