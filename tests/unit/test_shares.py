"""What one tenant may have of a gateway: bounds, turns, and what a refusal costs."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable

import pytest

from producer.gateway import shares
from producer.gateway.errors import ApiError
from producer.gateway.shares import BODIES, THREADS, TURNS, UPLOADS, Share, Shares, Turn, threads_of_caller


def refused(share: Share, size: int = 0, *, upload: bool = False) -> bool:
    try:
        with share.entered(size, upload=upload):
            return False
    except ApiError as error:
        return (error.status, error.headers) == (429, {"Retry-After": "1"})


def test_requests_and_bodies_have_an_end() -> None:
    """Of each tenant, and what was given is there again; bodies and uploads have room of their own."""
    all_shares = Shares(requests=2, body_bytes=100, upload_bytes=1_000)
    one, other = all_shares.of("one"), all_shares.of("other")
    assert all_shares.of("one") is one
    with one.entered(BODIES * 100 - 1, upload=False):
        assert refused(one, 2)
        assert not refused(one, 1)
        assert not refused(one, UPLOADS * 1_000, upload=True)
        with one.entered(0, upload=False):
            assert refused(one)
            assert not refused(other, 100)
    assert not refused(one, BODIES * 100)


def test_turns() -> None:
    """So many at a time; one that ended is the next one's at once, and may be ended again."""

    async def run() -> None:
        share = Share(100, 0, 0)
        turns = [Turn(share) for _ in range(TURNS + 1)]
        for turn in turns[:-1]:
            await turn.begin()
        last = asyncio.create_task(turns[-1].begin())
        await asyncio.sleep(0)
        assert not last.done()
        turns[0].end()
        turns[0].end(refused=True)
        await last
        assert share.turns.locked()
        Turn(share).end()  # it never began
        assert share.turns.locked()

    asyncio.run(run())


def test_a_refusal_costs_more_than_it_took(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until then the turn is nobody's."""
    now = 0.0
    later: list[float] = []

    async def run() -> None:
        nonlocal now
        share = Share(100, 0, 0)
        loop = asyncio.get_running_loop()
        monkeypatch.setattr(loop, "call_later", lambda seconds, release: later.append(seconds) or release())
        monkeypatch.setattr(shares.time, "monotonic", lambda: now)
        for took in (0.0, 0.01, 100.0):
            turn = Turn(share)
            await turn.begin()
            now += took
            turn.end(refused=True)

    asyncio.run(run())
    free, quick, slow = later
    # With every turn full of refusals, they have a fifth of the time.
    assert free == pytest.approx(4 * TURNS * 0.0005)
    assert quick == pytest.approx(4 * TURNS * 0.0105)
    assert slow == 5.0


def test_threads_are_those_of_the_tenant() -> None:
    """Whoever fills them waits, and nobody else; outside of requests there is no such bound."""

    async def run() -> None:
        mine, others = Share(100, 0, 0), Share(100, 0, 0)
        held = asyncio.Event()

        async def hold(until: Awaitable[bool]) -> None:
            async with threads_of_caller():
                await until

        with mine.entered(0, upload=False):
            holding = [asyncio.create_task(hold(held.wait())) for _ in range(THREADS)]
            await asyncio.sleep(0)
            waiting = asyncio.create_task(hold(held.wait()))
        with others.entered(0, upload=False):
            async with threads_of_caller():
                pass
        async with threads_of_caller():
            assert mine.threads.locked()
            assert not waiting.done()
        held.set()
        await asyncio.gather(*holding, waiting)

    asyncio.run(run())
