"""The commands in a user's hands, on a stack that is up: one job's life, bulk runs, and one JSON object each."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jobs.home import Home
from kit.commands import Background, Done, User, user
from kit.waiting import wait_until

# `slow` takes a tenth of a second for a character; `other` is the echo engine under a name that nobody serves.
CONFIG = """
[models.slow]
engine = "echo"
slots = 4
seconds_per_token = 0.1

[models.other]
engine = "echo"
"""
QUICK = {"HEADRACE_DRAIN_SECONDS": "1", "HEADRACE_LEASE_SECONDS": "4", "HEADRACE_HEARTBEAT_SECONDS": "1"}


@pytest.fixture(scope="module")
def ann() -> Iterator[User]:
    """A user whose stack serves `echo` and `slow`. Her folder has namesakes of our packages, which are none of ours."""
    with user(**QUICK) as one:
        (one.folder / "headrace.toml").write_text(CONFIG)
        for name in ("headrace", "producer", "jobs", "workers", "models"):
            (one.folder / name).mkdir()
            (one.folder / name / "__init__.py").write_text("raise RuntimeError('not ours')")
        with one.up("--model", "echo", "--model", "slow", "--no-flower"):
            yield one


@pytest.fixture(scope="module")
def bob() -> Iterator[User]:
    """A user without a stack."""
    with user(**QUICK) as one:
        (one.folder / "headrace.toml").write_text(CONFIG)
        yield one


# == one job =====================================================================================================


def test_submit_and_wait_prints_the_answer_alone(ann: User) -> None:
    """What a pipe gets is the text; the rest is on stderr."""
    done = ann.headrace("submit", "grüß dich", "--model", "echo", "--wait")
    assert (done.status, done.out) == (0, "grüß dich\n")
    assert "succeeded" in done.err


def test_submit_prints_an_id_that_the_other_commands_take(ann: User) -> None:
    """status, wait and list know the job by it."""
    job_id = ann.call("submit", "hello", "--model", "echo").out.strip()
    assert ann.call("wait", job_id).out == "hello\n"
    shown = ann.call("status", job_id).out
    for part in (job_id, "succeeded", "hello", "echo on echo, none, cpu"):
        assert part in shown
    assert job_id in ann.call("list", "--limit", "3").out


def test_every_option_of_submit_reaches_the_job(ann: User) -> None:
    """Choices, lengths, stop strings, metadata and conversation come back as asked."""
    options = ["--n", "2", "--max-tokens", "9", "--stop", "HALT", "--stop", "never", "--temperature", "0.5"]
    more = ["--metadata", "a=b=c", "--metadata", "empty=", "--conversation", "talk", "--system", "be brief"]
    arguments = ["one HALT two", "--model", "echo", "--wait", "--json", "--deadline-seconds", "60"]
    job = ann.call("submit", *arguments, *options, *more).json
    assert [choice["text"] for choice in job["choices"]] == ["one ", "one "]
    assert job["metadata"] == {"a": "b=c", "empty": ""}
    assert (job["conversation"], job["turn"], job["text"]) == ("talk", 1, "one ")


def test_the_same_idempotency_key_is_the_same_job(ann: User) -> None:
    """The second submit returns the first job; another request under the key is refused."""
    arguments = ["--model", "echo", "--idempotency-key", "once", "--json"]
    first = ann.call("submit", "same", *arguments).json
    assert ann.call("submit", "same", *arguments).json["id"] == first["id"]
    refused = ann.call("submit", "different", *arguments)
    assert refused.status == 1
    assert refused.json["error"]["code"] == "idempotency_conflict"


def test_a_running_job_is_cancelled_with_what_it_has(ann: User) -> None:
    """`wait` gives up when told to, `cancel` stops it, and then `wait` ends with status 3 and the partial text."""
    job_id = ann.call("submit", "x" * 5000, "--model", "slow").out.strip()
    waited = ann.call("wait", job_id, "--timeout", "0.5", "--json")
    assert (waited.status, waited.json["error"]["code"]) == (1, "wait_timeout")
    assert ann.call("cancel", job_id).out.startswith(job_id)
    ended = ann.call("wait", job_id, "--json")
    assert (ended.status, ended.json["state"]) == (3, "cancelled")
    assert set(ended.json["text"]) <= {"x"}
    assert ann.call("list", "--state", "cancelled", "--json").json["jobs"][0]["id"] == job_id
    assert ann.call("cancel", job_id, "--json").json["state"] == "cancelled"


def test_list_selects_by_model_and_number(ann: User) -> None:
    """The newest come first, and no other model's."""
    ids = [ann.call("submit", text, "--model", "echo", "--json").json["id"] for text in ("one", "two")]
    jobs = ann.call("list", "--model", "echo", "--limit", "2", "--json").json["jobs"]
    assert [job["id"] for job in jobs] == ids[::-1]
    assert ann.call("list", "--model", "other").out == "no jobs\n"


def test_workers_are_listed(ann: User) -> None:
    """Each model of the stack has one, and it is ready."""
    workers = ann.call("workers", "--json").json["workers"]
    assert {(worker["model"], worker["ready"]) for worker in workers} >= {("echo", True), ("slow", True)}
    assert "slow" in ann.call("workers").out


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        (["", "--model", "echo"], "messages"),
        (["hi", "--model", "gpt-9"], "model"),
        (["hi", "--model", "echo", "--max-tokens", "0"], "max_tokens"),
        (["hi", "--model", "echo", "--max-tokens", "99999999"], "max_tokens"),
        (["hi", "--model", "echo", "--temperature", "3"], "temperature"),
        (["hi", "--model", "echo", "--n", "0"], "n"),
        (["hi\udcff", "--model", "echo"], "messages[0].content"),
        (["hi", "--model", "echo", "--stop", ""], "stop[0]"),
    ],
)
def test_a_bad_request_names_its_field_in_both_ways(ann: User, arguments: list[str], field: str) -> None:
    """Exit status 2, one line or one object, and no job."""
    before = ann.call("list", "--json").json
    done = ann.call("submit", *arguments)
    assert (done.status, done.out, done.err.count("\n")) == (2, "", 1)
    assert done.err.startswith(f"headrace: {field}: ")
    assert ann.call("submit", *arguments, "--json").json["error"]["field"] == field
    assert ann.call("list", "--json").json == before


def test_a_prompt_may_come_from_a_pipe_but_not_be_too_long(ann: User) -> None:
    """`-` reads it from stdin; two megabytes are refused with the limit."""
    assert _piped(ann, "from a pipe").out == "from a pipe\n"
    refused = _piped(ann, "x" * 2_000_000)
    assert refused.status == 2
    assert "HEADRACE_MAX_PROMPT_BYTES" in refused.err


def test_a_job_that_does_not_exist_is_not_found(ann: User) -> None:
    """For status, wait and cancel alike."""
    for command in ("status", "wait", "cancel"):
        done = ann.call(command, "01a2087d-41ec-78fc-9d23-8e63e0e87750", "--json")
        assert (done.status, done.json["error"]["code"]) == (1, "not_found")


def test_migrate_can_be_repeated(ann: User) -> None:
    """On a database that is up to date it changes nothing."""
    assert ann.headrace("migrate", "--json").json == {"migrated": True}


# == workers and Flower in the foreground ========================================================================


def test_a_worker_in_the_foreground_joins_the_stack_until_ctrl_c(ann: User) -> None:
    """It serves a model that nobody served, drains at Ctrl-C, and is gone from the list."""
    with ann.background("worker", "--model", "other") as worker:
        done = ann.call("submit", "for the other", "--model", "other", "--wait")
        assert done.out == "for the other\n", worker.said
        assert worker.interrupt() == 0
    assert "other" not in {one["model"] for one in ann.call("workers", "--json").json["workers"]}


def test_flower_in_the_foreground_tells_its_login(ann: User) -> None:
    """One object with address, user and password; SIGTERM ends it."""
    with ann.background("flower", "--json") as page:
        page.await_until(lambda: "}" in page.said, "Flower tells its login")
        login = json.loads(page.said.splitlines()[0])
        assert login["url"].startswith("http://127.0.0.1:")
        assert len(login["password"]) >= 20
        page.await_until(lambda: "Connected to" in page.said, "Flower has started")
        assert page.interrupt(signal.SIGTERM) == 0
        assert "Traceback" not in page.said


# == bulk ========================================================================================================


def test_a_run_uses_the_stack_and_adds_the_worker_it_lacks(ann: User) -> None:
    """Batch lines for two models: one served by the stack, one by a worker that ends with the run."""
    lines = [_batch_line(f"echo-{i}", "echo") for i in range(20)] + [_batch_line("o", "other")]
    source = _write(ann, "two.jsonl", lines)
    done = ann.call("run", source, "-o", "two.out.jsonl", "--json")
    assert done.status == 0, done.err
    assert "no worker serves other; starting one" in done.err
    report = done.json
    assert (report["total"], report["succeeded"], report["rejected"]) == (21, 21, 0)
    assert {line["custom_id"] for line in _read(ann, "two.out.jsonl")} == {f"echo-{i}" for i in range(20)} | {"o"}
    assert "other" not in {one["model"] for one in ann.call("workers", "--json").json["workers"]}
    assert ann.call("list", "--json").status == 0


def test_bad_lines_do_not_stop_good_ones(ann: User) -> None:
    """Exit status 3, the good answers in the output, each bad line in the errors with its number and field."""
    lines = [_batch_line("good", "echo"), "not json", _batch_line("bad", "echo", temperature=3)]
    source = _write(ann, "mixed.jsonl", lines)
    done = ann.call("run", source, "-o", "mixed.out.jsonl", "--show", "3")
    assert done.status == 3
    assert "2 of 3 lines have no answer; why is in mixed.out.errors.jsonl" in done.out
    assert "hello from good" in done.out
    assert [line["custom_id"] for line in _read(ann, "mixed.out.jsonl")] == ["good"]
    errors = _read(ann, "mixed.out.errors.jsonl")
    assert [(one["line"], one["response"]["body"]["error"]["param"]) for one in errors] == [
        (2, "line"),
        (3, "body.temperature"),
    ]


def test_a_finished_output_is_not_overwritten_without_force(ann: User) -> None:
    """The second command is refused with status 2 and leaves the file; with --force it runs again."""
    source = _write(ann, "once.jsonl", [_batch_line("a", "echo")])
    assert ann.call("run", source, "-o", "once.out.jsonl").status == 0
    before = (ann.folder / "once.out.jsonl").read_bytes()
    refused = ann.call("run", source, "-o", "once.out.jsonl")
    assert refused.status == 2
    assert "--force" in refused.err
    assert (ann.folder / "once.out.jsonl").read_bytes() == before
    assert ann.call("run", source, "-o", "once.out.jsonl", "--force", "--json").json["succeeded"] == 1


@pytest.mark.parametrize(
    ("lines", "options", "reason"),
    [
        ([], [], "is empty"),
        ([{"question": "x"}], ["--prompt-field", "question", "--max-tokens", "0"], "max_tokens"),
        ([{"question": "x"}], ["--prompt-field", "question", "--model", "gpt-9"], "model"),
        ([{"question": "x"}], ["--prompt-field", "question", "--temperature", "3"], "temperature"),
    ],
)
def test_a_run_that_cannot_begin_is_refused(ann: User, lines: list[Any], options: list[str], reason: str) -> None:
    """Status 2, one line that names the reason, no output."""
    source = _write(ann, "refused.jsonl", lines)
    done = ann.call("run", source, "-o", "refused.out.jsonl", *options)
    assert done.status == 2
    assert reason in done.err.splitlines()[-1]
    assert not (ann.folder / "refused.out.jsonl").exists()


def test_a_run_without_a_stack_has_one_of_its_own(bob: User) -> None:
    """Any JSONL with a field as prompt: answers, a table, what to do next; afterwards nothing runs."""
    source = _write(bob, "questions.jsonl", [{"question": f"what is {i}?"} for i in range(200)])
    done = bob.headrace(
        "run", source, "-o", "out.jsonl", "--prompt-field", "question", "--model", "echo", "--show", "2"
    )
    assert done.status == 0, done.err
    for part in ("what is 0?", "200 in ", "succeeded", "p50", "cost", "Next:", "headrace up --detach"):
        assert part in done.out
    assert max(map(len, done.out.splitlines())) <= 80
    assert [line["custom_id"] for line in _read(bob, "out.jsonl")] == [f"line-{i + 1}" for i in range(200)]
    assert bob.processes() == []
    assert Home(bob.home).holder() is None


def test_ctrl_c_pauses_a_run_and_the_same_command_goes_on(bob: User) -> None:
    """Status 130 and how to go on; then the rest is done, nothing twice, and the whole output is there."""
    texts = [f"{i:02}" * 3 for i in range(30)]
    source = _write(bob, "long.jsonl", [{"question": text} for text in texts])
    command = ["run", source, "-o", "long.out.jsonl", "--prompt-field", "question", "--model", "slow"]
    with bob.background(*command) as run:
        run.await_until(lambda: _has_ended_rows(run), "some rows have ended")
        assert run.interrupt() == 130
        assert "same command" in run.said
        assert "Traceback" not in run.said
    bob.await_gone()
    assert not (bob.folder / "long.out.jsonl").exists()

    done = bob.headrace(*command, "--json")
    assert done.status == 0, done.err
    assert "going on with the unfinished run" in done.err
    assert done.json["continued"] is True
    answers = [line["response"]["body"]["choices"][0]["message"]["content"] for line in _read(bob, "long.out.jsonl")]
    assert answers == texts


def _has_ended_rows(run: Background) -> bool:
    return "running: " in run.said


def _piped(one: User, text: str) -> Done:
    return one.call("submit", "-", "--model", "echo", "--wait", stdin=text)


def _batch_line(custom_id: str, model: str, **body: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": f"hello from {custom_id}"}]
    return {
        "custom_id": custom_id,
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {"model": model, "messages": messages} | body,
    }


def _write(one: User, name: str, lines: list[Any]) -> str:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (one.folder / name).write_text("".join(f"{text}\n" for text in texts))
    return name


def _read(one: User, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(one.folder / name).read_text().splitlines()]


# == webhooks ====================================================================================================


def test_an_end_that_cannot_be_told_is_listed_and_tried_again(ann: User) -> None:
    """A private address is refused by the stack's gateway; the secret is shown again, and changed."""
    done = ann.call("submit", "hello", "--model", "echo", "--webhook", "http://127.0.0.1:9/", "--wait", "--json")
    job_id = done.json["id"]

    def refused() -> Any:
        [listed] = ann.call("webhooks", "list", "--state", "waiting", "--json").json["webhooks"]
        return listed if listed["error"] else None

    listed = wait_until(refused, 60, "the gateway has tried")
    assert (listed["job_id"], listed["tenant_id"], listed["state"]) == (job_id, "local", "waiting")
    assert "not public" in listed["error"]
    assert job_id in ann.call("webhooks", "list", "--tenant", "local").out
    assert ann.call("webhooks", "retry", listed["id"], "--json").json == {"retried": 1}
    assert ann.call("webhooks", "retry", "--tenant", "nobody").out == "0 to be tried again\n"
    secret = ann.call("webhooks", "secret", "--tenant", "local", "--json").json["secret"]
    assert ann.call("webhooks", "secret", "--tenant", "local").out == f"{secret}\n"
    rotated = ann.call("webhooks", "secret", "--tenant", "local", "--rotate").out.strip()
    assert rotated.startswith("whsec_")
    assert rotated != secret


# == keys, purge =================================================================================================


def test_a_key_from_its_making_to_its_end(ann: User) -> None:
    """Made, listed without its secret, given a new one, revoked; an id that is none is an error."""
    made = ann.call(
        "keys", "create", "--tenant", "acme", "--tier", "premium", "--quota-tokens-per-minute", "500",
        "--models", "echo, slow", "--roles", "read", "--json",
    )  # fmt: skip
    assert set(made.json) == {"id", "key", "tenant"}
    assert (made.json["tenant"], made.json["key"][:3]) == ("acme", "hr-")
    key_id = made.json["id"]

    [listed] = ann.call("keys", "list", "--tenant", "acme", "--json").json["keys"]
    expected = {"id": key_id, "tenant": "acme", "tier": "premium", "models": ["echo", "slow"], "roles": ["read"]}
    assert expected.items() <= listed.items()
    assert (listed["quota_tokens_per_minute"], listed["revoked_at"]) == (500, None)
    assert made.json["key"] not in ann.call("keys", "list").out

    rotated = ann.call("keys", "rotate", key_id, "--json").json
    assert (rotated["id"], rotated["tenant"]) == (key_id, "acme")
    assert rotated["key"] != made.json["key"]

    assert ann.call("keys", "revoke", key_id, "--json").json == {"id": key_id, "revoked": True}
    assert ann.call("keys", "list", "--tenant", "acme", "--json").json["keys"][0]["revoked_at"]
    gone = ann.call("keys", "rotate", key_id, "--json")
    assert (gone.status, gone.json["error"]["code"]) == (1, "not_found")


def test_a_person_is_shown_the_key_once(ann: User) -> None:
    """On stdout whole, however narrow the terminal; that it is not shown again is said beside it."""
    done = ann.call("keys", "create", "--tenant", "zeta")
    [secret] = [word for word in done.out.split() if word.startswith("hr-")]
    assert len(secret) == 3 + 43
    assert "not shown again" in done.err
    assert "zeta" in ann.call("keys", "list").out


@pytest.mark.parametrize(
    "options",
    [
        ["--tenant", "acme", "--roles", "read,root"],
        ["--tenant", "acme", "--models", "echo,"],
        ["--tenant", "acme", "--quota-tokens-per-minute", "0"],
        ["--tenant", " "],
        [],
    ],
)
def test_a_key_that_cannot_be_is_not_made(ann: User, options: list[str]) -> None:
    """Wrong usage is told in a line, with exit status 2."""
    before = ann.call("keys", "list", "--json").json["keys"]
    done = ann.call("keys", "create", *options)
    assert (done.status, done.out, done.err.count("\n")) == (2, "", 1)
    assert ann.call("keys", "list", "--json").json["keys"] == before


def test_purge_forgets_what_ended(ann: User) -> None:
    """Of one tenant, or what is older than a time; without either, nobody knows what is meant."""
    job = ann.call("submit", "forget me", "--model", "echo", "--wait", "--json").json["id"]
    for options in (["--older-than", "1d"], ["--tenant", "nobody", "--older-than", "0s"]):
        assert ann.call("purge", *options, "--json").json["purged"]["jobs"] == 0
    assert ann.call("purge", "--tenant", "local", "--older-than", "0s", "--json").json["purged"]["jobs"] >= 1
    assert ann.call("status", job, "--json").json["error"]["code"] == "not_found"
    for options in ([], ["--older-than", "soon"], ["--older-than", "-1d"]):
        assert ann.call("purge", *options).status == 2
