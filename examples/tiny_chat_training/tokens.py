"""tiny-chat's tokenizer: one token for each of the 256 bytes, no merges, and five special tokens."""

from collections.abc import Sequence

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from examples.tiny_chat_training.generate import Message

PAD, END = "<|pad|>", "<|end|>"
ROLES = ("system", "user", "assistant")
SPECIAL_TOKENS = (PAD, END, *(f"<|{role}|>" for role in ROLES))
IDS = {token: number for number, token in enumerate((*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())))}
"""The number of each token; a byte is written as the letter that byte-level tokenizers give it."""

CONTEXT_TOKENS = 4096
IGNORED = -100
"""The label of a token that is not learnt; the value that `torch.nn.CrossEntropyLoss` leaves out."""

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|' + message['role'] + '|>' + message['content'] + '<|end|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return the tokenizer; encoding and decoding any text gives the same text again."""
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]  # transformers types it in part
        tokenizer_object=_byte_level(),
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=list(SPECIAL_TOKENS[2:]),
        clean_up_tokenization_spaces=False,
        model_max_length=CONTEXT_TOKENS,
        padding_side="left",
        chat_template=CHAT_TEMPLATE,
    )


def _byte_level() -> Tokenizer:
    """Return a byte-level BPE without merges, so that every digit and letter is a token of its own."""
    tokenizer = Tokenizer(models.BPE(vocab=IDS, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return tokenizer


def encode_conversation(tokenizer: Tokenizer, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
    """Return the tokens of the rendered conversation and their labels: the assistant's words and their `END`."""
    tokens: list[int] = []
    labels: list[int] = []
    for message in messages:
        head = [IDS[f"<|{message['role']}|>"]]
        body = [*tokenizer.encode(message["content"]).ids, IDS[END]]
        tokens += head + body
        labels += [IGNORED, *(body if message["role"] == "assistant" else [IGNORED] * len(body))]
    return tokens, labels
