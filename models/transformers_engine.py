"""The engine for real models: continuous batching over a paged KV pool, through Hugging Face models.

A step, from top to bottom: the scheduler plans (`models.scheduler`), the runner computes (`models.runner`), the sampler
chooses (`models.sampling`), `models.base` turns tokens into text and ends what is over.
"""

import importlib.util
import itertools
import logging
import os
import time
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from models.attention import Kernels, Reference
from models.base import BaseEngine
from models.blocks import BlockPool
from models.catalog import ModelSpec
from models.fused import prepare_for_cpu
from models.gpu_meter import GpuMeter
from models.grammar import Grammars
from models.kv_pool import KVPool, LayerShape, blocks_in
from models.loading import choose_device, eos_token_ids, load_model
from models.prompt import PromptError, PromptFormat, load_prompt_format
from models.protocol import Event, Failure, GenerationRequest, GpuLoad, ModelLoadError
from models.rows import Advance, Row
from models.runner import Runner, check_attention, layer_shapes
from models.sampling import Sampler, logprobs, sample
from models.scheduler import BlockScheduler, Plan, StepBudget, Work

log = logging.getLogger(__name__)

BLOCK_TOKENS = 16
_GPU_MEMORY_FRACTION = 0.9
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

    def __init__(
        self,
        spec: ModelSpec,
        model: PreTrainedModel,
        prompt_format: PromptFormat,
        *,
        kernels: Kernels | None = None,
        graphs: bool = True,
    ) -> None:
        """`kernels` and `graphs` are for comparisons; by default the fastest that the device has."""
        kernels = kernels or choose_kernels(model, spec)
        shapes = layer_shapes(model, spec.name)
        context_tokens = prompt_format.context_tokens
        blocks = pool_blocks(spec, shapes, context_tokens)
        self._model = model
        self._blocks = BlockPool(blocks, BLOCK_TOKENS)
        self._pool = KVPool(shapes, blocks + 1, BLOCK_TOKENS)  # the last one is nobody's: see `models.graphs`
        may_capture = graphs and model.device.type == "cuda" and type(kernels) is not Reference
        rows_and_blocks = (spec.slots, self._blocks.blocks_for(min(context_tokens, blocks * BLOCK_TOKENS)))
        self._runner = Runner(model, self._pool, kernels, rows_and_blocks if may_capture else None)
        check_attention(model, self._runner, self._blocks, spec)
        self._samplers: dict[Row, Sampler] = {}
        self._eos_token_ids = eos_token_ids(model, prompt_format)
        vocab_tokens = model.config.get_text_config().vocab_size
        self._grammars = Grammars(prompt_format, vocab_tokens, self._eos_token_ids)
        self._budget = _step_budget(model.device)
        super().__init__(
            spec,
            BlockScheduler(self._blocks, self._budget, spec.slots),
            device=model.device.type,
            vocab_tokens=vocab_tokens,
            context_tokens=min(context_tokens, blocks * BLOCK_TOKENS),
            decode=prompt_format.decode,
        )
        self._meter = _gpu_meter(model.device)
        _announce(spec, shapes, blocks, context_tokens)

    def step(self) -> list[Event]:
        """See `Engine`."""
        events = super().step()
        self._samplers = {row: sampler for row, sampler in self._samplers.items() if row.finish_reason is None}
        if not self.has_work() and self._blocks.used:
            raise AssertionError(f"{self._blocks.used} blocks of the KV pool are held by nobody")
        return events

    def close(self) -> None:
        """See `Engine`."""
        super().close()
        self._grammars.close()

    def _gpu(self) -> GpuLoad | None:
        return None if self._meter is None else self._meter.look()

    def _prepare(self, request: GenerationRequest) -> Future[Any] | None:
        structure = request.sampling.structure
        return None if structure is None else self._grammars.compile(structure)

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
        unsound = self._unsound(works, ends, logits)
        computed = [work for work in works if work not in unsound]
        self._scheduler.done(computed)
        choosing = {
            work: end - 1
            for work, end in zip(works, ends, strict=True)
            if work.chooses and work not in unsound and work.row.tokens_to_come
        }
        chosen = self._sample(list(choosing), list(choosing.values()), logits) if choosing else {}
        for work, end in zip(works, ends, strict=True):
            if work.row.wants_prompt_logprobs and work not in unsound:
                self._note_prompt(work, logits[end - work.outputs : end])
        failed = [Advance(work.row, work.tokens, failure=_NAN_LOGITS) for work in unsound]
        return [chosen.get(work) or Advance(work.row, work.tokens) for work in computed] + failed

    def _unsound(self, works: Sequence[Work], ends: Sequence[int], logits: Tensor) -> list[Work]:
        """Works with an output that is no number. What they left in the pool is wiped: it would spread."""
        sound = logits.amax(dim=-1).isfinite().tolist() if len(logits) else []  # amax passes NaN on
        if all(sound):
            return []
        spoilt = [work for work, end in zip(works, ends, strict=True) if not all(sound[end - work.outputs : end])]
        for work in spoilt:
            if lease := work.row.lease:
                work.row.computed_tokens = len(lease.nodes) * BLOCK_TOKENS
                self._pool.clear(lease.blocks[len(lease.nodes) :])
        return spoilt

    def _sample(self, works: Sequence[Work], places: Sequence[int], logits: Tensor) -> dict[Work, Advance]:
        """One token for each of these works, whose logits are at these places."""
        rows = [work.row for work in works]
        samplers = [self._sampler(row) for row in rows]
        logits = logits if len(places) == len(logits) else logits[places]
        token_ids = sample(logits, samplers)
        told = logprobs(logits, token_ids, [sampler.sampling.logprobs for sampler in samplers])
        return {
            work: Advance(
                work.row,
                work.tokens,
                (token_id,),
                ended=sampler.ended,
                silent=sampler.silent,
                logprobs=() if logprob is None else (logprob,),
                failure=sampler.failure,
            )
            for work, sampler, token_id, logprob in zip(works, samplers, token_ids, told, strict=True)
        }

    def _sampler(self, row: Row) -> Sampler:
        if row not in self._samplers:
            request = row.flight.request
            structure = request.sampling.structure
            self._samplers[row] = Sampler(
                request.sampling,
                row.index,
                request.prompt_token_ids,
                self._vocab_tokens,
                self._device,
                eos_token_ids=self._eos_token_ids,
                matcher=None if structure is None else self._grammars.matcher(structure),
            )
        return self._samplers[row]

    def _note_prompt(self, work: Work, logits: Tensor) -> None:
        """Tell how likely the prompt's own tokens were, those that follow this chunk's."""
        flight = work.row.flight
        following = flight.request.prompt_token_ids[work.first + 1 : work.first + work.tokens + 1]
        counts = [flight.request.sampling.prompt_logprobs] * len(following)
        told = logprobs(logits[: len(following)], following, counts)
        flight.note_prompt_logprobs(work.first + 1, [one for one in told if one])

    def _recover(self) -> None:
        if self._device == "cuda":
            torch.cuda.synchronize()  # raises if the device itself is broken: then the process must end
            torch.cuda.empty_cache()

    def _failure(self, error: Exception) -> Failure:
        out_of_memory = isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
        return Failure("out_of_memory", str(error), retryable=True) if out_of_memory else super()._failure(error)


def _smaller(works: Sequence[Work]) -> list[Work]:
    """The same work in more parts, if it is a single row's chunk."""
    if len(works) > 1 or works[0].tokens == 1:
        return list(works)
    work, half = works[0], works[0].tokens // 2
    return [Work(work.row, work.first, half), Work(work.row, work.first + half, work.tokens - half)]


def choose_kernels(model: PreTrainedModel, spec: ModelSpec) -> Kernels:
    """The fastest attention that this device has; on a CPU the model's layers are made faster too, in place."""
    if model.device.type == "cpu":
        return prepare_for_cpu(model, spec.quantization)
    if model.device.type == "cuda" and importlib.util.find_spec("triton"):
        from models.kernels.triton import TritonKernels

        return TritonKernels()
    return Reference()


def _step_budget(device: torch.device) -> StepBudget:
    """A step of a CPU may last 0.35 s, of a GPU 0.1 s: so long does a decoding row wait for its neighbours' prompts."""
    if device.type == "cpu":
        return StepBudget(128, 2_048, target_seconds=0.35)
    # far more tokens than a CPU's least: below that a step of a GPU hardly gets shorter
    return StepBudget(2_048, 8_192, target_seconds=0.1, least_tokens=512)


def pool_blocks(spec: ModelSpec, shapes: Sequence[LayerShape], context_tokens: int) -> int:
    """How many blocks the pool has: what the memory budget holds, but no more than can be of use.

    Raises `ModelLoadError` if that is not even one block more than nothing.
    """
    useful = 2 * spec.slots * -(-context_tokens // BLOCK_TOKENS)  # every row at its longest, and as much to remember
    blocks = min(useful, blocks_in(kv_budget_bytes(spec, shapes[0].device), shapes, BLOCK_TOKENS) - 1)
    if blocks < 2:  # noqa: PLR2004
        raise ModelLoadError(f"model {spec.name}: kv_memory_bytes leaves no room for keys and values")
    return blocks


def kv_budget_bytes(spec: ModelSpec, device: torch.device) -> int:
    """What the spec says, else a fifth of the machine's free memory, or what the GPU's fraction leaves."""
    if spec.kv_memory_bytes:
        return spec.kv_memory_bytes
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        fraction = spec.gpu_memory_fraction or _GPU_MEMORY_FRACTION
        return max(0, int(free - (1 - fraction) * total))
    return _free_memory_bytes() // 5


def _free_memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


def _gpu_meter(device: torch.device) -> GpuMeter | None:
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    return GpuMeter(str(properties.uuid), properties.name)


def _announce(spec: ModelSpec, shapes: Sequence[LayerShape], blocks: int, context_tokens: int) -> None:
    tokens = blocks * BLOCK_TOKENS
    size = tokens * sum(shape.token_bytes for shape in shapes)
    rows = min(spec.slots, tokens // context_tokens)
    log.info(
        "model %s: KV pool of %.2f GiB holds %d tokens, %d rows at full context of %d",
        spec.name,
        size / 2**30,
        tokens,
        rows,
        context_tokens,
    )
