"""Bulk: a JSONL file through a running stack to an output file, against one Celery task and one commit a job.

Ours: `headrace run` in this process, echo engine, from the start of the command to the renamed output file; rows,
results, ledger and attempts are committed. Theirs: `apply_async` for each line, the row committed by its task, every
row read back and written to a file. The faster of Celery's pools (threads, prefork) counts.
"""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from uuid import uuid4

import orjson
import psycopg

from benchmarks import record
from benchmarks.record import Comparison, Promise
from benchmarks.systems import PlainCelery, headrace_stack, servers
from headrace.servers import Servers
from producer.bulk import BulkOptions, BulkRun
from producer.client import Producer

PROMISE = Promise("bulk throughput at least 5 times plain Celery's", at_least=5.0)
_QUESTIONS = Path(__file__).resolve().parents[2] / "shared" / "data" / "gsm8k_train.jsonl"
_THREADS = 72  # as in every measurement so far; a Headrace worker for echo had as many at first
_POLL_SECONDS = 0.02
_POOLS = {"threads": _THREADS, "prefork": 2}


def measure(*, quick: bool) -> bool:
    """Interleaved rounds; returns whether the promise held."""
    prompts = questions(1000 if quick else None)
    rounds = 1 if quick else 5
    rates: dict[str, list[float]] = {"headrace": [], **{f"celery {pool}": [] for pool in _POOLS}}
    gc.freeze()  # as `headrace run` does; it spares both sides' client the same
    with servers() as running:
        for _ in range(rounds):
            rates["headrace"].append(_headrace(running, prompts))
            for pool, concurrency in _POOLS.items():
                rates[f"celery {pool}"].append(_celery(PlainCelery(running, pool, concurrency), prompts))
    best = [max(pair) for pair in zip(*(rates[f"celery {pool}"] for pool in _POOLS), strict=True)]
    comparison = Comparison(rates["headrace"], best, "jobs/s")
    if not quick:
        record.write("bulk", {"jobs": len(prompts), "engine": "echo", "pools": _POOLS}, rates, comparison, PROMISE)
    return record.show(f"bulk, {len(prompts):,} jobs, jobs/s", rates, comparison, PROMISE)


def questions(limit: int | None) -> list[str]:
    """GSM8K's training questions if they are at hand, else made-up ones of like length (about 235 bytes)."""
    if _QUESTIONS.exists():
        lines = _QUESTIONS.read_bytes().splitlines()[:limit]
        return [orjson.loads(line)["question"] for line in lines]
    return [f"Question {number}: " + "how many are left then? " * 9 for number in range(limit or 7473)]


def _headrace(running: Servers, prompts: Sequence[str]) -> float:
    with headrace_stack(running) as settings, tempfile.TemporaryDirectory() as folder, Producer(settings) as producer:
        source, output = Path(folder, "in.jsonl"), Path(folder, "out.jsonl")
        source.write_bytes(b"".join(orjson.dumps({"question": p}, option=orjson.OPT_APPEND_NEWLINE) for p in prompts))
        options = BulkOptions(
            input=source,
            output=output,
            errors=None,
            model="echo",
            prompt_field="question",
            max_tokens=None,
            temperature=None,
            force=False,
        )
        started = time.perf_counter()
        run = BulkRun(producer, options)
        run.open()
        report = run.run(lambda _: None, lambda _: None)
        seconds = time.perf_counter() - started
        assert report.succeeded == len(prompts) == len(output.read_bytes().splitlines())
        return len(prompts) / seconds


def _celery(plain: PlainCelery, prompts: Sequence[str]) -> float:
    with plain.running(), tempfile.TemporaryDirectory() as folder:
        from benchmarks.plain_celery import bulk

        started = time.perf_counter()
        for prompt in prompts:
            bulk.apply_async((str(uuid4()), prompt))
        written = _read_back(plain, len(prompts), Path(folder, "out.jsonl"))
        seconds = time.perf_counter() - started
        assert written == len(prompts)
        return len(prompts) / seconds


def _read_back(plain: PlainCelery, rows: int, output: Path) -> int:
    with psycopg.connect(plain.database_url, autocommit=True) as connection, output.open("wb") as file:
        while connection.execute("SELECT count(*) FROM plain_jobs").fetchone() != (rows,):
            time.sleep(_POLL_SECONDS)
        found = connection.execute("SELECT id, answer FROM plain_jobs").fetchall()
        file.writelines(orjson.dumps({"id": i, "answer": a}, option=orjson.OPT_APPEND_NEWLINE) for i, a in found)
    return len(found)
