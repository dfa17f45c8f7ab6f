"""The web page: who gets in, what a session may do, and what a browser shows of it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from http.cookies import SimpleCookie
from typing import Any
from uuid import UUID

import httpx2
import pytest

from jobs.states import Role, State
from kit.gateways import RunningGateway
from kit.systems import PATIENCE_SECONDS, System
from kit.waiting import wait_until

HOSTILE = "<img src=x onerror=document.title='owned'><script>document.title='owned'</script>" * 4


@pytest.fixture
def browser_like(gateway: RunningGateway) -> Iterator[httpx2.Client]:
    """Somebody who has signed in with an admin's key."""
    with httpx2.Client(base_url=gateway.url) as client:
        reply = client.post("/login", json={"key": gateway.key(roles=list(Role))[1]})
        assert reply.status_code == 200
        client.headers["X-CSRF-Token"] = reply.json()["csrf"]
        yield client


def test_the_page_and_its_files_are_open_and_strict(gateway: RunningGateway) -> None:
    """No key is needed to see the door; nothing but our own files may run or be loaded."""
    for path, kind in (("/", "text/html"), ("/static/page.js", "text/javascript"), ("/static/page.css", "text/css")):
        reply = httpx2.get(f"{gateway.url}{path}")
        assert (reply.status_code, reply.headers["content-type"].split(";")[0]) == (200, kind)
        policy = reply.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert reply.headers["x-content-type-options"] == "nosniff"
    page = httpx2.get(gateway.url).text
    assert "onclick" not in page
    assert "style=" not in page
    assert "innerHTML" not in httpx2.get(f"{gateway.url}/static/page.js").text
    for path in ("/static/page.py", "/static/..%2fpage.py", "/static/"):
        assert httpx2.get(f"{gateway.url}{path}").status_code == 404


def test_the_cookie_is_for_our_pages_alone(gateway: RunningGateway) -> None:
    """No script reads it, no other site sends it; and it does not hold the key."""
    secret = gateway.key()[1]
    reply = httpx2.post(f"{gateway.url}/login", json={"key": secret})
    cookie = reply.headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=Strict" in cookie
    assert secret not in cookie
    assert httpx2.post(f"{gateway.url}/login", json={"key": "hr-nothing"}).status_code == 401
    elsewhere = {"Sec-Fetch-Site": "cross-site"}
    assert httpx2.post(f"{gateway.url}/login", json={"key": secret}, headers=elsewhere).status_code == 403


def test_a_session_needs_the_second_word_to_change_anything(browser_like: httpx2.Client) -> None:
    """It reads without, and is refused without or with a wrong one."""
    assert browser_like.get("/ui/now", headers={"X-CSRF-Token": ""}).status_code == 200
    for word in ("", "0" * 64):
        reply = browser_like.post(f"/ui/jobs/{'0' * 32}/cancel", headers={"X-CSRF-Token": word})
        assert reply.status_code == 403
    assert browser_like.post(f"/ui/jobs/{'0' * 32}/cancel").status_code == 404


def test_a_session_opens_the_page_alone(browser_like: httpx2.Client) -> None:
    """The API wants the key itself."""
    assert browser_like.get("/v1/models").status_code == 401
    assert browser_like.post("/v1/responses", json={"model": "echo", "input": "x"}).status_code == 401


def test_a_forged_session_is_refused(browser_like: httpx2.Client) -> None:
    """Whatever part of it was changed."""
    good = browser_like.cookies["headrace_session"]
    digest, until, signature = good.split(".")
    for forged in ("", "x", "..", f"{digest}.{int(until) + 1}.{signature}", f"{'0' * 64}.{until}.{signature}"):
        reply = httpx2.get(f"{browser_like.base_url}/ui/now", headers={"Cookie": f"headrace_session={forged}"})
        assert reply.status_code == 401


def test_a_session_ends_with_its_key_and_by_signing_out(gateway: RunningGateway) -> None:
    """A cookie that was taken away is gone from the browser."""
    key, secret = gateway.key()
    with httpx2.Client(base_url=gateway.url) as client:
        csrf = client.post("/login", json={"key": secret}).json()["csrf"]
        reply = client.post("/ui/logout", headers={"X-CSRF-Token": csrf})
        assert SimpleCookie(reply.headers["set-cookie"])["headrace_session"]["max-age"] == "0"
        client.post("/login", json={"key": secret})
        gateway.keys.revoke(key.id)
        wait_until(lambda: client.get("/ui/now").status_code == 401, PATIENCE_SECONDS, "the revoked key is forgotten")


def test_what_the_page_shows(browser_like: httpx2.Client, system: System) -> None:
    """Jobs, batches, workers and queues now; a job's life; cancel, and asking again."""
    job = system.producer.submit(model="echo", messages=[{"role": "user", "content": "seen"}])
    system.wait(job.id)
    now = browser_like.get("/ui/now").json()
    assert str(job.id) in {one["id"] for one in now["jobs"]}
    assert {worker["model"] for worker in now["workers"]} >= {"echo", "slow", "tiny-chat"}
    wait_until(lambda: all(map(used, workers(browser_like))), PATIENCE_SECONDS, "every worker has told what it uses")
    life = browser_like.get(f"/ui/jobs/{job.id}").json()
    assert (life["state"], life["answers"], life["asked"][0]["content"]) == ("succeeded", ["seen"], "seen")
    assert life["timings"]["queue_seconds"] >= 0
    again = browser_like.post(f"/ui/jobs/{job.id}/retry").json()
    assert again["id"] != str(job.id)
    assert system.wait(UUID(again["id"])).text == "seen"
    waiting = system.producer.submit(model="idle", messages=[{"role": "user", "content": "x"}])
    assert [one["id"] for one in browser_like.get("/ui/now?state=queued").json()["jobs"]] == [str(waiting.id)]
    assert browser_like.post(f"/ui/jobs/{waiting.id}/cancel").json()["state"] == "cancelled"


def workers(browser_like: httpx2.Client) -> list[dict[str, Any]]:
    return list(browser_like.get("/ui/now").json()["workers"])


def used(worker: dict[str, Any]) -> bool:
    """What it says of its machine, which has no GPU."""
    return worker["resident_bytes"] > 0 and worker["cpu_cores"] >= 0 and worker["gpu"] is None


def test_only_an_admin_sees_the_engine_room(gateway: RunningGateway) -> None:
    """Workers and queues are everybody's."""
    with httpx2.Client(base_url=gateway.url) as client:
        client.post("/login", json={"key": gateway.key("other")[1]})
        now = client.get("/ui/now").json()
    assert now == {"jobs": [], "batches": []}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A real one."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is not installed")
    with sync_api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield running
        running.close()


def test_in_a_real_browser(browser: Any, gateway: RunningGateway, system: System) -> None:
    """Sign in, watch a job end without a reload, read hostile text as text, cancel, ask again, sign out."""
    page = browser.new_page()
    faults: list[str] = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    # A refused sign-in is an error on the console too.
    page.on("console", lambda said: said.type == "error" and "401" not in said.text and faults.append(said.text))
    page.goto(gateway.url)
    page.fill("#key", "hr-wrong")
    page.click("#enter button")
    page.wait_for_selector("#trouble:not([hidden])")
    page.fill("#key", gateway.key(roles=list(Role))[1])
    page.click("#enter button")
    page.wait_for_selector("#workers tr")
    assert not page.is_visible("#enter")

    job = system.producer.submit(model="slow", messages=[{"role": "user", "content": HOSTILE}])
    page.click(f"#jobs button[title='{job.id}']")
    page.wait_for_selector("#facts:has-text('running')")
    page.wait_for_function("text => document.getElementById('answered').textContent === text", arg=HOSTILE)
    assert page.title() == "Headrace"
    assert page.query_selector("#answered *") is None

    long = system.producer.submit(model="slow", messages=[{"role": "user", "content": "word " * 400}])
    page.click(f"#jobs button[title='{long.id}']")
    page.click("#cancel")
    assert system.wait(long.id).state is State.CANCELLED
    page.click("#retry")
    page.wait_for_function("old => !document.getElementById('name').textContent.includes(old)", arg=str(long.id))
    page.click("#cancel")
    page.click("#leave")
    page.wait_for_selector("#enter:not([hidden])")
    assert faults == []
    page.close()
