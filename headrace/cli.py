"""The command `headrace`: what a user types, and how a mistake is answered: one clear line, never a traceback."""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Sequence

import typer

from headrace.commands import bulk, deployment, health, jobs, keys, purge, stack, webhooks
from headrace.commands.common import FAILURE, INTERRUPTED, USAGE

_WORD = re.compile(r"(?<!^)(?=[A-Z])")

app = typer.Typer(
    name="headrace",
    help="Self-hosted, queue-driven inference for open-weight language models.",
    epilog="Start with: headrace up --detach, then headrace submit 'What is 12 + 30?' --wait",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
bulk.register(app)
stack.register(app)
jobs.register(app)
health.register(app)
deployment.register(app)
keys.register(app)
webhooks.register(app)
purge.register(app)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns its exit status: 0, 1 (failed), 2 (wrong usage or input), 3, 130 (see the README)."""
    given = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        return int(app(given, prog_name="headrace", standalone_mode=False) or 0)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has left; nothing more can be written, at exit neither.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILURE
    except Exception as error:
        if not _is_users(error):
            raise
        _tell(error, as_json="--json" in given)
        return _status(error)


def _is_users(error: Exception) -> bool:
    """Whether the message says it all: our own errors, wrong usage, and files that cannot be used."""
    from jobs.errors import HeadraceError
    from models.catalog import CatalogError

    return isinstance(error, HeadraceError | CatalogError | OSError) or hasattr(error, "format_message")


def _status(error: Exception) -> int:
    from jobs.errors import RequestInvalid, SettingsError
    from models.catalog import CatalogError

    if isinstance(error, SettingsError | RequestInvalid | CatalogError):
        return USAGE
    return int(getattr(error, "exit_code", FAILURE))


def _tell(error: Exception, *, as_json: bool) -> None:
    if as_json:
        from headrace.show import emit

        emit({"error": {"code": _code(error), "message": _message(error), "field": _field(error)}})
    else:
        sys.stderr.write(f"headrace: {_sentence(error)}\n")


def _code(error: Exception) -> str:
    name = "UsageError" if hasattr(error, "format_message") else type(error).__name__
    return str(getattr(error, "code", None) or _WORD.sub("_", name).lower())


def _message(error: Exception) -> str:
    if hasattr(error, "format_message"):
        return str(error.format_message())
    return str(getattr(error, "message", None) or error)


def _sentence(error: Exception) -> str:
    if not hasattr(error, "format_message"):
        return str(error)
    context = getattr(error, "ctx", None)
    hint = f" (see `{context.command_path} --help`)" if context else ""
    return _message(error).rstrip(".") + hint


def _field(error: Exception) -> str | None:
    named = (getattr(error, name, None) for name in ("field", "variable", "option_name"))
    parameter = getattr(getattr(error, "param", None), "name", None)
    field = next(filter(None, named), parameter)
    return None if field is None else str(field)
