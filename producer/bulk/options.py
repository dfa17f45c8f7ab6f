"""What is asked of a bulk run, and whether it can be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.errors import RequestInvalid
from jobs.schema import JobRequest
from producer.bulk.errors import BulkRefused


@dataclass(frozen=True, slots=True)
class BulkOptions:
    """What to run and where to put it."""

    input: Path
    output: Path
    errors: Path | None = None  # None: beside the output, `OUT.errors.jsonl`
    model: str | None = None  # goes before the model of a line
    prompt_field: str | None = None  # None: the input is an OpenAI batch file
    max_tokens: int | None = None  # goes before a line's own, as `temperature` does
    temperature: float | None = None
    force: bool = False  # give up an output or an unfinished run that is there already

    @property
    def errors_path(self) -> Path:
        """Where lines go that did not succeed."""
        return self.errors or self.output.with_name(self.output.name.removesuffix(".jsonl") + ".errors.jsonl")

    def signature(self) -> dict[str, Any]:
        """What makes a run another run if it changes, beside the content of the input."""
        return {
            "model": self.model,
            "prompt_field": self.prompt_field,
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "errors": str(self.errors_path.absolute()),
        }

    def check(self, validate: Callable[[JobRequest], JobRequest]) -> None:
        """Refuse before anything is read what every line would be refused for. Raises BulkRefused or RequestInvalid."""
        self._check_files()
        if self.prompt_field is not None and self.model is None:
            raise RequestInvalid("model", "is missing; lines of your own have none", "missing_required_parameter")
        asked = {"max_tokens": self.max_tokens, "temperature": self.temperature, "prompt": "?"}
        request = JobRequest.parse(asked | {"model": self.model or "any"})
        if self.model is not None:
            validate(request)

    def _check_files(self) -> None:
        if not self.input.is_file():
            raise BulkRefused(f"{self.input}: is no file; the input is read more than once, so it cannot be a pipe")
        if self.input.stat().st_size == 0:
            raise BulkRefused(f"{self.input}: is empty")
        for path in (self.output, self.errors_path):
            if not path.parent.is_dir():
                raise BulkRefused(f"{path}: there is no folder {path.parent}")
            if path.exists() and not path.is_file():
                raise BulkRefused(f"{path}: is no regular file, and would be replaced by one")
        places = [path.resolve() for path in (self.input, self.output, self.errors_path)]
        if len(set(places)) < len(places):
            raise BulkRefused("input, output and errors must be three different files")
