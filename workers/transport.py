"""Kombu's Redis transport, for a worker whose messages are hints: nothing in Redis can end it or hold it up for long.

A message that cannot be read is dropped: the row behind it is in Postgres, and the sweeper sends another.
"""

from __future__ import annotations

import logging
import random
import socket
from contextlib import suppress
from queue import Empty
from typing import Any

from kombu import connection as kombu_connection
from kombu.transport import redis as kombu_redis
from redis.backoff import NoBackoff
from redis.retry import Retry

log = logging.getLogger(__name__)

# Between two tries to reach a broker that is away. Less than a worker's patience with messages (`workers.proof`).
_MOST_WAIT_SECONDS = 2.0

# Read, and then found to be none of ours: text that is no JSON or is cut short, JSON that is no message, a body or a
# header of an unexpected kind. (Celery itself refuses contents other than JSON.)
_UNREADABLE = (ValueError, TypeError, LookupError, AttributeError, RecursionError)


class Channel(kombu_redis.Channel):
    """Drops what cannot be read; keeps no accounts of what was popped; gives a silent peer up at its first timeout."""

    def _brpop_read(self, **options: Any) -> Any:
        return _guarded(super()._brpop_read, **options)

    def _receive(self) -> Any:
        return _guarded(super()._receive)

    def basic_ack(self, delivery_tag: str, multiple: bool = False) -> None:  # noqa: FBT001, FBT002 - kombu's
        """Nothing: what was popped is written down nowhere.

        Such accounts bring a dead worker's messages back after minutes; the sweeper does in seconds. Measured: two
        round trips and a third of the loop's work for each message, just while its job begins.
        """

    def basic_reject(self, delivery_tag: str, requeue: bool = False) -> None:  # noqa: FBT001, FBT002 - kombu's
        """Nothing: a message that is refused does not come back."""

    def _connparams(self, asynchronous: bool = False) -> dict[str, Any]:  # noqa: FBT001, FBT002 - kombu's
        # redis-py would try a silent peer several times, each for the whole timeout; Celery connects anew.
        parameters: dict[str, Any] = super()._connparams(asynchronous)  # type: ignore[no-untyped-call]
        return parameters | {"retry": Retry(NoBackoff(), 0)}


class Transport(kombu_redis.Transport):
    """The transport of `Channel`."""

    Channel = Channel

    def hang_up(self) -> None:
        """End every connection that is waited on, from any thread: the consumer finds them lost and dials again."""
        poller: Any = self.cycle
        for connection in list(poller._chan_to_sock.values()):  # noqa: SLF001
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


class Connection(kombu_connection.Connection):
    """Dials a broker that is away again and again, in a few seconds at most.

    Kombu's own waits grow to 30 s. Measured: after a minute without Redis it was 22 s until messages arrived again, and
    the consumer had been taken for deaf and started anew.
    """

    def ensure_connection(self, *arguments: Any, **options: Any) -> Any:
        """As kombu's, which waits between two tries; jittered, since all workers lost it at once."""
        most = _MOST_WAIT_SECONDS * random.uniform(0.5, 1.0)  # noqa: S311 - no secret
        waits = {"interval_start": most / 4, "interval_step": most / 4, "interval_max": most}
        return super().ensure_connection(*arguments, **(waits | options))  # type: ignore[no-untyped-call]


def _guarded(read: Any, **options: Any) -> Any:
    """Kombu lets the error through, a missing key as the loss of its connection; Celery ends for any other."""
    try:
        return read(**options)
    except _UNREADABLE as error:
        log.error("dropped a message that cannot be read: %s: %.200s", type(error).__name__, error)  # noqa: TRY400
        raise Empty from None
