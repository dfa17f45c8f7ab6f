"""What the parts of `models` load, in a fresh interpreter."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize("module", ["catalog", "prompt", "protocol", "client", "wire", "echo", "server", "screening"])
def test_no_torch_without_a_model(module: str) -> None:
    """Everything but the engine of real models loads neither torch nor transformers."""
    assert loaded_by(f"models.{module}", "torch", "transformers", "celery", "sqlalchemy") == []


@pytest.mark.parametrize("module", ["engine", "transformers_engine"])
def test_no_queue_in_the_engine(module: str) -> None:
    """The engine loads neither celery nor SQL, nor any other part of this project."""
    assert loaded_by(f"models.{module}", "celery", "sqlalchemy", "jobs", "workers", "producer", "headrace") == []


def loaded_by(module: str, *unwanted: str) -> list[str]:
    code = f"import sys, {module}; print(*[name for name in {unwanted} if name in sys.modules])"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return answer.stdout.split()
