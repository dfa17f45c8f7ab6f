"""OpenVINO GenAI's continuous batching pipeline, over the model as its own converter exports it (fp16 or int8).

Its defaults for this processor are left as they are: bf16 arithmetic where there are instructions for it, an 8-bit KV
cache, activations quantized on the fly for int8 weights.
"""

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.engine.places import cache_folder
from benchmarks.engine.serving import Answer, Setup, Then
from headrace.bench import Load


def load(setup: Setup) -> "OpenVino":
    """The pipeline, which steps in this process."""
    import openvino_genai

    scheduler = openvino_genai.SchedulerConfig()
    scheduler.max_num_seqs = setup.width
    scheduler.cache_size = setup.kv_memory_gib
    scheduler.enable_prefix_caching = setup.reuse
    properties = {"INFERENCE_NUM_THREADS": setup.threads}
    folder = _exported(setup)
    return OpenVino(openvino_genai.ContinuousBatchingPipeline(str(folder), scheduler, "CPU", properties))


def _exported(setup: Setup) -> Path:
    """The model in OpenVINO's own format; made on first use, kept."""
    folder = cache_folder() / "openvino" / f"{setup.folder.name}-{setup.precision}"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        new = tempfile.mkdtemp(dir=folder.parent)
        command = [str(Path(sys.executable).parent / "optimum-cli"), "export", "openvino"]
        command += ["--model", str(setup.folder), "--task", "text-generation-with-past"]
        command += ["--weight-format", setup.precision, new]
        try:
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            Path(new).rename(folder)
        finally:
            shutil.rmtree(new, ignore_errors=True)
    return folder


class OpenVino:
    """The loop around its pipeline."""

    knows_salts = False

    def __init__(self, pipeline: Any) -> None:
        import openvino_genai

        self.version = str(openvino_genai.__version__)
        self._pipeline = pipeline
        self._requests = 0

    def serve(self, loads: Sequence[Load], then: Then) -> Iterator[Answer]:
        """See `Serving`. It does not tell how much of a prompt came from its cache."""
        from openvino_genai import GenerationStatus

        handles = self._submit(loads)
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()
            for name, handle in list(handles.items()):
                if handle.get_status() != GenerationStatus.RUNNING:
                    answer = Answer(name, tuple(handles.pop(name).read_all()[0].generated_ids))
                    handles |= self._submit(then(answer))
                    yield answer

    def _submit(self, loads: Sequence[Load]) -> dict[str, Any]:
        import numpy as np
        from openvino import Tensor
        from openvino_genai import GenerationConfig

        handles = {}
        for one in loads:
            config = GenerationConfig(max_new_tokens=one.max_tokens, ignore_eos=True, do_sample=False)
            prompt = Tensor(np.array([one.prompt_token_ids], dtype=np.int64))
            self._requests += 1
            handles[one.id] = self._pipeline.add_request(self._requests, prompt, config)
        return handles
