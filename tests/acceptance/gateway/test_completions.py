"""Chats and completions as the official client asks for them, whole and streamed."""

from __future__ import annotations

import json
import threading
from typing import Any

import httpx2
import openai
import pytest

from jobs.states import State
from kit.gateways import RunningGateway
from kit.systems import PATIENCE_SECONDS, System
from kit.waiting import wait_until

HELLO: Any = [{"role": "user", "content": "Hello there"}]
SUM: Any = [{"role": "user", "content": "What is 12 + 30?"}]


def test_a_chat(client: openai.OpenAI) -> None:
    """The answer, its end, and what it took."""
    made = client.chat.completions.create(model="tiny-chat", messages=SUM)
    [choice] = made.choices
    assert str(choice.message.content).endswith("12 + 30 = 42.")
    assert choice.finish_reason == "stop"
    assert made.usage is not None
    assert made.usage.total_tokens == made.usage.prompt_tokens + made.usage.completion_tokens
    assert made.id.startswith("chatcmpl-")


def test_several_choices_count_the_prompt_once(client: openai.OpenAI) -> None:
    """n answers, one prompt."""
    one, three = (client.chat.completions.create(model="echo", messages=HELLO, n=n) for n in (1, 3))
    assert [choice.index for choice in three.choices] == [0, 1, 2]
    assert one.usage is not None
    assert three.usage is not None
    assert three.usage.prompt_tokens == one.usage.prompt_tokens
    assert three.usage.completion_tokens == 3 * one.usage.completion_tokens


def test_a_limit_ends_an_answer(client: openai.OpenAI) -> None:
    """With its reason."""
    made = client.chat.completions.create(model="echo", messages=HELLO, max_completion_tokens=5)
    assert (made.choices[0].message.content, made.choices[0].finish_reason) == ("Hello", "length")


def test_log_probabilities_of_a_chat(client: openai.OpenAI) -> None:
    """Of each token, with as many others as were asked for."""
    made = client.chat.completions.create(model="tiny-chat", messages=SUM, logprobs=True, top_logprobs=2)
    assert made.choices[0].logprobs is not None
    tokens = made.choices[0].logprobs.content
    assert tokens is not None
    assert all(len(token.top_logprobs) == 2 and token.logprob <= 0 for token in tokens)


def test_an_answer_of_a_schema(client: openai.OpenAI) -> None:
    """It is JSON of that form."""
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    form: Any = {"type": "json_schema", "json_schema": {"name": "sum", "schema": schema}}
    made = client.chat.completions.create(model="tiny-chat", messages=SUM, response_format=form, max_tokens=60)
    if made.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(str(made.choices[0].message.content))["a"], int)


def test_seeded_answers_repeat(client: openai.OpenAI) -> None:
    """The same seed, the same answer."""
    asked: Any = {"model": "tiny-chat", "messages": SUM, "seed": 7, "temperature": 1.5}
    answers = [client.chat.completions.create(**asked) for _ in range(3)]
    assert len({answer.choices[0].message.content for answer in answers}) == 1


def test_unknown_fields_and_nulls_are_ignored(client: openai.OpenAI) -> None:
    """Measuring tools send their own fields, and null for what they leave open."""
    extra = {"top_k": None, "min_p": None, "user": "x", "continuous_usage_stats": True, "store": True}
    made = client.chat.completions.create(model="echo", messages=HELLO, extra_body=extra)
    assert made.choices[0].message.content == "Hello there"


@pytest.mark.parametrize("model", ["echo", "slow", "tiny-chat"])
def test_a_streamed_chat_is_the_same_answer(client: openai.OpenAI, model: str) -> None:
    """Its pieces join to the text of the whole one; role first, reason last, then the usage."""
    whole = client.chat.completions.create(model=model, messages=SUM)
    options: Any = {"include_usage": True}
    chunks = list(client.chat.completions.create(model=model, messages=SUM, stream=True, stream_options=options))
    *told, usage = chunks
    assert (usage.choices, usage.usage) == ([], whole.usage)
    assert not [chunk for chunk in told if chunk.usage]
    assert told[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in told) == whole.choices[0].message.content
    assert [chunk.choices[0].finish_reason for chunk in told if chunk.choices[0].finish_reason] == ["stop"]
    assert told[-1].choices[0].finish_reason == "stop"
    assert len({chunk.id for chunk in chunks}) == 1
    if model == "slow":
        assert len(told) > 5


def test_streamed_choices_keep_apart(client: openai.OpenAI) -> None:
    """Each choice has its own pieces."""
    texts = ["", "", ""]
    for chunk in client.chat.completions.create(model="slow", messages=HELLO, n=3, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == ["Hello there"] * 3


def test_streamed_log_probabilities_are_those_of_the_whole(client: openai.OpenAI) -> None:
    """None is lost, none comes twice."""
    asked: Any = {"model": "tiny-chat", "messages": SUM, "logprobs": True, "top_logprobs": 1}
    whole = client.chat.completions.create(**asked).choices[0].logprobs
    streamed = [
        token
        for chunk in client.chat.completions.create(**asked, stream=True)
        if chunk.choices[0].logprobs
        for token in chunk.choices[0].logprobs.content or ()
    ]
    assert whole is not None
    assert [token.token for token in streamed] == [token.token for token in whole.content or ()]


def test_a_stop_text_never_leaks_into_a_stream(client: openai.OpenAI) -> None:
    """Not even its beginning."""
    chunks = client.chat.completions.create(model="slow", messages=HELLO, stop="lo th", stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "Hel"


def test_a_stream_has_bare_lines(gateway: RunningGateway) -> None:
    """Some tools look for nothing but `data: `, empty lines, and the last word."""
    body = {"model": "echo", "messages": HELLO, "stream": True}
    with httpx2.Client() as http:
        reply = http.post(f"{gateway.url}/v1/chat/completions", json=body, headers=_auth(gateway))
    assert reply.headers["content-type"].startswith("text/event-stream")
    events = reply.text.removesuffix("\n\n").split("\n\n")
    assert all(event.startswith("data: ") and "\n" not in event for event in events)
    assert events[-1] == "data: [DONE]"


def test_a_completion(client: openai.OpenAI) -> None:
    """A text goes on, up to the limit that is this endpoint's own."""
    made = client.completions.create(model="echo", prompt="one two three four five")
    assert (made.choices[0].text, made.choices[0].finish_reason) == ("one two three fo", "length")


def test_several_prompts_are_one_completion(client: openai.OpenAI) -> None:
    """Texts or token ids; the choices of a prompt lie together."""
    made = client.completions.create(model="echo", prompt=["ab", "cd"], n=2, max_tokens=8)
    assert [(choice.index, choice.text) for choice in made.choices] == [(0, "ab"), (1, "ab"), (2, "cd"), (3, "cd")]
    ids = client.completions.create(model="echo", prompt=[[97, 98], [99, 100]], max_tokens=8)
    assert [choice.text for choice in ids.choices] == ["ab", "cd"]
    assert made.usage is not None
    assert (made.usage.prompt_tokens, made.usage.completion_tokens) == (4, 8)


def test_streamed_prompts_keep_apart(gateway: RunningGateway) -> None:
    """As the whole ones do. (The client's types know no chunk without a reason for its end; upstream sends them so.)"""
    texts: dict[int, str] = {}
    lenient = gateway.client(_strict_response_validation=False)
    for chunk in lenient.completions.create(model="slow", prompt=["ab", "cd"], stream=True):
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + choice.text
    assert texts == {0: "ab", 1: "cd"}


@pytest.mark.parametrize("stream", [False, True])
def test_an_echoed_prompt_has_log_probabilities(gateway: RunningGateway, stream: bool) -> None:  # noqa: FBT001
    """The first one is null, as evaluation tools expect it (and the client's types do not)."""
    lenient = gateway.client(_strict_response_validation=False)
    asked: Any = {"model": "tiny-chat", "prompt": "What is 1 + 1?", "echo": True, "logprobs": 1, "max_tokens": 0}
    if stream:
        made = next(chunk for chunk in lenient.completions.create(**asked, stream=True) if chunk.choices[0].text)
    else:
        made = lenient.completions.create(**asked)
    assert made.choices[0].text == "What is 1 + 1?"
    told = made.choices[0].logprobs
    assert told is not None
    assert told.token_logprobs is not None
    assert told.token_logprobs[0] is None
    assert all(value is not None for value in told.token_logprobs[1:])
    assert told.text_offset is not None
    assert told.text_offset[0] == 0


def test_closing_a_request_cancels_its_job(gateway: RunningGateway, system: System) -> None:
    """Nobody computes what nobody waits for."""
    hasty = gateway.client(timeout=0.5)
    with pytest.raises(openai.APITimeoutError):
        hasty.chat.completions.create(model="slow", messages=[{"role": "user", "content": "wait " * 500}])
    job = system.producer.list(model="slow", limit=1)[0]
    assert system.wait(job.id).state is State.CANCELLED


def test_closing_a_stream_cancels_its_job(client: openai.OpenAI, system: System) -> None:
    """The same in mid-stream."""
    stream = client.chat.completions.create(
        model="slow", messages=[{"role": "user", "content": "wait " * 500}], stream=True
    )
    first = next(iter(stream))
    stream.close()
    job = system.producer.list(model="slow", limit=1)[0]
    assert first.id == f"chatcmpl-{job.id.hex}"
    assert system.wait(job.id).state is State.CANCELLED


def test_a_named_request_goes_on_and_is_found_again(gateway: RunningGateway, system: System) -> None:
    """With an idempotency key the client that lost its connection gets the same job's answer."""
    name = {"Idempotency-Key": "come-back"}
    asked: Any = {"model": "slow", "messages": [{"role": "user", "content": "patience " * 8}], "extra_headers": name}
    with pytest.raises(openai.APITimeoutError):
        gateway.client(timeout=0.4).chat.completions.create(**asked)
    made = gateway.client().chat.completions.create(**asked)
    assert made.choices[0].message.content == "patience " * 8
    assert len([job for job in system.producer.list(model="slow") if made.id.endswith(job.id.hex)]) == 1


def test_the_same_name_for_another_request(client: openai.OpenAI) -> None:
    """Is a conflict, which the client must not try again."""
    name = {"Idempotency-Key": "twice"}
    client.chat.completions.create(model="echo", messages=HELLO, extra_headers=name)
    with pytest.raises(openai.ConflictError) as refused:
        client.chat.completions.create(model="echo", messages=SUM, extra_headers=name)
    assert refused.value.response.headers["x-should-retry"] == "false"


def test_a_model_that_nobody_serves(client: openai.OpenAI) -> None:
    """503, and when to come back; nothing is left in the queue."""
    with pytest.raises(openai.InternalServerError) as refused:
        client.chat.completions.create(model="idle", messages=HELLO)
    assert refused.value.status_code == 503
    assert 1 <= int(refused.value.response.headers["retry-after"]) <= 60


def test_waiting_requests_hold_no_thread(gateway: RunningGateway, system: System) -> None:
    """More wait at once than there are threads or connections, and all are answered."""
    made: list[str | None] = []
    secret = gateway.key()[1]

    def ask() -> None:
        client = gateway.client(secret=secret)
        asked: Any = [{"role": "user", "content": "a while"}]
        made.append(client.chat.completions.create(model="slow", messages=asked).choices[0].message.content)

    before = threading.active_count()
    clients = [threading.Thread(target=ask) for _ in range(120)]
    for thread in clients:
        thread.start()
    wait_until(lambda: len(made) == len(clients), PATIENCE_SECONDS, "every request is answered")
    assert set(made) == {"a while"}
    for thread in clients:
        thread.join()
    assert threading.active_count() <= before + 45  # the pool's, and not one for each request


def _auth(gateway: RunningGateway) -> dict[str, str]:
    return {"Authorization": f"Bearer {gateway.key()[1]}"}
