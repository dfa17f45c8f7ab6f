"""The client of a bulk run killed again and again: the same command goes on, and the files come out the same."""

from __future__ import annotations

import json
import random
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest

from kit.bulk import start_run, write_questions
from kit.invariants import Witness, check_output
from kit.systems import PATIENCE_SECONDS, System

LINES = 300
_LONGEST_SECONDS = 2.0


@pytest.mark.parametrize("kills", [5, pytest.param(20, marks=pytest.mark.soak)])
def test_a_run_killed_again_and_again_ends_as_one_that_was_left_alone(
    system: System, tmp_path: Path, kills: int
) -> None:
    """Each line once in output or errors, no half-written file under its final name, nothing billed twice."""
    system.start("wide", lease_seconds=10.0)
    chance, source, output = random.Random(4), tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    custom_ids = write_questions(source, "wide", LINES)
    with Witness(system) as witness:
        for _ in range(kills):
            run = start_run(system, source, output)
            with suppress(subprocess.TimeoutExpired):
                run.wait(chance.uniform(0.3, _LONGEST_SECONDS))
            run.kill()
            run.wait()
            if output.exists():
                break
        else:
            assert start_run(system, source, output).wait(PATIENCE_SECONDS) == 3
        check_output(output, tmp_path / "out.errors.jsonl", custom_ids)
        undisturbed = tmp_path / "undisturbed.jsonl"
        assert start_run(system, source, undisturbed).wait(PATIENCE_SECONDS) == 3
        witness.check()
    assert _answers(output) == _answers(undisturbed)


# == helpers =====================================================================================================


def _answers(output: Path) -> list[tuple[str, str]]:
    """In the order of the file."""
    lines = [json.loads(line) for line in output.read_bytes().splitlines()]
    return [(one["custom_id"], one["response"]["body"]["choices"][0]["message"]["content"]) for one in lines]
