"""The chunks of streamed chats and completions: what has been written since the last one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jobs.schema import Choice, TokenLogprob, Usage
from producer.openai.objects import Object, columns, finish_reason, token_objects, usage_object
from producer.openai.requests import CHAT


@dataclass(frozen=True, slots=True)
class Chunks:
    """What all chunks of one stream have in common."""

    endpoint: str
    name: str  # of the completion
    created: int  # Unix seconds
    model: str
    with_usage: bool  # whether the last chunk tells the usage

    def first(self, index: int) -> Object:
        """Who speaks; chats alone begin so."""
        return self._chunk([self._choice(index, {"role": "assistant", "content": ""})])

    def text(self, index: int, text: str, logprobs: Sequence[TokenLogprob], offset: int) -> Object:
        """New text of a choice, behind so many characters."""
        if self.endpoint == CHAT:
            told = {"content": token_objects(logprobs), "refusal": None} if logprobs else None
            return self._chunk([self._choice(index, {"content": text}) | {"logprobs": told}])
        told = columns(text, logprobs, offset) if logprobs else None
        return self._chunk([self._text_choice(index, text) | {"logprobs": told}])

    def last(self, index: int, choice: Choice) -> Object:
        """Why a choice has ended."""
        empty = self._choice(index, {}) if self.endpoint == CHAT else self._text_choice(index, "")
        return self._chunk([empty | {"finish_reason": finish_reason(choice)}])

    def usage(self, usage: Usage) -> Object:
        """The very last one."""
        return self._chunk([]) | {"usage": usage_object(usage)}

    def _chunk(self, choices: list[Object]) -> Object:
        kind = "chat.completion.chunk" if self.endpoint == CHAT else "text_completion"
        chunk: dict[str, Any] = {
            "id": self.name,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": None,
            "choices": choices,
        }
        return chunk | {"usage": None} if self.with_usage else chunk

    def _choice(self, index: int, delta: Object) -> Object:
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def _text_choice(self, index: int, text: str) -> Object:
        return {"index": index, "text": text, "logprobs": None, "finish_reason": None}
