"""OpenAI's client for Node, unchanged, where it is installed: `make test-clients` sees to that."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from kit.gateways import RunningGateway

SCRIPT = Path(__file__).parents[2] / "clients" / "node_client.mjs"
# A folder with the client's `node_modules`.
FOLDER = Path(os.environ.get("NODE_CLIENT_FOLDER", SCRIPT.parents[2] / ".clients"))


def test_the_node_client(gateway: RunningGateway, tmp_path: Path) -> None:
    """Background, streams that are resumed, conversations, batches and errors."""
    if shutil.which("node") is None or not (FOLDER / "node_modules" / "openai").is_dir():
        pytest.skip("node, or its openai package, is not installed: make test-clients")
    (tmp_path / "node_modules").symlink_to(FOLDER / "node_modules")
    script = shutil.copy(SCRIPT, tmp_path)
    done = subprocess.run(
        ["node", script, f"{gateway.url}/v1", gateway.key()[1]],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
