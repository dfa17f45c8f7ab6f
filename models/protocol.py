"""The words an engine speaks: requests in, events out, one protocol for every engine.

Standard library only, so that a producer, a worker and an engine can all hold these values. They are frozen: whoever
has one may pass it to another thread. `models.wire` carries them between processes.

    EngineError
    ├── InvalidRequest       refused at intake, never retried
    │   └── DuplicateRequest an open request has this id
    └── ModelLoadError       the model cannot be served as asked
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

Outcome: TypeAlias = Literal["succeeded", "cancelled", "expired", "failed", "released"]
FinishReason: TypeAlias = Literal["stop", "length", "cancelled", "deadline", "error"]

MAX_CHOICES = 128
MAX_STOP_STRINGS = 16
MAX_STOP_CHARACTERS = 1_000
MAX_STOP_TOKEN_IDS = 1_024
MAX_LOGIT_BIASES = 1_024
MAX_TOP_LOGPROBS = 20
MAX_LOGPROB_VALUES = 2**18  # of one request; some 8 MB of JSON in its result
MAX_SCHEMA_BYTES = 64 * 1_024
MAX_REGEX_BYTES = 4 * 1_024
MAX_STRUCTURE_CHOICES = 1_024
FIRST_STEPS = 10  # of an engine, which may be long: kernels are compiled, graphs captured


class EngineError(Exception):
    """Anything an engine, or the way to it, reports by raising."""


class InvalidRequest(EngineError):
    """The request breaks the contract; `field` is the name a caller knows it by. It was not taken in."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field
        self.message = message


class DuplicateRequest(InvalidRequest):
    """A request with this id has not ended yet."""

    def __init__(self, request_id: str) -> None:
        super().__init__("id", f"{request_id!r} is already in the engine")


class ModelLoadError(EngineError):
    """The model cannot be loaded or run as its spec asks; the message names the model and the reason."""


@dataclass(frozen=True, slots=True)
class Structure:
    """The form that a choice's whole text must have: exactly one of these is given."""

    json_schema: str | None = None  # a JSON text that satisfies this schema, itself given as JSON text
    regex: str | None = None  # what this expression matches from end to end
    choice: tuple[str, ...] | None = None  # one of these texts
    json_object: bool = False  # any JSON object

    @property
    def field(self) -> str:
        """The name under which a caller asks for it."""
        return "regex" if self.regex is not None else "choice" if self.choice is not None else "response_format"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen and when a choice ends. Ranges are checked by `check_request`, not here."""

    max_tokens: int  # of each choice, at least 1; 0 (nothing but the prompt) only with prompt_logprobs
    temperature: float = 1.0  # 0 (greedy) to 2
    top_p: float = 1.0  # above 0, at most 1 (off)
    top_k: int = 0  # 0 is off
    min_p: float = 0.0  # 0 (off) to 1, relative to the likeliest token
    presence_penalty: float = 0.0  # -2 to 2, on generated tokens
    frequency_penalty: float = 0.0  # -2 to 2, on generated tokens, times their count
    repetition_penalty: float = 1.0  # above 0, at most 10; divides (multiplies) logits of tokens seen, prompt included
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, -100 to 100)
    seed: int | None = None  # signed 64 bits; None draws from the system
    stop: tuple[str, ...] = ()  # the text ends before the first of these
    n: int = 1  # choices, each with random numbers of its own
    ignore_eos: bool = False  # go on to max_tokens (measurements)
    stop_token_ids: tuple[int, ...] = ()  # like EOS: they end the choice and are no text
    min_tokens: int = 0  # none of the first so many tokens is EOS or a stop token, or completes a stop string
    logprobs: int | None = (
        None  # how many alternatives (0 to 20) to tell beside each generated token; None: tell nothing
    )
    prompt_logprobs: int | None = None  # the same of the prompt's tokens
    structure: Structure | None = None


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One prompt and how to continue it."""

    id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    deadline_seconds: float | None = None  # from intake; then the request ends as "expired" with what it has
    stream: bool = False  # whether Delta events are wanted
    return_token_ids: bool = True  # whether the choices of its Ended carry their token ids, or only text
    priority: int = 5  # 0 goes first, 9 last
    cache_salt: str = "local"  # only requests with the same salt may share cached keys and values


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """How likely the model found a token, as natural logarithms rounded to six decimals.

    Of the model's own distribution: before temperature, penalties, biases, truncation and structure.
    """

    token_id: int
    logprob: float | None  # None for the first token of a prompt: nothing comes before it
    top: tuple[tuple[int, float], ...] = ()  # (token id, logprob) of the likeliest, in order, as many as were asked for


@dataclass(frozen=True, slots=True)
class Choice:
    """One continuation. `text` holds whole characters only; `token_ids`, if wanted, includes the EOS that ended it."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    logprobs: tuple[TokenLogprobs, ...] = ()  # if wanted, one for each token, EOS and stop string included


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one request; `cached_tokens` is the part of the prompt that was not computed again."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0  # over all choices


@dataclass(frozen=True, slots=True)
class Timings:
    """Where a request's time in the engine went, in seconds. Queue, prefill and decode follow one another."""

    queue_seconds: float = 0.0  # intake to first step
    prefill_seconds: float = 0.0  # first step to first token
    decode_seconds: float = 0.0  # first token to the end
    detokenize_seconds: float = 0.0  # part of the two above
    time_to_first_token_seconds: float | None = None  # from intake; None if none came
    busy_seconds: float = 0.0  # this request's share of the engine's time


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a request failed.

    Codes: out_of_memory, engine_error, nan_logits, engine_lost (all may pass on another try), invalid_request and
    structure_failed (never).
    """

    code: str
    message: str
    retryable: bool
    in_company: bool = False  # of an engine that was lost with several requests: any of them may be to blame


@dataclass(frozen=True, slots=True)
class Started:
    """A step has worked on the request for the first time. Comes before its deltas; never if no step touched it.

    It stays in the engine's process, where the execution log is written: no worker asks for it.
    """

    id: str


@dataclass(frozen=True, slots=True)
class Delta:
    """New text of one choice, in order, and the tokens since the last; only for requests with `stream`.

    The texts join to the choice's text.
    """

    id: str
    choice: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()  # of these tokens, if wanted


@dataclass(frozen=True, slots=True)
class Ended:
    """The last event of a request, exactly one for each that was submitted.

    Cancelled, expired and failed ones carry what they had: choices so far, tokens and time to be billed.
    "released" means that no step touched it: whoever asked may hand it to another engine at no cost.
    """

    id: str
    outcome: Outcome
    choices: tuple[Choice, ...] = ()
    usage: Usage = Usage()
    timings: Timings = Timings()
    error: Failure | None = None  # present if and only if outcome is "failed"
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()  # if wanted, one for each token of the prompt


Event: TypeAlias = Started | Delta | Ended


@dataclass(frozen=True, slots=True)
class GpuLoad:
    """A GPU as its driver sees it, whoever uses it."""

    name: str
    utilization: float | None  # share of the last moments in which it computed, 0 to 1; None: it does not say
    memory_used_bytes: int
    memory_total_bytes: int


@dataclass(frozen=True, slots=True)
class Health:
    """What an engine is and does at this moment. `running` and `waiting` count rows (a request has n)."""

    model: str
    engine: str
    quantization: str
    device: str
    slots: int
    context_tokens: int
    running: int
    waiting: int
    steps: int
    busy_seconds: float  # all steps together; the shares of all requests add up to it
    step_seconds: float | None  # age of the step in progress, None between steps
    first_steps_seconds: float  # the longest of the first `FIRST_STEPS`, and
    later_steps_seconds: float  # of all those after them, that are finished
    started_at: float  # seconds since the epoch
    pid: int
    gpu: GpuLoad | None = None  # None: there is none, or nothing is known of it


class Engine(Protocol):
    """A model that can be asked. One thread owns it; only `health` may be called from others.

    The owner's loop: submit what arrived, `step` while `has_work`, pass the events on.
    """

    def submit(self, request: GenerationRequest) -> None:
        """Take the request in, or raise `InvalidRequest`. Touches no device and returns at once."""

    def cancel(self, request_id: str) -> None:
        """End the request in the next step with what it has; an unknown id is ignored."""

    def step(self) -> list[Event]:
        """One forward pass over the rows that run; returns [] when idle.

        A fault ends requests. It raises only if the device is beyond repair: then the process must end.
        """

    def has_work(self) -> bool:
        """Whether a step would do anything."""

    def drain(self) -> list[Event]:
        """End at once, as "released", every request that no step has touched; the others go on."""

    def health(self) -> Health:
        """Never blocks, even while a step hangs in another thread."""

    def close(self) -> None:
        """Free the device. Open requests end without an event."""


def check_request(request: GenerationRequest, *, vocab_tokens: int, context_tokens: int) -> None:
    """Raise `InvalidRequest` unless an engine with this vocabulary and context can serve the request.

    Types are checked too: what comes over a socket has only been parsed.
    """
    _require(_is_text(request.id, at_most=256), "id", "must be text of 1 to 256 characters")
    _check_prompt(request.prompt_token_ids, vocab_tokens)
    _check_sampling(request.sampling, vocab_tokens)
    _check_logprobs(request.sampling, len(request.prompt_token_ids))
    _check_length(len(request.prompt_token_ids), request.sampling.max_tokens, context_tokens)
    deadline = request.deadline_seconds
    good = deadline is None or _is_number(deadline, above=0.0)
    _require(good, "deadline_seconds", "must be above 0, not {!r}", deadline)
    _require(_is_integer(request.priority, 0, 9), "priority", "must be 0 to 9, not {!r}", request.priority)
    _require(isinstance(request.cache_salt, str), "cache_salt", "must be text")


def _check_prompt(token_ids: Sequence[int], vocab_tokens: int) -> None:
    _require(len(token_ids) > 0, "prompt", "must hold at least one token")
    if set(map(type, token_ids)) == {int} and min(token_ids) >= 0 and max(token_ids) < vocab_tokens:
        return  # the common case, without a Python loop
    stray = next(token for token in token_ids if not _is_integer(token, 0, vocab_tokens - 1))
    raise InvalidRequest("prompt", f"token id {stray!r} is not in the vocabulary of {vocab_tokens}")


def _check_sampling(sampling: SamplingParams, vocab_tokens: int) -> None:
    fewest = 1 if sampling.prompt_logprobs is None else 0
    good = _is_integer(sampling.max_tokens, fewest)
    _require(good, "max_tokens", "must be at least {}, not {!r}", fewest, sampling.max_tokens)
    _check_range("temperature", sampling.temperature, 0.0, 2.0)
    good = _is_number(sampling.top_p, above=0.0, at_most=1.0)
    _require(good, "top_p", "must be above 0 and at most 1, not {!r}", sampling.top_p)
    _require(_is_integer(sampling.top_k, 0), "top_k", "must be 0 (off) or more, not {!r}", sampling.top_k)
    _check_range("min_p", sampling.min_p, 0.0, 1.0)
    _check_range("presence_penalty", sampling.presence_penalty, -2.0, 2.0)
    _check_range("frequency_penalty", sampling.frequency_penalty, -2.0, 2.0)
    good = _is_number(sampling.repetition_penalty, above=0.0, at_most=10.0)
    _require(good, "repetition_penalty", "must be above 0 and at most 10, not {!r}", sampling.repetition_penalty)
    seed = sampling.seed
    _require(seed is None or _is_integer(seed, -(2**63), 2**63 - 1), "seed", "must fit 64 bits, not {!r}", seed)
    _require(_is_integer(sampling.n, 1, MAX_CHOICES), "n", "must be 1 to {}, not {!r}", MAX_CHOICES, sampling.n)
    _check_stop(sampling.stop)
    _check_stop_token_ids(sampling.stop_token_ids, vocab_tokens)
    _check_logit_bias(sampling.logit_bias, vocab_tokens)
    good = _is_integer(sampling.min_tokens, 0, sampling.max_tokens)
    problem = "must be 0 to max_tokens ({}), not {!r}"
    _require(good, "min_tokens", problem, sampling.max_tokens, sampling.min_tokens)
    if sampling.structure is not None:
        check_structure(sampling.structure)
        _require(
            sampling.min_tokens == 0, "min_tokens", "cannot be given together with a structure, which has its own end"
        )
        _require(
            not sampling.ignore_eos, "ignore_eos", "cannot be given together with a structure, which has its own end"
        )


def _check_stop(stop: Sequence[str]) -> None:
    _require(len(stop) <= MAX_STOP_STRINGS, "stop", "at most {} strings, not {}", MAX_STOP_STRINGS, len(stop))
    fits = all(_is_text(text, at_most=MAX_STOP_CHARACTERS) for text in stop)
    _require(fits, "stop", "each string must have 1 to {} characters", MAX_STOP_CHARACTERS)


def _check_stop_token_ids(token_ids: Sequence[int], vocab_tokens: int) -> None:
    field, count = "stop_token_ids", len(token_ids)
    _require(count <= MAX_STOP_TOKEN_IDS, field, "at most {} tokens, not {}", MAX_STOP_TOKEN_IDS, count)
    for token in token_ids:
        known = _is_integer(token, 0, vocab_tokens - 1)
        _require(known, field, "token id {!r} is not in the vocabulary of {}", token, vocab_tokens)


def _check_logprobs(sampling: SamplingParams, prompt_tokens: int) -> None:
    for field, top in (("logprobs", sampling.logprobs), ("prompt_logprobs", sampling.prompt_logprobs)):
        good = top is None or _is_integer(top, 0, MAX_TOP_LOGPROBS)
        _require(good, field, "must be 0 to {}, not {!r}", MAX_TOP_LOGPROBS, top)
    check_logprob_values(sampling.n * sampling.max_tokens, sampling.logprobs, prompt_tokens, sampling.prompt_logprobs)


def check_logprob_values(tokens: int, top: int | None, prompt_tokens: int, prompt_top: int | None) -> None:
    """Raise `InvalidRequest` if telling so many alternatives of so many tokens would be too much for one result."""
    generated = 0 if top is None else tokens * (1 + top)
    prompt = 0 if prompt_top is None else prompt_tokens * (1 + prompt_top)
    field, values = "logprobs" if generated >= prompt else "prompt_logprobs", generated + prompt
    _require(values <= MAX_LOGPROB_VALUES, field, "could be {:,} values; at most {:,}", values, MAX_LOGPROB_VALUES)


def check_structure(structure: Structure) -> None:
    """Raise `InvalidRequest` unless it is of the right form and size; whether it makes sense, its compiler knows."""
    given = (structure.json_schema is not None, structure.regex is not None, structure.choice is not None)
    _require(sum((*given, structure.json_object)) == 1, structure.field, "exactly one kind of structure must be given")
    if structure.json_schema is not None:
        _check_size("response_format", structure.json_schema, MAX_SCHEMA_BYTES)
        _require(_is_schema(structure.json_schema), "response_format", "the schema must be a JSON object")
    if structure.regex is not None:
        _check_size("regex", structure.regex, MAX_REGEX_BYTES)
    if structure.choice is not None:
        count = len(structure.choice)
        good = 1 <= count <= MAX_STRUCTURE_CHOICES
        _require(good, "choice", "must be 1 to {} texts, not {}", MAX_STRUCTURE_CHOICES, count)
        for text in structure.choice:
            _check_size("choice", text, MAX_SCHEMA_BYTES)
        _check_size("choice", "".join(structure.choice), MAX_SCHEMA_BYTES)


def _check_size(field: str, text: object, at_most_bytes: int) -> None:
    _require(_is_text(text, at_most_bytes), field, "must be text of 1 to {:,} bytes", at_most_bytes)
    size = len(str(text).encode(errors="replace"))
    _require(size <= at_most_bytes, field, "has {:,} bytes, at most {:,}", size, at_most_bytes)


def _is_schema(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def _check_logit_bias(biases: Sequence[tuple[int, float]], vocab_tokens: int) -> None:
    count = len(biases)
    _require(count <= MAX_LOGIT_BIASES, "logit_bias", "at most {} tokens, not {}", MAX_LOGIT_BIASES, count)
    for token, bias in biases:
        known = _is_integer(token, 0, vocab_tokens - 1)
        _require(known, "logit_bias", "token id {!r} is not in the vocabulary of {}", token, vocab_tokens)
        _check_range("logit_bias", bias, -100.0, 100.0)


def _check_length(prompt_tokens: int, max_tokens: int, context_tokens: int) -> None:
    if prompt_tokens >= context_tokens:
        raise InvalidRequest("prompt", f"has {prompt_tokens} tokens, the context holds {context_tokens}")
    if prompt_tokens + max_tokens > context_tokens:
        room = context_tokens - prompt_tokens
        raise InvalidRequest(
            "max_tokens",
            f"{max_tokens} after a prompt of {prompt_tokens} is above the context of {context_tokens}; at most {room}",
        )


def _check_range(field: str, value: float, low: float, high: float) -> None:
    inside = _is_number(value, at_least=low, at_most=high)
    _require(inside, field, "must be {:g} to {:g}, not {!r}", low, high, value)


def _require(condition: bool, field: str, message: str, *values: object) -> None:  # noqa: FBT001  reads as a sentence
    """Like a logger, put a message and its values together only when it is needed: a request passes all of these."""
    if not condition:
        raise InvalidRequest(field, message.format(*values))


def _is_integer(value: object, low: int, high: int | None = None) -> bool:
    """Whether it is an integer in the closed interval; True and False are not."""
    return type(value) is int and value >= low and (high is None or value <= high)


def _is_number(
    value: object, *, above: float = -math.inf, at_least: float = -math.inf, at_most: float = math.inf
) -> bool:
    """Whether it is a finite number in the interval."""
    if type(value) not in {int, float}:
        return False
    number = float(value)  # type: ignore[arg-type]
    return math.isfinite(number) and number > above and at_least <= number <= at_most


def _is_text(value: object, at_most: int) -> bool:
    return isinstance(value, str) and 0 < len(value) <= at_most
