"""Ours: `models.engine.load_engine`, without the queue around it."""

from collections.abc import Iterator, Sequence

from benchmarks.engine.serving import Answer, Setup, Then
from headrace.bench import Load, as_request
from models.protocol import Ended, Engine

_QUANTIZATIONS = {"bf16": "none", "int8": "int8-onednn"}


def load(setup: Setup) -> "Headrace":
    """Prefix reuse is always on; who wants none gives each load a salt of its own."""
    from models.catalog import ModelSpec
    from models.engine import load_engine

    spec = ModelSpec.model_validate(
        {
            "name": "bench",
            "path": str(setup.folder),
            "quantization": _QUANTIZATIONS[setup.precision],
            "slots": setup.width,
            "context_tokens": setup.context_tokens,
            "kv_memory_bytes": setup.kv_memory_gib * 2**30,
            "cpu_threads": setup.threads,  # a worker leaves a core to its neighbours; here there are none
        }
    )
    return Headrace(load_engine(spec, "cpu"))


class Headrace:
    """The owner's loop around an engine."""

    knows_salts = True

    def __init__(self, engine: Engine) -> None:
        from headrace import __version__

        self.version = __version__
        self.engine = engine

    def serve(self, loads: Sequence[Load], then: Then) -> Iterator[Answer]:
        """See `Serving`."""
        self._submit(loads)
        while self.engine.has_work():
            for event in self.engine.step():
                if isinstance(event, Ended):
                    answer = _answer(event)
                    self._submit(then(answer))
                    yield answer

    def _submit(self, loads: Sequence[Load]) -> None:
        for one in loads:
            self.engine.submit(as_request(one))


def _answer(ended: Ended) -> Answer:
    if ended.outcome != "succeeded":
        raise RuntimeError(f"{ended.id} {ended.outcome}: {ended.error}")
    return Answer(ended.id, ended.choices[0].token_ids, ended.usage.cached_tokens)
