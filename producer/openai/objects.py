"""From a `Job` to the objects of OpenAI's API: every field that its types require, as plain dictionaries."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

from jobs.schema import Choice, Job, Usage
from jobs.states import State
from producer.openai.requests import CHAT, COMPLETIONS, RESPONSES

Object = dict[str, Any]

_STATUS = {
    State.BLOCKED: "queued",
    State.QUEUED: "queued",
    State.RUNNING: "in_progress",
    State.SUCCEEDED: "completed",
    State.CANCELLED: "cancelled",
    State.FAILED: "failed",
    State.EXPIRED: "failed",
}


def answer(job: Job) -> Object:
    """What the endpoint that the job was written for returns; a chat completion if there was none."""
    return _OBJECTS[job.endpoint or CHAT](job)


def chat_completion(job: Job) -> Object:
    """A ChatCompletion."""
    return _completion(job, "chatcmpl", "chat.completion") | {"choices": [_chat_choice(c) for c in job.choices]}


def text_completion(job: Job) -> Object:
    """A Completion."""
    return _completion(job, "cmpl", "text_completion") | {"choices": [_text_choice(c) for c in job.choices]}


def response(job: Job, echo: Mapping[str, Any] | None = None) -> Object:
    """A Response. `echo` is what it repeats of its request, where whoever answers still knows that."""
    status = _response_status(job)
    return {
        "id": f"resp_{job.id.hex}",
        "object": "response",
        "created_at": _unix(job.created_at),
        "completed_at": _unix(job.finished_at) if status == "completed" and job.finished_at else None,
        "status": status,
        "background": False,
        "error": _response_error(job),
        "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
        "instructions": None,
        "max_output_tokens": None,
        "model": job.model,
        "output": [_message_item(job, status)] if job.choices else [],
        "parallel_tool_calls": True,
        "previous_response_id": None,
        "conversation": {"id": job.conversation} if job.conversation else None,
        "reasoning": {"effort": None, "summary": None},
        "service_tier": "default",
        "store": True,
        "temperature": None,
        "text": {"format": {"type": "text"}},
        "tool_choice": "auto",
        "tools": [],
        "top_p": None,
        "truncation": "disabled",
        "usage": _response_usage(job.usage) if job.state.final and job.usage else None,
        "metadata": dict(job.metadata),
        **(echo or {}),
    }


def error_body(message: str, kind: str, param: str | None, code: str | None) -> Object:
    """The envelope of every error."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _completion(job: Job, prefix: str, kind: str) -> Object:
    return {
        "id": f"{prefix}-{job.id.hex}",
        "object": kind,
        "created": _unix(job.created_at),
        "model": job.model,
        "usage": _usage(job.usage or Usage()),
        # What ran: two answers with the same fingerprint, seed and prompt should be the same.
        "system_fingerprint": job.served_by,
    }


def _chat_choice(choice: Choice) -> Object:
    return {
        "index": choice.index,
        "message": {"role": "assistant", "content": choice.text, "refusal": None},
        "logprobs": None,
        "finish_reason": _finish_reason(choice),
    }


def _text_choice(choice: Choice) -> Object:
    return {"index": choice.index, "text": choice.text, "logprobs": None, "finish_reason": _finish_reason(choice)}


def _finish_reason(choice: Choice) -> str:
    """The wire knows two of ours; whatever else cut an answer short looks like its length."""
    return "stop" if choice.finish_reason == "stop" else "length"


def _usage(usage: Usage) -> Object:
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


def _response_status(job: Job) -> str:
    if job.state is State.SUCCEEDED and _finish_reason(job.choices[0]) == "length":
        return "incomplete"
    return _STATUS[job.state]


def _response_error(job: Job) -> Object | None:
    if _STATUS[job.state] != "failed":
        return None
    # The wire's codes are a closed set; ours is in the message.
    reason = f"{job.error.code}: {job.error.message}" if job.error else str(job.state)
    return {"code": "server_error", "message": reason}


def _message_item(job: Job, status: str) -> Object:
    return {
        "id": f"msg_{job.id.hex}",
        "type": "message",
        "role": "assistant",
        "status": status if status in {"completed", "in_progress"} else "incomplete",
        "content": [{"type": "output_text", "text": job.text, "annotations": [], "logprobs": []}],
    }


def _unix(moment: datetime) -> int:
    return int(moment.timestamp())


_OBJECTS: dict[str, Callable[[Job], Object]] = {
    CHAT: chat_completion,
    COMPLETIONS: text_completion,
    RESPONSES: response,
}
