"""The states of a job, and who moves it.

             a               b              c
  (submit) ─────> queued ─────────> running ─────> succeeded | failed | cancelled | expired
      │             ^  │               │
      │ d         e │  │ g           f │
      └──> blocked ─┘  └─> cancelled   └──> queued (again)
              │            | expired
              └─ g

a  `Store.accept`               the producer inserts the row; it cannot be lost from here on
b  `Store.claim`, `claim_bulk`  a worker takes it under a fresh token
c  `Store.settle`               the worker that holds the token ends it; `Store.sweep` for a dead worker's row
                                that is out of attempts or was to be cancelled
d  `Store.accept`               a turn whose predecessor has not ended yet, or a response that goes on from such a one
e  `Store.settle` and every other end: the transaction that ends turn n releases turn n + 1; `Store.release`: a
                                gateway knows all that was said before a response
f  `Store.settle` (retry or release), `Store.sweep` (its worker died)
g  `Store.cancel`, `Batches.cancel`, `Store.sweep` (overdue), `Store.strand` (failed: nothing to go on from)

Rows of a final state stay until they are purged. Every arrow into a final state writes the one ledger row.
"""

from __future__ import annotations

from enum import StrEnum


class State(StrEnum):
    """Where a job is in its life."""

    BLOCKED = "blocked"
    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"

    @property
    def final(self) -> bool:
        """Nothing changes a row in a final state."""
        return self in FINAL


FINAL = frozenset({State.SUCCEEDED, State.FAILED, State.CANCELLED, State.EXPIRED})


class Lane(StrEnum):
    """The two lanes of a route. Workers look at `interactive` first."""

    INTERACTIVE = "interactive"
    BULK = "bulk"


class AttemptOutcome(StrEnum):
    """How one claim of one job ended."""

    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"
    RETRIED = "retried"  # failed, and the job went back to the queue
    RELEASED = "released"  # given back untouched by a draining worker; not charged to the job
    LOST = "lost"  # its worker died


class WorkerState(StrEnum):
    """A worker incarnation's state. Only `live` may claim; nothing leads back to `live`."""

    LIVE = "live"
    DRAINING = "draining"  # finishes what it holds, claims nothing
    STOPPED = "stopped"  # said goodbye
    DEAD = "dead"  # its process ended without a goodbye, or its lease ran out


class BatchState(StrEnum):
    """A batch's state. Only `running` and `filling` ones are drained."""

    FILLING = "filling"  # its input is still being read
    RUNNING = "running"
    PAUSED = "paused"  # its client stopped; the same command goes on
    FINISHED = "finished"  # its output was handed over
    CANCELLED = "cancelled"


class ApiBatchState(StrEnum):
    """The state of a batch, as OpenAI's API names them."""

    VALIDATING = "validating"
    IN_PROGRESS = "in_progress"
    FINALIZING = "finalizing"
    COMPLETED = "completed"
    FAILED = "failed"  # the file as a whole is no good; nothing ran
    EXPIRED = "expired"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"

    @property
    def final(self) -> bool:
        """Nothing changes it any more."""
        return self in {self.COMPLETED, self.FAILED, self.EXPIRED, self.CANCELLED}


class DeliveryState(StrEnum):
    """How far a webhook has come."""

    WAITING = "waiting"  # under way, or to be tried again
    DELIVERED = "delivered"
    GIVEN_UP = "given-up"


class Role(StrEnum):
    """What the holder of an API key may do."""

    SUBMIT = "submit"  # hand in jobs, cancel them
    READ = "read"  # see jobs and what came of them
    ADMIN = "admin"  # both, and see workers and queues
