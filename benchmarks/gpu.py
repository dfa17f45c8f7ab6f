"""One GPU: our engine, with its kernels and graphs and without, beside transformers' own ways, in one run.

The models are random and made on the GPU; the load is that of the CPU benchmark's `mixed`: prompts of 16 to 512 tokens,
answers of 8 to 256, log-uniform, greedy, all there from the start. What a decode step costs is held against its floor,
the time to read the weights and the rows' keys and values once.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import orjson
import torch
import transformers

from models.attention import Reference
from models.catalog import ModelSpec
from models.protocol import GenerationRequest, SamplingParams
from models.transformers_engine import TransformersEngine

Load = Sequence[tuple[list[int], int]]  # prompts, and how many tokens to answer
RESULTS = Path(__file__).resolve().parent / "results" / "gpu.json"
SHAPES: dict[str, dict[str, Any]] = {
    "qwen2-0.5b": {
        "model_type": "qwen2",
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 32_000,
    },
    "llama-8b": {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128_256,
    },
}
CONTEXT_TOKENS = 4_096
_STEPS_TIMED = 40
OURS = (  # rows, name, kernels, graphs
    (16, "headrace", "triton", True),
    (64, "headrace", "triton", True),
    (128, "headrace", "triton", True),
    (64, "headrace without graphs", "triton", False),
    (64, "headrace in plain torch", "reference", False),
)


class NoText:
    """A prompt format for models without a tokenizer: only tokens count here."""

    context_tokens = CONTEXT_TOKENS
    eos_token_ids: tuple[int, ...] = ()

    def __init__(self, vocab_tokens: int) -> None:
        self.vocab_tokens = vocab_tokens

    def decode(self, _token_ids: Sequence[int]) -> str:
        """Nothing."""
        return ""

    render = encode_messages = encode_text = decode


def measure(*, quick: bool) -> bool:
    """Prints the table and writes it; there is no promised ratio on a GPU yet."""
    if not torch.cuda.is_available():
        print("gpu: skipped, no CUDA device")
        return True
    records: list[dict[str, Any]] = []
    bandwidth = copy_bandwidth()
    for name in list(SHAPES)[: 1 if quick else None]:
        model = make(name)
        records += [{"model": name, **record} for record in compare(model, name, quick=quick, bandwidth=bandwidth)]
        del model
        torch.cuda.empty_cache()
    for record in records:
        print(" ".join(f"{key}={value}" for key, value in record.items()))
    hardware = {"gpu": torch.cuda.get_device_name(), "copy_bytes_per_second": round(bandwidth)}
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    RESULTS.write_bytes(
        orjson.dumps(
            {
                "name": "gpu",
                "date": time.strftime("%Y-%m-%d"),
                "hardware": hardware,
                "versions": versions,
                "records": records,
            },
            option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE,
        )
    )
    return True


def make(name: str) -> Any:
    """A random bfloat16 model of this shape, on the GPU."""
    shape = dict(SHAPES[name])
    config = transformers.AutoConfig.for_model(
        shape.pop("model_type"), **shape, max_position_embeddings=CONTEXT_TOKENS, eos_token_id=None, bos_token_id=None
    )
    torch.manual_seed(0)
    with torch.device("cuda"):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def compare(model: Any, name: str, *, quick: bool, bandwidth: float) -> list[dict[str, Any]]:
    """Tokens a second of each way over the same load, and our step times."""
    vocab = SHAPES[name]["vocab_size"]
    load = mixed(64 if quick else 128, vocab)
    records = []
    for rows, label, kernels, graphs in OURS:
        engine = TransformersEngine(
            spec(name, rows),
            model,
            NoText(vocab),  # type: ignore[arg-type]
            kernels=Reference() if kernels == "reference" else None,
            graphs=graphs,
        )
        ours(engine, load[:rows])  # warm: kernels compile, graphs are captured
        records.append({"engine": label, "rows": rows, **timed(lambda engine=engine: ours(engine, load), load)})
        if graphs:
            records[-1] |= step_time(engine, model, rows, vocab, bandwidth)
        engine.close()
        del engine
        torch.cuda.empty_cache()
    model.set_attn_implementation("sdpa")
    for rows in (16, 64):
        part = load[: 2 * rows]
        padded(model, load[:2])
        records.append(
            {
                "engine": "transformers padded",
                "rows": rows,
                "requests": len(part),
                **timed(lambda part=part, rows=rows: padded(model, part, rows), part),
            }
        )
    return [*records, {"engine": "transformers continuous", **continuous(model, load[:64])}]


def spec(name: str, rows: int) -> ModelSpec:
    return ModelSpec(name=name, path="in-memory", slots=rows, gpu_memory_fraction=0.8)


def mixed(requests: int, vocab: int) -> Load:
    """The load: the same for every engine."""
    draw = random.Random(0)

    def log_uniform(low: int, high: int) -> int:
        return round(math.exp(draw.uniform(math.log(low), math.log(high))))

    return [
        ([draw.randrange(vocab) for _ in range(log_uniform(16, 512))], log_uniform(8, 256)) for _ in range(requests)
    ]


def timed(run: Callable[[], None], load: Load) -> dict[str, float]:
    torch.cuda.synchronize()
    began = time.perf_counter()
    run()
    torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    return {
        "wall_seconds": round(seconds, 3),
        "tokens_per_second": round(sum(tokens for _, tokens in load) / seconds, 1),
    }


def ours(engine: TransformersEngine, load: Load) -> None:
    salt = str(time.perf_counter())  # nothing of an earlier run may be reused
    for at, (prompt, tokens) in enumerate(load):
        sampling = SamplingParams(tokens, temperature=0.0, ignore_eos=True)
        engine.submit(GenerationRequest(f"{salt} {at}", tuple(prompt), sampling, cache_salt=salt))
    while engine.has_work():
        engine.step()


def step_time(engine: TransformersEngine, model: Any, rows: int, vocab: int, bandwidth: float) -> dict[str, float]:
    """The median decode step over rows of 512 tokens, and its floor."""
    prompts: Load = [([at % vocab] * 480, 600) for at in range(rows)]
    salt = str(time.perf_counter())
    for at, (prompt, tokens) in enumerate(prompts):
        sampling = SamplingParams(tokens, temperature=0.0, ignore_eos=True)
        engine.submit(GenerationRequest(f"{salt} {at}", (at, *prompt), sampling, cache_salt=f"{salt} {at}"))
    seconds: list[float] = []
    while len(seconds) < _STEPS_TIMED:
        decoding = len(engine._scheduler.running) == rows and all(
            row.missing_tokens == 1 for row in engine._scheduler.running
        )
        began = time.perf_counter()
        engine.step()
        if decoding:
            seconds.append(time.perf_counter() - began)
    for at in range(rows):
        engine.cancel(f"{salt} {at}")
    engine.step()
    weights = sum(p.numel() * p.element_size() for p in model.parameters()) - model.get_input_embeddings().weight.nbytes
    token_bytes = sum(t[0, :, 0].nbytes for t in (*engine._pool.keys, *engine._pool.values))
    floor = (weights + rows * 512 * token_bytes) / bandwidth
    median = sorted(seconds)[len(seconds) // 2]
    return {"step_ms": round(1e3 * median, 3), "floor_ms": round(1e3 * floor, 3)}


@torch.inference_mode()
def padded(model: Any, load: Load, rows: int | None = None) -> None:
    """`generate` over batches padded on the left, in the order of arrival."""
    rows = rows or len(load)
    for first in range(0, len(load), rows):
        batch = load[first : first + rows]
        width = max(len(prompt) for prompt, _ in batch)
        ids = torch.tensor([[0] * (width - len(p)) + p for p, _ in batch], device="cuda")
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p, _ in batch], device="cuda")
        tokens = max(tokens for _, tokens in batch)
        model.generate(ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False, pad_token_id=0)


def continuous(model: Any, load: Load) -> dict[str, Any]:
    """transformers' continuous batching over groups of equal length, for it takes one length for all."""
    try:
        config = transformers.GenerationConfig(max_new_tokens=256, do_sample=False, eos_token_id=-1, pad_token_id=0)
        model.generate_batch([prompt for prompt, _ in load[:8]], generation_config=config)
        tokens = [(prompt, 256) for prompt, _ in load]
        return timed(
            lambda: model.generate_batch([prompt for prompt, _ in tokens], generation_config=config), tokens
        ) | {"note": "every answer 256 tokens"}
    except Exception as error:  # noqa: BLE001  a peer that fails here is named, and costs the others nothing
        return {"failed": f"{type(error).__name__}: {error}"[:200]}


def copy_bandwidth() -> float:
    """Bytes a second of a large copy on the device, read and written."""
    source = torch.empty(1 << 32, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    seconds = []
    for _ in range(5):
        torch.cuda.synchronize()
        began = time.perf_counter()
        target.copy_(source)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return 2 * source.numel() / min(seconds)
