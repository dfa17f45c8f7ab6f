"""How tokens are chosen and what is told of them, through the engine, with small random models."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from models.catalog import ModelSpec
from models.engine import load_engine
from models.protocol import Delta, Ended, Engine, Event, GenerationRequest, InvalidRequest, Structure, TokenLogprobs

Ask = Callable[..., GenerationRequest]
Finish = Callable[..., dict[str, Ended]]
EOS = 257
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
AS_PERSON = Structure(json_schema=json.dumps(PERSON | {"x-guidance": {"whitespace_flexible": False}}))


@pytest.fixture
def model(tiny_model: Callable[..., tuple[Path, Any]]) -> Any:
    return tiny_model()[1]


@pytest.fixture
def engine(tiny_model: Callable[..., tuple[Path, Any]]) -> Iterator[Engine]:
    made = load_engine(ModelSpec(name="tiny", path=str(tiny_model()[0]), slots=4), "cpu")
    yield made
    made.close()


def expected(model: Any, token_ids: list[int]) -> torch.Tensor:
    """(tokens, vocab): what the model thinks comes after each token."""
    with torch.inference_mode():
        return model(torch.tensor([token_ids])).logits[0].float().log_softmax(-1)


def check(told: TokenLogprobs, thought: torch.Tensor, token_id: int, count: int) -> None:
    assert told.token_id == token_id
    assert told.logprob == pytest.approx(thought[token_id].item(), abs=1e-3)
    values = thought.topk(count).values.tolist()
    assert [value for _, value in told.top] == pytest.approx(values, abs=1e-3)


# -- structure --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_a_schema_is_kept_beside_neighbours_without_one(
    engine: Engine, ask: Ask, finish: Finish, temperature: float
) -> None:
    """A random model writes what the schema says and stops; a neighbour writes what it would alone."""
    engine.submit(ask("alone", "hello", 60))
    alone = finish(engine)["alone"].choices
    engine.submit(ask("plain", "hello", 60))
    engine.submit(ask("guided", "hello", 100, structure=AS_PERSON, n=3, temperature=temperature, seed=1))
    ended = finish(engine)
    assert ended["plain"].choices == alone
    for choice in ended["guided"].choices:
        assert choice.finish_reason == "stop"
        person = json.loads(choice.text)
        assert set(person) == {"name", "age"}
        assert 0 <= person["age"] <= 99


def test_each_kind_of_structure(engine: Engine, ask: Ask, finish: Finish) -> None:
    """An expression, a choice and any object; cut by max_tokens, a text is the beginning of one that fits."""
    for name, structure, max_tokens in (
        ("regex", Structure(regex="[0-9]{3}-[a-c]{5}"), 40),
        ("choice", Structure(choice=("left", "right", "é")), 40),
        ("object", Structure(json_object=True), 20),
        ("cut", Structure(regex="[0-9]{3}-[a-c]{5}"), 5),
    ):
        engine.submit(ask(name, "x", max_tokens, structure=structure, temperature=1.0, seed=2))
    ended = finish(engine)
    texts = {name: end.choices[0].text for name, end in ended.items()}
    assert re.fullmatch("[0-9]{3}-[a-c]{5}", texts["regex"])
    assert texts["choice"] in {"left", "right", "é"}
    assert texts["object"].startswith("{")
    assert re.fullmatch("[0-9]{3}-[a-c]", texts["cut"])
    assert ended["cut"].choices[0].finish_reason == "length"


def test_a_structure_without_sense_ends_its_request_alone(engine: Engine, ask: Ask, finish: Finish) -> None:
    """It fails as the request's fault, by the field's name, and touches neither the model nor a neighbour."""
    engine.submit(ask("wrong", "x", structure=Structure(regex="(")))
    engine.submit(ask("right", "x", 5))
    ended = finish(engine)
    assert ended["right"].outcome == "succeeded"
    assert (ended["wrong"].outcome, ended["wrong"].choices) == ("failed", ())
    assert ended["wrong"].error is not None
    assert (ended["wrong"].error.code, ended["wrong"].error.retryable) == ("invalid_request", False)
    assert ended["wrong"].error.message.startswith("regex: ")


def test_a_structure_too_complex_to_follow_fails_its_request_alone(engine: Engine, ask: Ask, finish: Finish) -> None:
    """The limit is met in the middle of the answer; what was written is kept."""
    wide = {"type": "object", "properties": {f"property {at}": {"type": "string"} for at in range(1_200)}}
    engine.submit(ask("wide", "x", structure=Structure(json_schema=json.dumps(wide))))
    engine.submit(ask("right", "x", 5))
    ended = finish(engine)
    assert ended["right"].outcome == "succeeded"
    assert ended["wide"].error is not None
    assert ended["wide"].error.code == "structure_failed"


def test_a_request_can_be_cancelled_while_its_structure_is_compiled(engine: Engine, ask: Ask, finish: Finish) -> None:
    """Nothing of it stays behind: neither in the queue's count nor in the pool."""
    properties = {f"p{at}": {"type": "string", "pattern": f"^[a-z]{{{at}}}$"} for at in range(500)}
    engine.submit(ask("slow", "x", structure=Structure(json_schema=json.dumps({"properties": properties}))))
    engine.cancel("slow")
    assert finish(engine)["slow"].outcome == "cancelled"
    engine.submit(ask("next", "x", 3))
    assert finish(engine)["next"].outcome == "succeeded"
    assert engine.health().waiting == 0


@pytest.mark.parametrize(
    ("field", "settings"),
    [
        ("response_format", {"structure": AS_PERSON}),
        ("regex", {"structure": Structure(regex="a")}),
        ("logprobs", {"logprobs": 0}),
        ("prompt_logprobs", {"prompt_logprobs": 0}),
    ],
)
def test_echo_refuses_what_takes_a_model(ask: Ask, field: str, settings: dict[str, Any]) -> None:
    """The error names the field."""
    engine = load_engine(ModelSpec(name="echo", engine="echo"))
    with pytest.raises(InvalidRequest) as refused:
        engine.submit(ask("a", "hi", **settings))
    assert refused.value.field == field
    assert not engine.has_work()


# -- ends -------------------------------------------------------------------------------------------------------


def test_a_stop_token_ends_a_row_and_is_no_text(engine: Engine, ask: Ask, finish: Finish) -> None:
    """It is the last token, but not part of the text."""
    engine.submit(ask("free", "hello", 20))
    free = finish(engine)["free"].choices[0]
    stop = free.token_ids[7]
    first = free.token_ids.index(stop)
    engine.submit(ask("stopped", "hello", 20, stop_token_ids=(stop,)))
    choice = finish(engine)["stopped"].choices[0]
    assert choice.token_ids == free.token_ids[: first + 1]
    assert choice.finish_reason == "stop"
    assert free.text.startswith(choice.text)
    assert len(choice.text) <= first


def test_min_tokens_holds_off_every_kind_of_end(engine: Engine, ask: Ask, finish: Finish) -> None:
    """EOS, a stop token and a stop string come only after so many tokens."""
    engine.submit(ask("eos", "hello", 20, min_tokens=9, logit_bias=((EOS, 100.0),)))
    engine.submit(ask("token", "hello", 20, min_tokens=9, logit_bias=((10, 100.0),), stop_token_ids=(10,)))
    letter = load_letter()
    engine.submit(ask("string", "hello", 20, min_tokens=9, logit_bias=((letter, 100.0),), stop=("a",)))
    ended = finish(engine)
    assert [len(ended[name].choices[0].token_ids) for name in ("eos", "token", "string")] == [10, 10, 10]
    assert ended["eos"].choices[0].token_ids[-1] == EOS
    assert 10 not in ended["token"].choices[0].token_ids[:9]
    assert ended["string"].choices[0].text == "a" * 9
    assert {end.choices[0].finish_reason for end in ended.values()} == {"stop"}


def load_letter() -> int:
    """The token of "a" in the byte tokenizer."""
    from tokenizers import pre_tokenizers

    return sorted(pre_tokenizers.ByteLevel.alphabet()).index("a")


def test_echo_honours_stop_tokens_and_min_tokens(ask: Ask, finish: Finish) -> None:
    """Whether it gives its answer at once or token by token."""
    for seconds in (0.0, 1e-9):
        engine = load_engine(ModelSpec(name="echo", engine="echo", seconds_per_token=seconds))
        engine.submit(ask("stop", "abcabc", stop_token_ids=(ord("b"),)))
        engine.submit(ask("later", "abcabc", stop_token_ids=(ord("b"),), min_tokens=3))
        engine.submit(ask("longer", "abc", min_tokens=7))
        engine.submit(ask("string", "abcabc", stop=("ca",), min_tokens=2))
        ended = finish(engine)
        texts = {name: end.choices[0].text for name, end in ended.items()}
        assert texts == {"stop": "a", "later": "abca", "longer": "abcabca", "string": "ab"}


# -- log probabilities ------------------------------------------------------------------------------------------


def test_logprobs_are_the_models_own(engine: Engine, model: Any, ask: Ask, finish: Finish) -> None:
    """Of raw logits, under any rules, one for each token, in the deltas as in the end."""
    events: list[Event] = []
    prompt = list(b"tell me")
    engine.submit(ask("plain", prompt, 12, logprobs=3, stream=True))
    engine.submit(ask("ruled", prompt, 12, logprobs=0, temperature=1.5, seed=3, top_k=9, presence_penalty=2.0))
    engine.submit(ask("silent", prompt, 12))
    ended = finish(engine, events)
    for name, count in (("plain", 3), ("ruled", 0)):
        choice = ended[name].choices[0]
        assert len(choice.logprobs) == len(choice.token_ids) == 12
        thoughts = expected(model, [*prompt, *choice.token_ids])[len(prompt) - 1 :]
        for told, thought, token_id in zip(choice.logprobs, thoughts, choice.token_ids, strict=False):
            check(told, thought, token_id, count)
    assert ended["silent"].choices[0].logprobs == ()
    deltas = [event for event in events if isinstance(event, Delta)]
    assert all(len(delta.logprobs) == len(delta.token_ids) for delta in deltas)
    told = [one for delta in deltas for one in delta.logprobs]
    assert tuple(told) == ended["plain"].choices[0].logprobs[: len(told)]


def test_prompt_logprobs_are_told_once_even_after_a_cached_prompt(
    engine: Engine, model: Any, ask: Ask, finish: Finish
) -> None:
    """One for each token of a prompt longer than a step, none for the first; also if the prompt was seen before."""
    prompt = [(7 * at) % 256 for at in range(200)]
    engine.submit(ask("before", prompt, 2))
    finish(engine)
    engine.submit(ask("asked", prompt, 2, prompt_logprobs=2, n=2))
    engine.submit(ask("beside", prompt[:150], 2))
    ended = finish(engine)
    first, *others = ended["asked"].prompt_logprobs
    assert first is None
    assert len(others) == len(prompt) - 1
    for told, thought, token_id in zip(others, expected(model, prompt), prompt[1:], strict=False):
        assert told is not None
        check(told, thought, token_id, 2)
    assert ended["beside"].prompt_logprobs == ()


def test_a_prompt_can_be_scored_without_an_answer(engine: Engine, ask: Ask, finish: Finish) -> None:
    """max_tokens 0: nothing is written or billed but the prompt."""
    engine.submit(ask("scored", "some text", 0, prompt_logprobs=0))
    end = finish(engine)["scored"]
    assert (end.outcome, len(end.prompt_logprobs), end.usage.completion_tokens) == ("succeeded", 9, 0)
    assert (end.choices[0].text, end.choices[0].token_ids, end.choices[0].finish_reason) == ("", (), "length")
