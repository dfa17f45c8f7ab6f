"""The echo engine: answers with the prompt. For load and fault tests, of this code and of its users'.

A token is a byte. A step gives every running row one token and takes `seconds_per_token`; with 0 it gives each row its
whole answer, so that the queue around it is what is measured.
"""

import os
import threading
import time

from models.base import BaseEngine
from models.catalog import ModelSpec
from models.prompt import load_prompt_format
from models.protocol import GenerationRequest, InvalidRequest
from models.rows import Advance, Row
from models.scheduler import Plan, SlotScheduler


class EchoEngine(BaseEngine):
    """Continuous batching over `slots` rows, without a model."""

    def __init__(self, spec: ModelSpec, device: str = "cpu") -> None:
        prompt_format = load_prompt_format(spec)
        super().__init__(
            spec,
            SlotScheduler(spec.slots),
            device=device,
            vocab_tokens=prompt_format.vocab_tokens,
            context_tokens=prompt_format.context_tokens,
            decode=prompt_format.decode,
        )

    def submit(self, request: GenerationRequest) -> None:
        """See `Engine`. What only a model could do is refused."""
        sampling = request.sampling
        asked = {"logprobs": sampling.logprobs, "prompt_logprobs": sampling.prompt_logprobs}
        if sampling.structure:
            asked[sampling.structure.field] = 0
        for field, value in asked.items():
            if value is not None:
                raise InvalidRequest(field, "the echo engine only repeats the prompt")
        super().submit(request)

    def _forward(self, plan: Plan) -> list[Advance]:
        if self._spec.obeys_faults:
            for work in plan.works:
                _obey(bytes(work.row.flight.request.prompt_token_ids))
        if self._spec.seconds_per_token:
            time.sleep(self._spec.seconds_per_token)
            return [_echo(work.row, 1) for work in plan.works]
        return [_echo(work.row, work.row.tokens_to_come) for work in plan.works]


def _obey(prompt: bytes) -> None:
    """Die, or hang until killed, as a CUDA error or a driver would have it."""
    if prompt.startswith(b"!exit"):
        os._exit(1)
    if prompt.startswith(b"!hang"):
        threading.Event().wait()


def _echo(row: Row, tokens: int) -> Advance:
    """The next tokens of the answer: the prompt, again and again if it is to be longer."""
    prompt, sampling = row.flight.request.prompt_token_ids, row.flight.request.sampling
    length = sampling.max_tokens + 1 if sampling.ignore_eos else max(len(prompt), sampling.min_tokens)
    answer = prompt if length == len(prompt) else (prompt * (length // len(prompt) + 1))[:length]
    done = len(row.token_ids)
    token_ids = answer[done : done + tokens]
    prefilled = 0 if done else len(prompt)
    return Advance(row, prefilled + len(token_ids), token_ids, ended=done + len(token_ids) == len(answer))
