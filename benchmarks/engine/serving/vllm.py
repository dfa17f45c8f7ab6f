"""vLLM's CPU build, driven as its own `LLM.generate` does: requests into the engine, steps until they are out.

As its documentation for CPUs has it: OpenMP threads bound to the cores and Intel's OpenMP preloaded (`contestants.py`),
torch.compile on. It brings no int8 weights of its own for a checkpoint in bf16.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.engine.serving import DTYPES, Answer, Setup, Then
from headrace.bench import Load


def load(setup: Setup) -> "Vllm":
    """The engine runs in a process of its own, as it does for any user."""
    import vllm

    llm = vllm.LLM(
        str(setup.folder),
        dtype=DTYPES[setup.precision],
        max_num_seqs=setup.width,
        max_model_len=setup.context_tokens,
        kv_cache_memory_bytes=setup.kv_memory_gib * 2**30,
        enable_prefix_caching=setup.reuse,
    )
    return Vllm(llm)


class Vllm:
    """The loop around its engine."""

    knows_salts = False

    def __init__(self, llm: Any) -> None:
        import vllm

        self.version = str(vllm.__version__)
        self._engine = llm.llm_engine

    def serve(self, loads: Sequence[Load], then: Then) -> Iterator[Answer]:
        """See `Serving`."""
        self._submit(loads)
        while self._engine.has_unfinished_requests():
            for output in self._engine.step():
                if output.finished:
                    answer = Answer(output.request_id, tuple(output.outputs[0].token_ids), output.num_cached_tokens)
                    self._submit(then(answer))
                    yield answer

    def _submit(self, loads: Sequence[Load]) -> None:
        from vllm import SamplingParams, TokensPrompt

        for one in loads:
            sampling = SamplingParams(temperature=0.0, max_tokens=one.max_tokens, ignore_eos=True)
            self._engine.add_request(one.id, TokensPrompt(prompt_token_ids=list(one.prompt_token_ids)), sampling)
