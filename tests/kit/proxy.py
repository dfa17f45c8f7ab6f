"""A TCP proxy that does what networks do: cuts, refuses, swallows, delays, throttles, loses replies.

    with Proxy("127.0.0.1", 6379) as proxy:
        client = redis.Redis(port=proxy.port)
        proxy.silence()       # connections stand, nobody answers: what killing a server never shows
        proxy.heal()          # what passes from now on passes; what was swallowed is gone

Killing a server makes its kernel say so; the faults here are those that nobody is told of. One thread with an event
loop carries every connection. Each call has taken effect when it returns.
"""

from __future__ import annotations

import asyncio
import random
import socket
import struct
import threading
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Self, TypeVar
from urllib.parse import urlsplit, urlunsplit

T = TypeVar("T")
Direction = Literal["up", "down"]  # up: from the client to the server
BOTH: tuple[Direction, ...] = ("up", "down")

_CHUNK_BYTES = 65_536
_THROTTLED_BYTES = 1024
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER of no seconds: to close is to reset


@dataclass(frozen=True)
class Rule:
    """What becomes of the bytes of one direction."""

    swallow: bool = False  # neither bytes nor the connection's end are passed on
    unheard: bytes | None = None  # a chunk with these in it is swallowed
    delay_seconds: float = 0.0  # for each chunk
    bytes_per_second: float | None = None
    cut_after_bytes: int | None = None  # of each connection, from now on; then both ends see a reset
    lost_share: float = 0.0  # of chunks: the connection is cut instead of passing one on


PASS = Rule()
_TURNS = 10


@dataclass(eq=False)
class _Link:
    """One client's connection and its twin to the server."""

    client: asyncio.StreamWriter
    server: asyncio.StreamWriter
    rules: dict[Direction, Rule]
    passed: dict[Direction, int] = field(default_factory=lambda: {"up": 0, "down": 0})

    def cut(self) -> None:
        """Both ends see a reset."""
        for writer in (self.client, self.server):
            if not writer.transport.is_closing():  # by itself: its socket may be closed already
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            writer.transport.abort()


class Proxy:
    """Listens on a port of its own and passes everything on, until it is told otherwise. A context manager."""

    def __init__(self, host: str, port: int, seed: int = 0) -> None:
        self.port = 0
        self.accepted = 0  # connections so far
        self._target = host, port
        self._random = random.Random(seed)
        self._rules: dict[Direction, Rule] = dict.fromkeys(BOTH, PASS)  # of connections to come
        self._links: set[_Link] = set()
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)

    @classmethod
    def before(cls, url: str, seed: int = 0) -> Self:
        """A proxy before the server of this URL."""
        parts = urlsplit(url)
        assert parts.hostname is not None
        assert parts.port is not None
        return cls(parts.hostname, parts.port, seed)

    def url(self, url: str) -> str:
        """The URL with this proxy's address in place of the server's."""
        parts = urlsplit(url)
        user = parts.netloc.rpartition("@")
        return urlunsplit(parts._replace(netloc=f"{user[0]}{user[1]}127.0.0.1:{self.port}"))

    def __enter__(self) -> Self:
        self._thread.start()
        self.accept()
        return self

    def __exit__(self, *_: object) -> None:
        self._do(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    # -- faults -------------------------------------------------------------------------------------------------

    def heal(self) -> None:
        """Pass everything on, on connections that stand and on those to come."""
        self.rule(BOTH, lambda _: PASS)
        self.accept()

    def cut(self) -> None:
        """Reset every connection that stands."""
        self._do(self._cut())

    def refuse(self) -> None:
        """New connections are refused, as when nobody listens."""
        self._do(self._close())

    def accept(self) -> None:
        """Listen (again), on the same port."""
        self._do(self._listen())

    def silence(self, *, new_too: bool = True) -> None:
        """Connections stand, nothing comes through; a new one is taken, and is silent too if `new_too`."""
        self.blackhole(*BOTH, new_too=new_too)

    def blackhole(self, *directions: Direction, new_too: bool = True) -> None:
        """Swallow what goes this way; the other way goes on."""
        self.rule(directions, lambda rule: replace(rule, swallow=True), new_too=new_too)

    def swallow(self, words: bytes, direction: Direction) -> None:
        """Chunks with these words in them get lost, all others pass: a command that is never heard, say."""
        self.rule([direction], lambda rule: replace(rule, unheard=words))

    def delay(self, seconds: float, *directions: Direction) -> None:
        """Each chunk of bytes arrives this much later."""
        self.rule(directions or BOTH, lambda rule: replace(rule, delay_seconds=seconds))

    def throttle(self, bytes_per_second: float, *directions: Direction) -> None:
        """A slow line."""
        self.rule(directions or BOTH, lambda rule: replace(rule, bytes_per_second=bytes_per_second))

    def cut_after(self, number_bytes: int, *directions: Direction) -> None:
        """Each connection is reset once so many more bytes have gone this way, in the middle of whatever they say."""
        self.rule(directions or BOTH, lambda rule: replace(rule, cut_after_bytes=number_bytes))

    def lose(self, share: float, direction: Direction) -> None:
        """Instead of passing a chunk on, cut its connection: of what goes down, the server has done what was asked."""
        self.rule([direction], lambda rule: replace(rule, lost_share=share))

    def rule(self, directions: Iterable[Direction], change: Callable[[Rule], Rule], *, new_too: bool = True) -> None:
        """Change what becomes of these directions, on standing connections and, if `new_too`, on those to come."""
        self._do(self._change(list(directions), change, new_too=new_too))

    # -- in the loop --------------------------------------------------------------------------------------------

    def _do(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _listen(self) -> None:
        if self._server is None:
            self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
            self.port = self._server.sockets[0].getsockname()[1]

    async def _close(self) -> None:
        """Take no more connections; those just taken are served first, since a closed server forgets them unclosed."""
        server, self._server = self._server, None
        if server is not None:
            for listener in server.sockets:
                self._loop.remove_reader(listener)
            await _some_turns()
            server.close()

    async def _cut(self) -> None:
        for link in list(self._links):
            link.cut()

    async def _end(self) -> None:
        await self._close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await _some_turns()  # for what was aborted to be closed

    async def _change(self, directions: list[Direction], change: Callable[[Rule], Rule], *, new_too: bool) -> None:
        tables = [link.rules for link in self._links] + ([self._rules] if new_too else [])
        for link in self._links:
            link.passed |= dict.fromkeys(directions, 0)
        for rules in tables:
            rules |= {direction: change(rules[direction]) for direction in directions}

    async def _serve(self, reader: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.accepted += 1
        try:
            await self._carry(reader, client)
        except (OSError, asyncio.CancelledError):
            pass  # either end was cut, the server is not there, or the proxy ends
        finally:
            client.transport.abort()
            self._tasks.discard(task)

    async def _carry(self, reader: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
        from_server, server = await asyncio.open_connection(*self._target)
        link = _Link(client, server, dict(self._rules))
        self._links.add(link)
        for writer in (client, server):  # nothing stays here that a reset would drop
            writer.transport.set_write_buffer_limits(0)
        try:
            await asyncio.gather(self._pump(link, "up", reader, server), self._pump(link, "down", from_server, client))
        finally:
            self._links.discard(link)
            server.transport.abort()

    async def _pump(
        self, link: _Link, direction: Direction, source: asyncio.StreamReader, sink: asyncio.StreamWriter
    ) -> None:
        """Carry one direction until it ends."""
        while data := await source.read(self._chunk_bytes(link.rules[direction])):
            await self._pass(link, direction, data, sink)
        if not link.rules[direction].swallow:
            sink.write_eof()
            return
        # Who is silent does not say goodbye either: this end stays open until the other one goes, or we do.
        await asyncio.Event().wait()

    async def _pass(self, link: _Link, direction: Direction, data: bytes, sink: asyncio.StreamWriter) -> None:
        rule = link.rules[direction]
        if rule.swallow or (rule.unheard is not None and rule.unheard in data):
            return
        if rule.lost_share and self._random.random() < rule.lost_share:
            link.cut()
            raise ConnectionResetError
        if rule.bytes_per_second is not None:
            await asyncio.sleep(len(data) / rule.bytes_per_second)
        await asyncio.sleep(rule.delay_seconds)
        await self._write(link, direction, data, sink)

    async def _write(self, link: _Link, direction: Direction, data: bytes, sink: asyncio.StreamWriter) -> None:
        limit = link.rules[direction].cut_after_bytes
        room = len(data) if limit is None else limit - link.passed[direction]
        link.passed[direction] += len(data)
        sink.write(data[:room])
        await sink.drain()
        if room < len(data):
            link.cut()
            raise ConnectionResetError

    def _chunk_bytes(self, rule: Rule) -> int:
        return _CHUNK_BYTES if rule.bytes_per_second is None else _THROTTLED_BYTES


async def _some_turns() -> None:
    """Of the loop: what is about to happen in it happens."""
    for _ in range(_TURNS):
        await asyncio.sleep(0)
