"""From the body of an OpenAI call to a `JobRequest`.

    asked = translate("/v1/chat/completions", {"model": "echo", "messages": [{"role": "user", "content": "Hello"}]})
    request = asked.checked(validator.check)

Text only. `null` is as good as absent, and what nobody knows is ignored. What would change the answer but cannot be
done yet (tools, images, ...) is refused. Errors name a field as the caller does.
Whoever keeps responses and conversations looks up what came before and puts it into `input` first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from jobs.errors import RequestInvalid
from jobs.schema import JobRequest

CHAT: Final = "/v1/chat/completions"
COMPLETIONS: Final = "/v1/completions"
RESPONSES: Final = "/v1/responses"

# The wire's own default, of this endpoint alone.
_COMPLETION_MAX_TOKENS = 16

Body = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Asked:
    """A request as it came over the wire: what is to be run, and what the caller calls its fields."""

    request: JobRequest
    names: Mapping[str, str]  # our field: the caller's, where they differ

    def checked(self, check: Callable[[JobRequest], JobRequest]) -> JobRequest:
        """What `check` makes of the request; what it refuses is named in the caller's terms."""
        try:
            return check(self.request)
        except RequestInvalid as error:
            raise renamed(error, self.names) from None


@dataclass(frozen=True, slots=True)
class Endpoint:
    """How one route's body differs from the others'."""

    prompt: Callable[[Body], dict[str, Any]]  # the fields of a JobRequest that carry the prompt
    prompt_name: str
    logprobs: Callable[[Body], int | None]  # how many alternatives are to be told of each token
    limits: tuple[str, ...]  # the names of `max_tokens`, the first one given counts
    sampling: tuple[str, ...]
    # What is refused, unless its value is one of these: names without values are never accepted.
    refused: Mapping[str, tuple[Any, ...]]


def translate(endpoint: str, body: Body) -> Asked:
    """The request that this body of this endpoint asks for. Raises RequestInvalid in the caller's terms."""
    route = ENDPOINTS[endpoint]
    given = {name: value for name, value in body.items() if value is not None}
    _refuse(given, route.refused)
    limit = next((name for name in route.limits if name in given), route.limits[0])
    names = {"max_tokens": limit, "messages": route.prompt_name, "prompt": route.prompt_name}
    names |= {"logprobs": "top_logprobs"} if "top_logprobs" in given else {}
    names |= {"response_format": "text.format"} if "text" in given else {}
    fields = {"model": _typed(given, "model"), "max_tokens": _optional(given, limit)}
    fields |= {name: _optional(given, name) for name in route.sampling if name in given}
    fields |= {"logprobs": route.logprobs(given)} | route.prompt(given)
    if fields.get("response_format") == {"type": "text"}:
        del fields["response_format"]
    try:
        return Asked(JobRequest.parse(fields), names)
    except RequestInvalid as error:
        raise renamed(error, names) from None


def renamed(error: RequestInvalid, names: Mapping[str, str]) -> RequestInvalid:
    """The error with the field called as `names` says; a path behind the field stays."""
    root = error.field.partition("[")[0].partition(".")[0]
    name = names.get(root, root)
    if name == root:
        return error
    return RequestInvalid(name + error.field[len(root) :], error.message, error.code)


# == types ======================================================================================================

_WORDS: dict[type | tuple[type, ...], str] = {
    str: "a string",
    int: "an integer",
    (int, float): "a number",
    bool: "true or false",
    dict: "an object",
    list: "a list",
    (str, list): "a string or a list",
}

_TYPES: dict[str, type | tuple[type, ...]] = {
    "model": str,
    "max_completion_tokens": int,
    "max_tokens": int,
    "max_output_tokens": int,
    "n": int,
    "best_of": int,
    "seed": int,
    "top_k": int,
    "temperature": (int, float),
    "top_p": (int, float),
    "min_p": (int, float),
    "presence_penalty": (int, float),
    "frequency_penalty": (int, float),
    "repetition_penalty": (int, float),
    "logit_bias": dict,
    "stop": (str, list),
    "stop_token_ids": list,
    "min_tokens": int,
    "ignore_eos": bool,
    "echo": bool,
    "top_logprobs": int,
    "response_format": dict,
    "metadata": dict,
    "messages": list,
    "prompt": (str, list),
    "input": (str, list),
    "instructions": str,
    "text": dict,
    "include": list,
}


def _optional(given: Body, name: str) -> Any:
    return _typed(given, name) if name in given else None


def _typed(given: Body, name: str) -> Any:
    """The field's value. Raises RequestInvalid if it is missing or of another JSON type."""
    if name not in given:
        raise RequestInvalid(name, "is missing", "missing_required_parameter")
    value = given[name]
    _check_type(name, value, _TYPES[name])
    return (value,) if name == "stop" and isinstance(value, str) else value


def _check_type(path: str, value: Any, kind: type | tuple[type, ...]) -> None:
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise RequestInvalid(path, f"must be {_WORDS[kind]}", "invalid_type")


def _refuse(given: Body, refused: Mapping[str, tuple[Any, ...]]) -> None:
    for name, accepted in refused.items():
        if name not in given or given[name] in accepted:
            continue
        if not accepted:
            raise RequestInvalid(name, "is not supported", "unsupported_parameter")
        raise _unsupported(name, f"this value is not supported; supported: {', '.join(map(str, accepted))}")


def _unsupported(path: str, message: str) -> RequestInvalid:
    return RequestInvalid(path, message, "unsupported_value")


# == prompts ====================================================================================================

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
_TEXT_PARTS = ("text", "input_text", "output_text")


def _chat_prompt(given: Body) -> dict[str, Any]:
    return {"messages": messages_of("messages", _typed(given, "messages"))}


def _response_prompt(given: Body) -> dict[str, Any]:
    asked = _typed(given, "input")
    messages = [{"role": "user", "content": asked}] if isinstance(asked, str) else messages_of("input", asked)
    return {
        "messages": messages,
        "instructions": _optional(given, "instructions"),
        "metadata": _optional(given, "metadata") or {},
        "response_format": _response_format((_optional(given, "text") or {}).get("format")),
    }


def _response_format(form: Any) -> Any:
    """Here a schema's fields lie beside the type; chat completions and we have them in an object of their own."""
    if isinstance(form, dict) and form.get("type") == "json_schema":
        return {"type": "json_schema", "json_schema": {name: form[name] for name in form if name != "type"}}
    return form


def messages_of(path: str, items: Sequence[Any]) -> list[dict[str, str]]:
    """Messages with plain text, of those in any form of the wire. Raises RequestInvalid."""
    if not items:
        raise RequestInvalid(path, "must not be empty")
    return [_message(f"{path}[{index}]", item) for index, item in enumerate(items)]


def _message(path: str, item: Any) -> dict[str, str]:
    _check_type(path, item, dict)
    if item.get("type", "message") != "message":
        raise _unsupported(f"{path}.type", "only messages are supported")
    for name in ("tool_calls", "function_call"):
        if item.get(name):
            raise _unsupported(f"{path}.{name}", "calling tools is not supported")
    return {"role": _role(f"{path}.role", item.get("role")), "content": _text(f"{path}.content", item.get("content"))}


def _role(path: str, role: Any) -> str:
    if role is None:
        raise RequestInvalid(path, "is missing", "missing_required_parameter")
    _check_type(path, role, str)
    if role not in _ROLES:
        raise RequestInvalid(path, f"must be one of {', '.join(_ROLES)}")
    # A developer's message is what a system message was before; chat templates know the older word.
    return _ROLES[role]


def _text(path: str, content: Any) -> str:
    if content is None:
        raise RequestInvalid(path, "is missing", "missing_required_parameter")
    _check_type(path, content, (str, list))
    if isinstance(content, str):
        return content
    return "".join(_part(f"{path}[{index}]", part) for index, part in enumerate(content))


def _part(path: str, part: Any) -> str:
    _check_type(path, part, dict)
    if part.get("type") not in _TEXT_PARTS:
        raise _unsupported(f"{path}.type", "only text is supported")
    text = part.get("text")
    _check_type(f"{path}.text", text, str)
    return str(text)


def _completion_prompt(given: Body) -> dict[str, Any]:
    if _optional(given, "best_of") not in (None, given.get("n", 1)):
        raise _unsupported("best_of", "must be as large as n")
    limit = {} if "max_tokens" in given else {"max_tokens": _COMPLETION_MAX_TOKENS}
    return {"prompt": _one_prompt(_typed(given, "prompt")), "echo": _optional(given, "echo") or False} | limit


def _one_prompt(prompt: str | list[Any]) -> str | list[int]:
    """A text, or token ids; either may stand in a list of its own."""
    if not prompt:
        raise RequestInvalid("prompt", "must not be empty")
    if isinstance(prompt, str) or all(type(token) is int for token in prompt):
        return prompt
    if len(prompt) > 1:
        raise _unsupported("prompt", "must be one prompt; send a request for each")
    _check_type("prompt[0]", prompt[0], (str, list))
    if isinstance(prompt[0], list) and not all(type(token) is int for token in prompt[0]):
        raise RequestInvalid("prompt[0]", "must be a string or a list of token ids", "invalid_type")
    return _one_prompt(prompt[0])


# == log probabilities ==========================================================================================


def _chat_logprobs(given: Body) -> int | None:
    wanted, top = given.get("logprobs", False), _optional(given, "top_logprobs")
    _check_type("logprobs", wanted, bool)
    if top and not wanted:
        raise RequestInvalid("top_logprobs", "needs `logprobs` to be true")
    return (top or 0) if wanted else None


def _completion_logprobs(given: Body) -> int | None:
    if "logprobs" not in given:
        return None
    _check_type("logprobs", given["logprobs"], int)
    return int(given["logprobs"])


def _response_logprobs(given: Body) -> int | None:
    top = _optional(given, "top_logprobs")
    return top or 0 if "message.output_text.logprobs" in (_optional(given, "include") or ()) else top or None


# == endpoints ==================================================================================================

_SAMPLING = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "logit_bias",
    "seed",
    "stop",
    "stop_token_ids",
    "min_tokens",
    "ignore_eos",
)
_NO_TOOLS: dict[str, tuple[Any, ...]] = {"tools": ([],), "tool_choice": ("none", "auto"), "moderation": ()}

ENDPOINTS: Mapping[str, Endpoint] = {
    CHAT: Endpoint(
        prompt=_chat_prompt,
        prompt_name="messages",
        logprobs=_chat_logprobs,
        limits=("max_completion_tokens", "max_tokens"),
        sampling=("n", "response_format", *_SAMPLING),
        refused=_NO_TOOLS
        | {
            "functions": ([],),
            "function_call": ("none", "auto"),
            "modalities": (["text"],),
            "audio": (),
            "web_search_options": (),
        },
    ),
    COMPLETIONS: Endpoint(
        prompt=_completion_prompt,
        prompt_name="prompt",
        logprobs=_completion_logprobs,
        limits=("max_tokens",),
        sampling=("n", "response_format", *_SAMPLING),
        refused={"suffix": ("",)},
    ),
    RESPONSES: Endpoint(
        prompt=_response_prompt,
        prompt_name="input",
        logprobs=_response_logprobs,
        limits=("max_output_tokens",),
        sampling=_SAMPLING,
        refused=_NO_TOOLS
        | {
            "prompt": (),
            "context_management": (),
            "previous_response_id": (),
            "conversation": (),
            # Nothing is ever cut off: what is too long is refused either way.
            "truncation": ("disabled", "auto"),
        },
    ),
}
