"""Small random models that are made here, and a way to run an engine to its end."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from models.protocol import Delta, Ended, Engine, Event, GenerationRequest, SamplingParams

BYTES = 256
BOS, EOS = 256, 257
_ADDED_EOS = {"__type": "AddedToken", "content": "</s>", "lstrip": False, "rstrip": False, "normalized": False}


def byte_tokenizer() -> Tokenizer:
    """A token is a byte: ids are not the bytes' values, but the round trip is exact."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE({letter: at for at, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes a folder with a byte tokenizer, a config and the files given (text, or JSON for anything else)."""

    def make(**files: Any) -> Path:
        folder = tmp_path_factory.mktemp("model")
        byte_tokenizer().save(str(folder / "tokenizer.json"))
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": _ADDED_EOS}
        defaults = {"tokenizer_config.json": settings, "config.json": {"max_position_embeddings": 512}}
        for name, content in {**defaults, **files}.items():
            text = content if isinstance(content, str) else json.dumps(content)
            (folder / name).write_text(text, encoding="utf-8")
        return folder

    return make


@pytest.fixture(scope="session")
def tiny_model(tokenizer_folder: Callable[..., Path]) -> Callable[..., tuple[Path, Any]]:
    """Makes a random causal model: its folder, and the model itself to compare with. Same arguments, same model."""
    made: dict[str, tuple[Path, Any]] = {}

    def make(architecture: str = "llama", **settings: Any) -> tuple[Path, Any]:
        key = repr((architecture, settings))
        if key not in made:
            made[key] = _make_model(tokenizer_folder(), architecture, settings)
        return made[key]

    return make


def _make_model(folder: Path, architecture: str, settings: dict[str, Any]) -> tuple[Path, Any]:
    import torch
    import transformers

    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)  # these models are too small to share among cores
    config = transformers.AutoConfig.for_model(
        architecture,
        **{
            "vocab_size": 258,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "bos_token_id": BOS,
            "eos_token_id": EOS,
            "pad_token_id": None,
            **settings,
        },
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for weights in model.parameters():
        if weights.ndim > 1:
            weights.data *= 6  # so that what comes next depends on what came before
    model.save_pretrained(folder)
    return folder, model


@pytest.fixture
def finish() -> Callable[..., dict[str, Ended]]:
    """Steps an engine until nothing is left; the ends by id."""

    def run(engine: Engine, events: list[Event] | None = None) -> dict[str, Ended]:
        seen = events if events is not None else []
        while engine.has_work():
            seen += engine.step()
        return {event.id: event for event in seen if isinstance(event, Ended)}

    return run


@pytest.fixture
def ask() -> Callable[..., GenerationRequest]:
    """Makes a request from text (its bytes) or ids, and sampling settings; greedy by default."""

    def make(request_id: str, prompt: str | Iterable[int], max_tokens: int = 64, **settings: Any) -> GenerationRequest:
        ids = tuple(prompt.encode()) if isinstance(prompt, str) else tuple(prompt)
        own = {name: settings.pop(name) for name in ("deadline_seconds", "stream", "priority") if name in settings}
        sampling = SamplingParams(max_tokens, **{"temperature": 0.0, **settings})
        return GenerationRequest(request_id, ids, sampling, **own)

    return make


@pytest.fixture
def shown() -> Callable[[list[Event], str, int], str]:
    """The text that a request's deltas showed of one choice."""

    def join(events: list[Event], request_id: str, choice: int = 0) -> str:
        deltas = (event for event in events if isinstance(event, Delta))
        return "".join(event.text for event in deltas if (event.id, event.choice) == (request_id, choice))

    return join
