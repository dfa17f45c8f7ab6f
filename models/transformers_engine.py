"""The engine for real models: continuous batching over a paged KV pool, through Hugging Face models.

A step, from top to bottom: the scheduler plans (`models.scheduler`), the runner computes (`models.runner`), the sampler
chooses (`models.sampling`), `models.base` turns tokens into text and ends what is over.
"""

import logging
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from models.attention import Reference
from models.base import BaseEngine
from models.blocks import BlockPool
from models.catalog import ModelSpec
from models.kv_pool import KVPool, LayerShape, blocks_in
from models.loading import choose_device, eos_token_ids, load_model
from models.prompt import PromptError, PromptFormat, load_prompt_format
from models.protocol import Event, Failure, ModelLoadError
from models.rows import Advance, Row
from models.runner import Runner, check_attention, layer_shapes
from models.sampling import Sampler, sample
from models.scheduler import BlockScheduler, Plan, StepBudget, Work

log = logging.getLogger(__name__)

_BLOCK_TOKENS = 16
_NAN_LOGITS = Failure("nan_logits", "the model's output for this request is not a number", retryable=True)


def load_transformers_engine(spec: ModelSpec, device: str | None = None) -> "TransformersEngine":
    """Load the model of the spec and check that it can be served. Raises `ModelLoadError`."""
    try:
        prompt_format = load_prompt_format(spec)
    except PromptError as error:
        raise ModelLoadError(f"model {spec.name}: {error}") from error
    device = choose_device(device)
    return TransformersEngine(spec, load_model(spec, device), prompt_format)


class TransformersEngine(BaseEngine):
    """A model with its KV pool. A fault costs only the row that causes it."""

    def __init__(self, spec: ModelSpec, model: PreTrainedModel, prompt_format: PromptFormat) -> None:
        shapes = layer_shapes(model, spec.name)
        context_tokens = prompt_format.context_tokens
        blocks = pool_blocks(spec, shapes, context_tokens)
        self._blocks = BlockPool(blocks, _BLOCK_TOKENS)
        self._pool = KVPool(shapes, blocks, _BLOCK_TOKENS)
        self._runner = Runner(model, self._pool, Reference())
        check_attention(model, self._runner, self._blocks, spec.name)
        self._samplers: dict[Row, Sampler] = {}
        self._eos_token_ids = eos_token_ids(model, prompt_format)
        self._budget = _step_budget(model.device)
        super().__init__(
            spec,
            BlockScheduler(self._blocks, self._budget, spec.slots),
            device=model.device.type,
            vocab_tokens=model.config.get_text_config().vocab_size,
            context_tokens=min(context_tokens, blocks * _BLOCK_TOKENS),
            decode=prompt_format.decode,
        )
        _announce(spec, shapes, blocks, context_tokens)

    def step(self) -> list[Event]:
        """See `Engine`."""
        events = super().step()
        self._samplers = {row: sampler for row, sampler in self._samplers.items() if row.finish_reason is None}
        if not self.has_work() and self._blocks.used:
            raise AssertionError(f"{self._blocks.used} blocks of the KV pool are held by nobody")
        return events

    def _forward(self, plan: Plan) -> list[Advance]:
        self._pool.copy_blocks(plan.copies)
        works = sorted(plan.works, key=lambda work: work.tokens > 1)
        began = time.monotonic()
        advances = self._compute(works)
        self._budget.observe(sum(work.tokens for work in works), time.monotonic() - began)
        return advances

    def _compute(self, works: Sequence[Work]) -> list[Advance]:
        """Run them together; if that fails, in halves, down to the one that is to blame."""
        try:
            return self._choose(works, self._runner.run(works))
        except Exception as error:
            failure = self._failure(error)
            log.warning("a step over %d rows failed: %s", len(works), failure.message, exc_info=error)
        self._recover()  # not in the handler: there the error's frames still hold the step's tensors
        if failure.code == "out_of_memory":
            self._budget.halve()
            works = _smaller(works)
        if len(works) == 1:
            return [Advance(works[0].row, works[0].tokens, failure=failure)]
        half = len(works) // 2
        return self._compute(works[:half]) + self._compute(works[half:])

    def _choose(self, works: Sequence[Work], logits: Tensor) -> list[Advance]:
        """The next token of each row whose last token was computed; `logits` is (outputs of all works, vocab)."""
        ends = list(itertools.accumulate(work.outputs for work in works))
        choosing = [(work, end - 1) for work, end in zip(works, ends, strict=True) if work.chooses]
        sound = self._sound(choosing, logits)
        self._scheduler.done([work for work in works if not work.chooses or work in sound])
        ...

    def _next(self, ...)

    def _recover(self) -> None:
        if self._device == "cuda":
            torch.cuda.synchronize()  # raises if the device itself is broken: then the process must end
            torch.cuda.empty_cache()

    def _failure(self, error: Exception) -> Failure:
        out_of_memory = isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
        return Failure("out_of_memory", str(error), retryable=True) if out_of_memory else super()._failure(error)
