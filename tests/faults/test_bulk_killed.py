"""The client of a bulk run killed again and again: the same command goes on, and the files come out the same."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kit.invariants import Witness, check_output
from kit.systems import PATIENCE_SECONDS, System

LINES = 400
_LONGEST_SECONDS = 2.0


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Questions for the wide worker, one in fifty of which cannot be asked."""
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(_line(number)) + "\n" for number in range(LINES)))
    return path


@pytest.mark.parametrize("kills", [5, pytest.param(20, marks=pytest.mark.soak)])
def test_a_run_killed_again_and_again_ends_as_one_that_was_left_alone(
    system: System, source: Path, tmp_path: Path, kills: int
) -> None:
    """Each line once in output or errors, no half-written file under its final name, nothing billed twice."""
    system.start("wide", lease_seconds=10.0)
    chance, output = random.Random(4), tmp_path / "out.jsonl"
    with Witness(system) as witness:
        for _ in range(kills):
            run = _start(system, source, output)
            try:
                run.wait(chance.uniform(0.3, _LONGEST_SECONDS))
                break
            except subprocess.TimeoutExpired:
                run.kill()
                run.wait()
                assert not output.exists()
        assert _start(system, source, output).wait(PATIENCE_SECONDS) in {0, 3}
        undisturbed = tmp_path / "undisturbed.jsonl"
        assert _start(system, source, undisturbed).wait(PATIENCE_SECONDS) == 3
        witness.check()

    check_output(output, tmp_path / "out.errors.jsonl", [f"line {n}" for n in range(LINES)])
    assert _answers(output) == _answers(undisturbed)


# == helpers =====================================================================================================


def _line(number: int) -> dict[str, Any]:
    body = {"model": "wide", "messages": [{"role": "user", "content": f"{number:050d}"}]}
    if number % 50 == 0:
        body["max_tokens"] = 0
    return {"custom_id": f"line {number}", "method": "POST", "url": "/v1/chat/completions", "body": body}


def _start(system: System, source: Path, output: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "headrace", "run", str(source), "-o", str(output)],
        env=os.environ | system.settings.environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def _answers(output: Path) -> list[tuple[str, str]]:
    """In the order of the file."""
    lines = [json.loads(line) for line in output.read_bytes().splitlines()]
    return [(one["custom_id"], one["response"]["body"]["choices"][0]["message"]["content"]) for one in lines]
