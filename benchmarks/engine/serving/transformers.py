"""transformers, three ways: `generate` one at a time, `generate` over padded batches, its own continuous batching."""

from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.engine.serving import DTYPES, Answer, Setup, Then
from headrace.bench import Load


def load_generate(setup: Setup) -> "Generate":
    """Batches of `width`; a width of 1 is one request at a time."""
    return Generate(_model(setup), setup.width)


def load_continuous(setup: Setup) -> "Continuous":
    """Its continuous batching with at most `width` requests in a batch."""
    return Continuous(_model(setup), setup)


def _model(setup: Setup) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(setup.threads)
    model = AutoModelForCausalLM.from_pretrained(setup.folder, dtype=DTYPES[setup.precision]).eval()
    model.generation_config.eos_token_id = None  # an answer has the length that was asked for
    return model


def _version() -> str:
    from importlib.metadata import version

    return version("transformers")


class Generate:
    """What most code around transformers does, and what is called dynamic batching: the longest row decides."""

    knows_salts = False

    def __init__(self, model: Any, width: int) -> None:
        self.version = _version()
        self._model = model
        self._width = width

    def serve(self, loads: Sequence[Load], then: Then) -> Iterator[Answer]:
        """See `Serving`; what follows waits for the batches before it."""
        waiting = list(loads)
        while waiting:
            batch, waiting = waiting[: self._width], waiting[self._width :]
            for answer in self._answers(batch):
                waiting += then(answer)
                yield answer

    def _answers(self, batch: Sequence[Load]) -> list[Answer]:
        import torch

        width = max(len(one.prompt_token_ids) for one in batch)
        pads = [width - len(one.prompt_token_ids) for one in batch]
        outputs = self._model.generate(
            input_ids=torch.tensor([[0] * pad + [*one.prompt_token_ids] for pad, one in zip(pads, batch, strict=True)]),
            attention_mask=torch.tensor([[0] * pad + [1] * (width - pad) for pad in pads]),
            max_new_tokens=max(one.max_tokens for one in batch),
            do_sample=False,
        )
        rows = outputs[:, width:].tolist()
        return [Answer(one.id, tuple(row[: one.max_tokens])) for one, row in zip(batch, rows, strict=True)]


class Continuous:
    """Its own continuous batching, as its documentation has it, with the memory and the width given."""

    knows_salts = False

    def __init__(self, model: Any, setup: Setup) -> None:
        from transformers import ContinuousBatchingConfig, GenerationConfig

        self.version = _version()
        self._model = model
        self._generation = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)
        self._config = ContinuousBatchingConfig(
            max_requests_per_batch=setup.width,
            allow_block_sharing=setup.reuse,
        )

    def serve(self, loads: Sequence[Load], then: Then) -> Iterator[Answer]:
        """See `Serving`."""
        with self._model.continuous_batching_context_manager(
            generation_config=self._generation, continuous_batching_config=self._config
        ) as manager:
            waiting = list(loads)
            open_requests = 0
            while waiting or open_requests:
                for one in waiting:
                    manager.add_request(
                        list(one.prompt_token_ids), request_id=one.id, max_new_tokens=one.max_tokens, streaming=False
                    )
                open_requests, waiting = open_requests + len(waiting), []
                result = manager.get_result(timeout=1)
                if result is not None:
                    open_requests -= 1
                    answer = Answer(result.request_id, tuple(result.generated_tokens))
                    waiting = list(then(answer))
                    yield answer
