"""The model that is measured: random weights in the shape of Qwen2.5-0.5B, as a folder every engine can load.

How fast a model is depends on its shape, not on what it has learnt, and no weights need to be fetched. The vocabulary
is smaller than Qwen's: of 151,936 tokens the output head alone would be a third of the model.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.engine.places import cache_folder

_FORMAT = 1  # to be raised when the folder's content changes in another way than by its shape
_SPECIAL_TOKENS = ("<|pad|>", "<|end|>")
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class ModelShape:
    """A Qwen2ForCausalLM with tied embeddings; 387M parameters by default."""

    layers: int = 24
    hidden: int = 896
    heads: int = 14
    kv_heads: int = 2
    intermediate: int = 4_864
    vocab_tokens: int = 32_000
    context_tokens: int = 8_192
    seed: int = 1

    @property
    def layer_parameters(self) -> int:
        """Of the linear layers of one layer, without biases: what a token is multiplied with."""
        kv_width = self.kv_heads * self.hidden // self.heads
        return self.hidden * (2 * self.hidden + 2 * kv_width + 3 * self.intermediate)

    @property
    def head_parameters(self) -> int:
        """Of the output head."""
        return self.hidden * self.vocab_tokens

    @property
    def folder(self) -> Path:
        """Where it is kept: one place for each shape."""
        described = json.dumps([_FORMAT, dataclasses.asdict(self)]).encode()
        return cache_folder() / "bench-models" / hashlib.sha256(described).hexdigest()[:16]


FULL = ModelShape()
SMALL = ModelShape(layers=4, hidden=256, heads=4, kv_heads=2, intermediate=1_024)  # 12M parameters, for --quick


def make(shape: ModelShape) -> Path:
    """The folder of the model, made if it is not there yet. Needs torch and transformers."""
    from headrace.places import make_folder

    def fill(folder: Path) -> None:
        _save_tokenizer(shape, folder)
        _save_weights(shape, folder)

    shape.folder.parent.mkdir(parents=True, exist_ok=True)
    make_folder(shape.folder, fill)
    return shape.folder


def _save_weights(shape: ModelShape, folder: Path) -> None:
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(shape.seed)
    config = Qwen2Config(
        vocab_size=shape.vocab_tokens,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=shape.context_tokens,
        tie_word_embeddings=True,
        bos_token_id=None,
        pad_token_id=0,
        eos_token_id=1,
    )
    Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def _save_tokenizer(shape: ModelShape, folder: Path) -> None:
    """One token for each byte, and words of four letters up to the vocabulary's size, which no text is split into."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    bytes_and_words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *map(_word, range(shape.vocab_tokens))]
    names = [*_SPECIAL_TOKENS, *bytes_and_words][: shape.vocab_tokens]
    tokenizer = Tokenizer(models.BPE(vocab={name: number for number, name in enumerate(names)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in _SPECIAL_TOKENS])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings: Mapping[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # the name that every version of transformers knows
        "pad_token": _SPECIAL_TOKENS[0],
        "eos_token": _SPECIAL_TOKENS[1],
        "clean_up_tokenization_spaces": False,
        "model_max_length": shape.context_tokens,
        "padding_side": "left",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1), encoding="utf-8")


def _word(number: int) -> str:
    letters = []
    for _ in range(4):
        number, letter = divmod(number, len(_LETTERS))
        letters.append(_LETTERS[letter])
    return "".join(letters)
