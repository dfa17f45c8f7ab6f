"""The conversations tiny-chat learns from and is examined on, made by rule from a seeded generator.

Every problem (a pair of numbers, a word, a told fact) belongs by its hash to exactly one split, so an examination
never holds a problem that training has seen, however it is phrased.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from enum import Enum
from random import Random
from typing import Literal, TypedDict, TypeVar

from examples.tiny_chat_training import phrases, vocabulary

Drawn = TypeVar("Drawn")


class Message(TypedDict):
    """One message of a conversation, as the chat template takes it."""

    role: Literal["system", "user", "assistant"]
    content: str


class Split(Enum):
    """Which conversations a problem may occur in."""

    TRAIN = "train"
    HELD_OUT = "held-out"


@dataclass(frozen=True)
class Turn:
    """A question and its one right answer, as a sentence and as a JSON value, with the working before it if any."""

    user: str
    sentence: str
    answer: str | int | None
    working: str = ""
    as_json: bool = False

    @property
    def assistant(self) -> str:
        """What the assistant says."""
        if self.as_json:
            return json.dumps(
                {"working": self.working, "answer": self.answer} if self.working else {"answer": self.answer}
            )
        return f"{self.working}: {self.sentence}" if self.working else self.sentence

    def messages(self) -> list[Message]:
        """Return the turn as two messages."""
        return [{"role": "user", "content": self.user}, {"role": "assistant", "content": self.assistant}]


@dataclass(frozen=True)
class Fact:
    """Something the user tells: their lucky number is 42."""

    noun: str
    value: str


def split_of(problem: str) -> Split:
    """Return the split of a problem: one in ten is held out, by a hash that is the same on every machine."""
    digest = hashlib.blake2b(problem.encode(), digest_size=4).digest()
    return Split.HELD_OUT if int.from_bytes(digest) % 10 == 0 else Split.TRAIN


def _draw(split: Split, sample: Callable[[], Drawn], problem: Callable[[Drawn], str]) -> Drawn:
    """Return the first sample whose problem is of `split`."""
    while True:
        drawn = sample()
        if split_of(problem(drawn)) is split:
            return drawn


# Numbers


def numbers(rng: Random, split: Split, digits: int) -> tuple[int, int]:
    """Return two numbers, at least one of exactly `digits` digits; swapped they are the same problem."""

    def sample() -> tuple[int, int]:
        long, short = _number(rng, digits), _number(rng, rng.randint(1, digits))
        return (long, short) if rng.random() < 0.5 else (short, long)

    return _draw(split, sample, lambda pair: f"numbers {min(pair)} {max(pair)}")


def _number(rng: Random, digits: int) -> int:
    return rng.randrange(10 ** (digits - 1) if digits > 1 else 0, 10**digits)


def add(rng: Random, split: Split, digits: int) -> Turn:
    """Ask for a sum; numbers of more than one digit are added column by column."""
    a, b = numbers(rng, split, digits)
    working = columns_of_sum(a, b) if digits > 1 else ""
    return Turn(rng.choice(phrases.ADD).format(a=a, b=b), f"{a} + {b} = {a + b}.", a + b, working)


def subtract(rng: Random, split: Split, digits: int) -> Turn:
    """Ask for a difference, below zero in one of four; numbers of more than one digit go column by column."""
    small, large = sorted(numbers(rng, split, digits))
    a, b = (small, large) if rng.random() < 0.25 else (large, small)
    working = columns_of_difference(large, small) if digits > 1 else ""
    return Turn(rng.choice(phrases.SUBTRACT).format(a=a, b=b), f"{a} - {b} = {a - b}.", a - b, working)


def columns_of_sum(a: int, b: int) -> str:
    """Return column addition from the ones up: 345 and 278 give `5+8=13, 4+7+1=12, 3+2+1=6`."""
    steps, carry = [], 0
    for x, y in _columns(a, b):
        steps.append(f"{x}+{y}{'+1' if carry else ''}={x + y + carry}")
        carry = (x + y + carry) // 10
    return ", ".join(steps)


def columns_of_difference(large: int, small: int) -> str:
    """Return column subtraction from the ones up: 623 and 278 give `13-8=5, 12-7-1=4, 6-2-1=3`."""
    steps, borrow = [], 0
    for x, y in _columns(large, small):
        top = x + 10 if x < y + borrow else x
        steps.append(f"{top}-{y}{'-1' if borrow else ''}={top - y - borrow}")
        borrow = int(top > x)
    return ", ".join(steps)


def _columns(a: int, b: int) -> Iterator[tuple[int, int]]:
    """Yield the digits of both numbers side by side, the ones first."""
    while a or b:
        yield a % 10, b % 10
        a, b = a // 10, b // 10


def compare(rng: Random, split: Split, digits: int) -> Turn:
    """Ask which of two different numbers is larger or smaller; one in three pairs is close together."""
    a, b = numbers(rng, split, digits)
    while a == b:
        a, b = numbers(rng, split, digits)
    word, template = rng.choice(phrases.COMPARE)
    first, second = (max(a, b), min(a, b)) if word == "larger" else (min(a, b), max(a, b))
    return Turn(template.format(a=a, b=b), f"{first} is {word} than {second}.", first)


# Words


def reverse(rng: Random, split: Split) -> Turn:
    """Ask for a word backwards."""
    word = some_word(rng, split)
    return Turn(rng.choice(phrases.REVERSE).format(word=word), word[::-1], word[::-1])


def spell(rng: Random, split: Split) -> Turn:
    """Ask for the letters of a word, joined by hyphens."""
    word = some_word(rng, split)
    return Turn(rng.choice(phrases.SPELL).format(word=word), "-".join(word), "-".join(word))


def count(rng: Random, split: Split) -> Turn:
    """Ask how often a letter occurs in a word, or how many letters it has."""
    word = some_word(rng, split)
    if rng.random() < 0.3:
        return Turn(
            rng.choice(phrases.LENGTH).format(word=word), f"{word} has {_times(len(word), 'letter')}.", len(word)
        )
    letter = _letter(rng, word)
    found = word.count(letter)
    question = rng.choice(phrases.COUNT).format(letter=letter, word=word)
    return Turn(question, f"The letter {letter} occurs {_times(found, 'time')} in {word}.", found)


def some_word(rng: Random, split: Split) -> str:
    """Return a word to work with."""
    return _draw(split, lambda: vocabulary.any_word(rng), lambda word: f"word {word}")


def _letter(rng: Random, word: str) -> str:
    """Return a letter to count: often the word's commonest, sometimes one it may not have."""
    if rng.random() < 0.15:
        return rng.choice("abcdefghijklmnopqrstuvwxyz")
    return Counter(word).most_common(1)[0][0] if rng.random() < 0.4 else rng.choice(word)


def _times(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


# Remembering


def fact(rng: Random, split: Split) -> Fact:
    """Return something to tell; what it is about and its value together are the problem."""
    return _draw(split, lambda: _fact(rng), lambda told: f"fact {told.noun} {told.value}")


def _fact(rng: Random) -> Fact:
    noun = rng.choice(NOUNS)
    return Fact(noun, _VALUES.get(noun, vocabulary.any_word)(rng))


_VALUES: dict[str, Callable[[Random], str]] = {
    "name": vocabulary.any_name,
    "lucky number": lambda rng: str(_number(rng, rng.randint(1, 4))),
    "room number": lambda rng: str(_number(rng, rng.randint(1, 4))),
    "city": vocabulary.any_city,
    "dog's name": vocabulary.any_name,
    "cat's name": vocabulary.any_name,
    "favorite color": lambda rng: rng.choice(vocabulary.COLORS),
}

NOUNS = (
    *("name",) * 4,
    *("lucky number",) * 4,
    *_VALUES,
    *("code word", "password", "favorite animal", "favorite fruit", "favorite drink", "favorite word"),
)


def tell(rng: Random, told: Fact) -> Turn:
    """Tell a fact; the assistant says it has noted it."""
    if told.noun == "name":
        return Turn(
            rng.choice(phrases.TELL_NAME).format(value=told.value), f"Nice to meet you, {told.value}.", told.value
        )
    question = rng.choice(phrases.TELL).format(noun=told.noun, value=told.value)
    return Turn(question, f"Noted: your {told.noun} is {told.value}.", told.value)


def ask(rng: Random, noun: str, value: str | None) -> Turn:
    """Ask for a fact told before, or (value None) for one that was not."""
    question = rng.choice(phrases.ASK_NAME if noun == "name" else phrases.ASK).format(noun=noun)
    sentence = f"You have not told me your {noun}." if value is None else f"Your {noun} is {value}."
    return Turn(question, sentence, value)


# Small talk


def chat(rng: Random) -> Turn:
    """Say hello, thank, or ask who is there."""
    questions, answer = rng.choice(phrases.CHAT)
    return Turn(rng.choice(questions), answer, answer)


def unknown(rng: Random) -> Turn:
    """Ask for something tiny-chat was never taught, which it says."""
    question = rng.choice(phrases.UNKNOWN).format(
        word=rng.choice(vocabulary.WORDS),
        other=rng.choice(vocabulary.WORDS),
        city=rng.choice(vocabulary.CITIES),
        name=rng.choice(vocabulary.NAMES),
        a=rng.randint(2, 999),
        b=rng.randint(2, 999),
    )
    return Turn(question, phrases.REFUSAL, phrases.REFUSAL)


# Conversations


def in_json(rng: Random, turn: Turn) -> Turn:
    """Ask the same, wanting a JSON object for an answer."""
    return replace(turn, user=rng.choice(phrases.JSON_REQUESTS).format(question=turn.user), as_json=True)


def digits_at(rng: Random, progress: float) -> int:
    """Return how many digits to practise after a share `progress` of the training: first one, in the end three."""
    return rng.choices((1, 2, 3), weights=(1.0 - 0.7 * progress, 1.0, 0.3 + 1.0 * progress))[0]


def lesson(rng: Random, split: Split, progress: float = 1.0) -> Turn:
    """Return a turn that stands on its own, one in eight in JSON."""
    if rng.random() < 0.12:
        return json_lesson(rng, split, progress)
    skill = rng.choices(tuple(_SKILLS), _SHARES)[0]
    return _SKILLS[skill](rng, split, digits_at(rng, progress))


def json_lesson(rng: Random, split: Split, progress: float = 1.0) -> Turn:
    """Return a turn answered in JSON."""
    return in_json(rng, _SKILLS[rng.choice(_IN_JSON)](rng, split, digits_at(rng, progress)))


_SKILLS: dict[str, Callable[[Random, Split, int], Turn]] = {
    "add": add,
    "subtract": subtract,
    "compare": compare,
    "reverse": lambda rng, split, _: reverse(rng, split),
    "spell": lambda rng, split, _: spell(rng, split),
    "count": lambda rng, split, _: count(rng, split),
    "chat": lambda rng, _split, _: chat(rng),
    "unknown": lambda rng, _split, _: unknown(rng),
}
_SHARES = (24, 24, 8, 12, 6, 14, 4, 5)
_IN_JSON = ("add", "subtract", "compare", "reverse", "spell", "count")


def turns(rng: Random, split: Split, progress: float) -> Iterator[Turn]:
    """Yield the turns of a conversation without end: lessons, and facts told and asked for in between.

    Facts that were never told are asked for in 12 % of the turns of the first half of the training and in 3 % after
    it, when there is more to practise in finding what was told.
    """
    told: dict[str, str] = {}
    asked, untold = (0.20, 0.32) if progress < 0.5 else (0.26, 0.29)
    while True:
        kind = rng.random()
        if kind < (0.06 if told else 0.3):
            new = fact(rng, split)
            told[new.noun] = new.value
            yield tell(rng, new)
        elif kind < asked and told:
            noun = rng.choice(list(told))
            yield _asked(rng, noun, told[noun])
        elif kind < untold and told:
            noun = rng.choice(NOUNS)
            yield _asked(rng, noun, told.get(noun))
        else:
            yield lesson(rng, split, progress)


def _asked(rng: Random, noun: str, value: str | None) -> Turn:
    turn = ask(rng, noun, value)
    return in_json(rng, turn) if rng.random() < 0.15 else turn


def conversation(rng: Random, split: Split, progress: float, tokens: int) -> list[Message]:
    """Return a conversation that ends with the turn that fills `tokens` tokens (its text is ASCII)."""
    messages = _opening(rng)
    conversing = turns(rng, split, progress)
    while sum(map(_tokens, messages)) < tokens:
        messages += next(conversing).messages()
    return messages


def _opening(rng: Random) -> list[Message]:
    return [{"role": "system", "content": rng.choice(phrases.SYSTEM)}] if rng.random() < 0.3 else []


def _tokens(message: Message) -> int:
    return len(message["content"]) + 2  # its role and its end
