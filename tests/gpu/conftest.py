"""The models and requests of the unit tests, on a GPU."""

import pytest
import torch
from unit.models.conftest import ask, finish, tiny_model, tokenizer_folder

__all__ = ["ask", "finish", "tiny_model", "tokenizer_folder"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what lies in this folder where there is no GPU."""
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.path.parts:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
