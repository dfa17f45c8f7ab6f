"""The first engine for real models: micro-batches of whatever is waiting, through Hugging Face forwards.

Up to `slots` waiting rows form a batch: their prompts are padded on the left and prefilled together, then every step
decodes one token for each row. Rows that end leave; rows that arrive wait until the batch is done.
"""

import inspect
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from models.base import BaseEngine
from models.catalog import ModelSpec
from models.loading import choose_device, eos_token_ids, load_model
from models.prompt import PromptError, load_prompt_format
from models.protocol import Event, Failure, ModelLoadError
from models.rows import Advance, Row
from models.sampling import Sampler, sample

_NAN_LOGITS = Failure("nan_logits", "the model's output for this request is not a number", retryable=True)


class TransformersEngine(BaseEngine):
    """One batch at a time. A fault in a step costs the requests of that batch, no others."""

    def __init__(self, spec: ModelSpec, device: str | None = None) -> None:
        try:
            prompt_format = load_prompt_format(spec)
        except PromptError as error:
            raise ModelLoadError(f"model {spec.name}: {error}") from error
        device = choose_device(device)
        self._model = load_model(spec, device)
        self._eos_token_ids = eos_token_ids(self._model, prompt_format)
        self._batch: Batch | None = None
        super().__init__(
            spec,
            device=device,
            vocab_tokens=self._model.config.get_text_config().vocab_size,
            context_tokens=prompt_format.context_tokens,
            decode=prompt_format.decode,
        )

    def step(self) -> list[Event]:
        """See `Engine`."""
        events = super().step()
        if not self._running:
            self._batch = None  # an idle engine holds no cache
        return events

    def _room(self) -> int:
        return 0 if self._running else self._spec.slots

    @torch.inference_mode()
    def _forward(self, rows: Sequence[Row]) -> list[Advance]:
        if self._batch is None or not rows[0].token_ids:  # rows join all together, so the first speaks for all
            self._batch = Batch(self._model, rows, self._vocab_tokens)
        batch = self._batch
        batch.drop_ended()
        logits = batch.forward()  # (rows of the batch, vocab)
        sound = logits.amax(dim=-1).isfinite()  # (rows of the batch,); false for NaN, which amax passes on
        token_ids = batch.choose(logits.masked_fill(~sound.unsqueeze(-1), 0.0))
        return [
            self._next(row, token_id) if is_sound else Advance(row, _work(row), failure=_NAN_LOGITS)
            for row, token_id, is_sound in zip(batch.rows, token_ids, sound.tolist(), strict=True)
            if row.finish_reason is None
        ]

    def _next(self, row: Row, token_id: int) -> Advance:
        ended = token_id in self._eos_token_ids and not row.flight.request.sampling.ignore_eos
        return Advance(row, _work(row), (token_id,), ended=ended, silent=ended)

    def _recover(self) -> None:
        self._batch = None
        if self._device == "cuda":
            torch.cuda.synchronize()  # raises if the device itself is broken: then the process must end
            torch.cuda.empty_cache()

    def _failure(self, error: Exception) -> Failure:
        out_of_memory = isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
        return Failure("out_of_memory", str(error), retryable=True) if out_of_memory else super()._failure(error)


def _work(row: Row) -> int:
    """Tokens this step put through the model: the prompt, and after that one at a time."""
    return 1 if row.token_ids else len(row.flight.request.prompt_token_ids)


class Batch:
    """Rows computed together, and their keys and values.

    Padding on the left keeps every row's newest token in the last column, whatever the lengths.
    """

    def __init__(self, model: PreTrainedModel, rows: Sequence[Row], vocab_tokens: int) -> None:
        self.rows = list(rows)
        self._model = model
        self._cache = DynamicCache(config=model.config)
        self._accepted = frozenset(inspect.signature(model.forward).parameters)
        prompts = [row.flight.request.prompt_token_ids for row in rows]
        width = max(map(len, prompts))
        device = model.device
        self._input = torch.tensor([[0] * (width - len(ids)) + list(ids) for ids in prompts], device=device)
        self._mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts], device=device)
        self._positions = (self._mask.cumsum(dim=-1) - 1).clamp(min=0)  # all three (rows, width), decoding (rows, 1)
        self._samplers = [
            Sampler(row.flight.request.sampling, row.index, ids, vocab_tokens, str(device))
            for row, ids in zip(rows, prompts, strict=True)
        ]

    def drop_ended(self) -> None:
        """Once half of the rows have ended, keep the others only: copying the cache must be worth it."""
        live = [at for at, row in enumerate(self.rows) if row.finish_reason is None]
        if 2 * len(live) > len(self.rows):
            return
        kept = torch.tensor(live, device=self._input.device)
        self.rows = [self.rows[at] for at in live]
        self._samplers = [self._samplers[at] for at in live]
        self._cache.batch_select_indices(kept)
        self._input, self._mask, self._positions = self._input[kept], self._mask[kept], self._positions[kept]

    def forward(self) -> Tensor:
        """Run the rows' new tokens; returns (rows, vocab), the logits of the token that follows each row."""
        optional = {"position_ids": self._positions, "logits_to_keep": 1}
        output = self._model(
            input_ids=self._input,
            attention_mask=self._mask,
            past_key_values=self._cache,
            use_cache=True,
            **{name: value for name, value in optional.items() if name in self._accepted},
        )
        logits: Tensor = output.logits[:, -1]
        return logits

    def choose(self, logits: Tensor) -> list[int]:
        """The next token of each row, which is also the next step's input."""
        token_ids = sample(logits, self._samplers)
        self._input = torch.tensor(token_ids, device=self._input.device).unsqueeze(-1)
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(token_ids), 1)], dim=-1)
        self._positions = self._positions[:, -1:] + 1
        return token_ids
