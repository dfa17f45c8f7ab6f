"""From a spec to a model on its device: weights from safetensors only, and no code from the model's repository."""

import logging
import os
from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from models.catalog import ModelSpec
from models.prompt import PromptFormat
from models.protocol import ModelLoadError

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_device(device: str | None) -> str:
    """What was asked for, else the GPU if one is visible."""
    return device or ("cuda" if torch.cuda.is_available() else "cpu")


def load_model(spec: ModelSpec, device: str) -> PreTrainedModel:
    """The model, ready to run. Raises `ModelLoadError` with the model's name and the reason."""
    if device == "cpu":
        torch.set_num_threads(spec.cpu_threads or _all_cores_but_one())
    elif spec.quantization == "int8-onednn":
        raise ModelLoadError(f"model {spec.name}: quantization int8-onednn runs on a CPU only, not on {device}")
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    loaded: Any
    try:
        loaded = AutoModelForCausalLM.from_pretrained(
            str(spec.path),
            revision=spec.revision,
            dtype=_DTYPES.get(spec.dtype, "auto"),
            quantization_config=_QUANTIZATIONS[spec.quantization](spec),
            device_map={"": device},
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, ImportError, KeyError, TypeError) as error:
        raise ModelLoadError(f"model {spec.name} cannot be loaded from {spec.path}: {error}") from error
    model: PreTrainedModel = loaded[0]
    report: dict[str, Any] = loaded[1]
    if report["missing_keys"]:  # transformers would go on with random weights in their place
        missing = ", ".join(sorted(report["missing_keys"])[:3])
        raise ModelLoadError(f"model {spec.name} lacks {len(report['missing_keys'])} weights, such as {missing}")
    _refuse_unservable(spec, model)
    return model


def eos_token_ids(model: PreTrainedModel, prompt_format: PromptFormat) -> frozenset[int]:
    """Every token that ends an answer: checkpoints name them in three places, and not always the same ones."""
    named = (getattr(model.generation_config, "eos_token_id", None), model.config.get_text_config().eos_token_id)
    listed = (ids if isinstance(ids, list) else [ids] for ids in named if ids is not None)
    return frozenset(prompt_format.eos_token_ids).union(*listed)


def _all_cores_but_one() -> int:
    """That one is for the rest of the worker: torch's threads wait for the slowest of them at every operation.

    Measured with tiny-chat on 2 cores beside another busy process: 136 tokens/s with 2 threads, 1,237 with 1.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(torch.get_num_threads(), max(1, cores - 1))


def _refuse_unservable(spec: ModelSpec, model: PreTrainedModel) -> None:
    """The engine selects rows of a key-value cache; a model with another kind of memory would mix them up."""
    attends = model._supports_default_dynamic_cache()  # type: ignore[operator]  # noqa: SLF001  no public way to ask
    if model._is_stateful or not attends:  # noqa: SLF001
        raise ModelLoadError(f"model {spec.name}: {type(model).__name__} does not keep keys and values in a cache")


def _none(_spec: ModelSpec) -> None:
    """The weights as they are. On a CPU `models.fused` lays them out anew, and makes int8-onednn of them."""


def _int8(_spec: ModelSpec) -> BitsAndBytesConfig:
    """LLM.int8() (Dettmers et al. 2022): 8-bit linear layers, outlier columns in 16 bits."""
    _quiet_bitsandbytes()
    return _config(load_in_8bit=True)


def _nf4(spec: ModelSpec) -> BitsAndBytesConfig:
    """4-bit NormalFloat (QLoRA, Dettmers et al. 2023), its scales quantized too; computes in the model's own type."""
    _quiet_bitsandbytes()
    return _config(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=_DTYPES.get(spec.dtype, torch.bfloat16),
    )


_QUANTIZATIONS: dict[str, Callable[[ModelSpec], BitsAndBytesConfig | None]] = {
    "none": _none,
    "int8-onednn": _none,
    "int8": _int8,
    "nf4": _nf4,
}


def _config(**options: Any) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(**options)  # type: ignore[no-untyped-call]


def _quiet_bitsandbytes() -> None:
    """It says once a layer that int8 computes in float16."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
