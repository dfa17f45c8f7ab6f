"""The task that lets chained responses go on."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

from producer.chains import Chains


def test_a_mistake_of_ours_does_not_end_it() -> None:
    """Whatever a look brings, the next one is made: nobody starts the task again."""

    async def run() -> int:
        again = asyncio.Event()
        loop, looks = asyncio.get_running_loop(), 0

        def followers(_limit: int) -> list[Any]:
            nonlocal looks
            looks += 1
            if looks == 1:
                raise ValueError("a mistake")
            loop.call_soon_threadsafe(again.set)
            return []

        producer: Any = SimpleNamespace(store=SimpleNamespace(followers=followers))
        task = asyncio.create_task(Chains(producer).run())
        waiting = asyncio.create_task(again.wait())
        await asyncio.wait({task, waiting}, return_when=asyncio.FIRST_COMPLETED)
        over = task.done()
        for one in (task, waiting):
            one.cancel()
        await asyncio.gather(task, waiting, return_exceptions=True)
        assert not over
        return looks

    assert asyncio.run(run()) >= 2
