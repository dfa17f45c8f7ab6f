"""Between OpenAI's wire and ours: what is understood, ignored and refused, and what comes back."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import pytest

from jobs.batches import Rejection
from jobs.errors import ModelUnknown, RequestInvalid
from jobs.schema import Call, Choice, Job, JobError, JobRequest, TokenLogprob, Usage
from jobs.states import Lane, State
from producer.openai.lines import batch_line, custom_id, output_line, rejected_line
from producer.openai.objects import answer, response
from producer.openai.requests import CHAT, COMPLETIONS, ENDPOINTS, RESPONSES, translate

JOB_ID = UUID("01890a5d-ac96-774b-bcce-b302099a8057")
CREATED = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)

HELLO = [{"role": "user", "content": "Hello"}]
BODIES: dict[str, dict[str, Any]] = {
    CHAT: {"model": "echo", "messages": HELLO},
    COMPLETIONS: {"model": "echo", "prompt": "Hello"},
    RESPONSES: {"model": "echo", "input": "Hello"},
}


MISSING = "missing_required_parameter"
SCHEMA: dict[str, Any] = {
    "type": "json_schema",
    "json_schema": {"name": "n", "strict": True, "schema": {"type": "object"}},
}


def asked(endpoint: str, **fields: Any) -> JobRequest:
    return translate(endpoint, BODIES[endpoint] | fields).request


def refused(endpoint: str, **fields: Any) -> RequestInvalid:
    with pytest.raises(RequestInvalid) as refusal:
        translate(endpoint, BODIES[endpoint] | fields)
    return refusal.value


def contents(request: JobRequest) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in request.messages or ()]


# -- what is understood -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_the_smallest_body(endpoint: str) -> None:
    """A model and a prompt are enough on every endpoint."""
    request = asked(endpoint)
    assert request.model == "echo"
    assert request.prompt == "Hello" if endpoint == COMPLETIONS else contents(request) == [("user", "Hello")]


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_sampling_is_taken_over(endpoint: str) -> None:
    """Sampling fields, those of other servers' extensions too, reach the request as they are."""
    fields = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.1,
        "presence_penalty": 1,
        "frequency_penalty": -1.5,
        "repetition_penalty": 1.1,
        "seed": 7,
        "ignore_eos": True,
    }
    request = asked(endpoint, **fields, logit_bias={"5": -100}, stop=["a", "b"])
    assert request.model_dump(include=set(fields)) == fields
    assert request.logit_bias == {5: -100.0}
    assert request.stop == ("a", "b")


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_one_stop_string_is_a_list_of_one(endpoint: str) -> None:
    """`stop` may be a string."""
    assert asked(endpoint, stop="\n\n").stop == ("\n\n",)


@pytest.mark.parametrize(
    ("endpoint", "fields", "max_tokens"),
    [
        (CHAT, {}, None),
        (CHAT, {"max_tokens": 5}, 5),
        (CHAT, {"max_completion_tokens": 6}, 6),
        (CHAT, {"max_tokens": 5, "max_completion_tokens": 6}, 6),
        (COMPLETIONS, {}, 16),
        (COMPLETIONS, {"max_tokens": 5}, 5),
        (RESPONSES, {}, None),
        (RESPONSES, {"max_output_tokens": 8, "max_tokens": 5}, 8),
    ],
)
def test_the_limit_has_a_name_on_each_endpoint(endpoint: str, fields: dict[str, int], max_tokens: int | None) -> None:
    """Each endpoint's own name for the limit counts; only completions have a default of their own."""
    assert asked(endpoint, **fields).max_tokens == max_tokens


@pytest.mark.parametrize("endpoint", [CHAT, COMPLETIONS])
def test_several_choices(endpoint: str) -> None:
    """`n` is taken over where the wire has it."""
    assert asked(endpoint, n=3).n == 3
    assert asked(RESPONSES, n=3).n == 1


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_null_is_absent_and_the_unknown_is_ignored(endpoint: str) -> None:
    """Fields that are null, that the wire says to ignore, or that nobody knows change nothing."""
    ignored = {
        "user": "u",
        "store": True,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        "service_tier": "flex",
        "parallel_tool_calls": True,
        "prompt_cache_key": "k",
        "reasoning_effort": "low",
        "verbosity": "low",
        "safety_identifier": "s",
        "never_heard_of": [1, {"a": 2}],
        "background": True,
    }
    nothing = dict.fromkeys(("stop", "seed", "n", "tools", "logprobs", "top_logprobs", "temperature", "logit_bias"))
    assert asked(endpoint, **ignored, **nothing) == asked(endpoint)


def test_log_probabilities_are_asked_for_in_three_ways() -> None:
    """Each endpoint has its own; no alternatives are told if none are asked for."""
    assert asked(CHAT, logprobs=True).logprobs == 0
    assert asked(CHAT, logprobs=True, top_logprobs=5).logprobs == 5
    assert asked(CHAT, logprobs=False).logprobs is None
    assert [asked(COMPLETIONS, logprobs=count).logprobs for count in (0, 5)] == [0, 5]
    assert asked(RESPONSES, include=["message.output_text.logprobs"]).logprobs == 0
    assert asked(RESPONSES, include=["message.output_text.logprobs"], top_logprobs=3).logprobs == 3
    assert asked(RESPONSES, top_logprobs=0).logprobs is None


def test_a_structure_is_asked_for_in_two_ways() -> None:
    """A response lays a schema's fields beside its type, the others wrap them."""
    assert asked(CHAT, response_format=SCHEMA).response_format == SCHEMA
    assert asked(COMPLETIONS, response_format=SCHEMA).response_format == SCHEMA
    flat = {"type": "json_schema", **SCHEMA["json_schema"]}
    assert asked(RESPONSES, text={"format": flat, "verbosity": "low"}).response_format == SCHEMA
    for endpoint, fields in (
        (CHAT, {"response_format": {"type": "json_object"}}),
        (RESPONSES, {"text": {"format": {"type": "json_object"}}}),
    ):
        assert asked(endpoint, **fields).structures == ["response_format"]
    assert asked(CHAT, response_format={"type": "text"}).structures == []


def test_a_prompt_may_be_scored() -> None:
    """What evaluations send: the prompt again, with its log probabilities, and no or one token more."""
    request = asked(COMPLETIONS, prompt=[1, 2, 3], echo=True, logprobs=1, max_tokens=0)
    assert (request.echo, request.logprobs, request.max_tokens) == (True, 1, 0)
    request = asked(COMPLETIONS, stop_token_ids=[7], min_tokens=2)
    assert (request.stop_token_ids, request.min_tokens, request.echo) == ((7,), 2, False)


def test_what_asks_for_nothing_is_no_fault() -> None:
    """Empty tools, text as the only modality and plain text as format are what we do anyway."""
    assert asked(
        CHAT,
        tools=[],
        tool_choice="auto",
        functions=[],
        function_call="none",
        modalities=["text"],
        response_format={"type": "text"},
        logprobs=False,
        top_logprobs=0,
        metadata={"ignored": 1},
    ) == asked(CHAT)
    assert asked(COMPLETIONS, echo=False, suffix="", best_of=1) == asked(COMPLETIONS)
    assert asked(
        RESPONSES,
        tools=[],
        tool_choice="none",
        truncation="auto",
        text={"format": {"type": "text"}, "verbosity": "low"},
        include=["reasoning.encrypted_content"],
        reasoning={"effort": "low"},
    ) == asked(RESPONSES)


def test_messages_of_a_chat() -> None:
    """Roles are kept, a developer is a system, and text parts are joined."""
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "name": "ann", "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]},
        {"role": "assistant", "content": "Hi", "tool_calls": []},
        {"role": "tool", "content": "42", "tool_call_id": "c"},
    ]
    expected = [("system", "Be brief."), ("user", "Hello"), ("assistant", "Hi"), ("tool", "42")]
    assert contents(asked(CHAT, messages=messages)) == expected


def test_items_of_a_response() -> None:
    """Easy and typed message items are both understood; instructions lie apart; metadata is kept."""
    items = [
        {"role": "user", "content": "My name is Ann."},
        {
            "type": "message",
            "id": "msg_1",
            "role": "assistant",
            "status": "completed",
            "content": [
                {"type": "output_text", "text": "Hi ", "annotations": []},
                {"type": "output_text", "text": "Ann"},
            ],
        },
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Who am I?"}]},
    ]
    request = asked(RESPONSES, input=items, instructions="Be kind.", metadata={"team": "a"})
    assert request.instructions == "Be kind."
    assert contents(request) == [
        ("user", "My name is Ann."),
        ("assistant", "Hi Ann"),
        ("user", "Who am I?"),
    ]
    assert request.metadata == {"team": "a"}


@pytest.mark.parametrize(
    ("given", "prompt"),
    [("text", "text"), (["text"], "text"), ([1, 2, 3], (1, 2, 3)), ([[1, 2, 3]], (1, 2, 3))],
)
def test_prompts_of_a_completion(given: Any, prompt: Any) -> None:
    """A prompt is a text or token ids, either also in a list of one."""
    assert asked(COMPLETIONS, prompt=given).prompt == prompt


# -- what is refused --------------------------------------------------------------------------------------------

PICTURE = [{"type": "text", "text": "What is this?"}, {"type": "image_url", "image_url": {"url": "x"}}]


@pytest.mark.parametrize(
    ("endpoint", "fields", "field", "code"),
    [
        (CHAT, {"tools": [{"type": "function"}]}, "tools", "unsupported_value"),
        (CHAT, {"tool_choice": "required"}, "tool_choice", "unsupported_value"),
        (CHAT, {"functions": [{"name": "f"}]}, "functions", "unsupported_value"),
        (CHAT, {"function_call": {"name": "f"}}, "function_call", "unsupported_value"),
        (CHAT, {"modalities": ["text", "audio"]}, "modalities", "unsupported_value"),
        (CHAT, {"audio": {"voice": "x"}}, "audio", "unsupported_parameter"),
        (CHAT, {"web_search_options": {}}, "web_search_options", "unsupported_parameter"),
        (CHAT, {"moderation": {}}, "moderation", "unsupported_parameter"),
        (CHAT, {"response_format": {"type": "grammar"}}, "response_format", "invalid_value"),
        (CHAT, {"response_format": {"type": "json_schema"}}, "response_format.json_schema", MISSING),
        (CHAT, {"response_format": "json"}, "response_format", "invalid_type"),
        (CHAT, {"response_format": SCHEMA | {"x": 1}}, "response_format.x", "unknown_parameter"),
        (CHAT, {"response_format": SCHEMA, "min_tokens": 1}, "min_tokens", "invalid_value"),
        (CHAT, {"logprobs": 1}, "logprobs", "invalid_type"),
        (CHAT, {"top_logprobs": 2}, "top_logprobs", "invalid_value"),
        (CHAT, {"logprobs": True, "top_logprobs": 21}, "top_logprobs", "invalid_value"),
        (
            CHAT,
            {"messages": [{"role": "user", "content": PICTURE}]},
            "messages[0].content[1].type",
            "unsupported_value",
        ),
        (
            CHAT,
            {"messages": [*HELLO, {"role": "assistant", "content": None, "tool_calls": [{}]}]},
            "messages[1].tool_calls",
            "unsupported_value",
        ),
        (COMPLETIONS, {"suffix": "end"}, "suffix", "unsupported_value"),
        (COMPLETIONS, {"echo": 1}, "echo", "invalid_type"),
        (COMPLETIONS, {"logprobs": True}, "logprobs", "invalid_type"),
        (COMPLETIONS, {"logprobs": 21}, "logprobs", "invalid_value"),
        (COMPLETIONS, {"max_tokens": 0}, "max_tokens", "invalid_value"),
        (COMPLETIONS, {"best_of": 2}, "best_of", "unsupported_value"),
        (COMPLETIONS, {"prompt": ["a", "b"]}, "prompt", "unsupported_value"),
        (COMPLETIONS, {"prompt": [[1], [2]]}, "prompt", "unsupported_value"),
        (RESPONSES, {"tools": [{"type": "web_search"}]}, "tools", "unsupported_value"),
        (RESPONSES, {"prompt": {"id": "p"}}, "prompt", "unsupported_parameter"),
        (RESPONSES, {"context_management": []}, "context_management", "unsupported_parameter"),
        (RESPONSES, {"moderation": {}}, "moderation", "unsupported_parameter"),
        (RESPONSES, {"previous_response_id": "resp_1"}, "previous_response_id", "unsupported_parameter"),
        (RESPONSES, {"conversation": "conv_1"}, "conversation", "unsupported_parameter"),
        (RESPONSES, {"top_logprobs": 21}, "top_logprobs", "invalid_value"),
        (RESPONSES, {"text": {"format": {"type": "json_schema"}}}, "text.format.json_schema.schema", MISSING),
        (RESPONSES, {"text": {"format": {"type": "grammar"}}}, "text.format", "invalid_value"),
        (RESPONSES, {"input": [{"type": "function_call_output"}]}, "input[0].type", "unsupported_value"),
        (
            RESPONSES,
            {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
            "input[0].content[0].type",
            "unsupported_value",
        ),
    ],
)
def test_what_cannot_be_done_is_refused(endpoint: str, fields: dict[str, Any], field: str, code: str) -> None:
    """What would change the answer and cannot be done is refused by its name, not dropped."""
    refusal = refused(endpoint, **fields)
    assert (refusal.field, refusal.code) == (field, code)


@pytest.mark.parametrize(
    ("endpoint", "fields", "field", "code"),
    [
        (CHAT, {"model": None}, "model", "missing_required_parameter"),
        (CHAT, {"model": 5}, "model", "invalid_type"),
        (CHAT, {"model": ""}, "model", "invalid_value"),
        (CHAT, {"messages": None}, "messages", "missing_required_parameter"),
        (CHAT, {"messages": []}, "messages", "invalid_value"),
        (CHAT, {"messages": "Hello"}, "messages", "invalid_type"),
        (CHAT, {"messages": ["Hello"]}, "messages[0]", "invalid_type"),
        (CHAT, {"messages": [{"content": "Hello"}]}, "messages[0].role", "missing_required_parameter"),
        (CHAT, {"messages": [{"role": "judge", "content": "x"}]}, "messages[0].role", "invalid_value"),
        (CHAT, {"messages": [*HELLO, {"role": "user"}]}, "messages[1].content", "missing_required_parameter"),
        (CHAT, {"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "invalid_type"),
        (CHAT, {"messages": [{"role": "user", "content": ["a"]}]}, "messages[0].content[0]", "invalid_type"),
        (CHAT, {"max_completion_tokens": 0}, "max_completion_tokens", "invalid_value"),
        (CHAT, {"max_tokens": 0}, "max_tokens", "invalid_value"),
        (CHAT, {"max_tokens": "5"}, "max_tokens", "invalid_type"),
        (CHAT, {"max_tokens": True}, "max_tokens", "invalid_type"),
        (CHAT, {"max_tokens": 2.0}, "max_tokens", "invalid_type"),
        (CHAT, {"temperature": 3}, "temperature", "invalid_value"),
        (CHAT, {"temperature": "hot"}, "temperature", "invalid_type"),
        (CHAT, {"n": 0}, "n", "invalid_value"),
        (CHAT, {"stop": ["a", ""]}, "stop[1]", "invalid_value"),
        (CHAT, {"stop": 5}, "stop", "invalid_type"),
        (COMPLETIONS, {"prompt": None}, "prompt", "missing_required_parameter"),
        (COMPLETIONS, {"prompt": ""}, "prompt", "invalid_value"),
        (COMPLETIONS, {"prompt": []}, "prompt", "invalid_value"),
        (COMPLETIONS, {"prompt": [{}]}, "prompt[0]", "invalid_type"),
        (COMPLETIONS, {"prompt": [[1, "a"]]}, "prompt[0]", "invalid_type"),
        (COMPLETIONS, {"max_tokens": 0}, "max_tokens", "invalid_value"),
        (RESPONSES, {"input": None}, "input", "missing_required_parameter"),
        (RESPONSES, {"input": []}, "input", "invalid_value"),
        (RESPONSES, {"input": [{"role": "tool", "content": 1}]}, "input[0].content", "invalid_type"),
        (RESPONSES, {"max_output_tokens": 0}, "max_output_tokens", "invalid_value"),
        (RESPONSES, {"instructions": 5}, "instructions", "invalid_type"),
        (RESPONSES, {"metadata": {"a": 1}}, "metadata.a", "invalid_value"),
        (RESPONSES, {"truncation": "maybe"}, "truncation", "unsupported_value"),
    ],
)
def test_faults_are_named_as_the_caller_does(endpoint: str, fields: dict[str, Any], field: str, code: str) -> None:
    """A bad field is refused under the name it has on the wire, not under ours."""
    refusal = refused(endpoint, **fields)
    assert (refusal.field, refusal.code) == (field, code)


@pytest.mark.parametrize(
    ("endpoint", "fields", "ours", "theirs"),
    [
        (CHAT, {"max_completion_tokens": 9}, "max_tokens", "max_completion_tokens"),
        (CHAT, {"max_tokens": 9}, "max_tokens", "max_tokens"),
        (RESPONSES, {}, "max_tokens", "max_output_tokens"),
        (RESPONSES, {}, "messages", "input"),
        (CHAT, {}, "messages[3].content", "messages[3].content"),
        (COMPLETIONS, {}, "prompt", "prompt"),
        (RESPONSES, {}, "temperature", "temperature"),
    ],
)
def test_later_faults_are_renamed_too(endpoint: str, fields: dict[str, Any], ours: str, theirs: str) -> None:
    """What the model's own check refuses comes out in the caller's terms."""

    def check(_: JobRequest) -> JobRequest:
        raise RequestInvalid(ours, "too long", "context_length_exceeded")

    with pytest.raises(RequestInvalid) as refusal:
        translate(endpoint, BODIES[endpoint] | fields).checked(check)
    assert (refusal.value.field, refusal.value.code) == (theirs, "context_length_exceeded")
    assert str(refusal.value) == f"{theirs}: too long"


def test_an_unknown_model_stays_one() -> None:
    """The kind of an error that needs no other name is kept."""

    def check(_: JobRequest) -> JobRequest:
        raise ModelUnknown("no such model")

    with pytest.raises(ModelUnknown):
        translate(CHAT, BODIES[CHAT]).checked(check)


# -- objects ----------------------------------------------------------------------------------------------------


def job(state: State = State.SUCCEEDED, endpoint: str | None = CHAT, **fields: Any) -> Job:
    given: dict[str, Any] = {
        "choices": (Choice(index=0, text="Hi", finish_reason="stop"),) if state is State.SUCCEEDED else (),
        "usage": Usage(prompt_tokens=10, cached_tokens=4, completion_tokens=3),
        "finished_at": CREATED if state.final else None,
        "custom_id": "a",
        "line": 17,
    }
    return Job(
        id=JOB_ID,
        tenant_id="local",
        state=state,
        model="echo",
        lane=Lane.BULK,
        priority=5,
        attempts=1,
        max_attempts=3,
        created_at=CREATED,
        endpoint=endpoint,
        **(given | fields),
    )


def test_a_chat_completion() -> None:
    """A chat's answer has every required field, its tokens, and how much of the prompt was cached."""
    choices = (Choice(index=0, text="Hi", finish_reason="stop"), Choice(index=1, text="Ho", finish_reason="length"))
    made = answer(job(choices=choices))
    assert made["id"] == f"chatcmpl-{JOB_ID.hex}"
    assert made["object"] == "chat.completion"
    assert made["created"] == int(CREATED.timestamp())
    assert [(c["index"], c["message"]["content"], c["finish_reason"]) for c in made["choices"]] == [
        (0, "Hi", "stop"),
        (1, "Ho", "length"),
    ]
    assert made["usage"] == {
        "prompt_tokens": 10,
        "completion_tokens": 3,
        "total_tokens": 13,
        "prompt_tokens_details": {"cached_tokens": 4},
    }


def test_a_completion() -> None:
    """A completion's answer is its text, without a role."""
    made = answer(job(endpoint=COMPLETIONS))
    assert (made["id"], made["object"]) == (f"cmpl-{JOB_ID.hex}", "text_completion")
    assert made["choices"] == [{"index": 0, "text": "Hi", "logprobs": None, "finish_reason": "stop"}]


LOGPROBS = (
    TokenLogprob(token="H", id=7, logprob=-0.5, top=(("H", -0.5), ("J", -1.5))),
    TokenLogprob(token="bytes:\\xc3", id=8, logprob=-0.1),
    TokenLogprob(token="bytes:\\xa9", id=9, logprob=-0.2),
    TokenLogprob(token="y", id=3, logprob=-0.25),
    TokenLogprob(token="</s>", id=1, logprob=-2.0),
)


def test_logprobs_as_an_object_for_each_token() -> None:
    """Chat completions and responses give each token, its bytes, and the alternatives."""
    choices = (Choice(index=0, text="Héy", finish_reason="stop", logprobs=LOGPROBS),)
    content = answer(job(choices=choices))["choices"][0]["logprobs"]["content"]
    assert [one["logprob"] for one in content] == [-0.5, -0.1, -0.2, -0.25, -2.0]
    assert [bytes(one["bytes"]) for one in content] == [b"H", b"\xc3", b"\xa9", b"y", b"</s>"]
    assert content[0]["top_logprobs"] == [
        {"token": "H", "bytes": [72], "logprob": -0.5},
        {"token": "J", "bytes": [74], "logprob": -1.5},
    ]
    output = answer(job(endpoint=RESPONSES, choices=choices))["output"][0]["content"][0]
    assert output["logprobs"] == content


def test_logprobs_as_columns() -> None:
    """Completions give a list for each kind of fact; nothing comes before an echoed prompt's first token."""
    logprobs = (TokenLogprob(token="<s>", id=0), TokenLogprob(token=" A", id=5, logprob=-3.0), *LOGPROBS)
    choices = (Choice(index=0, text="AHéy", finish_reason="stop", logprobs=logprobs),)
    made = answer(job(endpoint=COMPLETIONS, choices=choices))["choices"][0]["logprobs"]
    assert made["tokens"] == ["<s>", " A", "H", "bytes:\\xc3", "bytes:\\xa9", "y", "</s>"]
    assert made["token_logprobs"] == [None, -3.0, -0.5, -0.1, -0.2, -0.25, -2.0]
    assert made["top_logprobs"][:3] == [None, {" A": -3.0}, {"H": -0.5, "J": -1.5}]
    assert made["text_offset"] == [0, 0, 1, 2, 2, 3, 4]


def test_a_response() -> None:
    """A response holds one message with the text, and its own names for tokens."""
    made = answer(job(endpoint=RESPONSES, metadata={"team": "a"}))
    assert (made["id"], made["status"], made["metadata"]) == (f"resp_{JOB_ID.hex}", "completed", {"team": "a"})
    assert made["output"][0]["content"][0]["text"] == "Hi"
    assert made["usage"]["input_tokens_details"] == {"cached_tokens": 4, "cache_write_tokens": 0}
    assert made["usage"]["total_tokens"] == 13
    assert made["incomplete_details"] is None


def test_a_response_cut_short() -> None:
    """One that reached its limit is incomplete and says why."""
    made = response(job(choices=(Choice(index=0, text="Hi", finish_reason="length"),)))
    assert made["status"] == made["output"][0]["status"] == "incomplete"
    assert made["incomplete_details"] == {"reason": "max_output_tokens"}


@pytest.mark.parametrize(
    ("state", "status"),
    [
        (State.BLOCKED, "queued"),
        (State.QUEUED, "queued"),
        (State.RUNNING, "in_progress"),
        (State.FAILED, "failed"),
        (State.EXPIRED, "failed"),
        (State.CANCELLED, "cancelled"),
    ],
)
def test_a_response_without_an_answer(state: State, status: str) -> None:
    """A response exists from the start; it has usage only at its end, and an error only if it failed."""
    made = response(job(state, error=JobError(code="out_of_memory", message="too large")))
    assert (made["status"], made["output"]) == (status, [])
    assert (made["usage"] is None) == (not state.final)
    expected = {"code": "server_error", "message": "out_of_memory: too large"} if status == "failed" else None
    assert made["error"] == expected


def test_a_response_repeats_its_request() -> None:
    """What the caller knows of the request goes before what the job alone can say."""
    made = response(job(call=Call(echo={"temperature": 0.5, "instructions": "Be kind."})))
    assert (made["temperature"], made["instructions"], made["top_p"]) == (0.5, "Be kind.", None)


# -- lines ------------------------------------------------------------------------------------------------------


def test_a_batch_line() -> None:
    """A line gives its url and body."""
    line = batch_line({"custom_id": "a", "method": "POST", "url": CHAT, "body": BODIES[CHAT], "more": 1})
    assert (line.url, line.body) == (CHAT, BODIES[CHAT])


@pytest.mark.parametrize(
    ("fields", "field", "code"),
    [
        ({"method": None}, "method", "missing_required_parameter"),
        ({"method": "GET"}, "method", "invalid_method"),
        ({"url": None}, "url", "missing_required_parameter"),
        ({"url": "/v1/embeddings"}, "url", "invalid_url"),
        ({"url": ["x" * 1000]}, "url", "invalid_url"),
        ({"body": None}, "body", "missing_required_parameter"),
        ({"body": "Hello"}, "body", "invalid_type"),
    ],
)
def test_a_bad_batch_line(fields: dict[str, Any], field: str, code: str) -> None:
    """A line without what makes it a request is refused by the field's name, in a short message."""
    with pytest.raises(RequestInvalid) as refusal:
        batch_line({"method": "POST", "url": CHAT, "body": {}} | fields)
    assert (refusal.value.field, refusal.value.code) == (field, code)
    assert len(str(refusal.value)) < 200


@pytest.mark.parametrize("name", ["", "x" * 513, 5, ["a"], "a\0b"])
def test_a_bad_custom_id(name: Any) -> None:
    """A custom_id is a string of 1 to 512 characters that the database can keep."""
    with pytest.raises(RequestInvalid, match="custom_id"):
        custom_id({"custom_id": name})


def test_a_custom_id_may_be_missing() -> None:
    """Absent and null are the same; anything else is kept as it is."""
    assert (custom_id({}), custom_id({"custom_id": None}), custom_id({"custom_id": "é" * 512})) == (
        None,
        None,
        "é" * 512,
    )


def test_the_line_of_a_success() -> None:
    """A success is a reply with status 200 and the endpoint's object."""
    line = output_line(job())
    assert (line["id"], line["custom_id"], line["error"]) == (f"batch_req_{JOB_ID.hex}", "a", None)
    assert line["response"]["status_code"] == 200
    assert line["response"]["body"] == answer(job())
    assert line["response"]["request_id"]


@pytest.mark.parametrize(("code", "status"), [("out_of_memory", 500), ("invalid_request", 400)])
def test_the_line_of_a_failure(code: str, status: int) -> None:
    """A request that the engine could not do is an HTTP failure inside the response."""
    line = output_line(job(State.FAILED, error=JobError(code=code, message="too large")))
    assert (line["line"], line["response"]["status_code"], line["error"]) == (17, status, None)
    error = line["response"]["body"]["error"]
    assert (error["message"], error["code"], set(error)) == ("too large", code, {"message", "type", "param", "code"})


@pytest.mark.parametrize(
    ("state", "error", "code"),
    [
        (State.EXPIRED, JobError(code="deadline_exceeded", message="late"), "batch_expired"),
        (State.CANCELLED, None, "batch_cancelled"),
        (State.FAILED, JobError(code="worker_lost", message="its worker died"), "worker_lost"),
    ],
)
def test_the_line_of_what_was_not_executed(state: State, error: JobError | None, code: str) -> None:
    """What was never answered has no response, and an error of its own."""
    line = output_line(job(state, error=error))
    assert line["response"] is None
    assert line["error"]["code"] == code
    assert line["error"]["message"]


@pytest.mark.parametrize(("code", "status"), [("invalid_value", 400), ("model_not_found", 404)])
def test_the_line_of_a_rejection(code: str, status: int) -> None:
    """A line that became no request says which line it was and which field was at fault."""
    error = JobError(code=code, message="body.temperature: too hot")
    line = rejected_line(JOB_ID, Rejection(17, "a", error, "body.temperature"))
    assert (line["line"], line["custom_id"], line["error"]) == (17, "a", None)
    assert line["response"]["status_code"] == status
    assert line["response"]["body"]["error"] == {
        "message": "body.temperature: too hot",
        "type": "invalid_request_error",
        "param": "body.temperature",
        "code": code,
    }
    json.dumps(line)
