"""The life of a job through real processes: submitted by the producer, computed by a worker, read from Postgres."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from decimal import Decimal
from itertools import pairwise
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from jobs.dispatch import Dispatcher, celery_app
from jobs.ids import new_id
from jobs.schema import Job, JobRequest
from jobs.settings import Settings
from jobs.signals import CANCEL, Signals
from jobs.states import Lane, State, WorkerState
from jobs.store import Waiting
from kit.systems import PATIENCE_SECONDS, System, system_on
from kit.waiting import wait_until
from kit.workers import WorkerProcesses
from models.catalog import Catalog
from models.prompt import load_prompt_format

TINY_CHAT = Path(__file__).parents[2] / "examples" / "tiny-chat"
SLOTS = 4
STEP_SECONDS = 0.02
THREADS = SLOTS + 8
_SLOW = {"engine": "echo", "slots": SLOTS, "seconds_per_token": STEP_SECONDS}
MODELS: dict[str, dict[str, Any]] = {
    "slow": _SLOW,
    # Routes of their own for tests that start and stop workers.
    "leaving": _SLOW,
    "shared": _SLOW,
    "small-chat": {"path": str(TINY_CHAT), "context_tokens": 96, "default_temperature": 0.0},
}
LONG = "0123456789" * 50  # ten seconds of the slow engine


@pytest.fixture(scope="module")
def system(servers: Any, database_template: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """One system for all tests here, which keep out of each other's way by their jobs' ids and models."""
    folder = tmp_path_factory.mktemp("life")
    with system_on(servers, database_template, folder, models=MODELS, sweep_seconds=0.5) as system:
        yield system


@pytest.fixture(scope="module")
def workers(system: System) -> dict[str, WorkerProcesses]:
    """The workers that most tests need, on their way: the language model takes longest, and is wanted last."""
    return {model: system.launch(model) for model in ("echo", "slow", "small-chat")}


@pytest.fixture(scope="module")
def echo(workers: dict[str, WorkerProcesses]) -> WorkerProcesses:
    """A worker that answers at once."""
    workers["echo"].await_ready()
    return workers["echo"]


@pytest.fixture(scope="module")
def slow(workers: dict[str, WorkerProcesses]) -> WorkerProcesses:
    """A worker that takes its time, with few slots."""
    workers["slow"].await_ready()
    return workers["slow"]


@pytest.fixture(scope="module")
def chat(workers: dict[str, WorkerProcesses]) -> WorkerProcesses:
    """A worker with a language model of a small context."""
    workers["small-chat"].await_ready()
    return workers["small-chat"]


# == one job =====================================================================================================


def test_a_submitted_job_comes_back_with_text_timings_and_a_bill(system: System, echo: WorkerProcesses) -> None:
    """Submit and wait: the answer, how long each phase took, what it cost, and who served it."""
    submitted = system.producer.submit(model="echo", prompt="grüß dich", max_tokens=50)
    job = system.wait(submitted.id)

    assert (job.state, job.text, job.attempts) == (State.SUCCEEDED, "grüß dich", 1)
    assert job.choices[0].finish_reason == "stop"
    assert job.usage is not None
    assert (job.usage.prompt_tokens, job.usage.completion_tokens) == (11, 11)
    assert job.timings is not None
    assert job.timings.time_to_first_token_seconds is not None
    assert job.cost is not None
    assert job.cost.busy_seconds == job.timings.busy_seconds > 0
    assert job.cost.token_dollars == Decimal("0.05") * 11 / 10**6 + Decimal("0.20") * 11 / 10**6
    assert job.cost.machine_dollars > 0
    assert job.served_by == "echo on echo, none, cpu"
    assert job.started_at is not None
    assert job.finished_at is not None
    assert job.created_at <= job.started_at <= job.finished_at


def test_metadata_comes_back_as_it_was_given(system: System, echo: WorkerProcesses) -> None:
    """Keys and values of any script, quotes and escapes survive the round trip."""
    metadata = {"Auftrag": 'Nr. 7 "groß"', "emoji": "🚰", "empty": "", "escape": "a\\b\nc"}
    job = system.wait(system.producer.submit(model="echo", prompt="x", metadata=metadata).id)
    assert job.metadata == metadata


def test_text_ends_before_a_stop_string(system: System, echo: WorkerProcesses) -> None:
    """The first stop string that appears cuts the text, and the finish reason says so."""
    job = system.wait(system.producer.submit(model="echo", prompt="one two HALT three", stop=["never", "HALT"]).id)
    assert (job.text, job.choices[0].finish_reason) == ("one two ", "stop")


def test_several_choices_are_one_job_and_one_bill(system: System, echo: WorkerProcesses) -> None:
    """`n=3` gives three choices in one job, whose one ledger row counts the tokens of all."""
    job = system.wait(system.producer.submit(model="echo", prompt="abcde", n=3, max_tokens=4).id)

    assert [(choice.index, choice.text, choice.finish_reason) for choice in job.choices] == [
        (index, "abcd", "length") for index in range(3)
    ]
    bill = system.tables.ledger(job.id)
    assert (bill["prompt_tokens"], bill["completion_tokens"]) == (5, 12)
    assert _executed(echo)[job.id] == 1


def test_many_jobs_at_once_each_get_their_own_answer(system: System, echo: WorkerProcesses) -> None:
    """Hundreds of interactive and bulk jobs together: every one its own text, one execution and one bill."""
    bulk = system.producer.submit_many({"model": "echo", "prompt": f"bulk {i}"} for i in range(400))
    with ThreadPoolExecutor(8) as threads:
        single = list(threads.map(lambda i: system.producer.submit(model="echo", prompt=f"single {i}"), range(100)))
    jobs = [system.wait(job.id) for job in [*bulk, *single]]

    assert [job.text for job in jobs] == [f"bulk {i}" for i in range(400)] + [f"single {i}" for i in range(100)]
    assert {job.state for job in jobs} == {State.SUCCEEDED}
    ids = {job.id for job in jobs}
    executed = _executed(echo)
    assert {executed[job_id] for job_id in ids} == {1}
    assert system.tables.value("SELECT count(*) FROM ledger WHERE job_id = ANY(%s)", list(ids)) == 500


# == failure, deadline, cancel ===================================================================================


def test_a_job_that_the_engine_refuses_fails_and_so_does_its_task(system: System, echo: WorkerProcesses) -> None:
    """What only the engine can see ends the job `failed` with the reason; the monitor sees its task fail."""
    job_id = new_id()
    request = JobRequest(model="echo", prompt=(104, 300), max_tokens=4)
    with _events(system.settings) as seen:
        system.producer.store.accept(job_id, request, max_attempts=3)
        system.producer.dispatcher.publish([Waiting(job_id, "echo", 5)])
        job = system.wait(job_id)
        wait_until(lambda: (str(job_id), "task-failed") in seen, PATIENCE_SECONDS, "the event of a failed task")

    assert (job.state, job.attempts, job.text) == (State.FAILED, 1, "")
    assert job.error is not None
    assert job.error.code == "invalid_request"
    assert "300" in job.error.message
    bill = system.tables.ledger(job_id)
    assert (bill["state"], bill["token_dollars"]) == ("failed", 0)


def test_a_job_that_cannot_be_prepared_fails_with_the_field(system: System, echo: WorkerProcesses) -> None:
    """A prompt that the model's format refuses in the worker ends the job, and the worker goes on."""
    job_id = new_id()
    request = JobRequest.parse({"model": "echo", "messages": [{"role": "system", "content": "no question"}]})
    system.producer.store.accept(job_id, request, max_attempts=3)
    system.producer.dispatcher.publish([Waiting(job_id, "echo", 5)])
    job = system.wait(job_id)

    assert (job.state, job.attempts) == (State.FAILED, 1)
    assert job.error is not None
    assert job.error.message.startswith("messages: ")
    assert system.wait(system.producer.submit(model="echo", prompt="still here").id).text == "still here"


def test_a_deadline_ends_a_running_job_with_what_it_has(system: System, slow: WorkerProcesses) -> None:
    """At its deadline a running job ends `expired`; its partial text is kept and charged."""
    job = system.wait(system.producer.submit(model="slow", prompt=LONG, deadline_seconds=1.5).id)

    assert job.state is State.EXPIRED
    assert job.error is not None
    assert job.error.code == "deadline_exceeded"
    _assert_partial(system, job)


def test_a_deadline_ends_a_job_that_nobody_serves(system: System, echo: WorkerProcesses) -> None:
    """A job that no worker takes ends `expired` too, by any worker's sweeper, with a bill of zeros."""
    job = system.wait(system.producer.submit(model="leaving", prompt="x", deadline_seconds=0.3).id)

    assert (job.state, job.attempts, job.text) == (State.EXPIRED, 0, "")
    assert job.cost is not None
    assert job.cost.busy_seconds == job.cost.token_dollars == job.cost.machine_dollars == 0


def test_cancel_stops_a_running_job_and_keeps_its_text(system: System, slow: WorkerProcesses) -> None:
    """A running job that is cancelled ends within a step, `cancelled`, with the text it had; that is charged."""
    job = _begun(system, slow)
    system.producer.cancel(job.id)
    job = system.wait(job.id)

    assert (job.state, job.error) == (State.CANCELLED, None)
    _assert_partial(system, job)


@pytest.mark.parametrize("terminate", [False, True])
def test_revoking_the_task_cancels_a_running_job(system: System, slow: WorkerProcesses, *, terminate: bool) -> None:
    """A monitor's revoke, with or without its terminate, is a cancel; the worker goes on."""
    job = _begun(system, slow)
    celery_app(system.settings).control.revoke(str(job.id), terminate=terminate)
    job = system.wait(job.id)

    assert job.state is State.CANCELLED
    _assert_partial(system, job)
    assert system.wait(system.producer.submit(model="slow", prompt="next").id).text == "next"


def test_a_busy_worker_leaves_messages_to_others_and_a_revoked_one_never_runs(
    system: System, slow: WorkerProcesses
) -> None:
    """While all threads are busy nothing is fetched ahead, and a job revoked in the queue ends without running."""
    jobs = [system.producer.submit(model="slow", prompt=LONG) for _ in range(THREADS + 3)]
    wait_until(lambda: len(_running(system, jobs)) == THREADS, PATIENCE_SECONDS, "all threads are busy")
    assert system.producer.dispatcher.depth("slow", Lane.INTERACTIVE, wait_seconds=PATIENCE_SECONDS) == 3

    queued = next(job for job in jobs if job.id not in _running(system, jobs))
    celery_app(system.settings).control.revoke(str(queued.id))
    ended = system.wait(queued.id)
    assert (ended.state, ended.attempts) == (State.CANCELLED, 0)

    _cancel_all(system, jobs)
    assert not slow.has_begun(queued.id)


def test_strangers_on_the_broker_move_nothing(system: System, slow: WorkerProcesses) -> None:
    """Without the secret, whoever writes to Redis neither starts nor ends a job, nor stops a worker."""
    stranger = system.settings.model_copy(update={"secret": "a stranger's guess, long enough to be one"})
    running = _begun(system, slow)
    # Nobody serves its model, so that no message of ours comes in between; a worker claims what it is told to.
    waiting = system.producer.submit(model="leaving", prompt="x")
    said_before = slow.log.read_text().count("refused a message")
    with closing(Dispatcher(stranger, lambda _: None)) as dispatcher, closing(Signals(stranger)) as signals:
        dispatcher.publish([Waiting(waiting.id, "slow", 5)], PATIENCE_SECONDS)
        dispatcher.hint_bulk("slow", PATIENCE_SECONDS)
        signals.publish(CANCEL, [running.id])
        control = celery_app(stranger).control
        assert "not signed" in str(control.revoke(str(running.id), reply=True))
        control.broadcast("shutdown")
        refused = lambda: slow.log.read_text().count("refused a message") - said_before  # noqa: E731
        wait_until(lambda: refused() >= 4, PATIENCE_SECONDS, "each of the four is refused, and logged")
    assert system.producer.get(running.id).state is State.RUNNING
    assert not slow.has_begun(waiting.id)
    _cancel_all(system, [running, waiting])
    assert system.wait(system.producer.submit(model="slow", prompt="fine").id).text == "fine"


def test_another_tenants_job_can_be_revoked(system: System, slow: WorkerProcesses) -> None:
    """The operator's monitor shows and ends the jobs of every tenant."""
    acme = system.producer.for_tenant("acme")
    job = acme.submit(model="slow", prompt=LONG)
    wait_until(lambda: slow.has_begun(job.id), PATIENCE_SECONDS, "the job runs")
    celery_app(system.settings).control.revoke(str(job.id))
    assert acme.wait(job.id, PATIENCE_SECONDS).state is State.CANCELLED


def test_an_unknown_task_can_be_revoked(system: System, slow: WorkerProcesses) -> None:
    """Revoking what is no job, or no id at all, disturbs nothing."""
    control = celery_app(system.settings).control
    control.revoke(str(new_id()), reply=True)
    control.revoke("not-an-id", reply=True)
    assert system.wait(system.producer.submit(model="slow", prompt="fine").id).text == "fine"


# == lanes and workers ===========================================================================================


def test_an_interactive_job_does_not_wait_behind_bulk(system: System, slow: WorkerProcesses) -> None:
    """With a long bulk backlog on a busy engine, an interactive job takes the next slot that is free."""
    backlog = system.producer.submit_many({"model": "slow", "prompt": "x" * 15} for _ in range(80))
    wait_until(lambda: len(_running(system, backlog)) == SLOTS, PATIENCE_SECONDS, "bulk rows fill the engine")
    job = system.wait(system.producer.submit(model="slow", prompt="now").id)

    assert (job.state, job.text) == (State.SUCCEEDED, "now")
    waiting = system.producer.list(states=[State.QUEUED], batch_id=backlog[0].batch_id, limit=100)
    assert len(waiting) > 40
    # No more is claimed than the engine has room for, beside what it has just finished.
    assert len(_running(system, backlog)) <= 2 * SLOTS
    assert backlog[0].batch_id is not None
    system.producer.batches.cancel(backlog[0].batch_id)
    _cancel_all(system, backlog)


def test_two_workers_share_a_backlog(system: System) -> None:
    """A worker that comes later takes its part of bulk rows and of queued messages at once; nothing runs twice."""
    with closing(system.start("shared")) as first:
        bulk = system.producer.submit_many({"model": "shared", "prompt": "x" * 15} for _ in range(2_000))
        single = [system.producer.submit(model="shared", prompt="y" * 15) for _ in range(400)]
        with closing(system.start("shared")) as second:
            for jobs in (bulk, single):
                ids = {job.id for job in jobs}
                for worker in (first, second):
                    wait_until(lambda: ids & _executed(worker).keys(), PATIENCE_SECONDS, "each has a part of both")  # noqa: B023
            assert max((_executed(first) + _executed(second)).values()) == 1


# == conversations ===============================================================================================


def test_the_turns_of_a_conversation_run_in_order_and_see_what_was_said(system: System, chat: WorkerProcesses) -> None:
    """Turns submitted together run one after the other, each with the turns before it in its prompt."""
    questions = ["my name is ann", "say yes", "what is my name"]
    submitted = [_turn(system, "ann", question, max_tokens=6) for question in questions]
    assert [job.turn for job in submitted] == [1, 2, 3]
    turns = [system.wait(job.id) for job in submitted]

    assert [job.state for job in turns] == [State.SUCCEEDED] * 3
    for before, after in pairwise(turns):
        assert before.finished_at is not None
        assert after.started_at is not None
        assert before.finished_at <= after.started_at
    history = [
        {"role": "user", "content": questions[0]},
        {"role": "assistant", "content": turns[0].text},
        {"role": "user", "content": questions[1]},
        {"role": "assistant", "content": turns[1].text},
        {"role": "user", "content": questions[2]},
    ]
    assert turns[2].usage is not None
    assert turns[2].usage.prompt_tokens == _prompt_tokens(history)
    alone = system.wait(system.producer.submit(model="small-chat", messages=history, max_tokens=6).id)
    assert turns[2].text == alone.text


def test_a_turn_whose_history_outgrows_the_context_fails_and_lets_the_next_one_go(
    system: System, chat: WorkerProcesses
) -> None:
    """A turn that fits alone but not with its history fails in the engine; turns after it are released all the same."""
    first = _turn(system, "long", "a b c d e f g h i j k l m n o p q r s t u v w x y z", max_tokens=30)
    second = _turn(system, "long", "z y x w v u t s r q p o n m l k j i h g f e d c b a", max_tokens=40)
    third = _turn(system, "long", "hi", max_tokens=1)

    assert system.wait(first.id).state is State.SUCCEEDED
    failed = system.wait(second.id)
    assert (failed.state, failed.attempts) == (State.FAILED, 1)
    assert failed.error is not None
    assert failed.error.code == "invalid_request"
    assert system.wait(third.id).state is State.SUCCEEDED


# == a clean end =================================================================================================


def test_sigterm_finishes_what_runs_and_gives_the_rest_back_uncharged(system: System) -> None:
    """A drain: what the engine works on ends, nothing else is charged, and the next worker computes only the rest."""
    worker = system.start("leaving")
    identity = worker.await_ready().id
    cancelled = _begun(system, worker, model="leaving")
    bulk = system.producer.submit_many({"model": "leaving", "prompt": "b" * 30} for _ in range(8))
    single = [system.producer.submit(model="leaving", prompt="s" * 30) for _ in range(8)]
    jobs = [*bulk, *single]
    wait_until(lambda: sum(worker.has_begun(job.id) for job in jobs) >= SLOTS - 1, PATIENCE_SECONDS, "a full engine")
    system.producer.cancel(cancelled.id)

    worker.begin_stop()
    with closing(system.launch("leaving")) as successor:
        assert worker.wait() == 0
        finished = [system.wait(job.id) for job in jobs]
        begun = _executed(worker).keys()
        assert _executed(successor) == {job.id: 1 for job in jobs if job.id not in begun}

    assert {(job.state, job.attempts) for job in finished} == {(State.SUCCEEDED, 1)}
    [row] = system.tables.rows("SELECT * FROM workers WHERE id = %s", identity)
    assert (row["state"], row["running"]) == (WorkerState.STOPPED, 0)
    attempts = system.tables.rows("SELECT * FROM attempts WHERE worker_id = %s", identity)
    outcomes = {"succeeded": begun - {cancelled.id}, "cancelled": {cancelled.id}}
    for outcome, ids in outcomes.items():
        assert {attempt["job_id"] for attempt in attempts if attempt["outcome"] == outcome} == ids
    assert {attempt["outcome"] for attempt in attempts} <= {*outcomes, "released"}
    assert sum(attempt["busy_seconds"] for attempt in attempts) == pytest.approx(row["busy_seconds"], rel=0.01)


def test_work_longer_than_the_drain_is_given_back_and_finished_elsewhere(system: System) -> None:
    """After HEADRACE_DRAIN_SECONDS running jobs are stopped and queued again, their attempt not counted."""
    worker = system.start("leaving", drain_seconds=0.5)
    prompt = LONG[:125]  # two and a half seconds
    bulk = system.producer.submit_many({"model": "leaving", "prompt": prompt} for _ in range(2))
    jobs = [*bulk, *(system.producer.submit(model="leaving", prompt=prompt) for _ in range(2))]
    wait_until(lambda: worker.has_begun(*(job.id for job in jobs)), PATIENCE_SECONDS, "all jobs run")

    worker.begin_stop()
    with closing(system.launch("leaving")):
        assert worker.wait() == 0
        finished = [system.wait(job.id) for job in jobs]
    assert {(job.state, job.attempts, job.text) for job in finished} == {(State.SUCCEEDED, 1, prompt)}
    assert {tuple(system.tables.outcomes(job.id)) for job in jobs} == {("released", "succeeded")}


# == helpers =====================================================================================================


def _begun(system: System, worker: WorkerProcesses, model: str = "slow") -> Job:
    """A long job that the engine works on."""
    job = system.producer.submit(model=model, prompt=LONG)
    wait_until(lambda: worker.has_begun(job.id), PATIENCE_SECONDS, "the engine works on the job")
    return job


def _executed(worker: WorkerProcesses) -> Counter[UUID]:
    """How often its engine began each job."""
    return Counter(execution.job_id for execution in worker.executions())


def _turn(system: System, conversation: str, text: str, max_tokens: int) -> Job:
    messages = [{"role": "user", "content": text}]
    return system.producer.submit(
        model="small-chat", messages=messages, conversation=conversation, max_tokens=max_tokens
    )


def _prompt_tokens(messages: list[dict[str, str]]) -> int:
    spec = Catalog.from_mapping(MODELS).get("small-chat")
    return len(load_prompt_format(spec).encode_messages(messages))


def _assert_partial(system: System, job: Job) -> None:
    """Some text, not all; charged by token and by time, in one row."""
    assert LONG.startswith(job.text)
    assert 0 < len(job.text) < len(LONG)
    bill = system.tables.ledger(job.id)
    assert (bill["state"], bill["completion_tokens"]) == (job.state, len(job.text))
    assert bill["token_dollars"] > 0
    assert bill["busy_seconds"] > 0


def _running(system: System, jobs: list[Job]) -> set[UUID]:
    ids = {job.id for job in jobs}
    return ids & {job.id for job in system.producer.list(states=[State.RUNNING], limit=1000)}


def _cancel_all(system: System, jobs: list[Job]) -> None:
    """End them and wait, so that the next test finds an idle worker."""
    for job in jobs:
        system.producer.cancel(job.id)
    for job in jobs:
        system.wait(job.id)


@contextmanager
def _events(settings: Settings) -> Iterator[set[tuple[str, str]]]:
    """(task id, kind) of every event that a monitor such as Flower sees meanwhile."""
    seen: set[tuple[str, str]] = set()
    app = celery_app(settings)
    done = threading.Event()
    with app.connection_for_read() as connection:
        receiver = app.events.Receiver(
            connection, handlers={"*": lambda event: seen.add((event.get("uuid", ""), event["type"]))}
        )

        def receive() -> None:
            for _ in receiver.consume(limit=None, timeout=None, wakeup=False):
                if done.is_set():
                    return

        thread = threading.Thread(target=receive)
        thread.start()
        # Workers beat every two seconds: the first beat says that we hear.
        wait_until(lambda: ("", "worker-heartbeat") in seen, PATIENCE_SECONDS, "a worker's heartbeat event")
        try:
            yield seen
        finally:
            done.set()
            receiver.should_stop = True
            thread.join()
