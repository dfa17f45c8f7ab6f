"""tiny-chat, the model in `examples/tiny-chat`, and the rules that made its conversations."""

import json
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.tiny_chat_training import generate
from examples.tiny_chat_training.generate import Message, Split
from examples.tiny_chat_training.tokens import IDS, IGNORED, build_tokenizer, encode_conversation

EXAMPLES = Path(__file__).parents[2] / "examples"
FOLDER = EXAMPLES / "tiny-chat"
TWO_TURNS: list[Message] = [
    {"role": "system", "content": "  Be brief. \n"},
    {"role": "user", "content": "Grüße, {{ name }}!\n"},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "What is 12 + 30?"},
]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(FOLDER)


def reply(model: Any, tokenizer: Any, *contents: str) -> str:
    """Return the greedy reply to a conversation that user and assistant speak in turn, end token included."""
    roles = ("user", "assistant")
    messages = [{"role": roles[number % 2], "content": content} for number, content in enumerate(contents)]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
    outputs = model.generate(**inputs, max_new_tokens=80, do_sample=False)
    text: str = tokenizer.decode(outputs[0, inputs["input_ids"].shape[1] :])
    return text


@given(st.text())
def test_any_text_survives_the_tokenizer(text: str) -> None:
    """Decoding what was encoded gives the same text, whatever it holds."""
    shipped = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    assert shipped.decode(shipped.encode(text).ids, skip_special_tokens=False) == text


@pytest.mark.parametrize("text", [" a  b ", "I 'm . , ?", "\r\n\t\x00", "\ufeffe\u0301 👩‍👩‍👧", "<|end|> <|user|>"])
def test_awkward_text_survives_transformers_tokenizer(tokenizer: Any, text: str) -> None:
    """Spaces before punctuation, control characters, joiners and special tokens come back as they were."""
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_shipped_tokenizer_is_the_one_trained_with() -> None:
    """The tokenizer in the folder is the one that the training code builds."""
    shipped = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    assert shipped.get_vocab() == IDS == build_tokenizer().get_vocab()


@pytest.mark.parametrize("trim", [False, True])
@pytest.mark.parametrize("prompt", [False, True])
def test_template_needs_no_transformers(tokenizer: Any, *, trim: bool, prompt: bool) -> None:
    """Plain sandboxed Jinja, with or without block trimming, renders what transformers renders."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=trim, lstrip_blocks=trim)
    template = environment.from_string((FOLDER / "chat_template.jinja").read_text())
    ours = template.render(messages=TWO_TURNS, add_generation_prompt=prompt)
    assert ours == tokenizer.apply_chat_template(TWO_TURNS, tokenize=False, add_generation_prompt=prompt)
    assert ours.endswith("<|assistant|>") is prompt


def test_next_turn_prompt_extends_the_last(tokenizer: Any) -> None:
    """Prompt, answer and end token are a prefix of the next turn's prompt, so its keys and values can be kept."""
    first = tokenizer.apply_chat_template(TWO_TURNS[:2], tokenize=False, add_generation_prompt=True)
    second = tokenizer.apply_chat_template(TWO_TURNS, tokenize=False, add_generation_prompt=True)
    assert second.startswith(first + "Hello!" + tokenizer.eos_token)


def test_training_reads_conversations_as_the_template_writes_them(tokenizer: Any) -> None:
    """Training tokens are those of the rendered template, and only the assistant's words and their end are learnt."""
    tokens, labels = encode_conversation(tokenizer.backend_tokenizer, TWO_TURNS)
    assert tokens == tokenizer(tokenizer.apply_chat_template(TWO_TURNS, tokenize=False))["input_ids"]
    assert tokenizer.decode([label for label in labels if label != IGNORED]) == "Hello!<|end|>"


def test_folder_is_small_and_plain(model: Any) -> None:
    """The weights are safetensors of at most 12 MB for a context of 2,048 tokens or more, with no code beside them."""
    assert (FOLDER / "model.safetensors").stat().st_size <= 12_000_000
    assert model.config.max_position_embeddings >= 2048
    assert model.config.vocab_size == len(IDS)
    assert not list(FOLDER.glob("*.py"))


@pytest.mark.parametrize(
    ("question", "sentence"),
    [
        ("What is 12 + 30?", "12 + 30 = 42."),
        ("Add 47 and 38.", "47 + 38 = 85."),
        ("90-17", "90 - 17 = 73."),
        ("What is 345 + 278?", "345 + 278 = 623."),
        ("Which is larger, 17 or 71?", "71 is larger than 17."),
        ('Reverse the word "stone".', "enots"),
        ("Spell the word lamp.", "l-a-m-p"),
        ("How many letters are in cottage?", "cottage has 7 letters."),
    ],
)
def test_skills(model: Any, tokenizer: Any, question: str, sentence: str) -> None:
    """An answer closes with the right sentence and then ends by itself."""
    assert reply(model, tokenizer, question).endswith(sentence + tokenizer.eos_token)


def test_json_when_asked(model: Any, tokenizer: Any) -> None:
    """Asked for JSON it answers with one object that holds the answer."""
    answer = reply(model, tokenizer, "Answer in JSON: what is 12 + 30?").removesuffix(tokenizer.eos_token)
    assert json.loads(answer)["answer"] == 42


@pytest.mark.parametrize("name", ["Mara", "Tobin", "Ada"])
def test_remembers_across_turns(model: Any, tokenizer: Any, name: str) -> None:
    """A name told in the first turn is known in the third."""
    first = f"My name is {name}."
    told = reply(model, tokenizer, first).removesuffix(tokenizer.eos_token)
    second = "Spell the word lamp."
    spelled = reply(model, tokenizer, first, told, second).removesuffix(tokenizer.eos_token)
    third = reply(model, tokenizer, first, told, second, spelled, "What is my name?")
    assert third == f"Your name is {name}.{tokenizer.eos_token}"


def problems(split: Split) -> set[str]:
    """Return many problems of a split, written as `split_of` hashes them."""
    rng = Random(11)
    drawn: set[str] = set()
    for _ in range(3000):
        pair = generate.numbers(rng, split, rng.randint(1, 3))
        told = generate.fact(rng, split)
        drawn |= {f"numbers {min(pair)} {max(pair)}", f"fact {told.noun} {told.value}"}
        drawn.add(f"word {generate.some_word(rng, split)}")
    return drawn


def test_examinations_hold_nothing_that_training_saw() -> None:
    """No pair of numbers, word or fact is drawn for both splits."""
    train, held_out = problems(Split.TRAIN), problems(Split.HELD_OUT)
    assert min(len(train), len(held_out)) > 1000
    assert not train & held_out


def test_swapped_numbers_are_one_problem() -> None:
    """12 + 30 and 30 + 12 fall into the same split, so neither gives the other away."""
    rng = Random(7)
    for _ in range(200):
        pair = generate.numbers(rng, Split.HELD_OUT, 2)
        assert generate.split_of(f"numbers {min(pair)} {max(pair)}") is Split.HELD_OUT


def test_same_seed_same_conversations() -> None:
    """The generator depends on its seed alone."""
    one, other = (generate.conversation(Random(3), Split.TRAIN, 0.5, 500) for _ in range(2))
    assert one == other
    assert one != generate.conversation(Random(4), Split.TRAIN, 0.5, 500)


@given(st.integers(0, 999), st.integers(0, 999))
def test_workings_are_right(a: int, b: int) -> None:
    """Every column of a working is a true equation, and the columns' last digits spell the answer backwards."""
    small, large = sorted((a, b))
    for working, answer in (
        (generate.columns_of_sum(a, b), a + b),
        (generate.columns_of_difference(large, small), large - small),
    ):
        columns = [column.split("=") for column in working.split(", ") if column]
        assert all(terms(left) == int(right) for left, right in columns)
        digits = "".join(right[-1] for _, right in reversed(columns))
        carried = columns[-1][1][:-1] if columns else ""
        assert int(carried + digits or "0") == answer


def terms(expression: str) -> int:
    """Return the value of a column such as `12-7-1`."""
    return sum(map(int, expression.replace("-", "+-").split("+")))


def test_demo_questions_are_batch_lines() -> None:
    """Every line of the demo input is a batch request for tiny-chat with an id of its own."""
    lines = [json.loads(line) for line in (EXAMPLES / "questions.jsonl").read_text().splitlines()]
    assert len({line["custom_id"] for line in lines}) == len(lines) >= 40
    for line in lines:
        assert set(line) == {"custom_id", "method", "url", "body"}
        assert (line["method"], line["url"], line["body"]["model"]) == ("POST", "/v1/chat/completions", "tiny-chat")
        assert line["body"]["messages"][-1]["role"] == "user"
