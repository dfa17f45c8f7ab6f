"""What an operator wants of prompts before they are accepted: named rules, off unless `[policies.TENANT.RULE]` says so.

A rule looks for a pattern, for a length, or for text that imitates the roles of a chat; it rejects the request,
redacts what it found, or only flags the job. Which rules took hold is recorded on the job. Without rules, prompts are
stored and returned byte for byte.

Patterns are RE2's: it takes time in proportion to the text, whatever the pattern, where Python's `re` can be made to
take years by a prompt of fifty characters. (SQL is no matter of policy: it is bound parameters that keep it harmless.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any, Literal, Self

from pydantic import Field, StringConstraints, TypeAdapter, ValidationError, model_validator

from jobs.errors import RequestInvalid, SettingsError
from jobs.schema import Frozen, JobRequest, Message
from jobs.settings import Settings

EVERY_TENANT = "*"
MAX_PATTERN_CHARACTERS = 2_000
Role = Literal["system", "developer", "user", "assistant", "tool"]

# What chat templates put between turns, and how people write roles: words of a user that would be somebody else's.
ROLE_LANGUAGE = (
    r"(?im)<\|[a-z_]{2,32}\|>|\[/?INST\]|<</?SYS>>|</?(?:system|assistant)>|<(?:start|end)_of_turn>"
    r"|^[ \t]*(?:#{1,6}[ \t]*)?(?:system|developer|assistant)[ \t]*:"
)
_FROM_OUTSIDE: tuple[Role, ...] = ("user", "tool")


class Action(StrEnum):
    """What a rule does about what it finds."""

    REJECT = "reject"  # there is no job
    REDACT = "redact"  # the rule's name, in brackets, takes its place before anything is stored
    FLAG = "flag"  # nothing changes, the job says so


class Rule(Frozen):
    """One rule as it is configured: exactly one of `pattern`, `max_characters` and `role_language`."""

    action: Action
    pattern: Annotated[str, StringConstraints(min_length=1, max_length=MAX_PATTERN_CHARACTERS)] | None = None
    """In RE2's syntax."""
    max_characters: int | None = Field(default=None, ge=1)
    """Of all texts that the rule looks at, together."""
    role_language: bool = False
    """Text that imitates a chat's roles; in messages of users and tools, unless `roles` says otherwise."""
    roles: tuple[Role, ...] | None = None
    """Only messages of these roles. Default: all, and a `prompt`."""

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        kinds = [self.pattern is not None, self.max_characters is not None, self.role_language]
        if sum(kinds) != 1:
            raise ValueError("needs exactly one of pattern, max_characters and role_language")
        if self.max_characters is not None and self.action is Action.REDACT:
            raise ValueError("a length can be rejected or flagged, not redacted")
        return self


_RuleName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
_TABLES: TypeAdapter[dict[str, dict[_RuleName, Rule]]] = TypeAdapter(dict[str, dict[_RuleName, Rule]])


@dataclass(frozen=True, slots=True)
class Policy:
    """The rules of one tenant, ready to be applied."""

    rules: tuple[tuple[str, _Compiled], ...] = ()

    def apply(self, request: JobRequest) -> JobRequest:
        """The request as it may be accepted, with what was found noted. Raises RequestInvalid if a rule rejects it."""
        found: dict[str, str] = {}
        for name, rule in self.rules:
            changed = rule.apply(name, request)
            if changed is not None:
                request = changed
                found[name] = str(rule.rule.action)
        return request.with_findings(found) if found else request


@dataclass(frozen=True, slots=True)
class _Compiled:
    rule: Rule
    pattern: Any  # of RE2; None: a length

    def apply(self, name: str, request: JobRequest) -> JobRequest | None:
        """None: nothing found. Else the request, redacted if the rule says so."""
        if request.messages is None and not isinstance(request.prompt, str):
            raise RequestInvalid("prompt", f"token ids cannot be looked at by the policy {name!r}", "policy_violation")
        texts = [text for role, text in _texts(request) if self._looks_at(role)]
        if not self._finds(texts):
            return None
        if self.rule.action is Action.REJECT:
            field = "prompt" if request.messages is None else "messages"
            raise RequestInvalid(field, f"is against the policy {name!r}", "policy_violation")
        return self._redacted(name, request) if self.rule.action is Action.REDACT else request

    def _looks_at(self, role: Role | None) -> bool:
        roles = self.rule.roles or (_FROM_OUTSIDE if self.rule.role_language else None)
        return roles is None or role in roles

    def _finds(self, texts: list[str]) -> bool:
        if self.rule.max_characters is not None:
            return sum(map(len, texts)) > self.rule.max_characters
        return any(self.pattern.search(text) is not None for text in texts)

    def _redacted(self, name: str, request: JobRequest) -> JobRequest:
        if request.messages is None:
            return request.model_copy(update={"prompt": self._without(name, str(request.prompt))})
        messages = tuple(
            Message(role=one.role, content=self._without(name, one.content)) if self._looks_at(one.role) else one
            for one in request.messages
        )
        return request.model_copy(update={"messages": messages, "instructions": self._instructions(name, request)})

    def _instructions(self, name: str, request: JobRequest) -> str | None:
        text = request.instructions
        return self._without(name, text) if text is not None and self._looks_at("system") else text

    def _without(self, name: str, text: str) -> str:
        return str(self.pattern.sub(f"[{name}]", text))


def _texts(request: JobRequest) -> list[tuple[Role | None, str]]:
    if request.messages is None:
        return [(None, str(request.prompt))]
    first: list[tuple[Role | None, str]] = []
    if request.instructions is not None:
        first.append(("system", request.instructions))
    return [*first, *((message.role, message.content) for message in request.messages)]


class Policies:
    """What `[policies]` says. Raises SettingsError naming the rule at fault."""

    def __init__(self, settings: Settings) -> None:
        try:
            tables = _TABLES.validate_python(settings.policies)
        except ValidationError as error:
            raise _fault(error) from None
        self._tenants = {tenant: _compiled(tenant, rules) for tenant, rules in tables.items()}

    def of(self, tenant_id: str) -> Policy:
        """The tenant's rules, after those for everybody."""
        return Policy((*self._tenants.get(EVERY_TENANT, ()), *self._tenants.get(tenant_id, ())))


def _compiled(tenant: str, rules: Mapping[str, Rule]) -> tuple[tuple[str, _Compiled], ...]:
    return tuple((name, _Compiled(rule, _pattern(f"policies.{tenant}.{name}", rule))) for name, rule in rules.items())


def _pattern(name: str, rule: Rule) -> Any:
    text = ROLE_LANGUAGE if rule.role_language else rule.pattern
    if text is None:
        return None
    import re2  # only where there is a policy

    options = re2.Options()
    options.log_errors = False
    try:
        pattern = re2.compile(text, options)
    except re2.error as error:
        raise SettingsError(f"{name}.pattern", f"is no pattern of RE2: {_said(error)}") from None
    if pattern.search("") is not None:
        raise SettingsError(f"{name}.pattern", "matches the empty text, and so everything")
    return pattern


def _said(error: Exception) -> str:
    said = error.args[0] if error.args else error
    return said.decode(errors="replace") if isinstance(said, bytes) else str(said)


def _fault(error: ValidationError) -> SettingsError:
    fault = error.errors()[0]
    path = ".".join(["policies", *(str(part) for part in fault["loc"] if part != "[key]")])
    return SettingsError(path, fault["msg"].removeprefix("Value error, "))
