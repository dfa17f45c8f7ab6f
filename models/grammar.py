"""Structured output: which tokens keep a row's text within a JSON schema, an expression or a choice.

    grammars = Grammars(prompt_format, vocab_tokens, eos_token_ids)
    compiled = grammars.compile(structure)     # a Future: a hostile schema takes 0.3 s, and steps must go on
    sampler = Sampler(..., matcher=grammars.matcher(structure))

The work is llguidance's; docs/structured-output.md says why.
"""

import json
from collections import OrderedDict
from collections.abc import Collection
from concurrent.futures import Future, ThreadPoolExecutor

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, grammar_from

from models.prompt import PromptFormat
from models.protocol import InvalidRequest, Structure

# Left free, a small model that is at a loss writes spaces up to max_tokens.
_WHITESPACE = r"\x20|\x0A\x20{0,20}"  # one space, or a new line and its indentation
_MAX_REASON_CHARACTERS = 300
_REMEMBERED = 256  # compiled grammars; some 0.1 MB each


class Grammars:
    """Compiles structures for one tokenizer, each once. One thread owns it; compiling has a thread of its own."""

    def __init__(self, prompt_format: PromptFormat, vocab_tokens: int, eos_token_ids: Collection[int]) -> None:
        """Takes 0.15 s for 32,000 tokens, holding the interpreter's lock: so it is done when the model is loaded.

        `vocab_tokens` is the width of the model's logits. With a tokenizer that llguidance cannot read, every structure
        is refused.
        """
        self._compiled: OrderedDict[Structure, Future[LLMatcher]] = OrderedDict()
        self._thread = ThreadPoolExecutor(1, "grammar")
        self._tokenizer: LLTokenizer | None = None
        self._reason = ""
        try:
            known = prompt_format.vocab_tokens
            eos = [token_id for token_id in sorted(eos_token_ids) if token_id < known] or None
            self._tokenizer = LLTokenizer(prompt_format.tokenizer_json or "", max(vocab_tokens, known), eos)
        except ValueError as error:
            self._reason = f"the model's tokenizer is of a kind that cannot be guided: {error}"

    def compile(self, structure: Structure) -> Future[LLMatcher]:
        """Begin, or find what was compiled before. Its error is an `InvalidRequest` that names the field."""
        found = self._compiled.get(structure)
        if found is None:
            found = self._compiled[structure] = self._thread.submit(self._compile, structure)
            if len(self._compiled) > _REMEMBERED:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(structure)
        return found

    def matcher(self, structure: Structure) -> "GrammarMatcher":
        """A fresh one, for one row. Raises `InvalidRequest`."""
        return GrammarMatcher(self.compile(structure).result().deep_copy())

    def close(self) -> None:
        """Compile nothing more."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _compile(self, structure: Structure) -> LLMatcher:
        if self._tokenizer is None:
            raise InvalidRequest(structure.field, self._reason)
        return compiled(self._tokenizer, structure)


def compiled(tokenizer: LLTokenizer, structure: Structure) -> LLMatcher:
    """Before its first token. Raises `InvalidRequest`."""
    try:
        limits = LLParserLimits(verbose_errors=False)
        matcher = LLMatcher(tokenizer, _grammar(structure), log_level=0, limits=limits)
    except ValueError as error:
        raise InvalidRequest(structure.field, str(error)) from error
    # The first mask, too: what cannot be followed from the start is refused, and what it takes to build is built.
    first = matcher.deep_copy()
    first.compute_bitmask()
    if first.is_error():
        raise InvalidRequest(structure.field, _reason(first))
    return matcher


class GrammarMatcher:
    """One row's place in its grammar. See `models.sampling.Matcher`."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher
        self.error: str | None = None

    @property
    def is_complete(self) -> bool:
        """See `Matcher`."""
        return self.error is None and self._matcher.is_stopped()

    def allowed(self) -> bytes:
        """See `Matcher`."""
        mask = self._matcher.compute_bitmask()
        self._look()
        return mask

    def advance(self, token_id: int) -> None:
        """See `Matcher`."""
        self._matcher.consume_token(token_id)
        self._look()

    def _look(self) -> None:
        if self._matcher.is_error():
            self.error = _reason(self._matcher)


def _grammar(structure: Structure) -> str:
    if structure.regex is not None:
        return grammar_from("regex", structure.regex)
    if structure.choice is not None:
        return grammar_from("choice", json.dumps(structure.choice))
    schema = structure.json_schema or '{"type": "object"}'
    return LLMatcher.grammar_from_json_schema(schema, defaults={"whitespace_pattern": _WHITESPACE})


def _reason(matcher: LLMatcher) -> str:
    """Its message without the parser's state behind it; some quote the whole grammar."""
    reason = matcher.get_error().partition("\n<")[0].strip()[:_MAX_REASON_CHARACTERS]
    return "no text can satisfy it" if reason == "NoExtensionBias" else reason
