"""Many open streams on one gateway."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import openai
import psutil

from kit.gateways import RunningGateway, gateway_process_on
from kit.systems import PATIENCE_SECONDS, System, system_on
from kit.waiting import wait_until

STREAMS = 500
MANY = {"engine": "echo", "slots": STREAMS, "seconds_per_token": 0.05}
# Beyond one for each stream: connections of the pools, and those of other requests.
MORE_FILES = 60
MEGABYTE = 1 << 20


@dataclass(frozen=True)
class Use:
    """What a process holds."""

    bytes: int
    files: int

    @classmethod
    def of(cls, process: psutil.Process) -> Self:
        return cls(process.memory_info().rss, process.num_fds())

    def most(self, other: Use) -> Use:
        return Use(max(self.bytes, other.bytes), max(self.files, other.files))


def test_500_streams_at_once(servers: Any, database_template: str, tmp_path: Path) -> None:
    """All are open before the first word, each gets all of its own in order, and others are answered meanwhile."""
    with (
        system_on(servers, database_template, tmp_path, models={"many": MANY}) as system,
        gateway_process_on(system.settings) as (gateway, process),
    ):
        before = Use.of(process)
        most = asyncio.run(_all(gateway, system, process))
        assert STREAMS <= most.files - before.files <= STREAMS + MORE_FILES
        assert most.bytes - before.bytes < 150 * MEGABYTE
        wait_until(lambda: process.num_fds() <= before.files + MORE_FILES, PATIENCE_SECONDS, "the files are closed")


async def _all(gateway: RunningGateway, system: System, process: psutil.Process) -> Use:
    """The most that the gateway used. No worker comes before all streams are open."""
    async with openai.AsyncOpenAI(
        base_url=f"{gateway.url}/v1", api_key=gateway.key()[1], max_retries=0, timeout=120
    ) as client:
        opened: asyncio.Queue[int] = asyncio.Queue()
        streams = [asyncio.create_task(_read(client, number, opened)) for number in range(STREAMS)]
        for _ in range(STREAMS):
            await asyncio.wait_for(opened.get(), PATIENCE_SECONDS)
        most = Use.of(process)
        worker = asyncio.create_task(asyncio.to_thread(system.start, "many"))
        while not all(stream.done() for stream in streams):
            await client.models.list(timeout=PATIENCE_SECONDS)
            most = most.most(Use.of(process))
        await worker
        assert await asyncio.gather(*streams) == [_text(number) for number in range(STREAMS)]
    return most


def _text(number: int) -> str:
    return f"stream {number:03}"


async def _read(client: openai.AsyncOpenAI, number: int, opened: asyncio.Queue[int]) -> str:
    """What it is told, piece by piece."""
    stream: Any = await client.responses.create(model="many", input=_text(number), background=True, stream=True)
    said, expected = "", 0
    async for event in stream:
        assert event.sequence_number == expected
        expected += 1
        if event.type == "response.created":
            opened.put_nowait(number)
        elif event.type == "response.output_text.delta":
            said += event.delta
    assert event.type == "response.completed"
    assert event.response.output_text == said
    return said
