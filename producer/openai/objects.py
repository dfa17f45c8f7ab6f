"""From a job to the objects of OpenAI's API: every field that its types require, as plain dictionaries."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from typing import Any, TypeAlias

from jobs.batches import Ended
from jobs.schema import Call, Choice, Job, TokenLogprob, Usage
from jobs.states import State
from producer.openai.requests import CHAT, COMPLETIONS, RESPONSES

Object = dict[str, Any]
Answered: TypeAlias = Job | Ended

_STATUS = {
    State.BLOCKED: "queued",
    State.QUEUED: "queued",
    State.RUNNING: "in_progress",
    State.SUCCEEDED: "completed",
    State.CANCELLED: "cancelled",
    State.FAILED: "failed",
    State.EXPIRED: "failed",
}


def answer(job: Answered) -> Object:
    """What the endpoint that the job was written for returns; a chat completion if there was none."""
    return _OBJECTS[job.endpoint or CHAT](job)


def chat_completion(job: Answered) -> Object:
    """A ChatCompletion."""
    return _completion(job, "chatcmpl", "chat.completion") | {"choices": [_chat_choice(c) for c in job.choices]}


def text_completion(job: Answered) -> Object:
    """A Completion."""
    return _completion(job, "cmpl", "text_completion") | {"choices": [_text_choice(c) for c in job.choices]}


def response(job: Answered) -> Object:
    """A Response. What it repeats of its request is known if it came over the API by itself."""
    status = response_status(job)
    call = job.call or Call()
    return {
        "id": f"resp_{job.id.hex}",
        "object": "response",
        "created_at": _unix(job.created_at),
        "completed_at": _unix(job.finished_at) if status == "completed" and job.finished_at else None,
        "status": status,
        "background": call.background,
        "error": _response_error(job),
        "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
        "instructions": None,
        "max_output_tokens": None,
        "model": job.model,
        "output": [message_item(job, status)] if job.choices else [],
        "parallel_tool_calls": True,
        "previous_response_id": f"resp_{call.previous.hex}" if call.previous else None,
        "conversation": {"id": job.conversation} if job.conversation else None,
        "reasoning": {"effort": None, "summary": None},
        "service_tier": "default",
        "store": call.stored,
        "temperature": None,
        "text": {"format": {"type": "text"}},
        "tool_choice": "auto",
        "tools": [],
        "top_p": None,
        "truncation": "disabled",
        "usage": _response_usage(job.usage) if job.state.final and job.usage else None,
        "metadata": dict(job.metadata),
        **call.echo,
    }


def error_body(message: str, kind: str, param: str | None, code: str | None) -> Object:
    """The envelope of every error."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _completion(job: Answered, prefix: str, kind: str) -> Object:
    return {
        "id": f"{prefix}-{job.id.hex}",
        "object": kind,
        "created": _unix(job.created_at),
        "model": job.model,
        "usage": usage_object(job.usage or Usage()),
        # What ran: two answers with the same fingerprint, seed and prompt should be the same.
        "system_fingerprint": job.served_by,
    }


def _chat_choice(choice: Choice) -> Object:
    return {
        "index": choice.index,
        "message": {"role": "assistant", "content": choice.text, "refusal": None},
        "logprobs": None if choice.logprobs is None else {"content": token_objects(choice.logprobs), "refusal": None},
        "finish_reason": finish_reason(choice),
    }


def _text_choice(choice: Choice) -> Object:
    return {
        "index": choice.index,
        "text": choice.text,
        "logprobs": None if choice.logprobs is None else columns(choice.text, choice.logprobs),
        "finish_reason": finish_reason(choice),
    }


def token_objects(logprobs: Sequence[TokenLogprob]) -> list[Object]:
    """Log probabilities as chat completions and responses have them: an object for each token."""
    return [
        _token(one.token, one.logprob) | {"top_logprobs": [_token(token, value) for token, value in one.top]}
        for one in logprobs
    ]


def _token(token: str, logprob: float | None) -> Object:
    return {"token": token, "bytes": list(_bytes_of(token)), "logprob": logprob}


def columns(text: str, logprobs: Sequence[TokenLogprob], offset: int = 0) -> Object:
    """Log probabilities as completions have them: a list for each kind of fact, null for what nothing comes before.

    The text is the part behind `offset` characters.

    The alternatives are keyed by text, the token itself among them: of two with the same text the likelier one stays.
    """
    return {
        "tokens": [one.token for one in logprobs],
        "token_logprobs": [one.logprob for one in logprobs],
        "top_logprobs": [
            None if one.logprob is None else dict([(one.token, one.logprob), *reversed(one.top)]) for one in logprobs
        ],
        "text_offset": [offset + start for start in _offsets(text, logprobs)],
    }


def _offsets(text: str, logprobs: Sequence[TokenLogprob]) -> Iterator[int]:
    """Where in the text each token begins, in characters. What is not in it, such as EOS, takes no place there."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    at = 0
    for one in logprobs:
        yield at
        piece = decoder.decode(_bytes_of(one.token))
        # a tokenizer of sentence pieces writes a space before the first word, which is not in the text
        shown = next((form for form in (piece, piece.lstrip(" ")) if text.startswith(form, at)), "")
        at += len(shown)


def _bytes_of(token: str) -> bytes:
    if token.startswith("bytes:\\x"):
        return bytes.fromhex(token.removeprefix("bytes:").replace("\\x", ""))
    return token.encode()


def finish_reason(choice: Choice) -> str:
    """The wire knows two of ours; whatever else cut an answer short looks like its length."""
    return "stop" if choice.finish_reason == "stop" else "length"


def usage_object(usage: Usage) -> Object:
    """The usage of chats and completions."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


def _response_usage(usage: Usage) -> Object:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


def response_status(job: Answered) -> str:
    if job.state is State.SUCCEEDED and finish_reason(job.choices[0]) == "length":
        return "incomplete"
    return _STATUS[job.state]


def _response_error(job: Answered) -> Object | None:
    if _STATUS[job.state] != "failed":
        return None
    # The wire's codes are a closed set; ours is in the message.
    reason = f"{job.error.code}: {job.error.message}" if job.error else str(job.state)
    return {"code": "server_error", "message": reason}


def message_item(job: Answered, status: str) -> Object:
    """The answer as an item of a response of this status."""
    return {
        "id": f"msg_{job.id.hex}",
        "type": "message",
        "role": "assistant",
        "status": status if status in {"completed", "in_progress"} else "incomplete",
        "content": [text_part(job.text, _first(job))],
    }


def text_part(text: str, logprobs: Sequence[TokenLogprob] = ()) -> Object:
    """The one part that an answer's message has."""
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": token_objects(logprobs)}


def _first(job: Answered) -> Sequence[TokenLogprob]:
    return (job.choices[0].logprobs or ()) if job.choices else ()


def _unix(moment: datetime) -> int:
    return int(moment.timestamp())


_OBJECTS: dict[str, Callable[[Answered], Object]] = {
    CHAT: chat_completion,
    COMPLETIONS: text_completion,
    RESPONSES: response,
}
