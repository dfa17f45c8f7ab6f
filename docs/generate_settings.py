"""Writes the table of settings in `docs/settings.md` from `jobs/settings.py`: names, defaults, and what they are."""  # noqa: INP001

import ast
import inspect
from pathlib import Path
from typing import Any

from jobs.settings import PREFIX, TABLES, Settings

PAGE = Path(__file__).with_name("settings.md")
BEGIN, END = "<!-- generated: make docs -->\n", "<!-- end of generated -->\n"


def page() -> str:
    """The page as it should be."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}{table()}{END}{after}"


def table() -> str:
    """One row for each setting, in the order of the code."""
    said = _docstrings()
    rows = [
        f"| `{PREFIX}{name.upper()}` | {_default(field.default)} | {said[name]} |"
        for name, field in Settings.model_fields.items()
        if name not in TABLES
    ]
    return "\n".join(["| Variable | Default | |", "|---|---|---|", *rows]) + "\n"


def _docstrings() -> dict[str, str]:
    """The string under each field of the class."""
    source = ast.parse(inspect.getsource(Settings)).body[0]
    assert isinstance(source, ast.ClassDef)
    pairs = zip(source.body, source.body[1:], strict=False)
    return {
        node.target.id: " ".join(str(text.value.value).split())
        for node, text in pairs
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
        if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
    }


def _default(value: Any) -> str:
    if value is None:
        return "none"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
