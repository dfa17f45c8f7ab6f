"""The arrows between the packages, as the source says and as a fresh interpreter shows."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
OURS = {"headrace", "producer", "jobs", "workers", "models"}
ARROWS = {
    "jobs": ["jobs"],
    "models": ["models"],
    "alembic": ["jobs"],
    "producer": ["producer", "jobs", "models.catalog", "models.prompt", "models.protocol"],
    "workers": ["workers", "jobs", "models"],
    "headrace": sorted(OURS),
}


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports anywhere, inside functions too; relative ones in full."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = path.relative_to(REPOSITORY).parts[:-1]
            above = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*above, *filter(None, [node.module])])
            # `from models import catalog` imports models.catalog.
            yield from (f"{module}.{alias.name}" for alias in node.names)


def ours(path: Path) -> set[str]:
    return {module for module in imports(path) if module.split(".")[0] in OURS}


def allowed(module: str, targets: list[str]) -> bool:
    return any(module == target or module.startswith(f"{target}.") for target in targets)


@pytest.mark.parametrize("package", ARROWS)
def test_arrows(package: str) -> None:
    """Each package imports of ours only what the architecture says."""
    files = sorted((REPOSITORY / package).rglob("*.py"))
    assert files
    strays = {
        f"{path.relative_to(REPOSITORY)} imports {module}"
        for path in files
        for module in ours(path)
        if not allowed(module, ARROWS[package])
    }
    assert strays == set()


def test_the_walk_sees_every_kind_of_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain, renamed, relative and hidden imports are all found, or the arrows would be tested in vain."""
    monkeypatch.setitem(globals(), "REPOSITORY", tmp_path)
    path = tmp_path / "jobs" / "deep" / "module.py"
    path.parent.mkdir(parents=True)
    path.write_text(
        "import models.engine as e, os\n"
        "from workers import tasks\n"
        "from ..store import Store\n"
        "from . import near\n"
        "def f():\n"
        "    if True:\n"
        "        from producer.client import Producer\n"
    )
    found = {"models.engine", "workers.tasks", "jobs.store.Store", "jobs.deep.near", "producer.client.Producer"}
    assert ours(path) == found


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("producer.client", {"torch", "transformers", "bitsandbytes", "workers", "headrace"}),
        ("models.engine", {"celery", "kombu", "sqlalchemy", "redis", "psycopg", "jobs", "producer", "workers"}),
        ("jobs.store", {"torch", "transformers", "celery", "models", "producer", "workers", "headrace"}),
    ],
)
def test_what_a_module_loads(module: str, unwanted: set[str]) -> None:
    """In a fresh interpreter, importing it loads nothing that its processes must do without."""
    code = f"import sys, {module}; print(*sorted({unwanted!r} & sys.modules.keys()))"
    asked = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert asked.stdout.split() == []
