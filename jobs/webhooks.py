"""Webhooks in SQL: whom to tell of which end, how that went, and what it is signed with.

             a            b                  c
  (end) ────────> due ─────────> under way ─────> delivered
                   ^                 │   d
                   └─────────────────┴──────────> given up
                          d, e

a  `Store`, `ApiBatches`  the statement that ends the job or batch; so an end has its delivery, or there was no end
b  `take`                 a sender, for some seconds, under the number of its attempt
c  `delivered`            its sender
d  `failed`               its sender: later again, or never
e                         its sender died, and those seconds are over. `retry` brings back what was given up

A delivery is gone with its job or batch. It holds no text of either.

A tenant's secret is made of the settings' secret, the tenant's name and how often it was rotated. So nothing of it is
stored, a stolen database signs nothing, and the operator can be shown it again.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from sqlalchemy import text

from jobs.database import Database
from jobs.errors import NotFound
from jobs.signing import Purpose, Signer
from jobs.states import DeliveryState

# After a rotation the secret before is signed with, too, for so long: receivers need time to change over.
ROTATION_SECONDS = 86_400


@dataclass(frozen=True, slots=True)
class Delivery:
    """One end that is to be told, in a sender's hands: of a job or of a batch of the API."""

    id: UUID
    tenant_id: str
    job_id: UUID | None
    batch_id: UUID | None
    url: str
    attempts: int  # this one is the last of them


@dataclass(frozen=True, slots=True)
class DeliveryRecord:
    """The same in a list."""

    id: UUID
    tenant_id: str
    job_id: UUID | None
    batch_id: UUID | None
    url: str
    attempts: int
    created_at: datetime
    next_attempt_at: datetime | None
    delivered_at: datetime | None
    given_up_at: datetime | None
    error: str | None  # of the last attempt

    @property
    def state(self) -> DeliveryState:
        """How far it has come."""
        if self.next_attempt_at is not None:
            return DeliveryState.WAITING
        return DeliveryState.GIVEN_UP if self.delivered_at is None else DeliveryState.DELIVERED


class Webhooks:
    """Every change of and look at deliveries, and the secrets that sign them."""

    def __init__(self, database: Database, secret: str) -> None:
        """`secret` is that of the settings."""
        self.database = database
        self._signer = Signer(secret, Purpose.WEBHOOKS)

    # -- a sender -----------------------------------------------------------------------------------------------

    def take(self, most: int, seconds: float, but: Sequence[str] = ()) -> list[Delivery]:
        """What is due, whoever it belongs to `but` these tenants; for so many seconds nobody else takes it."""
        fields = {"most": most, "seconds": seconds, "but": list(but)}
        return [Delivery(**row._asdict()) for row in self.database.rows(_TAKE, fields)]

    def delivered(self, delivery: Delivery) -> None:
        """Its receiver has it."""
        self._of(delivery).rows(_DELIVERED, {"id": delivery.id, "attempts": delivery.attempts})

    def failed(self, delivery: Delivery, error: str, again_after_seconds: float | None) -> None:
        """Its receiver has it not; None: and it is not tried again."""
        fields = {"id": delivery.id, "attempts": delivery.attempts, "error": error, "delay": again_after_seconds}
        self._of(delivery).rows(_FAILED, fields)

    def _of(self, delivery: Delivery) -> Database:
        return self.database.as_tenant(delivery.tenant_id)

    def secrets(self, tenant_id: str) -> list[str]:
        """What this tenant's webhooks are signed with now: the newest first, and for a while the one before."""
        row = self.database.as_tenant(tenant_id).row(_GENERATION, {"tenant": tenant_id, "seconds": ROTATION_SECONDS})
        if row is None:
            return [self._secret(tenant_id, 0)]
        generations = [row.generation, row.generation - 1] if row.fresh else [row.generation]
        return [self._secret(tenant_id, generation) for generation in generations]

    def _secret(self, tenant_id: str, generation: int) -> str:
        """In the form of the Standard Webhooks."""
        digest = bytes.fromhex(self._signer.sign(tenant_id, str(generation)))
        return f"whsec_{base64.b64encode(digest).decode()}"

    # -- the operator -------------------------------------------------------------------------------------------

    def rotate(self, tenant_id: str) -> None:
        """Sign with a new secret."""
        self.database.rows(_ROTATE, {"tenant": tenant_id})

    def list(
        self, tenant_id: str | None = None, *, state: DeliveryState | None = None, limit: int = 50
    ) -> list[DeliveryRecord]:
        """Deliveries of a tenant or of all, the newest first."""
        fields = {"tenant": tenant_id, "state": state and str(state), "limit": limit}
        return [DeliveryRecord(**row._asdict()) for row in self.database.rows(_LIST, fields)]

    def retry(self, delivery_id: UUID) -> None:
        """Try one again that was given up; one that waits, at once. Raises NotFound."""
        if self.database.row(_RETRY, {"id": delivery_id}) is None:
            raise NotFound(f"no delivery {delivery_id} that was not delivered")

    def retry_all(self, tenant_id: str | None = None) -> int:
        """Try everything again that was given up, of a tenant or of all; how many that are."""
        return len(self.database.rows(_RETRY_ALL, {"tenant": tenant_id}))


# For all tenants at once: see migration 0005.
_TAKE = text("SELECT * FROM headrace_take_webhooks(:most, :seconds, :but)")

_MINE = "id = :id AND attempts = :attempts AND next_attempt_at IS NOT NULL"

_DELIVERED = text(f"""
UPDATE webhook_deliveries SET delivered_at = now(), next_attempt_at = NULL, error = NULL WHERE {_MINE}
""")  # noqa: S608 - composed of constants

_FAILED = text(f"""
UPDATE webhook_deliveries
SET error = :error, next_attempt_at = now() + make_interval(secs => CAST(:delay AS double precision)),
    given_up_at = CASE WHEN CAST(:delay AS double precision) IS NULL THEN now() END
WHERE {_MINE}
""")  # noqa: S608

_GENERATION = text("""
SELECT generation, rotated_at > now() - make_interval(secs => :seconds) AS fresh
FROM webhook_secrets WHERE tenant_id = :tenant
""")

_ROTATE = text("""
INSERT INTO webhook_secrets AS s (tenant_id, generation) VALUES (:tenant, 1)
ON CONFLICT (tenant_id) DO UPDATE SET generation = s.generation + 1, rotated_at = now()
""")

_LIST = text("""
SELECT id, tenant_id, job_id, batch_id, url, attempts, created_at, next_attempt_at, delivered_at, given_up_at, error
FROM webhook_deliveries
WHERE (CAST(:tenant AS text) IS NULL OR tenant_id = :tenant)
  AND CASE CAST(:state AS text) WHEN 'waiting' THEN next_attempt_at IS NOT NULL
      WHEN 'delivered' THEN delivered_at IS NOT NULL WHEN 'given-up' THEN given_up_at IS NOT NULL ELSE true END
ORDER BY created_at DESC LIMIT :limit
""")

_AGAIN = "SET given_up_at = NULL, next_attempt_at = now(), attempts = 0"

_RETRY = text(f"UPDATE webhook_deliveries {_AGAIN} WHERE id = :id AND delivered_at IS NULL RETURNING id")

_RETRY_ALL = text(f"""
UPDATE webhook_deliveries {_AGAIN}
WHERE given_up_at IS NOT NULL AND (CAST(:tenant AS text) IS NULL OR tenant_id = :tenant) RETURNING id
""")
