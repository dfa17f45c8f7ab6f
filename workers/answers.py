"""From the engine's choices to those that are stored: token ids become text, and what is echoed goes before."""

from __future__ import annotations

from collections.abc import Sequence

from jobs.schema import Choice, JobRequest, TokenLogprob
from jobs.streams import Piece
from models.prompt import PromptFormat
from models.protocol import Ended, TokenLogprobs


def choices_of(
    request: JobRequest, ended: Ended, form: PromptFormat, pieces: Sequence[Piece] = ()
) -> tuple[Choice, ...]:
    """The answers as their owner sees them. `pieces`: those in which they were told, if they were streamed."""
    teller = _Teller(form)
    prompt = teller.tell(ended.prompt_logprobs)
    text, logprobs = (_prompt_text(request, form), prompt) if request.echo else ("", ())
    return tuple(
        Choice(
            index=choice.index,
            text=text + choice.text,
            finish_reason=choice.finish_reason,
            logprobs=None if request.logprobs is None else logprobs + teller.tell(choice.logprobs),
            prompt_logprobs=None if request.prompt_logprobs is None or choice.index else prompt,
            pieces=tuple((len(one.text), one.tokens) for one in pieces if one.choice == choice.index),
        )
        for choice in ended.choices
    )


def logprobs_of(logprobs: Sequence[TokenLogprobs], form: PromptFormat) -> tuple[TokenLogprob, ...]:
    """Those of some tokens, as their owner sees them."""
    return _Teller(form).tell(logprobs)


def _prompt_text(request: JobRequest, form: PromptFormat) -> str:
    return request.prompt if isinstance(request.prompt, str) else form.decode(request.prompt or ())


class _Teller:
    """Names tokens, each once: the same few thousand come again and again among the alternatives."""

    def __init__(self, form: PromptFormat) -> None:
        self._form = form
        self._names: dict[int, str] = {}

    def tell(self, logprobs: Sequence[TokenLogprobs]) -> tuple[TokenLogprob, ...]:
        """As the engine tells them, but with text for token ids."""
        return tuple(
            TokenLogprob(
                token=self._name(one.token_id),
                id=one.token_id,
                logprob=one.logprob,
                top=tuple((self._name(token_id), value) for token_id, value in one.top),
            )
            for one in logprobs
        )

    def _name(self, token_id: int) -> str:
        if token_id not in self._names:
            self._names[token_id] = token_name(self._form.token_bytes(token_id))
        return self._names[token_id]


def token_name(data: bytes) -> str:
    """A token's text; OpenAI's form for bytes that are none by themselves, such as a piece of a character."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
