"""From messages to token ids and back, without loading a model: chat template, tokenizer, context length.

    load_prompt_format(spec).encode_messages([{"role": "user", "content": "Hello"}])

The producer counts a prompt with it and the engine turns tokens into text with it, so both see the same tokens. It
needs a model's small files only (`tokenizer.json`, `config.json`, the chat template), and never imports transformers,
whose tokenizers load torch. Templates are code from strangers: they run in Jinja's immutable sandbox.
"""

import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn, Protocol

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from models.catalog import ModelSpec

Messages = Sequence[Mapping[str, Any]]

ECHO_VOCAB_TOKENS = 256
ECHO_CONTEXT_TOKENS = 1_000_000
_TOKENIZER_FILE = "tokenizer.json"
_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
_TEMPLATE_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class PromptError(Exception):
    """The prompt cannot be made for this model; `field` is the request's or the model's field at fault."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field
        self.message = message


class PromptFormat(Protocol):
    """How one model is spoken to. Safe to use from several threads."""

    context_tokens: int  # prompt and completion together
    vocab_tokens: int  # ids the tokenizer can give or take are below this
    eos_token_ids: tuple[int, ...]  # as the tokenizer names them; the model's own may be more

    @property
    def tokenizer_json(self) -> str | None:
        """The tokenizer, as the tokenizers library writes it; None if it is none of that library's."""

    def token_bytes(self, token_id: int) -> bytes:
        """What one token adds to a text, which may be a piece of a character; a special token gives its name."""

    def render(self, messages: Messages) -> str:
        """The text the model sees, up to where its answer begins. Raises `PromptError`."""

    def encode_messages(self, messages: Messages) -> list[int]:
        """Token ids of the rendered chat. Raises `PromptError`."""

    def encode_text(self, text: str) -> list[int]:
        """Token ids of a raw prompt, with the special tokens the tokenizer itself adds. Raises `PromptError`."""

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of these tokens without special ones; bytes that are no character become U+FFFD."""


@functools.lru_cache(maxsize=64)
def load_prompt_format(spec: ModelSpec) -> PromptFormat:
    """The model's format, loaded once for each spec. Raises `PromptError` if its files are missing or wrong."""
    if spec.engine == "echo":
        return EchoFormat(spec.context_tokens or ECHO_CONTEXT_TOKENS)
    return ModelFormat(spec, _read_files(spec))


def encode_prompt(form: PromptFormat, messages: Messages | None, prompt: str | Sequence[int] | None) -> Sequence[int]:
    """The tokens an engine will see: a chat through the model's template, raw text, or token ids as they are.

    Raises `PromptError` if the template refuses the messages.
    """
    if messages is not None:
        return form.encode_messages(messages)
    return form.encode_text(prompt) if isinstance(prompt, str) else prompt or ()


class EchoFormat:
    """The echo engine's: a token is a byte, and a chat is just its last user message."""

    vocab_tokens = ECHO_VOCAB_TOKENS
    eos_token_ids: tuple[int, ...] = ()
    tokenizer_json = None

    def __init__(self, context_tokens: int) -> None:
        self.context_tokens = context_tokens

    def token_bytes(self, token_id: int) -> bytes:
        """Itself."""
        return bytes([token_id])

    def render(self, messages: Messages) -> str:
        """The last user message's text."""
        for message in reversed(messages):
            if message.get("role") == "user" and isinstance(message.get("content"), str):
                return str(message["content"])
        raise PromptError("messages", "echo answers a user message with text, and there is none")

    def encode_messages(self, messages: Messages) -> list[int]:
        """UTF-8 bytes of the last user message."""
        return _encode(self.encode_text, self.render(messages), "messages")

    def encode_text(self, text: str) -> list[int]:
        """UTF-8 bytes."""
        return _encode(lambda text: list(text.encode()), text, "prompt")

    def decode(self, token_ids: Sequence[int]) -> str:
        """The bytes as UTF-8."""
        return bytes(token_ids).decode(errors="replace")


class ModelFormat:
    """That of a Hugging Face model, from its files."""

    def __init__(self, spec: ModelSpec, files: Mapping[str, str]) -> None:
        settings = _json(files, "tokenizer_config.json")
        self._tokenizer = _tokenizer(files[_TOKENIZER_FILE])
        self._special_tokens = _special_tokens({**_json(files, "special_tokens_map.json"), **settings})
        self._template = _template(spec, files, settings)
        self._name = spec.name
        self.context_tokens = _context_tokens(spec, _json(files, "config.json"), settings)
        self.vocab_tokens = self._tokenizer.get_vocab_size(with_added_tokens=True)
        self.eos_token_ids = self._ids("eos_token")
        self._added = frozenset(self._tokenizer.get_added_tokens_decoder())
        # A piece of a byte-level vocabulary writes each byte as a letter; one of the other kind writes a space as "▁",
        # and a byte that is no character by its number.
        self._is_byte_level = "ByteLevel" in repr(self._tokenizer.decoder)

    @property
    def tokenizer_json(self) -> str:
        """With the tokens that were added to it."""
        return self._tokenizer.to_str()

    def token_bytes(self, token_id: int) -> bytes:
        """From the vocabulary: decoding a token by itself may lose bytes, or a space before it."""
        piece = self._tokenizer.id_to_token(token_id) or ""
        if token_id in self._added:
            return piece.encode()
        if self._is_byte_level:
            letters = _bytes_of_letters()
            return b"".join(bytes([letters[letter]]) if letter in letters else letter.encode() for letter in piece)
        if byte := _BYTE_PIECE.fullmatch(piece):
            return bytes([int(byte[1], 16)])
        return piece.replace("\N{LOWER ONE EIGHTH BLOCK}", " ").encode()

    def render(self, messages: Messages) -> str:
        """The chat through the model's own template."""
        if self._template is None:
            raise PromptError("messages", f"model {self._name} has no chat template; send a prompt instead")
        if not messages:
            raise PromptError("messages", "must hold at least one message")
        try:
            return self._template.render(messages=messages, add_generation_prompt=True, **self._special_tokens)
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
            # What a template says by `raise_exception`, and what it trips over in messages it did not expect.
            raise PromptError("messages", f"the chat template of {self._name} refuses them: {error}") from error

    def encode_messages(self, messages: Messages) -> list[int]:
        """The template has written every special token already, so none are added."""
        return _encode(functools.partial(self._ids_of, add_special_tokens=False), self.render(messages), "messages")

    def encode_text(self, text: str) -> list[int]:
        """Special tokens as the tokenizer's post-processor adds them."""
        return _encode(functools.partial(self._ids_of, add_special_tokens=True), text, "prompt")

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text without special tokens."""
        return self._tokenizer.decode(token_ids, skip_special_tokens=True)

    def _ids_of(self, text: str, *, add_special_tokens: bool) -> list[int]:
        # As a batch of one: `encode` holds the interpreter's lock to its end, a second for a megabyte, and is slower.
        [encoding] = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return encoding.ids

    def _ids(self, special_token: str) -> tuple[int, ...]:
        token_id = self._tokenizer.token_to_id(self._special_tokens.get(special_token, ""))
        return () if token_id is None else (token_id,)


@functools.cache
def _bytes_of_letters() -> dict[str, int]:
    """The letters that stand for bytes in a byte-level vocabulary, as GPT-2 has them: printable ones for themselves."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + at): byte for at, byte in enumerate(others)}


def _encode(encode: Callable[[str], list[int]], text: str, field: str) -> list[int]:
    try:
        text.encode()  # the tokenizers library's own error for a lone surrogate does not say so
    except UnicodeEncodeError as error:
        raise PromptError(field, f"is not valid Unicode text: {error.reason} at character {error.start}") from error
    return encode(text)


def _tokenizer(serialized: str) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_str(serialized)
    except Exception as error:  # the library raises bare Exception
        raise PromptError("path", f"{_TOKENIZER_FILE} cannot be read: {error}") from error
    tokenizer.no_truncation()  # a too long prompt is refused, never cut
    tokenizer.no_padding()
    return tokenizer


def _special_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """Name to text, for the template; each is given as a string or as {"content": string}."""
    tokens = {name: settings.get(name) for name in _TEMPLATE_TOKENS}
    texts = {name: token.get("content") if isinstance(token, dict) else token for name, token in tokens.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _context_tokens(spec: ModelSpec, config: Mapping[str, Any], settings: Mapping[str, Any]) -> int:
    """What the spec asks for, if the model has it: a model asked beyond its positions answers nonsense."""
    text_config = {**config, **config.get("text_config", {})}
    made_for = text_config.get("max_position_embeddings") or settings.get("model_max_length")
    if not isinstance(made_for, int):
        made_for = spec.context_tokens
    if made_for is None:
        raise PromptError("context_tokens", f"model {spec.name} does not say; set models.{spec.name}.context_tokens")
    if spec.context_tokens is not None and spec.context_tokens > made_for:
        raise PromptError("context_tokens", f"{spec.context_tokens} is above the {made_for} of model {spec.name}")
    return spec.context_tokens or made_for


def _template(spec: ModelSpec, files: Mapping[str, str], settings: Mapping[str, Any]) -> jinja2.Template | None:
    """A file of its own goes before the tokenizer's settings; of several named templates, the default one."""
    source = files.get("chat_template.jinja")
    if source is None:
        source = _json(files, "chat_template.json").get("chat_template") or settings.get("chat_template")
    if isinstance(source, list):
        source = {entry["name"]: entry["template"] for entry in source}.get("default")
    if source is None:
        return None
    try:
        return _environment().from_string(source)
    except jinja2.TemplateError as error:
        raise PromptError("path", f"the chat template of {spec.name} is not valid: {error}") from error


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's words for training; here they are rendered like any others."""

    tags = {"generation"}  # noqa: RUF012  Jinja's own declaration

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@functools.cache
def _environment() -> ImmutableSandboxedEnvironment:
    """What Hugging Face templates are written for."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    return environment


def _to_json(value: Any, *, ensure_ascii: bool = False, **options: Any) -> str:
    """Jinja's own filter escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)  # noqa: DTZ005  templates mean the local date


_OPTIONAL_FILES = (
    "config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
)


def _read_files(spec: ModelSpec) -> dict[str, str]:
    """The small files there are, by name."""
    if spec.folder is None and str(spec.path).startswith(("/", ".", "~")):
        raise PromptError("path", f"model {spec.name}: there is no folder {spec.path}")
    fetch = functools.partial(_in_folder, spec.folder) if spec.folder else functools.partial(_from_hub, spec)
    found = {name: path for name in (_TOKENIZER_FILE, *_OPTIONAL_FILES) if (path := fetch(name))}
    if _TOKENIZER_FILE not in found:
        raise PromptError("path", f"model {spec.name}: no {_TOKENIZER_FILE} in {spec.path}")
    return {name: path.read_text(encoding="utf-8") for name, path in found.items()}


def _in_folder(folder: Path, name: str) -> Path | None:
    path = folder / name
    return path if path.is_file() else None


def _from_hub(spec: ModelSpec, name: str) -> Path | None:
    """From the local cache, or downloaded into it; None if the repository has no such file."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(str(spec.path), name, revision=spec.revision))
    except (LocalEntryNotFoundError, HFValidationError) as error:
        raise PromptError("path", f"{spec.path} is no folder here and cannot be fetched from the hub") from error
    except EntryNotFoundError:
        return None
    except OSError as error:  # no such repository or revision, no access, no network
        raise PromptError("path", f"{spec.path} cannot be fetched from the hub: {error}") from error


def _json(files: Mapping[str, str], name: str) -> dict[str, Any]:
    try:
        parsed = json.loads(files.get(name, "{}"))
    except json.JSONDecodeError as error:
        raise PromptError("path", f"{name} is not JSON: {error}") from error
    return parsed if isinstance(parsed, dict) else {}
