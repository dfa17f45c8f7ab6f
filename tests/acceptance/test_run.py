"""`headrace run` as its user sees it: real commands and workers, and what is left when either is stopped or killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from kit.contract import Tables
from kit.systems import SHORT_LEASES, System, system_on
from kit.waiting import wait_until
from kit.workers import WorkerProcesses

PATIENCE_SECONDS = 120.0
GSM8K = Path(__file__).parents[3] / "shared" / "data" / "gsm8k_train.jsonl"
# A question of ten bytes takes a tenth of a second, eight of them together.
SLOW = {"engine": "echo", "slots": 8, "seconds_per_token": 0.01}
PAUSED = 130


@pytest.fixture
def system(servers: Any, database_template: str, tmp_path: Path) -> Iterator[System]:
    """A system of this test's own, as yet without workers."""
    folder = tmp_path / "system"
    folder.mkdir()
    with system_on(servers, database_template, folder, models={"slow": SLOW}, **SHORT_LEASES) as system:
        yield system


class Command:
    """One `headrace run` with its files."""

    def __init__(self, system: System, folder: Path, *options: str, source: Path | None = None) -> None:
        self.input = source or folder / "in.jsonl"
        self.output = folder / "out.jsonl"
        self.errors = folder / "out.errors.jsonl"
        self._arguments = ["run", str(self.input), "-o", str(self.output), *options]
        config = folder / "headrace.toml"
        config.write_text(
            "\n".join(["[models.slow]", *(f"{key} = {json.dumps(value)}" for key, value in SLOW.items())])
        )
        self._environment = os.environ | system.settings.environment() | {"HEADRACE_CONFIG": str(config)}

    def ask(self, count: int) -> None:
        """So many questions of ten bytes."""
        self.input.write_text("".join(json.dumps({"question": f"{number:010}"}) + "\n" for number in range(count)))

    def start(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "headrace", *self._arguments],
            env=self._environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, status: int = 0) -> str:
        """Run it to its end, which is as expected. Returns what it said, on either stream."""
        process = self.start()
        said = "".join(process.communicate(timeout=PATIENCE_SECONDS))
        assert process.returncode == status, said
        return said

    def answers(self) -> dict[str, str]:
        """The answer to each custom_id, each of which is in one file once."""
        lines = read(self.output)
        names = Counter(line["custom_id"] for line in [*lines, *(read(self.errors) if self.errors.exists() else [])])
        assert set(names.values()) <= {1}
        return {line["custom_id"]: line["response"]["body"]["choices"][0]["message"]["content"] for line in lines}


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def await_ended(tables: Tables, rows: int) -> None:
    wait_until(lambda: tables.count("ledger") >= rows, PATIENCE_SECONDS, f"{rows} rows have ended")


def questions(count: int) -> dict[str, str]:
    return {f"line-{number + 1}": f"{number:010}" for number in range(count)}


@contextmanager
def running(command: Command) -> Iterator[subprocess.Popen[str]]:
    """The command on its way; it does not outlive the test."""
    process = command.start()
    try:
        yield process
    finally:
        process.kill()
        process.communicate(timeout=PATIENCE_SECONDS)


def executions(worker: WorkerProcesses) -> Counter[Any]:
    return Counter(execution.job_id for execution in worker.executions())


@pytest.mark.skipif(not GSM8K.is_file(), reason="../shared/data/gsm8k_train.jsonl is not here")
def test_a_public_data_set_as_it_is(system: System, tmp_path: Path) -> None:
    """A file of thousands of questions that knows nothing of batches: one answer a line, under the line's number."""
    worker = system.start("echo")
    asked = [row["question"] for row in read(GSM8K)]
    options = ["--prompt-field", "question", "--model", "echo", "--max-tokens", "2000"]
    command = Command(system, tmp_path, *options, source=GSM8K)
    command.run()

    assert command.answers() == {f"line-{number}": text for number, text in enumerate(asked, start=1)}
    assert not command.errors.exists()
    assert system.tables.count("ledger") == len(asked) == 7473
    assert set(executions(worker).values()) == {1}


def test_good_and_bad_lines(system: System, tmp_path: Path) -> None:
    """Every endpoint is answered in its form; bad lines are told with line and field, and the status says so."""
    system.start("echo")
    chat = {"model": "echo", "messages": [{"role": "user", "content": "Hello"}]}
    lines = [
        {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": chat},
        {"custom_id": "b", "method": "POST", "url": "/v1/completions", "body": {"model": "echo", "prompt": "Once"}},
        {"custom_id": "c", "method": "POST", "url": "/v1/responses", "body": {"model": "echo", "input": "Hi"}},
        {"custom_id": "d", "method": "POST", "url": "/v1/chat/completions", "body": chat | {"temperature": 3}},
        {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": chat},
    ]
    command = Command(system, tmp_path)
    command.input.write_bytes(b"".join(json.dumps(line).encode() + b"\n" for line in lines) + b'{"caf\xe9": 1}\noops')
    command.run(status=3)

    bodies = {line["custom_id"]: line["response"]["body"] for line in read(command.output)}
    assert bodies["a"]["choices"][0]["message"]["content"] == "Hello"
    assert bodies["b"]["choices"][0]["text"] == "Once"
    assert bodies["c"]["output"][0]["content"][0]["text"] == "Hi"
    faults = {line["line"]: line["response"]["body"]["error"] for line in read(command.errors)}
    assert {number: (fault["param"], fault["code"]) for number, fault in faults.items()} == {
        4: ("body.temperature", "invalid_value"),
        5: ("custom_id", "duplicate_custom_id"),
        6: ("line", "invalid_utf8"),
        7: ("line", "invalid_json_line"),
    }


def test_a_model_that_nobody_serves_gets_a_worker(system: System, tmp_path: Path) -> None:
    """On servers without a worker the command brings its own, and takes it away again."""
    command = Command(system, tmp_path, "--prompt-field", "question", "--model", "echo")
    command.ask(20)
    command.run()
    assert command.answers() == questions(20)
    assert not system.producer.leases.list()


def test_ctrl_c_and_on_again(system: System, tmp_path: Path) -> None:
    """Ctrl-C ends the command at once and says how to go on; so it goes on, and nothing is computed twice."""
    worker = system.start("slow")
    tables = system.tables
    command = Command(system, tmp_path, "--prompt-field", "question", "--model", "slow")
    command.ask(300)
    with running(command) as process:
        await_ended(tables, 20)
        process.send_signal(signal.SIGINT)
        said = "".join(process.communicate(timeout=PATIENCE_SECONDS))
    assert process.returncode == PAUSED, said
    assert "same command" in said.lower()
    assert not command.output.exists()
    # What was under way ends; what waits goes on waiting.
    wait_until(lambda: not tables.value("SELECT count(*) FROM jobs WHERE state = 'running'"), PATIENCE_SECONDS, "calm")
    assert 20 <= tables.count("ledger") < 300

    command.run()
    assert command.answers() == questions(300)
    assert set(executions(worker).values()) == {1}
    assert tables.count("ledger") == 300


def test_a_killed_command_is_taken_up_again(system: System, tmp_path: Path) -> None:
    """Killed without a chance to say so, its rows run on; the same command collects them."""
    worker = system.start("slow")
    tables = system.tables
    command = Command(system, tmp_path, "--prompt-field", "question", "--model", "slow")
    command.ask(200)
    with running(command) as process:
        await_ended(tables, 20)
        process.kill()
    assert not command.output.exists()
    await_ended(tables, 200)
    command.run()

    assert command.answers() == questions(200)
    assert set(executions(worker).values()) == {1}
    assert {path.name for path in tmp_path.glob("out*")} == {"out.jsonl"}


def test_a_killed_worker_loses_nothing(system: System, tmp_path: Path) -> None:
    """A worker dies in the middle and another takes over: every line has one answer and one bill."""
    worker = system.start("slow")
    tables = system.tables
    command = Command(system, tmp_path, "--prompt-field", "question", "--model", "slow")
    command.ask(300)
    with running(command) as process:
        await_ended(tables, 20)
        worker.kill()
        system.start("slow")
        said = "".join(process.communicate(timeout=PATIENCE_SECONDS))
    assert process.returncode == 0, said
    assert command.answers() == questions(300)
    assert tables.count("ledger") == 300
    assert tables.value("SELECT count(*) FROM attempts WHERE outcome = 'lost'") > 0


def test_a_finished_output_needs_force(system: System, tmp_path: Path) -> None:
    """The same command after the end is refused in one line; with --force it runs anew."""
    system.start("echo")
    command = Command(system, tmp_path, "--prompt-field", "question", "--model", "echo")
    command.ask(3)
    command.run()
    before = command.output.read_bytes()
    said = command.run(status=2)
    assert "--force" in said
    assert "Traceback" not in said
    assert command.output.read_bytes() == before

    Command(system, tmp_path, "--prompt-field", "question", "--model", "echo", "--force").run()
    assert command.answers() == questions(3)
    assert system.tables.count("ledger") == 6
