"""Tools that others measure and test with, where they are installed: `make test-clients` sees to that."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from kit.gateways import RunningGateway

REPOSITORY = Path(__file__).parents[3]
SCRIPTS = REPOSITORY / "tests" / "clients"
# One environment for each, named after the file of its requirements.
FOLDER = Path(os.environ.get("CLIENTS_FOLDER", REPOSITORY / ".clients"))


def run(environment: str, program: str, *arguments: str, cwd: Path, **variables: str) -> None:
    """A program of that environment, which must exit with 0."""
    command = [str(FOLDER / environment / "bin" / program), *arguments]
    if not Path(command[0]).exists():
        pytest.skip(f"{environment} is not installed: make test-clients")
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        command, cwd=cwd, env=own | variables, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-10_000:]


def test_inspect(gateway: RunningGateway, tmp_path: Path) -> None:
    """Evaluates in the background, and in batches, and finds every answer right."""
    run("inspect", "python", str(SCRIPTS / "inspect_client.py"), f"{gateway.url}/v1", gateway.key()[1], cwd=tmp_path)


def test_lm_eval(gateway: RunningGateway, tmp_path: Path) -> None:
    """Takes the more likely answer for the right one, and the one that is written too."""
    script, model = str(SCRIPTS / "lm_eval_client.py"), str(REPOSITORY / "examples" / "tiny-chat")
    arguments = [script, f"{gateway.url}/v1", gateway.key()[1], model]
    run("lm-eval", "python", *arguments, cwd=tmp_path, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "hub"))


def test_schemathesis(gateway: RunningGateway, tmp_path: Path) -> None:
    """Finds no fault of the gateway's, whatever it makes of the OpenAPI document."""
    arguments = ["run", f"{gateway.url}/openapi.json", "--header", f"Authorization: Bearer {gateway.key()[1]}"]
    arguments += ["--checks", "not_a_server_error", "--max-examples", "40", "--generation-deterministic"]
    run("schemathesis", "st", *arguments, cwd=tmp_path, SCHEMATHESIS_HOOKS=str(SCRIPTS / "schemathesis_hooks.py"))
