"""The events of a streamed response, in the order and with the numbers that the wire prescribes.

The same job gives the same events with the same numbers, whether they are told while it runs or later.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from jobs.conversations import answer_id
from jobs.schema import Job, TokenLogprob
from jobs.states import State
from producer.openai.objects import Object, message_item, response, text_part, token_objects

_FIRST_PIECE = {"output_index": 0, "content_index": 0}


class ResponseEvents:
    """The events of one response; each call goes on from the one before."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._item_id = answer_id(job.id)
        self._number = -1
        self._is_begun = False
        self._has_item = False

    def begin(self) -> Iterator[Object]:
        """It was taken in; one in the background waits first."""
        if self._job.call is not None and self._job.call.background:
            yield self._event("response.created", response=self._open(State.QUEUED))
            yield self._event("response.queued", response=self._open(State.QUEUED))
        else:
            yield self._event("response.created", response=self._open(State.RUNNING))
            yield from self._progress()

    def piece(self, text: str, logprobs: tuple[TokenLogprob, ...]) -> Iterator[Object]:
        """New text."""
        yield from self._item()
        told = token_objects(logprobs)
        yield self._part_event("response.output_text.delta", delta=text, logprobs=told)

    def end(self, job: Job) -> Iterator[Object]:
        """It has ended, however it did."""
        yield from self._progress()
        whole = response(job)
        if job.state is State.SUCCEEDED:
            yield from self._item()
            yield from self._close_item(job, whole)
        if job.state is State.CANCELLED:
            # The wire has no event for it.
            yield self.error("cancelled", "The response was cancelled.")
        else:
            yield self._event(f"response.{whole['status']}", response=whole)

    def error(self, code: str, message: str) -> Object:
        """The stream cannot go on."""
        return self._event("error", code=code, message=message, param=None)

    def _close_item(self, job: Job, whole: Object) -> Iterator[Object]:
        [item] = whole["output"]
        [part] = item["content"]
        yield self._part_event("response.output_text.done", text=job.text, logprobs=part["logprobs"])
        yield self._part_event("response.content_part.done", part=part)
        yield self._event("response.output_item.done", output_index=0, item=item)

    def _progress(self) -> Iterator[Object]:
        if not self._is_begun:
            self._is_begun = True
            yield self._event("response.in_progress", response=self._open(State.RUNNING))

    def _item(self) -> Iterator[Object]:
        yield from self._progress()
        if not self._has_item:
            self._has_item = True
            item = message_item(self._job, "in_progress") | {"content": []}
            yield self._event("response.output_item.added", output_index=0, item=item)
            yield self._part_event("response.content_part.added", part=text_part(""))

    def _open(self, state: State) -> Object:
        """The response as it was before it had an answer."""
        before = {"state": state, "choices": (), "usage": None, "error": None, "finished_at": None}
        return response(self._job.model_copy(update=before))

    def _part_event(self, kind: str, **fields: Any) -> Object:
        return self._event(kind, item_id=self._item_id, **_FIRST_PIECE, **fields)

    def _event(self, kind: str, **fields: Any) -> Object:
        self._number += 1
        return {"type": kind, "sequence_number": self._number, **fields}
