"""What is asked and what is answered: the pydantic models of a request and of a job as its owner sees it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from datetime import datetime
from decimal import Decimal
from functools import cached_property
from typing import Annotated, Any, Literal, NotRequired, Self
from urllib.parse import urlsplit
from uuid import UUID

import orjson
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    StringConstraints,
    Tag,
    TypeAdapter,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError
from typing_extensions import TypedDict

from jobs.errors import RequestInvalid
from jobs.states import Lane, State

MAX_CHOICES = 128
MAX_STOPS = 16
MAX_STOP_TOKEN_IDS = 1_024
MAX_TOP_LOGPROBS = 20
MAX_SCHEMA_BYTES = 64 * 1_024
MAX_REGEX_BYTES = 4 * 1_024
MAX_STRUCTURE_CHOICES = 1_024
MAX_METADATA_PAIRS = 16
MAX_URL_CHARACTERS = 2_048
MAX_PRIORITY = 9
MAX_SEED = 2**63 - 1
# Postgres keeps token counts as int4; no context is longer.
MAX_TOKENS = 2**31 - 1

_CODES = {"missing": "missing_required_parameter", "extra_forbidden": "unknown_parameter"}

Key = Annotated[str, StringConstraints(min_length=1, max_length=255, pattern=r"^[^\x00-\x1f\x7f]+$")]
MetadataKey = Annotated[str, StringConstraints(min_length=1, max_length=64)]
MetadataValue = Annotated[str, StringConstraints(max_length=512)]
Stop = Annotated[str, StringConstraints(min_length=1, max_length=1000)]
TokenId = Annotated[int, Field(ge=0, le=MAX_TOKENS)]

Text = Annotated[str, StringConstraints(min_length=1)]
TokenIds = Annotated[tuple[TokenId, ...], Field(min_length=1)]


def _kind_of_prompt(prompt: object) -> str:
    return "text" if isinstance(prompt, str | bytes) else "tokens"


# Told apart before they are checked, so that a fault is that of what was given.
Prompt = Annotated[Annotated[Text, Tag("text")] | Annotated[TokenIds, Tag("tokens")], Discriminator(_kind_of_prompt)]


def _at_most(size: int) -> AfterValidator:
    """Bytes of UTF-8 or, of what is no text, of its JSON."""

    def check(value: Any) -> Any:
        try:
            found = len(value.encode() if isinstance(value, str) else orjson.dumps(value))
        except TypeError as error:  # an integer above 64 bits, nested too deep, half a surrogate pair
            raise PydanticCustomError("json", "cannot be written as JSON: {error}", {"error": str(error)}) from None
        if found > size:
            message = "has {found} bytes, at most {size} are accepted"
            raise PydanticCustomError("too_long", message, {"found": found, "size": size})
        return value

    return AfterValidator(check)


def _web_address(url: str) -> str:
    """Its form alone: where it leads is looked at when it is called."""
    try:
        parts = urlsplit(url)
        good = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
    except ValueError:
        good = False
    if not good or "@" in parts.netloc or parts.fragment:
        message = "must be an http or https URL with a host, without a user, a password or a fragment"
        raise PydanticCustomError("url", message)
    return url


Webhook = Annotated[
    # Printable ASCII: what is written otherwise has a form in that (percent signs, xn-- names).
    str, StringConstraints(max_length=MAX_URL_CHARACTERS, pattern=r"^[\x21-\x7e]+$"), AfterValidator(_web_address)
]
_WEBHOOK: TypeAdapter[str] = TypeAdapter(Webhook)

_NAMED = ConfigDict(extra="forbid")


class SchemaFormat(TypedDict):
    """A JSON schema as OpenAI's API wraps it; only the schema itself counts."""

    __pydantic_config__ = _NAMED  # type: ignore[misc]
    name: NotRequired[str]
    description: NotRequired[str | None]
    strict: NotRequired[bool | None]
    schema: Annotated[dict[str, Any], _at_most(MAX_SCHEMA_BYTES)]


class TextFormat(TypedDict):
    """Any text."""

    __pydantic_config__ = _NAMED  # type: ignore[misc]
    type: Literal["text"]


class JsonObjectFormat(TypedDict):
    """Any JSON object."""

    __pydantic_config__ = _NAMED  # type: ignore[misc]
    type: Literal["json_object"]


class JsonSchemaFormat(TypedDict):
    """JSON that satisfies a schema."""

    __pydantic_config__ = _NAMED  # type: ignore[misc]
    type: Literal["json_schema"]
    json_schema: SchemaFormat


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Discriminator("type")]


def _storable(message: object) -> object:
    # A message may quote anything an exception holds; Postgres takes neither NUL nor half a surrogate pair.
    return message.encode(errors="replace").decode().replace("\0", "\ufffd") if isinstance(message, str) else message


class Frozen(BaseModel):
    """Immutable, and refuses what it does not know."""

    # What is asked and answered is not quoted in errors, which are logged.
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)


class Message(Frozen):
    """One message of a chat."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    # With a constraint, even this one, pydantic refuses lone surrogates; a bare str lets them through.
    content: Annotated[str, StringConstraints(min_length=0)]


class JobRequest(Frozen):
    """One generation request. Exactly one of `messages` and `prompt` is given.

    Lengths are in tokens, times in seconds. A field that is None takes the model's default.
    """

    model: Annotated[str, StringConstraints(min_length=1, max_length=255)]
    messages: Annotated[tuple[Message, ...], Field(min_length=1)] | None = None
    prompt: Prompt | None = None

    max_tokens: int | None = Field(default=None, ge=0, le=MAX_TOKENS)
    """0 writes nothing: for the prompt's log probabilities alone."""
    min_tokens: int = Field(default=0, ge=0, le=MAX_TOKENS)
    """No end, not even a stop string, before so many tokens."""
    n: int = Field(default=1, ge=1, le=MAX_CHOICES)
    temperature: float | None = Field(default=None, ge=0, le=2, allow_inf_nan=False)
    """0 is greedy."""
    top_p: float = Field(default=1.0, gt=0, le=1, allow_inf_nan=False)
    top_k: int = Field(default=0, ge=0, le=MAX_TOKENS)
    """0 is off."""
    min_p: float = Field(default=0.0, ge=0, le=1, allow_inf_nan=False)
    presence_penalty: float = Field(default=0.0, ge=-2, le=2, allow_inf_nan=False)
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2, allow_inf_nan=False)
    repetition_penalty: float = Field(default=1.0, gt=0, le=10, allow_inf_nan=False)
    logit_bias: dict[TokenId, Annotated[float, Field(ge=-100, le=100)]] = Field(default_factory=dict, max_length=1024)
    seed: int | None = Field(default=None, ge=0, le=MAX_SEED)
    stop: Annotated[tuple[Stop, ...], Field(max_length=MAX_STOPS)] = ()
    stop_token_ids: Annotated[tuple[TokenId, ...], Field(max_length=MAX_STOP_TOKEN_IDS)] = ()
    """Like EOS: they end an answer and are no text."""
    ignore_eos: bool = False

    logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)
    """Tell how likely each token was, and so many of the likeliest in its place."""
    prompt_logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)
    """The same of the prompt's tokens."""
    echo: bool = False
    """Put the prompt before the answer, and its log probabilities, if there are some, before the answer's."""
    response_format: ResponseFormat | None = None
    regex: Annotated[Text, _at_most(MAX_REGEX_BYTES)] | None = None
    """What the whole answer must match. Of this, `choice` and a `response_format` that is not text, only one."""
    choice: (
        Annotated[tuple[Text, ...], Field(min_length=1, max_length=MAX_STRUCTURE_CHOICES), _at_most(MAX_SCHEMA_BYTES)]
        | None
    ) = None
    """The texts of which the answer must be one."""

    conversation: Key | None = None
    """Turns of one conversation run in order, each seeing the ones before it that succeeded."""
    instructions: str | None = None
    """A system message in front of everything, the turns before included; of this turn alone: no later one sees it."""
    stream: bool = False
    """Tell the answer's pieces while it is written."""
    idempotency_key: Key | None = None
    """The same key with the same request is the same job."""
    max_attempts: int | None = Field(default=None, ge=1, le=100)
    deadline_seconds: float | None = Field(default=None, gt=0, le=31_536_000, allow_inf_nan=False)
    """From acceptance to the end; later than that the job ends `expired`."""
    priority: int = Field(default=5, ge=0, le=MAX_PRIORITY)
    """0 goes first."""
    metadata: dict[MetadataKey, MetadataValue] = Field(default_factory=dict, max_length=MAX_METADATA_PAIRS)
    webhook: Webhook | None = None
    """A URL that is told when the job has ended."""

    @cached_property
    def findings(self) -> dict[str, str]:
        """Rules of the tenant's policy that took hold, and what each did. Ours to set: a request cannot bring any."""
        return {}

    def with_findings(self, findings: dict[str, str]) -> Self:
        """The same request, with these noted."""
        noted = self.model_copy()
        noted.__dict__["findings"] = dict(findings)
        return noted

    @model_validator(mode="after")
    def _one_input(self) -> Self:
        if self.messages is None and self.prompt is None:
            raise ValueError("messages: is required (or a `prompt`)")
        if self.messages is not None and self.prompt is not None:
            raise ValueError("prompt: cannot be given together with `messages`")
        if self.conversation is not None and self.messages is None:
            raise ValueError("conversation: a turn needs `messages`, not a `prompt`")
        if self.instructions is not None and self.messages is None:
            raise ValueError("instructions: go with `messages`, not with a `prompt`")
        return self

    @model_validator(mode="after")
    def _ends_add_up(self) -> Self:
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens: is above `max_tokens` ({self.max_tokens})")
        if self.max_tokens == 0 and not self.echo and self.prompt_logprobs is None:
            raise ValueError("max_tokens: 0 is only for `echo` or `prompt_logprobs`")
        if self.echo and self.prompt is None:
            raise ValueError("echo: needs a `prompt`, not `messages`")
        return self

    @model_validator(mode="after")
    def _one_structure(self) -> Self:
        asked = self.structures
        if len(asked) > 1:
            raise ValueError(f"{asked[1]}: cannot be given together with `{asked[0]}`")
        if asked and self.min_tokens:
            raise ValueError(
                f"min_tokens: cannot be given together with `{asked[0]}`, which says where the answer ends"
            )
        if asked and self.ignore_eos:
            raise ValueError(
                f"ignore_eos: cannot be given together with `{asked[0]}`, which says where the answer ends"
            )
        return self

    def chat(self, history: Sequence[dict[str, str]] = ()) -> list[dict[str, str]] | None:
        """The whole chat as a template takes it, the turns before it given; None if the request is a prompt."""
        if self.messages is None:
            return None
        first = [] if self.instructions is None else [{"role": "system", "content": self.instructions}]
        return [*first, *history, *(message.model_dump() for message in self.messages)]

    @property
    def structures(self) -> list[str]:
        """The fields that say which form the answer has; valid requests have at most one."""
        form = self.response_format
        asked = [] if form is None or form["type"] == "text" else ["response_format"]
        return [*asked, *(name for name in ("regex", "choice") if getattr(self, name) is not None)]

    @classmethod
    def parse(cls, fields: dict[str, Any] | JobRequest) -> JobRequest:
        """Validate, or raise RequestInvalid naming the first field at fault."""
        if isinstance(fields, JobRequest):
            return fields
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            raise request_fault(error) from None

    def payload(self) -> str:
        """The request as stored: JSON text, byte for byte what was asked, without what is at its default."""
        return self.model_dump_json(exclude_defaults=True)

    def metadata_payload(self) -> str | None:
        """The metadata as stored beside the payload: JSON text, None if there are none."""
        return orjson.dumps(self.metadata).decode() if self.metadata else None

    def findings_payload(self) -> str | None:
        """The findings as stored beside the payload."""
        return orjson.dumps(self.findings).decode() if self.findings else None

    def digest(self, payload: str | None = None) -> bytes:
        """Tells two requests apart: SHA-256 of the payload without its idempotency key. A payload at hand is used."""
        if self.idempotency_key is not None:
            payload = self.model_dump_json(exclude_defaults=True, exclude={"idempotency_key"})
        return hashlib.sha256((payload or self.payload()).encode()).digest()


class TokenLogprob(Frozen):
    """How likely a token was to the model, before temperature and all other rules: natural logarithms, six decimals."""

    token: str
    """Its text; a piece of a character is given by its bytes, as `bytes:\\xe2\\x82`."""
    id: int
    logprob: float | None = None
    """None: nothing comes before it."""
    top: tuple[tuple[str, float], ...] = ()
    """The likeliest in its place, in order, each with its logarithm."""


class Choice(Frozen):
    """One answer of `n`."""

    index: int
    text: str
    """After the prompt's, if that is to be echoed."""
    finish_reason: str
    logprobs: tuple[TokenLogprob, ...] | None = None
    """If asked for, one for each token of the answer, what ended it included; echoed, after the prompt's."""
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None
    """If asked for; they are the same for every choice, so only the first has them."""
    pieces: tuple[tuple[int, int], ...] = ()
    """If it was streamed: characters and tokens of each piece, so that its stream can be told again as it was."""

    def stored(self) -> dict[str, Any]:
        """For JSON, without what is at its default."""
        return self.model_dump(exclude_defaults=True)


class Usage(Frozen):
    """Tokens of one job. `cached_tokens` is the part of `prompt_tokens` that was not computed again."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0


class Timings(Frozen):
    """Seconds that the attempt which ended the job spent in each phase, and its share of the engine's busy time."""

    queue_seconds: float = 0.0
    tokenize_seconds: float = 0.0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    detokenize_seconds: float = 0.0
    time_to_first_token_seconds: float | None = None
    """From the moment the job could first start."""
    busy_seconds: float = 0.0


class JobError(Frozen):
    """Why a job did not succeed."""

    code: str
    message: Annotated[str, BeforeValidator(_storable)]


class Cost(Frozen):
    """The job's ledger row. Dollars by tokens and by machine time; busy seconds of all attempts."""

    busy_seconds: float
    token_dollars: Decimal
    machine_dollars: Decimal


class Call(Frozen):
    """How a job came over the API, beside what is to be run: who may have its answer, and what that repeats."""

    background: bool = False
    stored: bool = True
    """Whether it can be retrieved and gone on from."""
    previous: UUID | None = None
    """The response that it goes on from."""
    own_messages: int | None = None
    """How many messages at the end of the request are its own input; None: all of them."""
    echo: dict[str, Any] = Field(default_factory=dict)
    """Fields of the answer that are those of the request."""


class Job(Frozen):
    """A job as its owner sees it."""

    id: UUID
    tenant_id: str
    state: State
    model: str
    lane: Lane
    priority: int
    attempts: int
    max_attempts: int
    created_at: datetime
    started_at: datetime | None = None
    finished_at: datetime | None = None
    cancel_requested_at: datetime | None = None
    worker_id: UUID | None = None
    conversation: str | None = None
    turn: int | None = None
    batch_id: UUID | None = None
    line: int | None = None
    """Of the batch's input, from 1."""
    custom_id: str | None = None
    endpoint: str | None = None
    """The route the request was written for, such as `/v1/chat/completions`; None: for none."""
    call: Call | None = None
    """How it came over that route, if the answer needs to know."""
    metadata: dict[str, str] = Field(default_factory=dict)
    policy: dict[str, str] = Field(default_factory=dict)
    """Rules of the tenant's policy that took hold when it was accepted, and what each did: `redact` or `flag`."""
    choices: tuple[Choice, ...] = ()
    usage: Usage | None = None
    timings: Timings | None = None
    error: JobError | None = None
    cost: Cost | None = None
    served_by: str | None = None
    """What ran: model, engine, quantization and device, as the engine names them."""

    @property
    def text(self) -> str:
        """The first choice's text; empty while there is none."""
        return self.choices[0].text if self.choices else ""

    def log_context(self) -> dict[str, str]:
        """What every log line about this job carries."""
        return {"job": str(self.id), "model": self.model, "state": self.state}


def webhook_of(value: object) -> str:
    """A webhook that is no field of a request. Raises RequestInvalid."""
    try:
        return _WEBHOOK.validate_python(value, strict=True)
    except ValidationError as error:
        fault = request_fault(error)
        raise RequestInvalid("webhook", fault.message, fault.code) from None


def request_fault(error: ValidationError) -> RequestInvalid:
    """The first fault of a request, with the dotted path of its field."""
    fault = error.errors(include_url=False)[0]
    field = _dotted(fault["loc"]) or "request"
    message = fault["msg"]
    if fault["type"] == "value_error":  # ours, from a validator of the whole
        field, _, message = message.removeprefix("Value error, ").partition(": ")
    code = _CODES.get(fault["type"], "invalid_value")
    return RequestInvalid(field, message[:1].lower() + message[1:], code)


def _dotted(location: tuple[int | str, ...]) -> str:
    path = ""
    for part in _of_the_user(location):
        if isinstance(part, int):
            path += f"[{part}]"
        else:
            path += f".{part}" if path else part
    return path


def _of_the_user(location: tuple[int | str, ...]) -> tuple[int | str, ...]:
    """Without what pydantic puts in: the tag of a prompt's or a format's kind, and its mark of a mapping's key."""
    if location[:1] in {("prompt",), ("response_format",)}:
        return location[:1] + location[2:]
    return location[:-1] if location[-1:] == ("[key]",) else location
