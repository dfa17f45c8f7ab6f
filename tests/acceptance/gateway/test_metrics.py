"""What Prometheus is told: by whom, of what, and that the figures are those of what happened."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx2
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from headrace.ports import free_port
from jobs.dispatch import RUN_JOB, celery_app, queue_name
from jobs.ids import new_id
from jobs.states import Lane, Role
from kit.gateways import RunningGateway, gateway_on
from kit.systems import System
from kit.waiting import wait_until

PATIENCE_SECONDS = 30.0
HELLO: Any = [{"role": "user", "content": "Hello"}]
REQUESTS = "headrace_http_request_duration_seconds_count"


@pytest.fixture(scope="module")
def admin(gateway: RunningGateway) -> Iterator[httpx2.Client]:
    """Prometheus, with a key of an admin."""
    headers = {"Authorization": f"Bearer {gateway.key('watchers', roles=[Role.ADMIN])[1]}"}
    with httpx2.Client(base_url=gateway.url, headers=headers, timeout=60) as client:
        yield client


class Figures:
    """One answer, read by Prometheus' own parser."""

    def __init__(self, text: str) -> None:
        self.samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]

    def all(self, name: str, **labels: str) -> list[float]:
        """Values of the series with these labels."""
        return [s.value for s in self.samples if s.name == name and labels.items() <= s.labels.items()]

    def sum(self, name: str, **labels: str) -> float:
        return sum(self.all(name, **labels))


def look(client: httpx2.Client) -> Figures:
    reply = client.get("/metrics")
    assert reply.status_code == 200
    assert reply.headers["content-type"].startswith("text/plain; version=0.0.4")
    return Figures(reply.text)


@pytest.mark.parametrize("roles", [[Role.READ], [Role.SUBMIT], [Role.READ, Role.SUBMIT]])
def test_only_an_admin_sees_them(gateway: RunningGateway, roles: list[Role]) -> None:
    """Other keys are refused; without one, it is as any route (the walk of `test_door.py`)."""
    secret = gateway.key(roles=roles)[1]
    reply = httpx2.get(f"{gateway.url}/metrics", headers={"Authorization": f"Bearer {secret}"})
    assert reply.status_code == 403


def test_requests_are_counted_by_route_and_status(gateway: RunningGateway, admin: httpx2.Client) -> None:
    """A route is named without its ids; what was turned away, or leads nowhere, makes no series of its own."""
    before = look(admin)
    for name in ("resp_1", "resp_2"):
        assert admin.get(f"/v1/responses/{name}").status_code == 404
    assert httpx2.get(f"{gateway.url}/v1/models").status_code == 401
    for path in ("/nowhere/1", "/nowhere/2"):
        assert admin.get(path).status_code == 404
    admin.request("PROPFIND", "/v1/models")
    after = look(admin)

    def more(**labels: str) -> float:
        return after.sum(REQUESTS, **labels) - before.sum(REQUESTS, **labels)

    assert more(method="GET", route="/v1/responses/{name}", status="404") == 2
    assert more(route="none", status="401") == 1
    assert more(route="none", status="404") == 2
    assert more(method="other") == 1
    assert more(method="GET", route="/metrics", status="200") == 1
    assert {s.labels["route"] for s in after.samples if s.name == REQUESTS} <= {"none", *_routes(admin)}


def _routes(admin: httpx2.Client) -> list[str]:
    hidden = ["/", "/static/{name}", "/login", "/docs", "/openapi.json", "/v1/models/{model:path}"]
    return [*admin.get("/openapi.json").json()["paths"], *hidden]


def test_a_request_is_timed_to_its_last_byte(admin: httpx2.Client, client: openai.OpenAI) -> None:
    """A stream takes as long as its answer is written."""
    labels = {"route": "/v1/chat/completions", "method": "POST", "status": "200"}
    name = "headrace_http_request_duration_seconds_sum"
    before = look(admin).sum(name, **labels)
    # 20 ms a token.
    said = "".join(f"word{number} " for number in range(20))
    answer = client.chat.completions.create(
        model="slow", messages=[{"role": "user", "content": said}], stream=True, max_tokens=20
    )
    assert list(answer)
    assert look(admin).sum(name, **labels) - before > 0.2


def test_ended_jobs_and_their_tokens(admin: httpx2.Client, client: openai.OpenAI) -> None:
    """They are those that the answer itself tells."""
    kind = {"model": "echo", "lane": "interactive", "state": "succeeded"}
    look(admin)
    before = look(admin)
    usage = client.chat.completions.create(model="echo", messages=HELLO).usage
    assert usage is not None

    def told() -> bool:  # the figures of the system may be a second old
        after = look(admin)
        gained = [
            after.sum(name, **kind, **more) - before.sum(name, **kind, **more)
            for name, more in (
                ("headrace_jobs_ended_total", {}),
                ("headrace_tokens_total", {"kind": "prompt"}),
                ("headrace_tokens_total", {"kind": "completion"}),
            )
        ]
        return gained == [1, usage.prompt_tokens, usage.completion_tokens]

    wait_until(told, PATIENCE_SECONDS, "the job is counted with its tokens")


def test_what_workers_use_and_how_long_jobs_take(admin: httpx2.Client, client: openai.OpenAI) -> None:
    """Of each process; and each job that was answered is in every histogram once."""
    echo = {"model": "echo", "lane": "interactive"}
    histograms = [f"headrace_job_{name}_seconds" for name in ("queue", "first_token", "duration")]
    look(admin)
    before = look(admin)
    client.chat.completions.create(model="echo", messages=HELLO)

    def told() -> bool:  # with the next heartbeat
        after = look(admin)
        return all(after.sum(f"{name}_count", **echo) > before.sum(f"{name}_count", **echo) for name in histograms)

    wait_until(told, PATIENCE_SECONDS, "the job is in the histograms")
    after = look(admin)
    for name in histograms:
        assert after.sum(f"{name}_bucket", **echo, le="+Inf") == after.sum(f"{name}_count", **echo)
        assert after.sum(f"{name}_bucket", **echo, le="600.0") == after.sum(f"{name}_count", **echo)
    for process in ("consumer", "engine"):
        assert after.sum("headrace_worker_cpu_seconds_total", model="echo", process=process) > 0
        assert after.sum("headrace_worker_resident_bytes", model="echo", process=process) > 10_000_000
    assert after.sum("headrace_worker_steps_total", model="echo") > 0


def test_a_queue_that_nobody_serves_is_seen(
    system: System, admin: httpx2.Client, client: openai.OpenAI, stranger: openai.OpenAI
) -> None:
    """It grows with every job that is accepted, of whatever tenant, and its oldest one gets older."""
    waiting = {"model": "idle", "lane": "interactive", "state": "queued"}
    before = look(admin).sum("headrace_jobs", **waiting)
    made = [one.responses.create(model="idle", input="x", background=True) for one in (client, stranger)]
    wait_until(
        lambda: look(admin).sum("headrace_jobs", **waiting) == before + 2, PATIENCE_SECONDS, "both are in the queue"
    )
    assert look(admin).sum("headrace_oldest_job_seconds", model="idle") > 0
    for one, response in zip((client, stranger), made, strict=True):
        one.responses.cancel(response.id)


def test_workers_are_told_as_they_are(system: System, admin: httpx2.Client) -> None:
    """Every live one, with its slots and what it does; a model that nobody asks has figures all the same."""
    figures = look(admin)
    workers = {worker.model: worker for worker in system.producer.leases.list()}
    assert set(workers) == {"echo", "slow", "tiny-chat"}
    for model, worker in workers.items():
        labels = {"model": model, "worker": worker.id.hex, "host": worker.host}
        assert figures.all("headrace_worker_up", state="live", **labels) == [1]
        assert figures.all("headrace_worker_ready", **labels) == [1]
        assert figures.all("headrace_worker_slots", **labels) == [worker.slots]
        assert figures.all("headrace_worker_running", **labels)
        assert figures.all("headrace_worker_busy_seconds_total", **labels)
        assert figures.all("headrace_worker_refused_messages_total", **labels) == [0]
        assert figures.all("headrace_jobs", model=model, lane="bulk", state="queued") == [0]
    assert figures.all("headrace_store_up") == [1]
    assert figures.all("headrace_refused_messages_total") == [0]


def test_a_forged_message_is_counted(system: System, admin: httpx2.Client) -> None:
    """The worker that refused it says so with its next heartbeat."""
    with celery_app(system.settings) as app:
        app.send_task(RUN_JOB, (str(new_id()), "forged"), queue=queue_name("echo", Lane.INTERACTIVE))
    wait_until(
        lambda: look(admin).sum("headrace_worker_refused_messages_total", model="echo") == 1,
        PATIENCE_SECONDS,
        "the forgery is counted",
    )


def test_the_process_tells_of_itself(admin: httpx2.Client) -> None:
    """CPU and memory, as everybody's dashboards know them."""
    figures = look(admin)
    assert figures.sum("process_cpu_seconds_total") > 0
    assert figures.sum("process_resident_memory_bytes") > 1_000_000


def test_nothing_of_a_tenant_is_in_them(admin: httpx2.Client, client: openai.OpenAI) -> None:
    """Neither what was asked nor who asked it."""
    client.chat.completions.create(model="echo", messages=[{"role": "user", "content": "quite a secret"}])
    text = admin.get("/metrics").text
    assert "secret" not in text
    assert "stranger" not in text
    assert "tenant" not in text


def test_another_listener_asks_for_no_key(system: System) -> None:
    """The same figures at an address of their own, and nothing else there; it ends with the gateway."""
    address = f"127.0.0.1:{free_port()}"
    settings = system.settings.model_copy(update={"gateway_metrics_address": address})
    with gateway_on(settings) as gateway:
        figures = Figures(httpx2.get(f"http://{address}/metrics").text)
        assert figures.all("headrace_store_up") == [1]
        assert len(figures.all("headrace_worker_slots")) == 3
        assert httpx2.get(f"{gateway.url}/metrics").status_code == 401
        assert httpx2.post(f"http://{address}/v1/responses", json={}).status_code >= 400
    with pytest.raises(httpx2.ConnectError):
        httpx2.get(f"http://{address}/metrics")
