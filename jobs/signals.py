"""Wake-up calls over Redis pub/sub: a job ended, a job is to be cancelled. Losing one costs time, never truth.

Each is an id and a signature: whoever can only publish can neither wake nor cancel anything.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from uuid import UUID

import redis
from tenacity import (
    Retrying,
    retry_if_exception_type,
    sleep_using_event,
    stop_when_event_set,
    wait_random_exponential,
)

from jobs.settings import Settings
from jobs.signing import MessageSigner

log = logging.getLogger(__name__)

ENDED = "ended"
CANCEL = "cancel"
TOLD = "told"
_SEPARATOR = ":"  # between an id and its signature
_LISTEN_SECONDS = 0.2  # also how long a listener takes to stop

UNREACHABLE = (redis.RedisError, OSError)


class Signals:
    """Publishes and listens.

    `ended` carries the ids of interactive jobs, `cancel` the ids of running ones, `told` those with new pieces.
    """

    def __init__(self, settings: Settings) -> None:
        assert settings.broker_url is not None
        assert settings.secret is not None
        self.signer = MessageSigner(settings.secret)
        self._prefix = settings.key_prefix
        self._redis = redis.Redis.from_url(
            settings.broker_url,
            socket_timeout=2.0,
            socket_connect_timeout=2.0,
            socket_keepalive=True,
            health_check_interval=5,
            retry=None,
        )

    def publish(self, kind: str, ids: Sequence[UUID]) -> bool:
        """Tell whoever listens. False: Redis did not take it; those who wait will find out by looking."""
        if not ids:
            return True
        try:
            self._publish(self._channel(kind), [self._signed(kind, str(job_id)) for job_id in ids])
        except UNREACHABLE as error:
            log.warning("could not announce %d %s: %s", len(ids), kind, error)
            return False
        return True

    def _signed(self, kind: str, job_id: str) -> str:
        return f"{job_id}{_SEPARATOR}{self.signer.sign(kind, job_id)}"

    def _publish(self, channel: str, messages: Sequence[str]) -> None:
        if len(messages) == 1:  # the usual case, of somebody who waits; to make a pipeline takes longer than to send it
            self._redis.publish(channel, messages[0])
            return
        with self._redis.pipeline(transaction=False) as pipeline:
            for message in messages:
                pipeline.publish(channel, message)
            pipeline.execute()

    def listen(self, kind: str, on_id: Callable[[UUID], None], stop: threading.Event, ready: threading.Event) -> None:
        """Call `on_id` for every id until `stop`; subscribes again, jittered, after a failure. `ready`: subscribed."""
        retrying = Retrying(
            retry=retry_if_exception_type(UNREACHABLE),
            wait=wait_random_exponential(multiplier=0.1, max=5.0),
            stop=stop_when_event_set(stop),
            sleep=sleep_using_event(stop),
            retry_error_callback=lambda _: None,
        )
        while not stop.is_set():
            retrying(self._listen_once, kind, on_id, stop, ready)

    def _listen_once(
        self,
        kind: str,
        on_id: Callable[[UUID], None],
        stop: threading.Event,
        ready: threading.Event,
    ) -> None:
        with self._redis.pubsub(ignore_subscribe_messages=False) as pubsub:
            pubsub.subscribe(self._channel(kind))
            try:
                while not stop.is_set():
                    message = pubsub.get_message(timeout=_LISTEN_SECONDS)
                    if message is not None and message["type"] == "subscribe":
                        ready.set()
                    elif message is not None and message["type"] == "message":
                        self._deliver(kind, message["data"], on_id)
            finally:
                ready.clear()

    def _deliver(self, kind: str, data: bytes, on_id: Callable[[UUID], None]) -> None:
        text, _, signature = data.decode("ascii", "replace").partition(_SEPARATOR)
        if self.signer.accepts(signature, kind, text):
            on_id(UUID(text))

    def _channel(self, kind: str) -> str:
        return f"{self._prefix}:{kind}"

    def close(self) -> None:
        """Let go of Redis."""
        self._redis.close()
