"""Chats to tokens without a model, exactly as transformers does it."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import huggingface_hub.errors
import pytest
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE

from models.catalog import Catalog, ModelSpec
from models.prompt import PromptError, PromptFormat, load_prompt_format

CHATML = (
    "{% for message in messages %}\n"
    "    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim + '<|im_end|>' + '\\n' -}}\n"
    "{% endfor %}\n"
    "{% if add_generation_prompt %}\n"
    "    {{- '<|im_start|>assistant\\n' -}}\n"
    "{% endif %}"
)
LLAMA = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% if message.role == 'user' %}[INST] {{ message.content }} [/INST]"
    "{% else %}{% generation %} {{ message.content }}{{ eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
)
FANCY = (
    "{%- set ns = namespace(turn=0) %}{{ unk_token }}"
    "{%- for message in messages %}{% if message.role == 'tool' %}{% continue %}{% endif %}"
    "{%- set ns.turn = ns.turn + 1 %}"
    "{{ ns.turn }}: {{ message | tojson }} {{ {'a': '<b>é'} | tojson(indent=2) }} {{ strftime_now('%Y') }}\n"
    "{%- endfor %}{%- if ns.turn > 2 %}{{ 'long' }}{%- endif %}"
)
CHAT = [
    {"role": "user", "content": " What is 12 + 30? <b> "},
    {"role": "assistant", "content": "42 ✓ 好"},
    {"role": "user", "content": "And twice\n  that?"},
]


def prompt_format(folder: Path, **spec: object) -> PromptFormat:
    return load_prompt_format(ModelSpec(name="m", path=str(folder), **spec))


@pytest.mark.parametrize("template", [CHATML, LLAMA, FANCY])
def test_chat_equals_transformers(template: str, tokenizer_folder: Callable[..., Path]) -> None:
    """Text and tokens of a chat are those of transformers' apply_chat_template."""
    from transformers import AutoTokenizer

    folder = tokenizer_folder(**{"chat_template.jinja": template})
    reference = AutoTokenizer.from_pretrained(folder)
    ours = prompt_format(folder)
    rendered = reference.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    tokens = reference.apply_chat_template(CHAT, tokenize=True, add_generation_prompt=True, return_dict=False)
    assert ours.render(CHAT) == rendered
    assert ours.encode_messages(CHAT) == tokens
    assert ours.encode_text("a <s> b") == reference("a <s> b")["input_ids"]


@pytest.mark.parametrize(
    "files",
    [
        {"chat_template.json": {"chat_template": CHATML}},
        {"tokenizer_config.json": {"chat_template": CHATML}},
        {"tokenizer_config.json": {"chat_template": [{"name": "default", "template": CHATML}]}},
        {"chat_template.jinja": CHATML, "tokenizer_config.json": {"chat_template": LLAMA}},
    ],
)
def test_template_is_found_where_models_keep_it(files: dict, tokenizer_folder: Callable[..., Path]) -> None:
    """A chat template may lie in a file of its own or in the tokenizer's settings; its own file goes first."""
    assert prompt_format(tokenizer_folder(**files)).render([{"role": "user", "content": "Hi"}]) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize(
    ("template", "messages", "said"),
    [
        (LLAMA, [{"role": "system", "content": "Be brief"}], "System role not supported"),
        ("{{ 'User: ' + messages[0].content }}", [{"role": "user", "content": None}], "refuses"),
        ("{{ 'User: ' + messages[0].content }}", [{"role": "user"}], "refuses"),
        (CHATML, [], "at least one"),
        ("{{ messages.__class__.__mro__[1].__subclasses__() }}", CHAT, "unsafe"),
        ("{{ messages.append(1) }}", CHAT, "unsafe"),
    ],
)
def test_what_a_template_refuses_is_an_error_of_the_messages(
    template: str, messages: list, said: str, tokenizer_folder: Callable[..., Path]
) -> None:
    """A template may refuse a role, stumble over a message or try to leave its sandbox: the request is at fault."""
    with pytest.raises(PromptError, match=said) as refused:
        prompt_format(tokenizer_folder(**{"chat_template.jinja": template})).encode_messages(messages)
    assert refused.value.field == "messages"


def test_without_a_template_only_prompts_work(tokenizer_folder: Callable[..., Path]) -> None:
    """A base model takes raw text and refuses messages."""
    ours = prompt_format(tokenizer_folder())
    assert ours.decode(ours.encode_text("héllo 好")) == "héllo 好"
    with pytest.raises(PromptError, match="no chat template"):
        ours.render(CHAT)


def test_text_that_is_no_unicode_is_refused(tokenizer_folder: Callable[..., Path]) -> None:
    """A lone surrogate, which JSON can carry, is an error that says where it is."""
    with pytest.raises(PromptError, match="at character 2"):
        prompt_format(tokenizer_folder()).encode_text("ab\ud800")
    with pytest.raises(PromptError, match=r"messages: .* at character 0"):
        load_prompt_format(Catalog.from_mapping().get("echo")).encode_messages([{"role": "user", "content": "\ud800"}])


def test_truncation_and_padding_of_a_tokenizer_are_off(tokenizer_folder: Callable[..., Path]) -> None:
    """A tokenizer file that cuts or pads its input must not change a prompt."""
    from tokenizers import Tokenizer

    folder = tokenizer_folder()
    cutting = Tokenizer.from_file(str(folder / "tokenizer.json"))
    cutting.enable_truncation(3)
    cutting.enable_padding(length=8)
    cutting.save(str(folder / "tokenizer.json"))
    ours = prompt_format(folder)
    assert [len(ours.encode_text(text)) for text in ("a", "abcdefghij")] == [1, 10]


def test_context_is_what_the_model_was_made_for_or_less(tokenizer_folder: Callable[..., Path]) -> None:
    """A spec may ask for less context than the model has, not for more."""
    folder = tokenizer_folder(**{"config.json": {"text_config": {"max_position_embeddings": 300}}})
    assert prompt_format(folder).context_tokens == 300
    assert prompt_format(folder, context_tokens=100).context_tokens == 100
    with pytest.raises(PromptError, match="301 is above the 300") as refused:
        prompt_format(folder, context_tokens=301).encode_text("x")
    assert refused.value.field == "context_tokens"


def test_a_model_that_does_not_say_its_context_needs_a_setting(tokenizer_folder: Callable[..., Path]) -> None:
    """Without a length in its config the context comes from the spec, or the model is refused."""
    folder = tokenizer_folder(**{"config.json": {}})
    assert prompt_format(folder, context_tokens=64).context_tokens == 64
    with pytest.raises(PromptError, match=r"models\.m\.context_tokens"):
        prompt_format(folder)


def test_broken_files_are_named(tokenizer_folder: Callable[..., Path], tmp_path: Path) -> None:
    """A missing or unreadable file is an error that names it."""
    for name, content in (
        ("tokenizer.json", "{}"),
        ("config.json", "{"),
        ("chat_template.jinja", "{% for %}"),
    ):
        with pytest.raises(PromptError, match=name.split(".", maxsplit=1)[0].replace("_", ".")):
            prompt_format(tokenizer_folder(**{name: content}))
    with pytest.raises(PromptError, match=r"no tokenizer\.json"):
        prompt_format(tmp_path)
    with pytest.raises(PromptError, match="there is no folder"):
        prompt_format(tmp_path / "nowhere")


def test_hub_models_are_fetched_file_by_file_at_their_revision(
    tokenizer_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the small files are asked for, at the revision of the spec; one that the repository lacks is no error."""
    folder, asked = tokenizer_folder(**{"chat_template.jinja": CHATML}), []

    def download(repository: str, name: str, *, revision: str | None) -> str:
        asked.append((repository, name, revision))
        if not (folder / name).exists():
            raise huggingface_hub.errors.EntryNotFoundError(name)
        return str(folder / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    ours = load_prompt_format(ModelSpec(name="m", path="owner/model", revision="v1"))
    assert ours.render(CHAT) == prompt_format(folder).render(CHAT)
    assert {(repository, revision) for repository, _, revision in asked} == {("owner/model", "v1")}
    assert not [name for _, name, _ in asked if "safetensors" in name]


@pytest.mark.parametrize(
    "error",
    [
        huggingface_hub.errors.LocalEntryNotFoundError("offline"),
        huggingface_hub.errors.HFValidationError("bad id"),
        ConnectionError("no network"),
    ],
)
def test_a_hub_model_that_cannot_be_fetched_is_an_error_of_its_path(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Offline, unknown or not a hub id at all: the error names the path."""

    def download(*_: object, **__: object) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(PromptError, match=r"owner/model .*cannot be fetched") as refused:
        load_prompt_format(ModelSpec(name="m", path="owner/model", revision=type(error).__name__))
    assert refused.value.field == "path"


def test_eos_is_known_by_its_id(tokenizer_folder: Callable[..., Path]) -> None:
    """The tokenizer's end-of-sequence token is given as an id, whichever way its settings write it."""
    assert prompt_format(tokenizer_folder()).eos_token_ids == (257,)


def test_echo_speaks_bytes() -> None:
    """To echo a chat is its last user message, and a token is a byte."""
    echo = load_prompt_format(Catalog.from_mapping().get("echo"))
    assert echo.encode_messages([*CHAT, {"role": "assistant", "content": "x"}]) == list(b"And twice\n  that?")
    assert echo.decode(list("é".encode())) == "é"
    with pytest.raises(PromptError, match="user message"):
        echo.render([{"role": "system", "content": "x"}])


def test_a_format_is_loaded_once(tokenizer_folder: Callable[..., Path]) -> None:
    """Equal specs share one format."""
    folder = tokenizer_folder()
    assert prompt_format(folder) is prompt_format(folder)


def test_tiny_chat_has_a_template_and_an_exact_round_trip() -> None:
    """The model that ships renders a chat and gives any text back as it was."""
    spec = Catalog.from_mapping().get("tiny-chat")
    if spec.folder is None or not (spec.folder / "tokenizer.json").is_file():
        pytest.skip("examples/tiny-chat is not in this checkout")
    ours = load_prompt_format(spec)
    assert "What is 12 + 30?" in ours.render([{"role": "user", "content": "What is 12 + 30?"}])
    text = "naïve 好 \U0001f600 \t\n  x"
    assert ours.decode(ours.encode_text(text)).endswith(text)
    assert ours.context_tokens >= 2_048
    assert ours.eos_token_ids


def test_the_bytes_of_tokens_join_to_the_text(tokenizer_folder: Callable[..., Path]) -> None:
    """Each token's share of a text, pieces of characters too; a special token gives its name."""
    form = load_prompt_format(ModelSpec(name="tiny", path=str(tokenizer_folder())))
    text = "Héllo 😀\n\x00"
    assert b"".join(map(form.token_bytes, form.encode_text(text))) == text.encode()
    assert [form.token_bytes(token) for token in (257, 999)] == [b"</s>", b""]


def test_the_bytes_of_sentence_pieces(tokenizer_folder: Callable[..., Path]) -> None:
    """A space is a letter of its own there, and a rare byte is given by its number."""
    pieces = {"▁a": 0, "<0xC3>": 1, "é": 2}
    tokenizer = Tokenizer(BPE(pieces, []))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    folder = tokenizer_folder(**{"tokenizer.json": tokenizer.to_str()})
    form = load_prompt_format(ModelSpec(name="tiny", path=str(folder)))
    assert [form.token_bytes(token) for token in range(3)] == [b" a", b"\xc3", "é".encode()]


def test_a_long_prompt_leaves_other_threads_their_turns(tokenizer_folder: Callable[..., Path]) -> None:
    """Whoever serves others beside it goes on meanwhile."""
    form = load_prompt_format(ModelSpec(name="tiny", path=str(tokenizer_folder())))
    rounds, over = 0, threading.Event()

    def serve_others() -> None:
        nonlocal rounds
        while not over.wait(0.0001):
            rounds += 1

    other = threading.Thread(target=serve_others)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1_000)  # no thread is interrupted: another runs only if the lock is given away
    try:
        other.start()
        before = rounds
        form.encode_text("word " * 50_000)
        during = rounds - before
    finally:
        sys.setswitchinterval(interval)
        over.set()
        other.join()
    assert during > 0
