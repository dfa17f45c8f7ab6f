"""Responses and conversations as the official client asks for them."""

from __future__ import annotations

from typing import Any

import openai
import pytest
import redis

from jobs.ids import new_id
from jobs.states import State
from kit.gateways import RunningGateway
from kit.systems import PATIENCE_SECONDS, System
from kit.waiting import wait_until

EVENTS = [
    "response.created",
    "response.in_progress",
    "response.output_item.added",
    "response.content_part.added",
    "response.output_text.delta",
    "response.output_text.done",
    "response.content_part.done",
    "response.output_item.done",
    "response.completed",
]


def ended(client: openai.OpenAI, response_id: str) -> Any:
    """The response once it has ended."""

    def look() -> Any:
        found = client.responses.retrieve(response_id)
        return found if found.status not in {"queued", "in_progress"} else None

    return wait_until(look, PATIENCE_SECONDS, "the response has ended")


def test_a_response(client: openai.OpenAI) -> None:
    """The answer, and what it repeats of its request."""
    made = client.responses.create(
        model="tiny-chat",
        input="What is 12 + 30?",
        instructions="Be kind.",
        temperature=0,
        max_output_tokens=50,
        metadata={"a": "b"},
    )
    assert made.output_text.endswith("12 + 30 = 42.")
    assert made.status == "completed"
    assert (made.instructions, made.temperature, made.max_output_tokens) == ("Be kind.", 0, 50)
    assert (made.metadata, made.store, made.background) == ({"a": "b"}, True, False)
    assert made.usage is not None
    assert made.usage.total_tokens == made.usage.input_tokens + made.usage.output_tokens
    assert client.responses.retrieve(made.id) == made


def test_a_limit_leaves_a_response_incomplete(client: openai.OpenAI) -> None:
    """With the reason; even a limit below the upstream's smallest is taken."""
    made = client.responses.create(model="echo", input="Hello there", max_output_tokens=5)
    assert (made.output_text, made.status) == ("Hello", "incomplete")
    assert made.incomplete_details is not None
    assert made.incomplete_details.reason == "max_output_tokens"


def test_a_response_in_the_background(client: openai.OpenAI) -> None:
    """It is there at once, its answer later; also if it is not to be stored."""
    for store in (True, False):
        made = client.responses.create(model="slow", input="Hello there", background=True, store=store)
        assert (made.status, made.output, made.background) == ("queued", [], True)
        assert ended(client, made.id).output_text == "Hello there"


def test_one_in_the_background_waits_for_a_worker(client: openai.OpenAI) -> None:
    """Nobody serves the model yet: it is accepted all the same."""
    made = client.responses.create(model="idle", input="Hello", background=True)
    assert client.responses.retrieve(made.id).status == "queued"
    assert client.responses.cancel(made.id).status == "cancelled"


def test_cancelling(client: openai.OpenAI) -> None:
    """What runs is stopped and keeps what it had; doing so again changes nothing."""
    made = client.responses.create(model="slow", input="word " * 200, background=True)
    wait_until(lambda: client.responses.retrieve(made.id).status == "in_progress", PATIENCE_SECONDS, "it runs")
    cancelled = client.responses.cancel(made.id)
    assert cancelled.status == "cancelled"
    assert client.responses.cancel(made.id) == cancelled
    done = ended(client, client.responses.create(model="echo", input="x", background=True).id)
    assert client.responses.cancel(done.id) == done


def test_a_response_in_the_foreground_cannot_be_cancelled(client: openai.OpenAI) -> None:
    """As upstream."""
    made = client.responses.create(model="echo", input="x")
    with pytest.raises(openai.BadRequestError, match="background=true"):
        client.responses.cancel(made.id)


def test_a_deleted_response_is_gone(client: openai.OpenAI) -> None:
    """Neither to be seen, nor to be gone on from."""
    made = client.responses.create(model="echo", input="x")
    client.responses.delete(made.id)
    for call in (client.responses.retrieve, client.responses.delete, client.responses.input_items.list):
        with pytest.raises(openai.NotFoundError):
            call(made.id)
    with pytest.raises(openai.BadRequestError) as refused:
        client.responses.create(model="echo", input="x", previous_response_id=made.id)
    assert (refused.value.code, refused.value.param) == ("previous_response_not_found", "previous_response_id")


def test_one_that_is_not_stored_is_gone(client: openai.OpenAI) -> None:
    """In the foreground there is nothing to come back for."""
    made = client.responses.create(model="echo", input="x", store=False)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(made.id)


def test_a_chain_sees_what_came_before(client: openai.OpenAI) -> None:
    """Going on from a response is the same as sending everything, and branches do not see each other."""
    first = client.responses.create(model="tiny-chat", input="My name is Ann.", instructions="Only for this one.")
    second, third = (
        client.responses.create(model="tiny-chat", input="What is my name?", previous_response_id=first.id)
        for _ in range(2)
    )
    explicit: Any = [
        {"role": "user", "content": "My name is Ann."},
        {"role": "assistant", "content": first.output_text},
        {"role": "user", "content": "What is my name?"},
    ]
    whole = client.responses.create(model="tiny-chat", input=explicit)
    assert second.output_text == third.output_text == whole.output_text
    assert second.usage is not None
    assert whole.usage is not None
    assert second.usage.input_tokens == whole.usage.input_tokens
    assert second.previous_response_id == first.id
    [item] = client.responses.input_items.list(second.id).data
    assert item.content[0].text == "What is my name?"  # type: ignore[union-attr]


def test_going_on_from_one_that_still_runs(client: openai.OpenAI) -> None:
    """Waits for it."""
    first = client.responses.create(model="slow", input="one two", background=True)
    second = client.responses.create(model="echo", input="three", previous_response_id=first.id)
    assert second.output_text == "three"
    assert client.responses.retrieve(first.id).status == "completed"


LONG = "word " * 20  # takes the slow model two seconds


def begin(client: openai.OpenAI, model: str, text: str, previous: Any = None, **fields: Any) -> Any:
    """In the background, at once, whatever the one before does."""
    after = {} if previous is None else {"previous_response_id": previous.id}
    return client.responses.create(model=model, input=text, background=True, **after, **fields)


def test_in_the_background_one_goes_on_from_what_still_runs(client: openai.OpenAI) -> None:
    """It is there at once and waits, others behind it; each then sees what it would have seen had it come later."""
    first = begin(client, "slow", f"My name is Ann. {LONG}")
    second = begin(client, "echo", "And yours?", first)
    third, branch = (begin(client, "tiny-chat", text, second) for text in ("What is my name?", "What is 12 + 30?"))
    assert client.responses.retrieve(first.id).status in {"queued", "in_progress"}
    assert {client.responses.retrieve(one.id).status for one in (second, third, branch)} == {"queued"}
    explicit: Any = [
        {"role": "user", "content": f"My name is Ann. {LONG}"},
        {"role": "assistant", "content": ended(client, first.id).output_text},
        {"role": "user", "content": "And yours?"},
        {"role": "assistant", "content": ended(client, second.id).output_text},
    ]
    for one, text in ((third, "What is my name?"), (branch, "What is 12 + 30?")):
        whole = client.responses.create(model="tiny-chat", input=[*explicit, {"role": "user", "content": text}])
        chained = ended(client, one.id)
        assert (chained.status, chained.output_text) == ("completed", whole.output_text)
        assert chained.usage.input_tokens == whole.usage.input_tokens  # type: ignore[union-attr]
        [item] = client.responses.input_items.list(one.id).data
        assert item.content[0].text == text  # type: ignore[union-attr]


def test_what_has_nothing_to_go_on_from_fails(client: openai.OpenAI) -> None:
    """The one before was cancelled; so was, at once, what waited behind that."""
    first = begin(client, "slow", LONG)
    second = begin(client, "echo", "on", first)
    third, cancelled = begin(client, "echo", "on", second), begin(client, "echo", "on", second)
    assert client.responses.cancel(cancelled.id).status == "cancelled"
    client.responses.cancel(first.id)
    for one in (second, third):
        failed = ended(client, one.id)
        assert failed.status == "failed"
        assert failed.error.message.startswith("previous_response_not_found")
    with pytest.raises(openai.BadRequestError):
        begin(client, "echo", "on", second)


def test_what_waits_for_another_can_be_streamed(client: openai.OpenAI) -> None:
    """It is queued, and told when it comes."""
    first = begin(client, "slow", LONG)
    events = list(begin(client, "echo", "three", first, stream=True))
    assert events[0].response.status == "queued"
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == "three"
    assert events[-1].type == "response.completed"


def test_what_waits_for_another_can_be_repeated(gateway: RunningGateway) -> None:
    """The same name is the same response, before and after; a key with a quota has it reserved."""
    client = gateway.client(secret=gateway.key(quota_tokens_per_minute=100_000)[1])
    first = begin(client, "slow", LONG)
    name = {"Idempotency-Key": "on from there"}
    made = begin(client, "echo", "on", first, extra_headers=name)
    assert begin(client, "echo", "on", first, extra_headers=name).id == made.id
    assert ended(client, made.id).output_text == "on"
    assert begin(client, "echo", "on", first, extra_headers=name).id == made.id


def test_input_tokens_are_those_of_the_usage(client: openai.OpenAI) -> None:
    """Counted before, they are what will be counted."""
    first = client.responses.create(model="tiny-chat", input="My name is Ann.")
    asked: Any = {"model": "tiny-chat", "input": "And you?", "instructions": "x", "previous_response_id": first.id}
    counted = client.responses.input_tokens.count(**asked)
    made = client.responses.create(**asked)
    assert made.usage is not None
    assert counted.input_tokens == made.usage.input_tokens


def test_input_items_by_pages(client: openai.OpenAI) -> None:
    """In both orders, through the client's own paging."""
    said: Any = [{"role": "user", "content": str(number)} for number in range(7)]
    made = client.responses.create(model="echo", input=said)
    up = [item.content[0].text for item in client.responses.input_items.list(made.id, limit=2, order="asc")]  # type: ignore[union-attr]
    down = [item.content[0].text for item in client.responses.input_items.list(made.id, limit=3)]  # type: ignore[union-attr]
    assert up == [str(number) for number in range(7)]
    assert down == up[::-1]


# == streams ====================================================================================================


@pytest.mark.parametrize("model", ["echo", "slow", "tiny-chat"])
def test_the_events_of_a_stream(client: openai.OpenAI, model: str) -> None:
    """In the prescribed order, numbered from 0, and their pieces join to the text."""
    events: list[Any] = list(client.responses.create(model=model, input="What is 12 + 30?", stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert list(dict.fromkeys(event.type for event in events)) == EVENTS
    final = events[-1].response
    assert "".join(event.delta for event in events if event.type.endswith("delta")) == final.output_text
    assert {event.item_id for event in events if hasattr(event, "item_id")} == {final.output[0].id}
    assert client.responses.retrieve(final.id) == final


def test_the_clients_own_accumulator(client: openai.OpenAI) -> None:
    """It takes our stream apart and puts it together again."""
    with client.responses.stream(model="slow", input="Hello there") as stream:
        assert stream.get_final_response().output_text == "Hello there"
    with client.chat.completions.stream(model="slow", messages=[{"role": "user", "content": "Hello"}]) as chat:
        assert chat.get_final_completion().choices[0].message.content == "Hello"


def test_a_stream_can_be_told_again(client: openai.OpenAI, system: System) -> None:
    """From any event, while it runs, afterwards, and when Redis has forgotten it: always the same events."""
    live: list[Any] = list(client.responses.create(model="slow", input="Hello there", background=True, stream=True))
    assert live[1].type == "response.queued"
    name = live[0].response.id

    def again(**options: Any) -> list[Any]:
        return list(client.responses.retrieve(name, stream=True, **options))  # type: ignore[call-overload]

    assert again() == live
    assert [again(starting_after=number) for number in (0, 6, len(live) - 1)] == [live[1:], live[7:], []]
    with redis.Redis.from_url(str(system.settings.broker_url)) as broker:
        keys = list(broker.scan_iter(f"{system.settings.key_prefix}:stream:*", count=1000))
        assert keys
        assert all(broker.pttl(key) > 0 for key in keys)
        broker.delete(*keys)
    assert again() == live
    assert again(starting_after=8) == live[9:]


def test_a_stream_is_joined_while_it_runs(client: openai.OpenAI) -> None:
    """Who comes later gets what was told, and then the rest."""
    stream = client.responses.create(model="slow", input="Hello there " * 4, background=True, stream=True)
    seen: list[Any] = []
    for event in stream:
        seen.append(event)
        if len(seen) == 8:
            break
    stream.close()
    name = seen[0].response.id
    rest: list[Any] = list(client.responses.retrieve(name, stream=True, starting_after=7))
    assert [event.sequence_number for event in seen + rest] == list(range(len(seen) + len(rest)))
    assert "".join(e.delta for e in seen + rest if e.type.endswith("delta")) == "Hello there " * 4
    assert rest[-1].type == "response.completed"


def test_a_cancelled_stream_ends(client: openai.OpenAI) -> None:
    """With an error, for there is no event for it."""
    stream = client.responses.create(model="slow", input="word " * 200, background=True, stream=True)
    events: Any = iter(stream)
    first = next(events)
    while next(events).type != "response.output_text.delta":
        pass
    client.responses.cancel(first.response.id)
    assert [event.type for event in events][-1] == "error"


def test_a_foreground_response_cannot_be_streamed_by_id(client: openai.OpenAI) -> None:
    """400."""
    made = client.responses.create(model="echo", input="x")
    with pytest.raises(openai.BadRequestError):
        list(client.responses.retrieve(made.id, stream=True))


def test_unstreamed_jobs_tell_no_pieces(client: openai.OpenAI, system: System) -> None:
    """They cost Redis nothing."""
    made = client.responses.create(model="echo", input="x")
    job_id = made.id.removeprefix("resp_")
    with redis.Redis.from_url(str(system.settings.broker_url)) as broker:
        names = [key.decode().replace("-", "") for key in broker.scan_iter("*:stream:*", count=1000)]
    assert not [name for name in names if name.endswith(job_id)]


# == conversations ==============================================================================================


def test_a_conversation(client: openai.OpenAI) -> None:
    """Its items come before each turn's, and each turn's stay in it."""
    made = client.conversations.create(items=[{"role": "user", "content": "My name is Ann."}], metadata={"a": "b"})
    assert client.conversations.retrieve(made.id) == made
    answer = client.responses.create(
        model="tiny-chat", input="What is my name?", conversation=made.id, instructions="Not for later ones."
    )
    assert answer.output_text == "Your name is Ann."
    assert answer.conversation is not None
    assert answer.conversation.id == made.id
    items: list[Any] = list(client.conversations.items.list(made.id, order="asc"))
    assert [(item.role, item.content[0].text) for item in items] == [
        ("user", "My name is Ann."),
        ("user", "What is my name?"),
        ("assistant", "Your name is Ann."),
    ]
    assert client.conversations.items.retrieve(items[1].id, conversation_id=made.id) == items[1]


def test_items_are_put_in_and_taken_out(client: openai.OpenAI) -> None:
    """What was taken out is not seen by the next turn, whether it was put in by hand or said in a turn."""
    made = client.conversations.create()
    added = client.conversations.items.create(made.id, items=[{"role": "user", "content": "My name is Ann."}])
    ask: Any = {"model": "tiny-chat", "input": "What is my name?", "conversation": made.id}
    knows = client.responses.create(**ask)
    client.conversations.items.delete(added.data[0].id, conversation_id=made.id)
    client.conversations.items.delete(knows.output[0].id, conversation_id=made.id)  # type: ignore[arg-type]
    alone = client.responses.create(model="tiny-chat", input="What is my name?")
    left: list[Any] = list(client.conversations.items.list(made.id))
    assert [item.content[0].text for item in left] == ["What is my name?"]
    assert "Ann" in knows.output_text
    assert "Ann" not in alone.output_text
    assert "Ann" not in client.responses.create(**ask).output_text


def test_items_by_pages(client: openai.OpenAI) -> None:
    """Through the client's own paging, also of an empty list."""
    said: Any = [{"role": "user", "content": str(number)} for number in range(7)]
    made = client.conversations.create(items=said)
    read: list[Any] = list(client.conversations.items.list(made.id, limit=3))
    assert [item.content[0].text for item in read] == [str(number) for number in reversed(range(7))]
    empty = client.conversations.create()
    assert list(client.conversations.items.list(empty.id)) == []


def test_turns_of_one_conversation_take_turns(client: openai.OpenAI) -> None:
    """Two at once run one after the other, and nothing is mixed up."""
    made = client.conversations.create()
    turns = [
        client.responses.create(model="slow", input=f"turn {number}", conversation=made.id, background=True)
        for number in range(3)
    ]
    assert [ended(client, turn.id).output_text for turn in turns] == ["turn 0", "turn 1", "turn 2"]
    items: list[Any] = list(client.conversations.items.list(made.id, order="asc"))
    assert [item.content[0].text for item in items] == [f"turn {number}" for number in range(3) for _ in range(2)]


def test_changing_and_deleting_a_conversation(client: openai.OpenAI) -> None:
    """Metadata are replaced; what is deleted is gone."""
    made = client.conversations.create(metadata={"a": "b"})
    assert client.conversations.update(made.id, metadata={"c": "d"}).metadata == {"c": "d"}
    assert client.conversations.delete(made.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.conversations.retrieve(made.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.create(model="echo", input="x", conversation=made.id)


def test_a_conversation_and_a_previous_response(client: openai.OpenAI) -> None:
    """Are not given together."""
    made = client.conversations.create()
    with pytest.raises(openai.BadRequestError) as refused:
        client.responses.create(model="echo", input="x", conversation=made.id, previous_response_id="resp_1")
    assert refused.value.param == "previous_response_id"


# == others' ====================================================================================================


def test_another_tenants_id_is_an_unknown_one(client: openai.OpenAI, stranger: openai.OpenAI) -> None:
    """The answers do not differ by a letter, but for the id itself."""
    made = client.responses.create(model="echo", input="x", background=True)
    talk = client.conversations.create()
    for theirs, unknown, call in (
        (made.id, f"resp_{new_id().hex}", stranger.responses.retrieve),
        (made.id, f"resp_{new_id().hex}", stranger.responses.cancel),
        (made.id, f"resp_{new_id().hex}", stranger.responses.delete),
        (talk.id, f"conv_{new_id().hex}", stranger.conversations.retrieve),
        (talk.id, f"conv_{new_id().hex}", stranger.conversations.delete),
    ):
        assert _refusal(call, theirs) == _refusal(call, unknown)
    previous = lambda name: stranger.responses.create(model="echo", input="x", previous_response_id=name)  # noqa: E731
    assert _refusal(previous, made.id) == _refusal(previous, f"resp_{new_id().hex}")
    within = lambda name: stranger.responses.create(model="echo", input="x", conversation=name)  # noqa: E731
    assert _refusal(within, talk.id) == _refusal(within, f"conv_{new_id().hex}")


def _refusal(call: Any, name: str) -> tuple[int, str]:
    with pytest.raises(openai.APIStatusError) as refused:
        call(name)
    return refused.value.status_code, str(refused.value.body).replace(name, "ID")


def test_a_gateway_that_goes_leaves_the_background(system: System) -> None:
    """What was accepted goes on without it, and another gateway tells of it."""
    from kit.gateways import gateway_on

    with gateway_on(system.settings) as first:
        made = first.client().responses.create(model="slow", input="Hello there " * 5, background=True)
    with gateway_on(system.settings) as second:
        assert ended(second.client(), made.id).output_text == "Hello there " * 5
    job_id = made.id.removeprefix("resp_")
    assert [job.state for job in system.producer.list(model="slow") if job.id.hex == job_id] == [State.SUCCEEDED]


def test_models(client: openai.OpenAI, gateway: RunningGateway) -> None:
    """Those of the catalog, and only the key's if it has some."""
    assert {model.id for model in client.models.list()} == {"echo", "idle", "slow", "tiny-chat"}
    assert client.models.retrieve("tiny-chat").owned_by == "headrace"
    with pytest.raises(openai.NotFoundError) as unknown:
        client.models.retrieve("no/such model")
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.PermissionDeniedError):
        client.models.delete("echo")
    bound = gateway.client(secret=gateway.key(models=["echo"])[1])
    assert [model.id for model in bound.models.list()] == ["echo"]
    for refused in (lambda: bound.models.retrieve("slow"), lambda: bound.responses.create(model="slow", input="x")):
        with pytest.raises(openai.PermissionDeniedError):
            refused()
