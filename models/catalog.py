"""What can be served: each model's name, where it lies, how it is loaded, and what it costs.

    Catalog.from_mapping({"qwen": {"path": "Qwen/Qwen2.5-7B-Instruct", "quantization": "nf4"}}).get("qwen")

Two models are always there: `echo`, which answers with the question (for load and fault tests), and `tiny-chat`, which
ships with the code. Any folder or hub id (`owner/name`) is a model too, under that name and with the defaults below.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from models.protocol import Usage

_MILLION = Decimal(1_000_000)
_SECONDS_PER_HOUR = Decimal(3_600)
_NAME_CHARACTERS = 255

Dollars = Annotated[Decimal, Field(ge=0, allow_inf_nan=False)]


class CatalogError(Exception):
    """A model's table is wrong; names the model and the field. Nothing is served from such a catalog."""

    def __init__(self, model: str, field: str, message: str) -> None:
        super().__init__(f"models.{model}.{field}: {message}" if field else f"models.{model}: {message}")
        self.model = model
        self.field = field
        self.message = message


class UnknownModel(CatalogError):
    """No model has this name; a job that asks for it is refused at submit."""

    def __init__(self, name: str, known: tuple[str, ...]) -> None:
        Exception.__init__(self, f"unknown model {name!r}; known: {', '.join(known)}, or any folder or hub id")
        self.model = name
        self.field = "model"
        self.known = known
        self.message = str(self)


@dataclass(frozen=True, slots=True)
class Price:
    """What a request costs, counted in two ways: by its tokens, and by the machine time it took. Exact dollars."""

    token_dollars: Decimal
    machine_dollars: Decimal


class ModelSpec(BaseModel):
    """One model as it is served. Two workers with equal specs are interchangeable.

    The default prices are placeholders of a plausible size for a small model on a rented machine, so that the ledger
    shows something; set your own.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(min_length=1, max_length=_NAME_CHARACTERS)
    engine: Literal["transformers", "echo"] = "transformers"
    path: str | None = None  # a folder, or a hub id; None for echo
    revision: str | None = None  # of a hub id: branch, tag or commit
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: as the checkpoint was saved
    quantization: Literal["none", "int8", "nf4", "int8-onednn"] = "none"  # int8-onednn: on a CPU only
    context_tokens: int | None = Field(default=None, ge=2)  # None: what the model was made for
    slots: int = Field(default=16, ge=1, le=4_096)  # rows computed together
    kv_memory_bytes: int | None = Field(default=None, ge=1)  # for keys and values; None: of the memory that is free
    gpu_memory_fraction: float | None = Field(default=None, gt=0, le=1)  # for weights, keys and values; None: 0.9
    cpu_threads: int | None = Field(default=None, ge=1)  # that compute; None: all cores but one
    tier: str = Field(default="standard", min_length=1)
    default_max_tokens: int = Field(default=512, ge=1)
    default_temperature: float = Field(default=1.0, ge=0, le=2, allow_inf_nan=False)  # of requests that name none
    prompt_dollars_per_million_tokens: Dollars = Decimal("0.05")
    cached_dollars_per_million_tokens: Dollars = Decimal("0.0125")
    completion_dollars_per_million_tokens: Dollars = Decimal("0.20")
    machine_dollars_per_hour: Dollars = Decimal("0.10")
    seconds_per_token: float = Field(default=0.0, ge=0, allow_inf_nan=False)  # echo: what a step takes
    obeys_faults: bool = False  # echo: a prompt may ask it to die or to hang; for fault tests

    @field_validator("path")
    @classmethod
    def _absolute_if_folder(cls, path: str | None) -> str | None:
        """Processes of one worker may run in other folders than the one the settings were read in."""
        return str(Path(path).expanduser().absolute()) if path and _is_folder(path) else path

    @model_validator(mode="after")
    def _fits_engine(self) -> Self:
        if self.engine == "echo" and (self.path is not None or self.quantization != "none"):
            raise ValueError("the echo engine takes neither path nor quantization")
        if self.engine == "transformers" and not self.path:
            raise ValueError("path is missing: a folder or a hub id")
        if self.engine == "transformers" and (self.seconds_per_token or self.obeys_faults):
            raise ValueError("seconds_per_token and obeys_faults are for the echo engine")
        return self

    @property
    def folder(self) -> Path | None:
        """The model's folder if it lies on this machine, else None (a hub id, or echo)."""
        return Path(self.path) if self.path and _is_folder(self.path) else None

    def price(self, usage: Usage, busy_seconds: float) -> Price:
        """The price of these tokens and of this share of the engine's time, unrounded."""
        fresh_prompt_tokens = usage.prompt_tokens - usage.cached_tokens
        per_million = (
            fresh_prompt_tokens * self.prompt_dollars_per_million_tokens
            + usage.cached_tokens * self.cached_dollars_per_million_tokens
            + usage.completion_tokens * self.completion_dollars_per_million_tokens
        )
        machine = Decimal(str(busy_seconds)) * self.machine_dollars_per_hour / _SECONDS_PER_HOUR
        return Price(token_dollars=per_million / _MILLION, machine_dollars=machine)


class Catalog:
    """The models of one deployment, by name. Immutable."""

    def __init__(self, specs: Mapping[str, ModelSpec]) -> None:
        self._specs = dict(specs)

    @classmethod
    def from_mapping(cls, tables: Mapping[str, Mapping[str, Any]] | None = None) -> Self:
        """The built-in models and the configured `[models.NAME]` tables.

        A table with a built-in's name changes the fields it gives. Raises `CatalogError`.
        """
        merged: dict[str, Mapping[str, Any]] = _built_ins()
        for name, table in (tables or {}).items():
            merged[name] = {**merged.get(name, {}), **table}
        return cls({name: _spec(name, table) for name, table in merged.items()})

    def names(self) -> tuple[str, ...]:
        """Built-in and configured names, sorted."""
        return tuple(sorted(self._specs))

    def get(self, name: str) -> ModelSpec:
        """The model of that name; a folder or a hub id needs no table. Raises `UnknownModel`."""
        if name in self._specs:
            return self._specs[name]
        if len(name) <= _NAME_CHARACTERS and ("/" in name or _is_folder(name)):
            return _spec(name, {"path": name})
        raise UnknownModel(name, self.names())


def _built_ins() -> dict[str, Mapping[str, Any]]:
    return {
        "echo": {"engine": "echo", "slots": 256},
        # float32: a CPU computes it 1.3 to 1.7 times as fast as the bfloat16 it is stored in; the texts are equal.
        "tiny-chat": {"path": str(_tiny_chat_folder()), "dtype": "float32", "default_temperature": 0.0},
    }


def _tiny_chat_folder() -> Path:
    """Beside the packages in a clone; in the wheel, inside the package `headrace`."""
    root = Path(__file__).resolve().parent.parent
    in_clone, in_wheel = root / "examples" / "tiny-chat", root / "headrace" / "bundled" / "tiny-chat"
    return in_wheel if in_wheel.is_dir() else in_clone


def _spec(name: str, table: Mapping[str, Any]) -> ModelSpec:
    if "name" in table:
        raise CatalogError(name, "name", "is given by the table's heading")
    try:
        return ModelSpec.model_validate({**table, "name": name})
    except ValidationError as error:
        first = error.errors()[0]
        raise CatalogError(name, ".".join(map(str, first["loc"])), first["msg"]) from error


def _is_folder(path: str) -> bool:
    # Unlike pathlib, these two answer False to names that no file system takes.
    return os.path.isdir(os.path.expanduser(path))  # noqa: PTH111, PTH112
