"""The objects of OpenAI's API as they go out, as types: what the gateway's document says of its answers.

Times are Unix seconds.
"""

from __future__ import annotations

from typing import Any, Literal, NotRequired

from typing_extensions import TypedDict


class Model(TypedDict):
    """A model that can be asked for."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: NotRequired[int]


class ModelList(TypedDict):
    """All of them."""

    object: Literal["list"]
    data: list[Model]


class FileObject(TypedDict):
    """A file."""

    id: str
    object: Literal["file"]
    bytes: int
    created_at: int
    expires_at: int | None
    filename: str
    purpose: str
    status: Literal["processed"]
    status_details: None


class FileList(TypedDict):
    """A page of files."""

    object: Literal["list"]
    data: list[FileObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class Deleted(TypedDict):
    """What was deleted."""

    id: str
    object: Literal["file", "response", "conversation.deleted"]
    deleted: Literal[True]


class CachedTokens(TypedDict):
    """Tokens that were not computed again."""

    cached_tokens: int


class InputDetails(CachedTokens):
    """The same of a response."""

    cache_write_tokens: int


class OutputDetails(TypedDict):
    """Tokens of reasoning; none."""

    reasoning_tokens: int


class BatchFault(TypedDict):
    """What is wrong with a batch's file."""

    code: str
    message: str
    line: int | None
    param: str | None


class BatchFaults(TypedDict):
    """All of it."""

    object: Literal["list"]
    data: list[BatchFault]


class RequestCounts(TypedDict):
    """What became of a batch's requests."""

    total: int
    completed: int
    failed: int


class BatchUsage(TypedDict):
    """Tokens of all requests of a batch."""

    input_tokens: int
    input_tokens_details: CachedTokens
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


class Batch(TypedDict):
    """A batch."""

    id: str
    object: Literal["batch"]
    endpoint: str
    errors: BatchFaults | None
    input_file_id: str
    completion_window: Literal["24h"]
    status: Literal[
        "validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"
    ]
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    in_progress_at: int | None
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    expires_at: int
    request_counts: RequestCounts
    usage: BatchUsage | None
    metadata: dict[str, str] | None


class BatchList(TypedDict):
    """A page of batches."""

    object: Literal["list"]
    data: list[Batch]
    first_id: str | None
    last_id: str | None
    has_more: bool


class Token(TypedDict):
    """A token and how likely it was."""

    token: str
    bytes: list[int]
    logprob: float | None


class TokenWithTop(Token):
    """The same, and the likeliest in its place."""

    top_logprobs: list[Token]


class ItemPart(TypedDict):
    """Text within an item; of an answer with annotations, of which there are none, and log probabilities."""

    type: Literal["input_text", "output_text"]
    text: str
    annotations: NotRequired[list[Any]]
    logprobs: NotRequired[list[TokenWithTop]]


class MessageItem(TypedDict):
    """A message in a response or a conversation."""

    id: str
    type: Literal["message"]
    role: str
    status: Literal["in_progress", "completed", "incomplete"]
    content: list[ItemPart]


class ItemList(TypedDict):
    """A page of items."""

    object: Literal["list"]
    data: list[MessageItem]
    first_id: str
    last_id: str
    has_more: bool


class ResponseError(TypedDict):
    """Why a response failed."""

    code: str
    message: str


class IncompleteDetails(TypedDict):
    """Why a response is incomplete."""

    reason: Literal["max_output_tokens"]


class ConversationName(TypedDict):
    """Which conversation."""

    id: str


class ResponseUsage(TypedDict):
    """Tokens of a response."""

    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


class ModelResponse(TypedDict):
    """A response. From `instructions` to `user`, what it repeats of its request."""

    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: Literal["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]
    background: bool
    error: ResponseError | None
    incomplete_details: IncompleteDetails | None
    model: str
    output: list[MessageItem]
    previous_response_id: str | None
    conversation: ConversationName | None
    reasoning: dict[str, None]
    service_tier: str
    store: bool
    tools: list[Any]
    usage: ResponseUsage | None
    metadata: dict[str, str]
    instructions: str | None
    max_output_tokens: int | None
    parallel_tool_calls: bool
    temperature: float | None
    text: dict[str, Any]
    tool_choice: str
    top_p: float | None
    truncation: str
    top_logprobs: NotRequired[int]
    max_tool_calls: NotRequired[int]
    prompt_cache_key: NotRequired[str]
    safety_identifier: NotRequired[str]
    user: NotRequired[str]


class InputTokens(TypedDict):
    """How many tokens a request would have."""

    object: Literal["response.input_tokens"]
    input_tokens: int


class ConversationObject(TypedDict):
    """A conversation."""

    id: str
    object: Literal["conversation"]
    created_at: int
    metadata: dict[str, str]


class CompletionUsage(TypedDict):
    """Tokens of a chat or a completion."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class ChatMessage(TypedDict):
    """An answer."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatLogprobs(TypedDict):
    """How likely its tokens were."""

    content: list[TokenWithTop]
    refusal: None


class ChatChoice(TypedDict):
    """One answer of `n`."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"]


class ChatCompletion(TypedDict):
    """An answered chat."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: CompletionUsage
    system_fingerprint: str | None


class TextLogprobs(TypedDict):
    """How likely the tokens of a text were, and where in it each begins. Null: nothing comes before it."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TextChoice(TypedDict):
    """One text of `n`."""

    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Literal["stop", "length"]


class TextCompletion(TypedDict):
    """A text that was gone on with."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: CompletionUsage
    system_fingerprint: str | None


class Health(TypedDict):
    """The process runs."""

    status: Literal["ok"]


class Ready(TypedDict):
    """Whether requests are taken in, and the models that somebody serves."""

    ready: bool
    models: list[str]
