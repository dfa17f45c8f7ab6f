"""Structures, against a tokenizer whose tokens are bytes and one of sentence pieces."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE, Unigram

from models.catalog import ModelSpec
from models.grammar import GrammarMatcher, Grammars
from models.prompt import load_prompt_format
from models.protocol import InvalidRequest, Structure

EOS = 257
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 5}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def spec(tokenizer_folder: Callable[..., Path]) -> ModelSpec:
    return ModelSpec(name="tiny", path=str(tokenizer_folder()))


@pytest.fixture(scope="module")
def grammars(spec: ModelSpec) -> Iterator[Grammars]:
    made = Grammars(load_prompt_format(spec), 300, (EOS, 299))
    yield made
    made.close()


@pytest.fixture
def encode(spec: ModelSpec) -> Callable[[str], list[int]]:
    return load_prompt_format(spec).encode_text


def allowed(matcher: GrammarMatcher) -> set[int]:
    mask = matcher.allowed()
    return {token for token in range(8 * len(mask)) if mask[token // 8] >> token % 8 & 1}


def follow(matcher: GrammarMatcher, token_ids: list[int]) -> bool:
    """Whether every one of these may come."""
    for token_id in token_ids:
        if token_id not in allowed(matcher):
            return False
        matcher.advance(token_id)
    return True


def schema(fields: object) -> Structure:
    return Structure(json_schema=json.dumps(fields))


@pytest.mark.parametrize(
    ("structure", "good", "bad"),
    [
        (schema(PERSON), '{"name": "Ada", "age": 36}', '{"name": "Ada", "age": "36"}'),
        (schema(PERSON), '{"name":"Ada","age":-1}', '{"name":"Augusta","age":1}'),
        (Structure(json_object=True), '{"a": [1, {"b": null}], "é": "\\n"}', "[1]"),
        (Structure(regex="[0-9]{4}-[0-9]{2}"), "2026-11", "2026-1x"),
        (Structure(choice=("yes", "no", '"maybe"\n')), '"maybe"\n', "nay"),
        (Structure(choice=("é", "\x00")), "é", "e"),
    ],
)
def test_only_what_fits_is_allowed(
    grammars: Grammars, encode: Callable[[str], list[int]], structure: Structure, good: str, bad: str
) -> None:
    """A text that fits is allowed token by token and then complete; at some token one that does not fit is not."""
    matcher = grammars.matcher(structure)
    assert EOS not in allowed(matcher)
    assert follow(matcher, encode(good))
    assert matcher.is_complete
    assert EOS in allowed(matcher)
    assert not follow(grammars.matcher(structure), encode(bad))


def test_eos_is_allowed_where_the_text_may_end_or_go_on(grammars: Grammars, encode: Callable[[str], list[int]]) -> None:
    """A complete text that may grow is not over, but may be ended."""
    matcher = grammars.matcher(Structure(choice=("no", "nobody")))
    assert follow(matcher, encode("no"))
    assert not matcher.is_complete
    assert allowed(matcher) == {EOS, *encode("b")}


@pytest.mark.parametrize(
    ("structure", "message"),
    [
        (Structure(regex="("), "regex: .*unclosed group"),
        (Structure(regex="(?=a)b"), "regex: .*look-around"),
        (schema({"type": "strng"}), "response_format: Invalid type: strng"),
        (schema({"not": {"type": "string"}}), 'response_format: Unimplemented keys: .*"not"'),
        (schema({"$ref": "http://127.0.0.1/schema.json"}), "response_format: .*does not fetch"),
        (schema({"$ref": "#"}), "response_format: no text can satisfy it"),
        (schema({"enum": []}), "response_format: Unsatisfiable"),
        (Structure(json_schema='{"enum": ["\\ud800"]}'), "response_format: "),
        (schema({"allOf": [{"type": "string", "pattern": f"^.*{c}.*$"} for c in "abcdefghijkl"]}), "response_format: "),
    ],
)
def test_what_makes_no_grammar_is_refused_by_field(grammars: Grammars, structure: Structure, message: str) -> None:
    """The error says which field, and why, in a few words."""
    with pytest.raises(InvalidRequest, match=f"(?s){message}") as refused:
        grammars.matcher(structure)
    assert len(str(refused.value)) < 400


@pytest.mark.parametrize(
    "structure",
    [
        Structure(regex="(a{1,1000}){1,1000}"),
        Structure(regex="((a{1,100}){1,100}){1,100}"),
        Structure(regex="(a+)+"),
        schema({"$ref": "#/$defs/a", "$defs": {"a": {"type": "array", "items": {"$ref": "#/$defs/a"}, "minItems": 1}}}),
        schema({"type": "object", "properties": {f"property {at}": {"type": "string"} for at in range(1_200)}}),
        schema({"type": "array", "items": {"type": "integer"}, "minItems": 1_000_000}),
    ],
)
def test_hostile_structures_cost_only_their_row(grammars: Grammars, structure: Structure) -> None:
    """They are followed as far as the limits go; then their matcher has an error, and no exception is raised."""
    matcher = grammars.matcher(structure)
    for _ in range(100):
        token = min(allowed(matcher) - {EOS}, default=None)
        if matcher.error or token is None:
            break
        matcher.advance(token)
    assert matcher.error is None or len(matcher.error) < 400
    assert grammars.matcher(Structure(choice=("a",))).error is None


def test_a_token_that_must_not_come_is_an_error(grammars: Grammars, encode: Callable[[str], list[int]]) -> None:
    """Whoever takes another token than those allowed hears of it."""
    matcher = grammars.matcher(Structure(choice=("a",)))
    matcher.advance(encode("b")[0])
    assert matcher.error
    assert not matcher.is_complete


def test_a_structure_is_compiled_once_and_rows_do_not_share_their_place(
    grammars: Grammars, encode: Callable[[str], list[int]]
) -> None:
    """What was compiled is found again; each row begins at the beginning. Old ones are forgotten."""
    structure = Structure(choice=("abc",))
    assert grammars.compile(structure) is grammars.compile(structure)
    one, other = grammars.matcher(structure), grammars.matcher(structure)
    assert follow(one, encode("ab"))
    assert allowed(one) == set(encode("c"))
    assert allowed(other) == set(encode("a"))
    first = grammars.compile(structure)
    for number in range(300):
        grammars.compile(Structure(choice=(str(number),)))
    assert grammars.compile(structure) is not first


def format_of(tokenizer: Tokenizer) -> Any:
    return SimpleNamespace(tokenizer_json=tokenizer.to_str(), vocab_tokens=tokenizer.get_vocab_size())


def test_sentence_pieces_with_bytes_are_guided_too() -> None:
    """A tokenizer of the other family: a space is a letter of its own, and rare characters are bytes."""
    pieces = [
        ("<unk>", 0.0),
        ("</s>", 0.0),
        *((f"<0x{byte:02X}>", -9.0) for byte in range(256)),
        ("▁", -2.0),
        ("a", -2.0),
    ]
    tokenizer = Tokenizer(Unigram(pieces, 0, byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(["</s>"])
    grammars = Grammars(format_of(tokenizer), tokenizer.get_vocab_size(), (1,))
    matcher = grammars.matcher(Structure(choice=(" a", "é")))
    named = {tokenizer.id_to_token(token) for token in allowed(matcher)}
    assert named == {"▁", "<0x20>", "<0xC3>"}
    grammars.close()


def test_a_tokenizer_that_cannot_be_guided_is_an_error_of_the_request() -> None:
    """The model loads and serves everything else; the error names the field."""
    grammars = Grammars(format_of(Tokenizer(BPE({"a": 0, "b": 1}, []))), 2, ())
    with pytest.raises(InvalidRequest, match=re.escape("regex: the model's tokenizer")):
        grammars.matcher(Structure(regex="a"))
    grammars.close()
