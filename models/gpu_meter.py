"""How busy a GPU is and how full, as its driver says through NVML. Needs `nvidia-ml-py`; without it nothing is told."""

import logging
from importlib import import_module
from typing import Any

from models.protocol import GpuLoad

log = logging.getLogger(__name__)


class GpuMeter:
    """Of one GPU. A look takes no part in what the GPU does: it answers while a kernel hangs, too."""

    def __init__(self, uuid: str, name: str) -> None:
        """`uuid` as torch has it, for an index means another GPU to the driver than to us."""
        self._name = name
        self._nvml: Any = None
        try:
            nvml = import_module("pynvml")
            nvml.nvmlInit()
            self._handle = nvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")
            self._nvml = nvml
        except Exception as error:  # noqa: BLE001 - no package, no driver, another driver: a model runs without figures
            log.warning("nothing is told of the GPU: %s", error)

    def look(self) -> GpuLoad | None:
        """As it is now; None if that cannot be known."""
        if self._nvml is None:
            return None
        try:
            memory = self._nvml.nvmlDeviceGetMemoryInfo(self._handle)
        except self._nvml.NVMLError as error:
            log.warning("the GPU's driver does not tell of it: %s", error)
            return None
        return GpuLoad(self._name, self._utilization(), int(memory.used), int(memory.total))

    def _utilization(self) -> float | None:
        try:
            return float(self._nvml.nvmlDeviceGetUtilizationRates(self._handle).gpu) / 100
        except self._nvml.NVMLError:  # a part of a GPU (MIG) does not know
            return None
