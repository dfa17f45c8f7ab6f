"""How a bulk run can end early. What was computed is kept either way."""

from __future__ import annotations

from jobs.errors import HeadraceError


class BulkError(HeadraceError):
    """The run did not end; the message says why, and how to go on."""


class BulkRefused(BulkError):
    """It cannot be run as asked, and was not begun."""

    exit_code = 2


class BulkPaused(HeadraceError):
    """The run was stopped on request; the same command goes on."""
