"""Checks a request against the model that will serve it, before a row exists. Loads tokenizers, never torch."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Self

from jobs.conversations import Item
from jobs.errors import ModelUnknown, RequestInvalid, SettingsError
from jobs.schema import JobRequest
from jobs.settings import Settings
from models.catalog import Catalog, CatalogError, ModelSpec, UnknownModel
from models.prompt import PromptError, PromptFormat, encode_prompt, load_prompt_format
from models.protocol import InvalidRequest, check_logprob_values
from producer.policy import Policies, Policy

# A model hub that does not answer is given up after some 25 s; a file of a million lines must not wait for each.
_UNUSABLE_SECONDS = 60.0


def catalog_of(settings: Settings) -> Catalog:
    """The models these settings know. Raises SettingsError naming the table and field at fault."""
    try:
        return Catalog.from_mapping(settings.models)
    except CatalogError as error:
        name = ".".join(part for part in ("models", error.model, error.field) if part)
        raise SettingsError(name, error.message) from None


class Validator:
    """Refuses what no engine could run, and fills in what the model's defaults say."""

    def __init__(self, settings: Settings) -> None:
        self._catalog = catalog_of(settings)
        self._max_prompt_bytes = settings.max_prompt_bytes
        self._unusable: dict[str, tuple[str, float]] = {}  # by model: why, and until when nothing is tried
        self._formats: dict[str, PromptFormat] = {}  # by model; to ask with the whole spec costs a hash of it
        self._policies = Policies(settings)
        self._policy = Policy()
        self._allowed: frozenset[str] | None = None

    def for_tenant(self, tenant_id: str, models: Iterable[str] | None = None) -> Self:
        """The same, by the tenant's policy, and for these models alone. It shares what was loaded."""
        other = copy.copy(self)
        other._policy = self._policies.of(tenant_id)  # noqa: SLF001 - our own kind
        other._allowed = None if models is None else frozenset(models)  # noqa: SLF001
        return other

    def check(self, request: JobRequest) -> JobRequest:
        """The request with `max_tokens` and `temperature` decided. Raises RequestInvalid naming the field at fault."""
        spec = self._spec(request.model)
        self._check_size(request)
        request = self._policy.apply(request)
        _check_engine(request, spec)
        form = self._format(spec)
        prompt_tokens = _prompt_tokens(form, request)
        room = form.context_tokens - prompt_tokens
        max_tokens = _max_tokens(request, spec, form.context_tokens, room)
        _check_told(request, max_tokens, prompt_tokens)
        temperature = spec.default_temperature if request.temperature is None else request.temperature
        return request.model_copy(update={"max_tokens": max_tokens, "temperature": temperature})

    def screened(self, items: Sequence[Item]) -> list[Item]:
        """What is put into a conversation by hand, as the tenant's policy leaves it. Raises RequestInvalid."""
        if not items:
            return []
        said = [{"role": item.role, "content": item.content} for item in items]
        request = self._policy.apply(JobRequest.parse({"model": "any", "messages": said}))
        assert request.messages is not None
        return [replace(item, content=one.content) for item, one in zip(items, request.messages, strict=True)]

    def prompt_tokens(self, request: JobRequest) -> int:
        """Tokens of the rendered prompt. Raises RequestInvalid."""
        spec = self._spec(request.model)
        self._check_size(request)
        return _prompt_tokens(self._format(spec), request)

    def context_tokens(self, model: str) -> int | None:
        """How long prompt and answer of this model may be together; None if that is not known without loading it."""
        form = self._formats.get(model)
        try:
            return form.context_tokens if form else self._catalog.get(model).context_tokens
        except CatalogError:
            return None

    def most_tokens(self, checked: JobRequest) -> int:
        """What a request that was checked may take at most: its prompt, and every answer to its limit."""
        assert checked.max_tokens is not None
        return _prompt_tokens(self._format(self._spec(checked.model)), checked) + checked.n * checked.max_tokens

    def _spec(self, model: str) -> ModelSpec:
        if self._allowed is not None and model not in self._allowed:
            raise ModelUnknown(f"the key is not for the model {model!r}")
        try:
            return self._catalog.get(model)
        except UnknownModel as error:
            raise ModelUnknown(error.message) from None
        except CatalogError as error:
            raise RequestInvalid("model", str(error)) from None

    def _format(self, spec: ModelSpec) -> PromptFormat:
        form = self._formats.get(spec.name)
        if form is None:
            form = self._formats[spec.name] = self._load_format(spec)
        return form

    def _load_format(self, spec: ModelSpec) -> PromptFormat:
        reason, until = self._unusable.get(spec.name, ("", 0.0))
        if time.monotonic() > until:
            try:
                return load_prompt_format(spec)
            except PromptError as error:
                reason = error.message
                self._unusable[spec.name] = (reason, time.monotonic() + _UNUSABLE_SECONDS)
        raise RequestInvalid("model", f"{spec.name!r} cannot be used: {reason}", "model_not_found")

    def _check_size(self, request: JobRequest) -> None:
        field = prompt_field(request)
        size = _prompt_bytes(request)
        if size == 0:
            raise RequestInvalid(field, "must not be empty")
        if size > self._max_prompt_bytes:
            raise RequestInvalid(
                field,
                f"has {size:,} bytes, at most {self._max_prompt_bytes:,} are accepted (HEADRACE_MAX_PROMPT_BYTES)",
            )


def _check_engine(request: JobRequest, spec: ModelSpec) -> None:
    """What takes a model is not for one that only repeats."""
    told = [name for name in ("logprobs", "prompt_logprobs") if getattr(request, name) is not None]
    if spec.engine == "echo" and (fields := [*told, *request.structures]):
        raise RequestInvalid(fields[0], f"{spec.name!r} only repeats the prompt", "unsupported_value")


def _check_told(request: JobRequest, max_tokens: int, prompt_tokens: int) -> None:
    """The decided `max_tokens` must leave room for `min_tokens`, and a result must not be too large."""
    if request.min_tokens > max_tokens:
        raise RequestInvalid("min_tokens", f"is above the {max_tokens:,} tokens that the answer may have")
    tokens = max_tokens + (prompt_tokens if request.echo else 0)
    try:
        check_logprob_values(request.n * tokens, request.logprobs, prompt_tokens, request.prompt_logprobs)
    except InvalidRequest as error:
        raise RequestInvalid(error.field, error.message) from None


def prompt_field(request: JobRequest) -> str:
    """The field that carries the prompt."""
    return "messages" if request.messages is not None else "prompt"


def _prompt_bytes(request: JobRequest) -> int:
    if request.messages is not None:
        return sum(len(message["content"].encode()) for message in request.chat() or ())
    return len(request.prompt.encode() if isinstance(request.prompt, str) else request.prompt or ())


def _prompt_tokens(form: PromptFormat, request: JobRequest) -> int:
    field = prompt_field(request)
    try:
        tokens = len(encode_prompt(form, request.chat(), request.prompt))
    except PromptError as error:
        raise RequestInvalid(error.field, error.message) from None
    if tokens == 0:
        raise RequestInvalid(field, "holds no token")
    if tokens >= form.context_tokens:
        message = f"has {tokens:,} tokens, the model's context holds {form.context_tokens:,}"
        raise RequestInvalid(field, message, "context_length_exceeded")
    return tokens


def _max_tokens(request: JobRequest, spec: ModelSpec, context_tokens: int, room: int) -> int:
    if request.max_tokens is None:
        return min(spec.default_max_tokens, room)
    if request.max_tokens > room:
        raise RequestInvalid(
            "max_tokens",
            f"{request.max_tokens:,} does not fit: the context holds {context_tokens:,} tokens, "
            f"{context_tokens - room:,} of them are the prompt",
            "context_length_exceeded",
        )
    return request.max_tokens
