"""Flower, the web page of the workers: on loopback unless told otherwise, and never without a password.

    python -m headrace.flower PORT [ADDRESS]

It reads the settings as every process does, and who may log in from `FLOWER_BASIC_AUTH` ("user:password"), so that no
password shows in a process list. Flower's other `FLOWER_*` variables work, but for those that could open it up.
Its history is in memory alone.
"""

from __future__ import annotations

import base64
import importlib.util
import os
import re
import secrets
import sys
import urllib.error
import urllib.request
from dataclasses import dataclass, field

from headrace.ports import LOOPBACK, free_port
from jobs.errors import SettingsError
from jobs.settings import Settings

AUTH_VARIABLE = "FLOWER_BASIC_AUTH"
_PROBE_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Access:
    """Where Flower is and who may see it."""

    address: str
    port: int
    logins: str = field(repr=False)  # "user:password", several with commas between

    @property
    def url(self) -> str:
        """The page's address, without the password."""
        return f"http://{self.address}:{self.port}"

    @property
    def user(self) -> str:
        """The first user."""
        return self._first[0]

    @property
    def password(self) -> str:
        """The first user's."""
        return self._first[1]

    @property
    def _first(self) -> tuple[str, str]:
        user, _, password = self.logins.partition(",")[0].partition(":")
        return user, password

    @property
    def environment(self) -> dict[str, str]:
        """What Flower's process needs besides the settings."""
        return {AUTH_VARIABLE: self.logins}

    def answers(self) -> bool:
        """Whether Flower lets us in."""
        token = base64.b64encode(f"{self.user}:{self.password}".encode()).decode()
        request = urllib.request.Request(f"{self.url}/workers", headers={"Authorization": f"Basic {token}"})  # noqa: S310
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with direct.open(request, timeout=_PROBE_SECONDS) as reply:
                return bool(reply.status == 200)  # noqa: PLR2004
        except (urllib.error.URLError, OSError):
            return False


def grant(port: int | None = None, address: str = LOOPBACK) -> Access:
    """Where Flower will be: on that port or a free one, for the users of FLOWER_BASIC_AUTH or one made up now.

    Raises SettingsError if the variable is not user:password, or several with commas between.
    """
    logins = os.environ.get(AUTH_VARIABLE) or f"headrace:{secrets.token_urlsafe(18)}"
    if not all(re.fullmatch(r"[^:]+:.+", login) for login in logins.split(",")):
        raise SettingsError(AUTH_VARIABLE, "must look like user:password")
    return Access(address, port or free_port(), logins)


def installed() -> bool:
    """Whether the extra `headrace[flower]` is there."""
    return importlib.util.find_spec("flower") is not None


def arguments(access: Access) -> list[str]:
    """How `python -m` starts it."""
    return ["headrace.flower", str(access.port), access.address]


def serve(settings: Settings, port: int, address: str) -> None:
    """Be Flower, until a signal. `FLOWER_BASIC_AUTH` must be set."""
    if not os.environ.get(AUTH_VARIABLE):
        raise SettingsError(AUTH_VARIABLE, "is not set; Flower is never open to everybody")
    from jobs.dispatch import celery_app

    # A file of options found in the current folder, a Unix socket and a log-in by others could each undo the password.
    os.environ["FLOWER_UNAUTHENTICATED_API"] = "false"
    closed = [f"--address={address}", f"--port={port}", "--unix_socket=", "--auth=", f"--conf={os.devnull}"]
    celery_app(settings).start(["--quiet", "flower", *closed])


if __name__ == "__main__":
    serve(Settings.load(), int(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else LOOPBACK)  # noqa: PLR2004
