"""Bulk runs on real servers, with a worker that answers by the contract alone: in, out, and every way to stop."""

from __future__ import annotations

import json
import os
import resource
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Self

import pytest

from headrace.migrations import upgrade
from headrace.servers import Servers
from jobs.database import Database
from jobs.errors import StoreUnavailable
from jobs.schema import Choice, JobError, JobRequest, Usage
from jobs.settings import Settings
from jobs.states import BatchState, State
from jobs.store import Claim, Settlement
from kit.contract import Tables, Worker, settlement
from kit.waiting import wait_until
from producer.bulk import BulkError, BulkOptions, BulkPaused, BulkProgress, BulkRefused, BulkReport, BulkRun, sidecar
from producer.bulk.reading import CHUNK_LINES, FIRST_CHUNK_LINES
from producer.client import Producer
from producer.openai.requests import CHAT, COMPLETIONS, RESPONSES

GSM8K = Path(__file__).parents[3] / "shared" / "data" / "gsm8k_train.jsonl"
PATIENCE_SECONDS = 60.0
ROWS_AT_ONCE = 200

Settle = Callable[[Claim], Settlement]


def question_of(request: JobRequest) -> str:
    return request.messages[-1].content if request.messages else str(request.prompt)


def answered(claim: Claim) -> Settlement:
    """A worker's answer: the question again."""
    choice = Choice(index=0, text=question_of(claim.request), finish_reason="stop")
    return settlement(claim, choices=(choice,), usage=Usage(prompt_tokens=3, completion_tokens=2), served_by="by hand")


class Hand:
    """A worker for one model in a thread: it takes rows while there are some and ends each as `settle` says."""

    def __init__(self, database: Database, settle: Settle = answered, model: str = "echo") -> None:
        self._database = database
        self._settle = settle
        self._model = model
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work)
        self.faults: list[Exception] = []

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        assert not self.faults

    def _work(self) -> None:
        worker = Worker.hire(self._database, self._model)
        while not self._stop.is_set():
            try:
                worker.renew()
                claims = worker.claim_bulk(ROWS_AT_ONCE)
                worker.store.settle([self._settle(claim) for claim in claims])
            except StoreUnavailable:
                continue
            except Exception as error:  # noqa: BLE001 - shown where the test ends
                self.faults.append(error)
                return
            if not claims:
                self._stop.wait(0.02)


@pytest.fixture
def producer(settings: Settings) -> Iterator[Producer]:
    with Producer(settings) as producer:
        yield producer


@pytest.fixture
def tables(settings: Settings) -> Iterator[Tables]:
    with closing(Tables(str(settings.database_url))) as tables:
        yield tables


@pytest.fixture
def hand(producer: Producer) -> Iterator[Hand]:
    with Hand(producer.database) as hand:
        yield hand


class Folder:
    """A folder with an input, where a run's files appear."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.path = folder
        self.input = folder / "in.jsonl"
        self.output = folder / "out.jsonl"
        self.errors = folder / "out.errors.jsonl"

    def fill(self, *lines: dict[str, Any] | str) -> None:
        text = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        self.input.write_text("".join(f"{line}\n" for line in text), encoding="utf-8")

    def ask(self, count: int) -> None:
        """So many good questions."""
        self.fill(*({"question": f"What is {number}?"} for number in range(1, count + 1)))

    def options(self, **options: Any) -> BulkOptions:
        return BulkOptions(self.input, self.output, **options)

    def names(self) -> set[str]:
        return {path.name for path in self.path.iterdir()}

    @staticmethod
    def read(path: Path) -> dict[str, dict[str, Any]]:
        """Lines by custom_id, each of which is there once."""
        content = path.read_bytes()
        assert not content or content.endswith(b"\n")
        lines = [json.loads(line) for line in content.splitlines()]
        assert max(Counter(line["custom_id"] for line in lines).values(), default=1) == 1
        return {line["custom_id"]: line for line in lines}

    def answers(self) -> dict[str, str]:
        """Chat answers by custom_id."""
        lines = self.read(self.output).items()
        return {name: line["response"]["body"]["choices"][0]["message"]["content"] for name, line in lines}


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path / "files")


ASKED: dict[str, Any] = {"model": "echo", "prompt_field": "question"}


def nothing(_: Any) -> None:
    """What a run tells nobody listens to."""


def run(producer: Producer, options: BulkOptions, on_progress: Callable[[BulkProgress], None] = nothing) -> BulkReport:
    bulk = BulkRun(producer, options)
    bulk.open()
    return bulk.run(on_progress, nothing)


def line(custom_id: str | None, url: str = CHAT, **body: Any) -> dict[str, Any]:
    asked = {"method": "POST", "url": url, "body": {"model": "echo", **body}}
    return asked if custom_id is None else asked | {"custom_id": custom_id}


def chat(custom_id: str | None, text: str, **body: Any) -> dict[str, Any]:
    return line(custom_id, messages=[{"role": "user", "content": text}], **body)


# -- from end to end --------------------------------------------------------------------------------------------


def test_every_line_has_its_end(producer: Producer, hand: Hand, folder: Folder) -> None:
    """Good lines are answered in the form of their endpoint, bad ones are named, and no file is left over."""
    folder.fill(
        chat("chat", "Hello"),
        "this is not JSON",
        line("text", COMPLETIONS, prompt="Once"),
        "",
        line("response", RESPONSES, input="Hi", metadata={"team": "a"}),
        chat(None, "no name"),
        chat("hot", "Hello", temperature=9),
        chat("chat", "again"),
        chat("lost", "Hello", model="nobody"),
    )
    report = run(producer, folder.options())

    good, bad = folder.read(folder.output), folder.read(folder.errors)
    bodies = {name: one["response"]["body"] for name, one in good.items()}
    assert list(good) == ["chat", "text", "response", "line-6"]
    assert all(one["response"]["status_code"] == 200 and one["error"] is None for one in good.values())
    assert bodies["chat"]["choices"][0]["message"]["content"] == "Hello"
    assert bodies["text"]["choices"][0]["text"] == "Once"
    assert bodies["response"]["output"][0]["content"][0]["text"] == "Hi"
    assert bodies["response"]["metadata"] == {"team": "a"}
    assert {name: (one["line"], one["response"]["body"]["error"]["param"]) for name, one in bad.items()} == {
        "line-2": (2, "line"),
        "hot": (7, "body.temperature"),
        "line-8": (8, "custom_id"),
        "lost": (9, "body.model"),
    }
    assert (report.total, report.succeeded, report.failed, report.rejected) == (8, 4, 0, 4)
    assert (report.prompt_tokens, report.completion_tokens) == (12, 8)
    assert report.samples == [("Hello", "Hello"), ("Once", "Once"), ("Hi", "Hi"), ("no name", "no name")]
    assert report.latency_p50_seconds is not None
    assert folder.names() == {"in.jsonl", "out.jsonl", "out.errors.jsonl"}
    assert producer.batches.get(report.batch_id).state is BatchState.FINISHED


def test_nothing_wrong_leaves_no_errors(producer: Producer, hand: Hand, folder: Folder) -> None:
    """Without a bad line there is no errors file, and one of an earlier run goes."""
    folder.ask(3)
    folder.errors.write_text("of before")
    report = run(producer, folder.options(**ASKED))
    assert folder.answers() == {f"line-{number}": f"What is {number}?" for number in (1, 2, 3)}
    assert (report.succeeded, report.failed, report.rejected) == (3, 0, 0)
    assert folder.names() == {"in.jsonl", "out.jsonl"}


def test_failed_lines_say_why(producer: Producer, folder: Folder) -> None:
    """What a worker could not do, or nobody did, is in the errors file with its reason."""

    def settle(claim: Claim) -> Settlement:
        error = JobError(code="nan_logits", message="it broke")
        ends = {"fail": {"outcome": "failed", "error": error}, "stop": {"outcome": "cancelled"}}
        return settlement(claim, **ends.get(question_of(claim.request), {}))

    folder.fill(chat("a", "fail"), chat("b", "stop"), chat("c", "go"))
    with Hand(producer.database, settle):
        report = run(producer, folder.options(errors=folder.path / "bad.jsonl"))
    bad = folder.read(folder.path / "bad.jsonl")
    assert set(folder.read(folder.output)) == {"c"}
    assert bad["a"]["response"]["status_code"] == 500
    assert bad["a"]["response"]["body"]["error"]["code"] == "nan_logits"
    assert (bad["b"]["response"], bad["b"]["error"]["code"]) == (None, "batch_cancelled")
    assert [one["line"] for one in bad.values()] == [1, 2]
    assert (report.succeeded, report.failed, report.rejected) == (1, 2, 0)


def test_all_may_fail(producer: Producer, folder: Folder) -> None:
    """A run in which nothing succeeded has an output all the same, an empty one: it is finished."""
    folder.fill("bad", "worse")
    report = run(producer, folder.options())
    assert folder.output.read_bytes() == b""
    assert set(folder.read(folder.errors)) == {"line-1", "line-2"}
    assert (report.total, report.succeeded, report.rejected, report.samples) == (2, 0, 2, [])


def test_text_of_every_kind(producer: Producer, hand: Hand, folder: Folder) -> None:
    """Any Unicode text goes in and comes out as it is, the NUL character too."""
    texts = ["a\0b", 'tab\t \\ quote" \\N', "Zoë 日本 🙂", "\u2028", "\ufeff", "{}"]
    folder.fill(*(chat(f"id {text}".replace("\0", ""), text) for text in texts))
    run(producer, folder.options())
    assert list(folder.answers().items()) == [(f"id {text}".replace("\0", ""), text) for text in texts]


def test_names_are_unique_over_the_whole_file(producer: Producer, hand: Hand, folder: Folder) -> None:
    """A name that a line far above has, good or bad, cannot be had again."""
    many = [chat(f"n{number}", "x") for number in range(CHUNK_LINES)]
    folder.fill(chat("bad", "x", n=0), *many, chat("n5", "again"), chat("bad", "again"), chat(None, "fine"))
    report = run(producer, folder.options())
    bad = folder.read(folder.errors)
    assert set(folder.read(folder.output)) == {f"n{number}" for number in range(CHUNK_LINES)} | {"line-1004"}
    assert {name: one["response"]["body"]["error"]["code"] for name, one in bad.items()} == {
        "bad": "invalid_value",
        "line-1002": "duplicate_custom_id",
        "line-1003": "duplicate_custom_id",
    }
    assert report.total == CHUNK_LINES + 4


@pytest.mark.skipif(not GSM8K.is_file(), reason="../shared/data/gsm8k_train.jsonl is not here")
def test_a_file_as_it_is(producer: Producer, hand: Hand, folder: Folder) -> None:
    """Thousands of questions from a public data set: each is answered once, under its line's number."""
    questions = [json.loads(text)["question"] for text in GSM8K.read_bytes().splitlines()]
    report = run(producer, BulkOptions(GSM8K, folder.output, **ASKED, max_tokens=64))
    assert folder.answers() == {f"line-{number}": text for number, text in enumerate(questions, start=1)}
    assert (report.total, report.succeeded) == (len(questions), len(questions))


# -- what is told -----------------------------------------------------------------------------------------------


def test_progress_is_told(producer: Producer, hand: Hand, folder: Folder) -> None:
    """While it runs it tells how far it is: bytes while reading, lines afterwards, in three phases."""
    folder.fill(*(chat(None, "x") for _ in range(FIRST_CHUNK_LINES + 1)), "bad")
    told: list[BulkProgress] = []
    run(producer, folder.options(), told.append)
    assert list(dict.fromkeys(one.phase for one in told)) == ["reading", "running", "writing"]
    reading = [one for one in told if one.phase == "reading"]
    assert [one.total for one in reading] == [None] * len(reading)
    offsets = [one.input_offset for one in reading]
    assert offsets == sorted(offsets)
    assert len(set(offsets)) == 3
    last = told[-1]
    assert (last.total, last.ended, last.failed) == (FIRST_CHUNK_LINES + 2, FIRST_CHUNK_LINES + 2, 1)
    assert last.input_offset == last.input_bytes == folder.input.stat().st_size


def test_each_model_is_asked_for_once(producer: Producer, folder: Folder) -> None:
    """A worker is asked for when the first line of its model is in, and never again in the run."""
    folder.fill(chat("a", "x"), chat("b", "x", model="tiny-chat"), *(chat(None, "x") for _ in range(CHUNK_LINES)))
    asked: list[str] = []
    bulk = BulkRun(producer, folder.options())
    bulk.open()
    with Hand(producer.database), Hand(producer.database, model="tiny-chat"):
        bulk.run(nothing, asked.append)
    assert asked == ["echo", "tiny-chat"]


def test_workers_are_told_of_the_rows(producer: Producer, hand: Hand, folder: Folder) -> None:
    """The route's bulk queue gets a message, so that an idle worker starts at once."""
    from jobs.states import Lane

    folder.ask(1)
    run(producer, folder.options(**ASKED))
    assert producer.dispatcher.depth("echo", Lane.BULK, wait_seconds=PATIENCE_SECONDS)


# -- stop and go on ---------------------------------------------------------------------------------------------


def test_a_paused_run_goes_on(producer: Producer, tables: Tables, folder: Folder) -> None:
    """Stopped on request nothing more is started; the same command goes on, and nothing is computed twice."""
    folder.ask(300)
    seen = threading.Event()

    def one_answer(claim: Claim) -> Settlement:
        seen.wait(PATIENCE_SECONDS)
        return answered(claim)

    bulk = BulkRun(producer, folder.options(**ASKED))
    bulk.open()

    def stop_in_the_middle(progress: BulkProgress) -> None:
        if progress.phase == "running":
            bulk.pause()

    with pytest.raises(BulkPaused, match="the same command"):
        bulk.run(stop_in_the_middle, nothing)
    assert producer.batches.get(bulk.batch_id).state is BatchState.PAUSED
    assert folder.names() == {"in.jsonl", "out.jsonl.headrace"}
    assert Worker.hire(producer.database).claim_bulk(1) == []

    again = BulkRun(producer, folder.options(**ASKED))
    again.open()
    assert (again.batch_id, again.continued) == (bulk.batch_id, True)
    with Hand(producer.database, one_answer):
        seen.set()
        report = again.run(nothing, nothing)
    assert report.succeeded == len(folder.answers()) == 300
    assert tables.count("attempts") == tables.count("ledger") == 300
    assert folder.names() == {"in.jsonl", "out.jsonl"}


class Killed(BaseException):
    """Ends a command without giving it a chance, as SIGKILL would."""


def killed_at(producer: Producer, options: BulkOptions, here: Callable[[BulkProgress], bool]) -> BulkRun:
    bulk = BulkRun(producer, options)
    bulk.open()

    def die(progress: BulkProgress) -> None:
        if here(progress):
            raise Killed

    with pytest.raises(Killed):
        bulk.run(die, nothing)
    return bulk


def test_a_killed_intake_goes_on(producer: Producer, hand: Hand, tables: Tables, folder: Folder) -> None:
    """Killed while the input was read, the next command reads on behind the last chunk that is in."""
    folder.fill("bad", *({"question": f"What is {number}?"} for number in range(2, 3 * CHUNK_LINES)))
    killed = killed_at(producer, folder.options(**ASKED), lambda progress: progress.input_offset > 0)
    batch = producer.batches.get(killed.batch_id)
    assert (batch.input_lines, batch.state) == (FIRST_CHUNK_LINES, BatchState.FILLING)

    again = BulkRun(producer, folder.options(**ASKED))
    again.open()
    offsets: list[int] = []
    report = again.run(lambda progress: offsets.append(progress.input_offset), nothing)
    assert (again.batch_id, offsets[0]) == (killed.batch_id, batch.input_offset)
    assert folder.answers() == {f"line-{number}": f"What is {number}?" for number in range(2, 3 * CHUNK_LINES)}
    assert set(folder.read(folder.errors)) == {"line-1"}
    assert report.total == tables.count("ledger") + 1 == 3 * CHUNK_LINES - 1


@pytest.mark.parametrize("phase", ["running", "writing"])
def test_a_killed_run_goes_on(producer: Producer, hand: Hand, tables: Tables, folder: Folder, phase: str) -> None:
    """Killed later, the next command waits for the same rows and hands over the same answers, once."""
    folder.ask(20)
    killed = killed_at(producer, folder.options(**ASKED), lambda progress: progress.phase == phase)
    assert not folder.output.exists()
    report = run(producer, folder.options(**ASKED))
    assert (report.batch_id, len(folder.answers())) == (killed.batch_id, 20)
    assert tables.count("attempts") == 20
    assert folder.names() == {"in.jsonl", "out.jsonl"}


def test_killed_when_all_was_done(
    producer: Producer, hand: Hand, folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between the output's rename and the end, the next command finds it finished and says the same."""
    folder.ask(5)

    def die(_: sidecar.Sidecar) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(sidecar.Sidecar, "remove", die)
        with pytest.raises(Killed):
            run(producer, folder.options(**ASKED))
    first = folder.output.read_bytes()
    assert folder.names() == {"in.jsonl", "out.jsonl", "out.jsonl.headrace"}

    report = run(producer, folder.options(**ASKED))
    assert folder.output.read_bytes() == first
    assert report.succeeded == 5
    assert folder.names() == {"in.jsonl", "out.jsonl"}


def test_a_worker_that_cannot_be_had(producer: Producer, folder: Folder) -> None:
    """If there can be no worker the run says so and its rows wait; once there is one the same command goes on."""
    folder.ask(5)
    bulk = BulkRun(producer, folder.options(**ASKED))
    bulk.open()

    def serve(model: str) -> None:
        raise RuntimeError(f"no worker for {model}")

    with pytest.raises(RuntimeError, match="no worker for echo"):
        bulk.run(nothing, serve)
    assert producer.batches.get(bulk.batch_id).state is BatchState.PAUSED
    with Hand(producer.database):
        assert run(producer, folder.options(**ASKED)).succeeded == 5


def test_postgres_may_be_away_for_a_while(own_servers: Servers, tmp_path: Path, folder: Folder) -> None:
    """A run outlives a crash of Postgres that takes longer than a call waits, and loses nothing."""
    upgrade(own_servers.database_url)
    urls = {
        "database_url": own_servers.database_url,
        "broker_url": own_servers.broker_url,
        "secret": own_servers.secret,
    }
    folder.ask(50)
    ready = threading.Event()

    def back_again() -> None:
        ready.wait(PATIENCE_SECONDS)
        own_servers.postgres.kill()
        with closing(Database(own_servers.database_url, wait_seconds=0.5)) as look, pytest.raises(StoreUnavailable):
            look.run(lambda connection: connection.exec_driver_sql("SELECT 1"))
        own_servers.postgres.start()

    thread = threading.Thread(target=back_again)
    thread.start()
    settings = Settings.load(home=tmp_path, store_wait_seconds=0.2, **urls)
    with Producer(settings) as producer:
        bulk = BulkRun(producer, folder.options(**ASKED))
        bulk.open()

        def crash(progress: BulkProgress) -> None:
            if progress.phase == "running":
                ready.set()

        def settle_when_back(claim: Claim) -> Settlement:
            thread.join(PATIENCE_SECONDS)
            return answered(claim)

        with Hand(producer.database, settle_when_back):
            report = bulk.run(crash, nothing)
    assert report.succeeded == len(folder.answers()) == 50


# -- outputs that are there already -----------------------------------------------------------------------------


def test_a_finished_output_is_kept(producer: Producer, hand: Hand, tables: Tables, folder: Folder) -> None:
    """What is finished is not touched without --force, and made anew with it."""
    folder.ask(2)
    run(producer, folder.options(**ASKED))
    before = folder.output.read_bytes()
    with pytest.raises(BulkRefused, match=r"out\.jsonl: exists already; to replace it needs --force"):
        run(producer, folder.options(**ASKED))
    assert folder.output.read_bytes() == before
    assert folder.names() == {"in.jsonl", "out.jsonl"}

    folder.ask(3)
    report = run(producer, folder.options(**ASKED, force=True))
    assert report.succeeded == len(folder.answers()) == 3
    assert tables.count("batches") == 2


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"max_tokens": 9}, r"max_tokens \(it was not given, now 9\)"),
        ({"temperature": 0.5}, "temperature"),
        ({"prompt_field": "answer"}, "prompt_field"),
        ({"model": "tiny-chat"}, "model"),
        ({"errors": Path("other.jsonl")}, "errors"),
        ({}, "the input's content"),
    ],
)
def test_another_run_is_not_mixed_in(
    producer: Producer, folder: Folder, tables: Tables, change: dict[str, Any], named: str
) -> None:
    """While a run is unfinished, a command that differs is refused by what differs; nothing changes."""
    folder.ask(3)
    killed = killed_at(producer, folder.options(**ASKED), lambda progress: progress.phase == "running")
    if not change:
        folder.ask(4)
    with pytest.raises(BulkRefused, match=rf"{named}.*--force"):
        run(producer, folder.options(**(ASKED | change)))
    assert producer.batches.get(killed.batch_id).state is BatchState.RUNNING
    assert tables.count("batches") == 1
    assert folder.names() == {"in.jsonl", "out.jsonl.headrace"}


def test_force_gives_the_old_run_up(producer: Producer, tables: Tables, folder: Folder) -> None:
    """With --force an unfinished run's rows are ended, billed at nothing, and a new run begins."""
    folder.ask(10)
    killed = killed_at(producer, folder.options(**ASKED), lambda progress: progress.phase == "running")
    worker = Worker.hire(producer.database)
    (running,) = worker.claim_bulk(1)
    folder.ask(4)
    bulk = BulkRun(producer, folder.options(**ASKED, max_tokens=9, force=True))
    bulk.open()
    assert (bulk.continued, bulk.batch_id != killed.batch_id) == (False, True)
    assert producer.batches.get(killed.batch_id).state is BatchState.CANCELLED
    assert worker.renew([running.token]).cancelled == (running.token,)
    worker.settle(running, "cancelled")
    assert producer.batches.progress(killed.batch_id).states == {State.CANCELLED: 10}
    assert tables.value("SELECT sum(prompt_tokens) FROM ledger") == 0
    with Hand(producer.database):
        assert bulk.run(nothing, nothing).succeeded == 4
    assert tables.count("ledger") == 14


def test_a_run_given_up_half_way(producer: Producer, hand: Hand, folder: Folder) -> None:
    """Where the old run was cancelled and the new one not begun, the next command begins it."""
    folder.ask(2)
    killed = killed_at(producer, folder.options(**ASKED), lambda progress: progress.phase == "running")
    producer.batches.cancel(killed.batch_id)
    report = run(producer, folder.options(**ASKED))
    assert report.batch_id != killed.batch_id
    assert len(folder.answers()) == 2


def test_two_commands_at_once(producer: Producer, hand: Hand, folder: Folder) -> None:
    """A second command for the same output is refused while the first one runs, which goes on undisturbed."""
    folder.ask(2)
    first = BulkRun(producer, folder.options(**ASKED))
    first.open()
    with pytest.raises(BulkRefused, match="another command is writing this output"):
        BulkRun(producer, folder.options(**ASKED, force=True)).open()
    assert first.run(nothing, nothing).succeeded == 2


# -- faults of the file system and of the user ------------------------------------------------------------------


@contextmanager
def small_files(limit_bytes: int) -> Iterator[None]:
    """No file may grow beyond the limit, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk(producer: Producer, hand: Hand, tables: Tables, folder: Folder) -> None:
    """When the output cannot be written there is none, not a part of it; with room the same command finishes."""
    folder.ask(200)
    bulk = BulkRun(producer, folder.options(**ASKED))
    bulk.open()
    with small_files(10_000), pytest.raises(BulkError, match="cannot be written: File too large"):
        bulk.run(nothing, nothing)
    assert folder.names() == {"in.jsonl", "out.jsonl.headrace"}

    report = run(producer, folder.options(**ASKED))
    assert (report.batch_id, len(folder.answers())) == (bulk.batch_id, 200)
    assert tables.count("attempts") == 200


@pytest.mark.parametrize("content", ["", "\n", "  \n\r\n\n"])
def test_an_input_without_a_request(producer: Producer, tables: Tables, folder: Folder, content: str) -> None:
    """An empty file, or one of blank lines, is an error, and leaves nothing that is open."""
    folder.input.write_text(content)
    with pytest.raises(BulkRefused, match=r"is empty|holds no request"):
        run(producer, folder.options(**ASKED))
    assert folder.names() == {"in.jsonl"}
    assert tables.rows("SELECT 1 FROM batches WHERE finished_at IS NULL") == []


def test_nothing_is_begun_for_a_bad_option(producer: Producer, tables: Tables, folder: Folder) -> None:
    """An option that no line could be run with is refused before anything is written."""
    from jobs.errors import RequestInvalid

    folder.ask(2)
    for change, field in (({"model": "nobody"}, "model"), ({"max_tokens": 0}, "max_tokens")):
        with pytest.raises(RequestInvalid) as refusal:
            run(producer, folder.options(**(ASKED | change)))
        assert refusal.value.field == field
    assert folder.names() == {"in.jsonl"}
    assert tables.count("batches") == 0


def test_an_input_that_shrinks(producer: Producer, folder: Folder) -> None:
    """An input that is cut off while it is read ends the run with an error, not with a short output."""
    folder.ask(3 * CHUNK_LINES)

    def cut(progress: BulkProgress) -> None:
        if progress.input_offset:
            os.truncate(folder.input, progress.input_offset)

    with pytest.raises(BulkError, match="changed meanwhile"):
        run(producer, folder.options(**ASKED), cut)
    assert not folder.output.exists()


def test_paused_before_the_start(producer: Producer, tables: Tables, folder: Folder) -> None:
    """Stopped while the input is looked over, nothing was begun."""
    folder.ask(1)
    bulk = BulkRun(producer, folder.options(**ASKED))
    bulk.pause()
    with pytest.raises(BulkPaused):
        bulk.open()
    assert folder.names() == {"in.jsonl"}
    assert tables.count("batches") == 0


def test_a_pause_does_not_wait_for_postgres(own_servers: Servers, tmp_path: Path, folder: Folder) -> None:
    """Stopped while Postgres is away, the command ends, and the same command goes on."""
    upgrade(own_servers.database_url)
    urls = {
        "database_url": own_servers.database_url,
        "broker_url": own_servers.broker_url,
        "secret": own_servers.secret,
    }
    folder.ask(5)
    with Producer(Settings.load(home=tmp_path, store_wait_seconds=0.2, **urls)) as producer:
        bulk = BulkRun(producer, folder.options(**ASKED))
        bulk.open()
        calls: list[BulkProgress] = []

        def stop_without_store(progress: BulkProgress) -> None:
            calls.append(progress)
            if progress.phase == "running" and own_servers.postgres.is_alive():
                own_servers.postgres.kill()
            elif progress.phase == "running":
                bulk.pause()

        with pytest.raises(BulkPaused):
            bulk.run(stop_without_store, nothing)
        assert calls[-1] == calls[-2]
        own_servers.postgres.start()
        with Hand(producer.database):
            wait_until(producer.leases.list, PATIENCE_SECONDS, "a worker is there")
            assert run(producer, folder.options(**ASKED)).succeeded == 5
