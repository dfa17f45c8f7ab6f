"""Files and batches as the official client asks for them."""

from __future__ import annotations

import io
import json
from typing import Any

import openai
import pytest

from jobs.ids import new_id
from jobs.states import State
from kit.gateways import RunningGateway, gateway_on
from kit.systems import PATIENCE_SECONDS, System
from kit.waiting import wait_until

CHAT = "/v1/chat/completions"
OPEN = {"validating", "in_progress", "finalizing", "cancelling"}


def line(custom_id: str, content: str = "Hello", url: str = CHAT, **body: Any) -> dict[str, Any]:
    asked = {"input": content} if url == "/v1/responses" else {"messages": [{"role": "user", "content": content}]}
    asked = {"prompt": content} if url == "/v1/completions" else asked
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": {"model": "echo"} | asked | body}


def upload(client: openai.OpenAI, *lines: dict[str, Any] | str) -> str:
    text = "".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in lines)
    return client.files.create(file=("in.jsonl", text.encode()), purpose="batch").id


def begin(client: openai.OpenAI, file_id: str, endpoint: Any = CHAT, **options: Any) -> Any:
    return client.batches.create(input_file_id=file_id, endpoint=endpoint, completion_window="24h", **options)


def ended(client: openai.OpenAI, batch: Any) -> Any:
    """The batch once it has ended."""

    def look() -> Any:
        found = client.batches.retrieve(batch.id)
        return found if found.status not in OPEN else None

    return wait_until(look, PATIENCE_SECONDS, "the batch has ended")


def lines_of(client: openai.OpenAI, file_id: str | None) -> list[dict[str, Any]]:
    text = "" if file_id is None else client.files.content(file_id).text
    assert text == "" or text.endswith("\n")
    return [json.loads(one) for one in text.splitlines()]


# == files ======================================================================================================


@pytest.mark.parametrize("size", [0, 1, 262_143, 262_144, 262_145, 3_000_000])
def test_a_file_comes_back_as_it_was(client: openai.OpenAI, size: int) -> None:
    """Byte for byte, whatever its size is to that of the pieces in which it lies."""
    content = bytes(index * 7 % 251 for index in range(size))
    made = client.files.create(file=("f.bin", content), purpose="user_data")
    assert (made.bytes, made.filename, made.status, made.purpose) == (size, "f.bin", "processed", "user_data")
    assert client.files.retrieve(made.id) == made
    assert client.files.content(made.id).read() == content


def test_files_are_listed_by_pages(gateway: RunningGateway) -> None:
    """In both orders, by purpose, through the client's own paging; what is deleted is gone."""
    client = gateway.client("pages")
    assert list(client.files.list()) == []
    names = [client.files.create(file=("x", b"x"), purpose="batch").id for _ in range(5)]
    other = client.files.create(file=("x", b"x"), purpose="user_data").id
    assert [file.id for file in client.files.list(limit=2, purpose="batch", order="asc")] == names
    assert [file.id for file in client.files.list(limit=4)] == [other, *reversed(names)]
    assert client.files.delete(other).deleted
    for call in (client.files.retrieve, client.files.content, client.files.delete):
        with pytest.raises(openai.NotFoundError):
            call(other)
    assert other not in {file.id for file in client.files.list()}


def test_a_file_expires_when_it_should(client: openai.OpenAI) -> None:
    """After the time that was asked for, which has limits; one for a batch after 30 days."""
    wanted: Any = {"anchor": "created_at", "seconds": 3600}
    made = client.files.create(file=("x", b"x"), purpose="user_data", expires_after=wanted)
    assert made.expires_at == made.created_at + 3600
    month = client.files.create(file=("x", b"x"), purpose="batch")
    assert month.expires_at == month.created_at + 30 * 86_400
    with pytest.raises(openai.BadRequestError) as refused:
        client.files.create(file=("x", b"x"), purpose="batch", expires_after={"anchor": "created_at", "seconds": 10})
    assert refused.value.param == "expires_after.seconds"


def test_a_purpose_that_we_do_not_know(client: openai.OpenAI) -> None:
    """400, naming it."""
    with pytest.raises(openai.BadRequestError) as refused:
        client.files.create(file=("x", b"x"), purpose="fine-tune")
    assert refused.value.param == "purpose"


def test_the_clients_own_wait(client: openai.OpenAI) -> None:
    """A file is processed at once."""
    made = client.files.create(file=io.BytesIO(b"x"), purpose="batch")
    assert client.files.wait_for_processing(made.id).status == "processed"


# == batches ====================================================================================================


@pytest.mark.parametrize("endpoint", [CHAT, "/v1/completions", "/v1/responses"])
def test_a_batch(client: openai.OpenAI, endpoint: str) -> None:
    """Every request has its line in one of the two files, and the counts say so."""
    asked = [line(f"r{number}", f"text {number}", endpoint) for number in range(30)]
    bad = line("bad", "x", endpoint, temperature=9)
    file_id = upload(client, *asked[:10], "", bad, *asked[10:])
    made = begin(client, file_id, endpoint, metadata={"a": "b"})
    assert (made.status, made.endpoint, made.input_file_id) == ("validating", endpoint, file_id)
    assert made.expires_at == made.created_at + 86_400
    done = ended(client, made)
    assert (done.status, done.metadata) == ("completed", {"a": "b"})
    assert done.request_counts.model_dump() == {"total": 31, "completed": 30, "failed": 1}
    output = lines_of(client, done.output_file_id)
    assert {one["custom_id"]: _text(one["response"]["body"]) for one in output} == {
        f"r{number}": f"text {number}" for number in range(30)
    }
    assert {one["response"]["status_code"] for one in output} == {200}
    assert [one["error"] for one in output] == [None] * 30
    [error] = lines_of(client, done.error_file_id)
    assert (error["custom_id"], error["response"]["status_code"], error["error"]) == ("bad", 400, None)
    assert set(error["response"]["body"]["error"]) == {"message", "type", "param", "code"}
    stamps = [done.created_at, done.in_progress_at, done.finalizing_at, done.completed_at]
    assert stamps == sorted(stamps)
    assert done.usage.output_tokens == sum(len(f"text {number}") for number in range(30))


def _text(body: dict[str, Any]) -> str:
    if body["object"] == "response":
        return str(body["output"][0]["content"][0]["text"])
    [choice] = body["choices"]
    return str(choice["message"]["content"] if "message" in choice else choice["text"])


def test_a_batch_in_which_everything_fails_is_completed(client: openai.OpenAI) -> None:
    """Without an output file; and one without failures has no error file."""
    done = ended(client, begin(client, upload(client, line("a", n=0), line("b", model="nobody's"))))
    assert (done.status, done.output_file_id) == ("completed", None)
    assert {one["custom_id"]: one["response"]["status_code"] for one in lines_of(client, done.error_file_id)} == {
        "a": 400,
        "b": 404,
    }
    assert ended(client, begin(client, upload(client, line("a")))).error_file_id is None


@pytest.mark.parametrize(
    ("lines", "code", "number"),
    [
        (["{bad"], "invalid_json_line", 1),
        ([line("a"), "[1]"], "invalid_json_line", 2),
        ([line("a"), "", line("a")], "duplicate_custom_id", 3),
        ([line("a"), line("b", url="/v1/responses")], "url_mismatch", 2),
        ([line("a") | {"method": "GET"}], "invalid_method", 1),
        ([{"custom_id": "a", "method": "POST", "url": CHAT}], "missing_required_parameter", 1),
        ([line("a") | {"custom_id": None}], "missing_required_parameter", 1),
        (["", ""], "empty_file", None),
        ([line(str(number)) for number in range(50_001)], "too_many_tasks", None),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_file_that_is_no_batch(client: openai.OpenAI, lines: list[Any], code: str, number: int | None) -> None:
    """Told by the batch, with the line; nothing of it runs."""
    done = ended(client, begin(client, upload(client, *lines)))
    assert done.status == "failed"
    assert done.failed_at is not None
    assert (done.errors.data[0].code, done.errors.data[0].line) == (code, number)
    assert (done.output_file_id, done.error_file_id) == (None, None)


def test_what_no_batch_can_be_made_of(client: openai.OpenAI) -> None:
    """Refused at once, naming the field."""
    file_id = upload(client, line("a"))
    good: Any = {"input_file_id": file_id, "endpoint": CHAT, "completion_window": "24h"}
    for field, value in (
        ("endpoint", "/v1/moderations"),
        ("completion_window", "1h"),
        ("metadata", {str(number): "x" for number in range(17)}),
        ("metadata", {"a": "x" * 513}),
    ):
        with pytest.raises(openai.BadRequestError) as refused:
            client.batches.create(**good | {field: value})
        assert str(refused.value.param).startswith(field)
    with pytest.raises(openai.NotFoundError) as unknown:
        client.batches.create(**good | {"input_file_id": f"file-{new_id().hex}"})
    assert unknown.value.param == "input_file_id"


def test_cancelling_keeps_what_is_done(client: openai.OpenAI) -> None:
    """What has ended is in the output; every other request is told to be cancelled; nothing changes it afterwards."""
    quick = [line(f"q{number}") for number in range(3)]
    slow = [line(f"s{number}", "word " * 400, model="slow") for number in range(40)]
    made = begin(client, upload(client, *quick, *slow))
    wait_until(
        lambda: client.batches.retrieve(made.id).request_counts.completed == 3,  # type: ignore[union-attr]
        PATIENCE_SECONDS,
        "the quick ones have ended",
    )
    assert client.batches.cancel(made.id).status == "cancelling"
    assert client.batches.cancel(made.id).status in {"cancelling", "cancelled"}
    done = ended(client, made)
    assert done.status == "cancelled"
    assert {one["custom_id"] for one in lines_of(client, done.output_file_id)} == {"q0", "q1", "q2"}
    errors = lines_of(client, done.error_file_id)
    assert {one["custom_id"] for one in errors} == {f"s{number}" for number in range(40)}
    assert {(one["response"], one["error"]["code"]) for one in errors} == {(None, "batch_cancelled")}
    assert (done.request_counts.completed, done.request_counts.failed) == (3, 40)
    assert client.batches.cancel(made.id) == done


def test_a_completed_batch_cannot_be_cancelled(client: openai.OpenAI) -> None:
    """409, and trying again is of no use."""
    done = ended(client, begin(client, upload(client, line("a"))))
    with pytest.raises(openai.ConflictError, match="'completed'") as refused:
        client.batches.cancel(done.id)
    assert refused.value.response.headers["x-should-retry"] == "false"


def test_what_is_left_when_its_time_is_over(client: openai.OpenAI, system: System) -> None:
    """Expires; what was done is handed over."""
    made = begin(client, upload(client, line("done"), *[line(f"i{n}", model="idle") for n in range(5)]))
    wait_until(
        lambda: client.batches.retrieve(made.id).request_counts.completed == 1,  # type: ignore[union-attr]
        PATIENCE_SECONDS,
        "the one that can run has ended",
    )
    batch_id = made.id.removeprefix("batch_")
    system.tables.execute("UPDATE api_batches SET expires_at = now() - interval '1 minute' WHERE id = %s", batch_id)
    system.tables.execute("UPDATE jobs SET deadline_at = now() WHERE batch_id = %s AND finished_at IS NULL", batch_id)
    done = ended(client, made)
    assert done.status == "expired"
    assert [one["custom_id"] for one in lines_of(client, done.output_file_id)] == ["done"]
    assert {one["error"]["code"] for one in lines_of(client, done.error_file_id)} == {"batch_expired"}
    assert done.request_counts.model_dump() == {"total": 6, "completed": 1, "failed": 5}


def test_deleting_the_input_of_a_running_batch(client: openai.OpenAI) -> None:
    """The batch goes on."""
    file_id = upload(client, *[line(f"r{number}", model="slow") for number in range(20)])
    made = begin(client, file_id)
    client.files.delete(file_id)
    assert ended(client, made).request_counts.completed == 20
    with pytest.raises(openai.NotFoundError):
        begin(client, file_id)


def test_batches_are_listed_by_pages(gateway: RunningGateway) -> None:
    """The newest first."""
    client = gateway.client("lists")
    file_id = upload(client, line("a"))
    names = [begin(client, file_id).id for _ in range(5)]
    assert [batch.id for batch in client.batches.list(limit=2)] == names[::-1]


def test_the_same_name_makes_one_batch(client: openai.OpenAI) -> None:
    """A client that does not know whether its request arrived repeats it."""
    file_id, name = upload(client, line("a")), {"Idempotency-Key": "my-batch"}
    assert begin(client, file_id, extra_headers=name).id == begin(client, file_id, extra_headers=name).id
    with pytest.raises(openai.ConflictError):
        begin(client, upload(client, line("a")), extra_headers=name)


def test_another_gateway_goes_on_with_a_batch(system: System) -> None:
    """The one that took it in may go."""
    with gateway_on(system.settings) as first:
        client = first.client()
        made = begin(client, upload(client, *[line(f"r{n}", "some words", model="slow") for n in range(60)]))
        wait_until(lambda: client.batches.retrieve(made.id).status == "in_progress", PATIENCE_SECONDS, "it runs")
    with gateway_on(system.settings) as second:
        done = ended(second.client(), made)
        assert done.request_counts.model_dump() == {"total": 60, "completed": 60, "failed": 0}
        names = [one["custom_id"] for one in lines_of(second.client(), done.output_file_id)]
    assert sorted(names) == sorted(f"r{n}" for n in range(60))
    jobs = [job for job in system.producer.list(batch_id=None, limit=500) if job.custom_id in names]
    assert all(job.state is State.SUCCEEDED for job in jobs)


def test_a_key_for_some_models_alone(gateway: RunningGateway) -> None:
    """Cannot reach others through a batch."""
    client = gateway.client(secret=gateway.key(models=["echo"])[1])
    done = ended(client, begin(client, upload(client, line("a"), line("b", model="slow"))))
    assert [one["custom_id"] for one in lines_of(client, done.output_file_id)] == ["a"]
    assert [one["response"]["status_code"] for one in lines_of(client, done.error_file_id)] == [404]


def metered(number: int, model: str, max_tokens: int = 40) -> dict[str, Any]:
    """Of 100 tokens a minute, two of these can be had."""
    return line(f"m{number}", url="/v1/completions", model=model, max_tokens=max_tokens)


def test_a_keys_quota_holds_for_its_batches(gateway: RunningGateway, system: System) -> None:
    """Lines come in as there is room for them, minute by minute; one that no minute has room for is refused."""
    key, secret = gateway.key(quota_tokens_per_minute=100)
    client, tables = gateway.client(secret=secret), system.tables
    lines = [metered(0, "idle", 100), *[metered(number, "idle") for number in range(1, 6)]]
    made = begin(client, upload(client, *lines), "/v1/completions")
    batch_id = made.id.removeprefix("batch_")
    taken = "SELECT count(*) FROM jobs WHERE batch_id = %s AND reserved_tokens IS NOT NULL"
    for rows in (2, 4, 5):
        wait_until(lambda rows=rows: tables.value(taken, batch_id) == rows, PATIENCE_SECONDS, f"{rows} lines are in")
        assert tables.value("SELECT used_tokens FROM quotas WHERE key_id = %s", key.id) <= 100
        with pytest.raises(openai.RateLimitError):
            client.completions.create(model="echo", prompt="Hello", max_tokens=60)
        tables.execute("UPDATE quotas SET minute_began_at = minute_began_at - interval '1 minute'")
        tables.execute("UPDATE api_batches SET runner_until = now() WHERE id = %s", batch_id)
    assert client.batches.retrieve(made.id).status == "in_progress"
    client.batches.cancel(made.id)
    codes = {one["custom_id"]: one for one in lines_of(client, ended(client, made).error_file_id)}
    assert codes.pop("m0")["response"]["body"]["error"]["code"] == "tokens_above_quota"
    assert {one["error"]["code"] for one in codes.values()} == {"batch_cancelled"}
    assert len(codes) == 5


def test_what_a_batch_does_not_use_makes_room_for_its_rest(gateway: RunningGateway) -> None:
    """Three lines that may take more than a minute's tokens, and take few."""
    client = gateway.client(secret=gateway.key(quota_tokens_per_minute=100)[1])
    done = ended(client, begin(client, upload(client, *[metered(n, "echo") for n in range(3)]), "/v1/completions"))
    assert (done.status, done.request_counts.completed) == ("completed", 3)


def test_what_no_minute_had_room_for_expires(gateway: RunningGateway, system: System) -> None:
    """Lines that were not in when the batch's time was over are told as those that were."""
    client, tables = gateway.client(secret=gateway.key(quota_tokens_per_minute=100)[1]), system.tables
    made = begin(client, upload(client, *[metered(n, "idle") for n in range(5)]), "/v1/completions")
    batch_id = made.id.removeprefix("batch_")
    waiting = "SELECT count(*) FROM jobs WHERE batch_id = %s"
    wait_until(lambda: tables.value(waiting, batch_id) == 2, PATIENCE_SECONDS, "what there is room for is in")
    tables.execute("UPDATE jobs SET deadline_at = now() WHERE batch_id = %s", batch_id)
    over = "UPDATE api_batches SET expires_at = now() - interval '1 minute', runner_until = now() WHERE id = %s"
    tables.execute(over, batch_id)
    done = ended(client, made)
    assert (done.status, done.request_counts.failed) == ("expired", 5)
    errors = lines_of(client, done.error_file_id)
    assert {one["custom_id"] for one in errors} == {f"m{number}" for number in range(5)}
    assert {one["error"]["code"] for one in errors} == {"batch_expired"}


def test_another_tenants_file_and_batch(client: openai.OpenAI, stranger: openai.OpenAI) -> None:
    """Are unknown ones, to the letter."""
    file_id = upload(client, line("a"))
    done = ended(client, begin(client, file_id))
    for theirs, unknown, call in (
        (file_id, f"file-{new_id().hex}", stranger.files.retrieve),
        (file_id, f"file-{new_id().hex}", stranger.files.content),
        (done.output_file_id, f"file-{new_id().hex}", stranger.files.content),
        (file_id, f"file-{new_id().hex}", stranger.files.delete),
        (file_id, f"file-{new_id().hex}", lambda name: begin(stranger, name)),
        (done.id, f"batch_{new_id().hex}", stranger.batches.retrieve),
        (done.id, f"batch_{new_id().hex}", stranger.batches.cancel),
    ):
        assert _refusal(call, theirs) == _refusal(call, unknown)
    assert list(stranger.files.list()) == []
    assert list(stranger.batches.list()) == []


def _refusal(call: Any, name: str) -> tuple[int, str]:
    with pytest.raises(openai.APIStatusError) as refused:
        call(name)
    return refused.value.status_code, str(refused.value.body).replace(name, "ID")
