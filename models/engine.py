"""The way to an engine: from a model's spec to something that answers."""

from models.catalog import ModelSpec
from models.protocol import Engine, ModelLoadError


def load_engine(spec: ModelSpec, device: str | None = None) -> Engine:
    """Load the model and return its engine, ready for `submit`.

    `device` is "cpu" or "cuda"; None takes the GPU if one is visible (`CUDA_VISIBLE_DEVICES` is the caller's business,
    before the process starts). Raises `ModelLoadError`.
    """
    if spec.engine == "echo":
        from models.echo import EchoEngine

        return EchoEngine(spec)
    try:
        from models.transformers_engine import load_transformers_engine
    except ImportError as error:
        raise ModelLoadError(f"model {spec.name} needs the extra 'worker': {error}") from error
    return load_transformers_engine(spec, device)
