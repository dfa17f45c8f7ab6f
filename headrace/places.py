"""Where the embedded servers of a home keep their files, as whom they run, and where their binaries come from.

A normal user's servers lie in the home and run in place. Postgres refuses to run as root, so for root both run as
`nobody`: from copies of the binaries in /var/lib/headrace/PACKAGE-VERSION, on data in /var/lib/headrace/homes/HASH.
There root keeps the folders, and `nobody` owns only what a server must read or write.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import pwd
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from jobs.errors import HeadraceError

_SYSTEM_FOLDER = Path("/var/lib/headrace")
_ACCOUNT_FOR_ROOT = "nobody"


class ServerError(HeadraceError):
    """An embedded server cannot be found, started or reached. The message ends with the server's own last words."""


@dataclass(frozen=True)
class Place:
    """The folder that holds one folder per server, and the account that runs them (None: the caller's own)."""

    folder: Path
    account: str | None

    @classmethod
    def of(cls, home: Path) -> Place:
        """The place of a home; nothing is made yet."""
        home = home.expanduser().resolve()
        if os.geteuid() != 0:
            return cls(home, None)
        return cls(_SYSTEM_FOLDER / "homes" / short_hash(home), _ACCOUNT_FOR_ROOT)

    def create(self) -> None:
        """Make the folder if it is missing. What exists keeps its mode and owner."""
        if self.account is None:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        else:
            _make_open_folder(self.folder.parent)
            make_folder(self.folder, self.share)

    def share(self, folder: Path) -> None:
        """Let the account, and no other, pass through a folder that stays ours."""
        if self.account is not None:
            os.chown(folder, -1, pwd.getpwnam(self.account).pw_gid)
            folder.chmod(0o710)

    def give(self, path: Path) -> None:
        """Make the account the owner."""
        if self.account is not None:
            entry = pwd.getpwnam(self.account)
            os.chown(path, entry.pw_uid, entry.pw_gid)

    def write(self, path: Path, text: str) -> None:
        """Write a file that the account alone can read, whole or not at all."""
        new = path.with_name(f"{path.name}.new")
        new.unlink(missing_ok=True)
        with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
            file.write(text)
        self.give(new)
        new.rename(path)


@dataclass(frozen=True)
class Wheel:
    """An installed distribution that carries binaries in `parts`, paths beside its import package."""

    distribution: str
    package: str
    parts: tuple[str, ...]

    def folder(self, place: Place) -> Path:
        """The folder in which the parts lie so that the place's account can run them. Raises ServerError."""
        spec = importlib.util.find_spec(self.package)
        installed = None if spec is None or spec.origin is None else Path(spec.origin).parents[1]
        if installed is None or not (installed / self.parts[0]).is_dir():
            raise ServerError(f'no {self.parts[0]} is installed here: pip install "headrace[local]"')
        return installed if place.account is None else self._copy(installed)

    def _copy(self, installed: Path) -> Path:
        """Once for each version. Starts at the same time each make a copy, and the first to finish wins."""
        copy = _SYSTEM_FOLDER / f"{self.distribution}-{importlib.metadata.version(self.distribution)}"

        def fill(new: Path) -> None:
            for part in self.parts:
                shutil.copytree(installed / part, new / part, ignore=_NOT_NEEDED, copy_function=_copy_for_all)
            for folder, _, _ in os.walk(new):
                Path(folder).chmod(0o755)
            os.sync()  # the name promises a complete copy, after a power cut too

        _make_open_folder(_SYSTEM_FOLDER)
        make_folder(copy, fill)
        return copy


_NOT_NEEDED = shutil.ignore_patterns("include", "pgxs", "pkgconfig", "*.a", "__pycache__")


def short_hash(path: Path) -> str:
    """Sixteen hexadecimal digits that stand for a path."""
    return hashlib.sha256(os.fsencode(path)).hexdigest()[:16]


def _make_open_folder(folder: Path) -> None:
    """Make a folder, and those above it, that everybody may enter, whatever the umask."""
    if not folder.exists():
        _make_open_folder(folder.parent)
        make_folder(folder, lambda new: new.chmod(0o755))


def make_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Make it aside, fill it and rename it, unless it exists: nobody ever sees it unfinished."""
    if folder.exists():
        return
    new = Path(tempfile.mkdtemp(prefix=f"{folder.name}.new-", dir=folder.parent))
    try:
        fill(new)
        new.rename(folder)
    except BaseException as error:
        shutil.rmtree(new, ignore_errors=True)
        if not (isinstance(error, OSError) and folder.exists()):
            raise


def _copy_for_all(source: str, target: str) -> None:
    shutil.copyfile(source, target)
    Path(target).chmod(0o755 if os.access(source, os.X_OK) else 0o644)
