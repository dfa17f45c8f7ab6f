"""From a plan to logits: packs the rows' tokens into one sequence and runs the model over the KV pool.

Weights, layers and quantization are transformers'; only their attention is ours (`models.attention`).
"""

import itertools
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from models.attention import NAME, Chunk, Kernels, Step, as_tables, running
from models.blocks import BlockPool, Lease
from models.catalog import ModelSpec
from models.graphs import DecodeGraphs
from models.kv_pool import KVPool, LayerShape
from models.protocol import GenerationRequest, ModelLoadError, SamplingParams
from models.rows import Flight, Row
from models.scheduler import Work

_CHECKED_TOKENS = 48
_CHECK_SEED = 20_261_126
# Relative error of the logits, as a norm: rounding stays far below, a mask that is wrong far above.
_TOLERATED = {torch.float32: 1e-3, torch.float16: 0.05}
_TOLERATED_ROUGH = 0.1  # of bfloat16 and of quantized models


class Runner:
    """One model over one pool. Holds no state of rows between steps."""

    def __init__(
        self, model: PreTrainedModel, pool: KVPool, kernels: Kernels, graphs: tuple[int, int] | None = None
    ) -> None:
        """`graphs`: capture CUDA graphs for at most (rows, blocks of a row)."""
        self._model = model
        self._pool = pool
        self._kernels = kernels
        self._graphs = graphs and DecodeGraphs(self.forward, *graphs)

    @torch.inference_mode()
    def run(self, works: Sequence[Work]) -> Tensor:
        """One forward pass. Returns (outputs of all works, vocab): logits, in the order of `works`.

        Works of one token have to come first.
        """
        step = self.pack(works)
        if self._graphs and all(work.outputs == 1 for work in works):
            logits = self._graphs.run(step)
            if logits is not None:
                return logits
        wanted: list[int] = []
        for work, end in zip(works, itertools.accumulate(work.tokens for work in works), strict=True):
            wanted += range(end - work.outputs, end)
        return self.forward(step, torch.tensor(wanted, dtype=torch.long, device=step.token_ids.device))

    def forward(self, step: Step, wanted: Tensor) -> Tensor:
        """The logits, (wanted tokens, vocab), at these places of the packed step, ascending."""
        with running(replace(step, wanted=wanted)):
            output = self._model(
                input_ids=step.token_ids.unsqueeze(0),
                position_ids=step.positions.unsqueeze(0),
                use_cache=False,
                logits_to_keep=wanted,
            )
        logits: Tensor = output.logits[0]
        return logits

    def pack(self, works: Sequence[Work]) -> Step:
        """The tensors of one step."""
        token_ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        chunks: list[Chunk] = []
        decode_rows = sum(work.tokens == 1 for work in works)
        for row, work in enumerate(works):
            if row >= decode_rows:
                chunks.append(Chunk(row, len(token_ids), work.tokens, work.first + work.tokens))
            token_ids += work.row.sequence[work.first : work.first + work.tokens]
            positions += range(work.first, work.first + work.tokens)
            slots += self._slots(work)
        contexts = [work.first + work.tokens for work in works]
        device = self._model.device
        return Step(
            pool=self._pool,
            kernels=self._kernels,
            token_ids=torch.tensor(token_ids, device=device),
            positions=torch.tensor(positions, device=device),
            slots=torch.tensor(slots, device=device),
            block_tables=as_tables([work.row.lease.blocks for work in works if work.row.lease]).to(device),
            context_tokens=torch.tensor(contexts, dtype=torch.int32, device=device),
            decode_rows=decode_rows,
            longest_decode=max(contexts[:decode_rows], default=0),
            chunks=tuple(chunks),
        )

    def _slots(self, work: Work) -> list[int]:
        assert work.row.lease is not None
        size, blocks = self._pool.block_tokens, work.row.lease.blocks
        return [blocks[at // size] * size + at % size for at in range(work.first, work.first + work.tokens)]


def layer_shapes(model: PreTrainedModel, name: str) -> list[LayerShape]:
    """What each attention layer keeps of a token, seen on one. Raises `ModelLoadError` for other kinds of memory."""
    config = model.config.get_text_config(decoder=True)
    if model._is_stateful or not model._supports_default_dynamic_cache():  # type: ignore[operator]  # noqa: SLF001
        raise unservable(name, model, "it does not keep keys and values in a cache")
    if not model._supports_attention_backend:  # noqa: SLF001  no public way to ask
        raise unservable(name, model, "its attention does not use transformers' AttentionInterface")
    model.set_attn_implementation("eager")
    cache = DynamicCache(config=config)
    with torch.inference_mode():
        model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device), past_key_values=cache, use_cache=True)
    shapes = []
    for number, layer in enumerate(cache.layers):
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if keys is None or values is None or keys.ndim != 4:  # noqa: PLR2004  (1, kv_heads, 1, head_dim)
            raise unservable(name, model, f"layer {number} is no attention layer ({type(layer).__name__})")
        shapes.append(LayerShape(keys.shape[1], keys.shape[-1], values.shape[-1], keys.dtype, keys.device))
    if len(shapes) != config.num_hidden_layers:
        raise unservable(name, model, f"{len(shapes)} of its {config.num_hidden_layers} layers keep keys and values")
    return shapes


def check_attention(model: PreTrainedModel, runner: Runner, blocks: BlockPool, spec: ModelSpec) -> None:
    """Hold the runner against the model's own attention, on random tokens. Raises `ModelLoadError`.

    The reference is transformers' eager attention, the only one that has every rule of every architecture.
    """
    limit = min(_CHECKED_TOKENS, blocks.blocks * blocks.block_tokens // 2)
    vocab = model.config.get_text_config().vocab_size
    prompts = torch.randint(0, vocab, (2, limit), generator=torch.Generator().manual_seed(_CHECK_SEED))
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        expected = model(input_ids=prompts.to(model.device), use_cache=False).logits.float()
    model.set_attn_implementation(NAME)
    error = _relative_error(runner, blocks, prompts, expected)
    exact = spec.quantization == "none" and getattr(model, "hf_quantizer", None) is None
    if not error <= (_TOLERATED.get(model.dtype, _TOLERATED_ROUGH) if exact else _TOLERATED_ROUGH):
        raise unservable(spec.name, model, f"with our attention its logits differ by {error:.2g} from its own")


def _relative_error(runner: Runner, blocks: BlockPool, prompts: Tensor, expected: Tensor) -> float:
    """All prompts at once: half of each, nearly the rest, then token by token. Worst of the errors at these places."""
    rows = [_row(prompt) for prompt in prompts.tolist()]
    limit, errors = prompts.shape[1], []
    for first, end in itertools.pairwise([0, limit // 2, limit - 2, limit - 1, limit]):
        for row, prompt in zip(rows, prompts.tolist(), strict=True):
            row.sequence = prompt[:end]
            row.lease = row.lease or Lease("check")
            blocks.grow(row.lease, end)
        actual = runner.run([Work(row, first, end - first) for row in rows]).float()
        wanted = expected[:, end - 1]
        errors.append(float(((actual - wanted).norm(dim=-1) / wanted.norm(dim=-1)).max()))
    for row in rows:
        blocks.release(row.lease or Lease("check"), ())
    return max(errors)


def _row(prompt: Sequence[int]) -> Row:
    request = GenerationRequest("check", tuple(prompt), SamplingParams(1))
    return Flight(request, 0.0, lambda _: "").rows[0]


def unservable(name: str, model: PreTrainedModel, reason: str) -> ModelLoadError:
    """The error for a model of a kind that cannot be served."""
    return ModelLoadError(f"model {name}: {type(model).__name__} cannot be served: {reason}")
