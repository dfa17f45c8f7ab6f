"""The fault proxy: each fault as a client and a server see it."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator

import pytest

from kit.proxy import Proxy
from kit.waiting import wait_until

SHORT_SECONDS = 0.2  # of silence that is taken for silence
PATIENCE_SECONDS = 10.0


class EchoServer:
    """Sends back what it gets, and keeps what it got."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.received = bytearray()
        self.ended = 0  # connections whose end it has seen
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                connection = self._listener.accept()[0]
            except OSError:
                return
            threading.Thread(target=self._echo, args=(connection,), daemon=True).start()

    def _echo(self, connection: socket.socket) -> None:
        try:
            while data := connection.recv(65_536):
                self.received += data
                connection.sendall(data)
        except OSError:
            pass
        self.ended += 1
        connection.close()


@pytest.fixture
def server() -> Iterator[EchoServer]:
    """A server behind the proxy."""
    server = EchoServer()
    yield server
    server.close()


@pytest.fixture
def proxy(server: EchoServer) -> Iterator[Proxy]:
    """A proxy that passes everything on."""
    with Proxy("127.0.0.1", server.port) as proxy:
        yield proxy


@pytest.fixture
def client(proxy: Proxy) -> Iterator[socket.socket]:
    """A connection that has been used once."""
    with _dial(proxy) as client:
        assert _ask(client, b"hello") == b"hello"
        yield client


def test_bytes_pass_both_ways_whole_and_in_order(proxy: Proxy, client: socket.socket) -> None:
    """Without a fault the proxy is not there: a megabyte goes and comes back, then the end does."""
    sent = bytes(range(256)) * 4096
    threading.Thread(target=client.sendall, args=(sent,)).start()
    assert _read(client, len(sent)) == sent
    client.shutdown(socket.SHUT_WR)
    assert client.recv(1) == b""


def test_a_cut_is_a_reset_at_both_ends_and_new_connections_pass(
    proxy: Proxy, client: socket.socket, server: EchoServer
) -> None:
    """RST, not FIN: a read fails instead of ending; who dials again is served."""
    proxy.cut()
    with pytest.raises(ConnectionResetError):
        client.recv(1)
    wait_until(lambda: server.ended == 1, PATIENCE_SECONDS, "the server sees it too")
    with _dial(proxy) as again:
        assert _ask(again, b"again") == b"again"


def test_refused_connections_fail_at_once_and_standing_ones_go_on(proxy: Proxy, client: socket.socket) -> None:
    """Nobody listens on the port until the proxy accepts again, on the same one."""
    proxy.refuse()
    with pytest.raises(ConnectionRefusedError):
        _dial(proxy)
    assert _ask(client, b"still") == b"still"
    proxy.accept()
    with _dial(proxy) as again:
        assert _ask(again, b"again") == b"again"


def test_a_connection_taken_in_the_moment_of_refusing_is_carried_and_closed(proxy: Proxy, server: EchoServer) -> None:
    """asyncio's server would forget it: neither served nor closed until the garbage collector warns of it."""
    held, go_on = threading.Event(), threading.Event()
    proxy._loop.call_soon_threadsafe(held.set)
    proxy._loop.call_soon_threadsafe(go_on.wait, PATIENCE_SECONDS)
    assert held.wait(PATIENCE_SECONDS)
    with _dial(proxy) as client:  # by the kernel: the loop sees it together with the order to refuse
        refusing = threading.Thread(target=proxy.refuse)
        refusing.start()
        wait_until(lambda: len(proxy._loop._ready) > 0, PATIENCE_SECONDS, "it is told to refuse")  # type: ignore[attr-defined]
        go_on.set()
        refusing.join()
        assert _ask(client, b"taken") == b"taken"
    wait_until(lambda: server.ended == 1, PATIENCE_SECONDS, "its end is passed on")


@pytest.mark.parametrize("direction", ["up", "down"])
def test_one_direction_is_swallowed_and_the_other_is_not(
    proxy: Proxy, client: socket.socket, server: EchoServer, direction: str
) -> None:
    """The client hears nothing either way; the server has heard the question if it was the answer that got lost."""
    proxy.blackhole(direction)  # type: ignore[arg-type]
    client.sendall(b"lost?")
    assert _is_silent(client)
    assert (b"lost?" in server.received) == (direction == "down")


def test_one_command_is_not_heard_and_others_are(proxy: Proxy, client: socket.socket, server: EchoServer) -> None:
    """What has the words in it is swallowed, on connections to come too; what has not passes."""
    proxy.swallow(b"FETCH", "up")
    with _dial(proxy) as again:
        for connection in (client, again):
            connection.sendall(b"please FETCH")
            assert _is_silent(connection)
            assert _ask(connection, b"put") == b"put"
    assert b"FETCH" not in server.received


def test_a_silent_peer_keeps_its_connections_and_says_no_goodbye(
    proxy: Proxy, client: socket.socket, server: EchoServer
) -> None:
    """Nothing passes, no end of a connection either; healed, what comes passes and what was swallowed is gone."""
    proxy.silence()
    client.sendall(b"lost")
    with _dial(proxy) as new:
        new.sendall(b"lost too")
        assert _is_silent(client)
        assert _is_silent(new)
    assert server.received == b"hello"
    assert server.ended == 0
    proxy.heal()
    assert _ask(client, b"heard") == b"heard"


def test_only_standing_connections_fall_silent_if_so_wanted(proxy: Proxy, client: socket.socket) -> None:
    """As when a device in between forgets its connections: who dials anew is served."""
    proxy.silence(new_too=False)
    client.sendall(b"lost")
    with _dial(proxy) as new:
        assert _ask(new, b"heard") == b"heard"
    assert _is_silent(client)


def test_a_delay_holds_each_answer_back(proxy: Proxy, client: socket.socket) -> None:
    """What goes and comes takes at least the delay of both ways."""
    proxy.delay(0.1)
    began = time.monotonic()
    assert _ask(client, b"slow") == b"slow"
    assert time.monotonic() - began >= 0.2


def test_a_throttled_line_carries_no_more_than_its_rate(proxy: Proxy, client: socket.socket) -> None:
    """Twenty thousand bytes at a hundred thousand a second take a fifth of a second or more."""
    proxy.throttle(100_000, "down")
    began = time.monotonic()
    assert len(_ask(client, bytes(20_000))) == 20_000
    assert time.monotonic() - began >= 0.2


def test_a_connection_is_cut_in_the_middle_of_an_answer(proxy: Proxy, client: socket.socket) -> None:
    """So many bytes arrive, then a reset."""
    proxy.cut_after(3, "down")
    client.sendall(b"truncated")
    assert _read(client, 3) == b"tru"
    with pytest.raises(ConnectionResetError):
        client.recv(1)


def test_a_lost_reply_is_a_reset_after_the_server_has_worked(
    proxy: Proxy, client: socket.socket, server: EchoServer
) -> None:
    """The question arrives, the answer never does."""
    proxy.lose(1.0, "down")
    client.sendall(b"commit")
    with pytest.raises(ConnectionResetError):
        client.recv(1)
    assert server.received.endswith(b"commit")


def test_a_url_leads_through_the_proxy_with_its_password_and_path(proxy: Proxy) -> None:
    """Only host and port are replaced."""
    there = proxy.url("postgresql+psycopg://user:pa%40ss@127.0.0.1:5432/name")
    assert there == f"postgresql+psycopg://user:pa%40ss@127.0.0.1:{proxy.port}/name"


# == helpers =====================================================================================================


def _dial(proxy: Proxy) -> socket.socket:
    return socket.create_connection(("127.0.0.1", proxy.port), PATIENCE_SECONDS)


def _ask(client: socket.socket, question: bytes) -> bytes:
    client.sendall(question)
    return _read(client, len(question))


def _read(client: socket.socket, number_bytes: int) -> bytes:
    data = b""
    while len(data) < number_bytes:
        part = client.recv(number_bytes - len(data))
        assert part, "the connection ended"
        data += part
    return data


def _is_silent(client: socket.socket) -> bool:
    client.settimeout(SHORT_SECONDS)
    try:
        client.recv(1)
    except TimeoutError:
        return True
    finally:
        client.settimeout(PATIENCE_SECONDS)
    return False
