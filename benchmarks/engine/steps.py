"""`python -m benchmarks.engine.steps`: CPU milliseconds of single steps, on one thread.

Counted by the thread's own clock, best of some: it does not see neighbours, so it can be compared on a shared machine.
"""

import argparse
import time
from collections.abc import Callable, Sequence

from benchmarks.engine.mixed import FIRST_WORD
from benchmarks.engine.model import FULL, make
from benchmarks.engine.serving import Setup
from benchmarks.engine.serving.headrace import load
from models.blocks import Lease
from models.rows import Advance
from models.runner import _row
from models.scheduler import Work

CONTEXT = 300  # tokens of a decoding row


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engine.steps")
    parser.add_argument("--precision", choices=("bf16", "int8"), default=("bf16", "int8"), nargs="*")
    parser.add_argument("--rows", type=int, default=24, help="that decode")
    parser.add_argument("--tokens", type=int, default=256, help="of a prompt's chunk")
    parser.add_argument("--repeats", type=int, default=8)
    chosen = parser.parse_args()
    for precision in chosen.precision:
        engine = load(Setup(make(FULL), precision, chosen.rows, threads=1, reuse=False)).engine
        run = engine._runner.run  # type: ignore[attr-defined]
        for tensor in (*engine._pool.keys, *engine._pool.values):  # type: ignore[attr-defined]
            tensor.fill_(0.01)  # Linux has one page for all memory that was never written, and it stays in the cache
        rows = [_work(engine, CONTEXT) for _ in range(chosen.rows)]
        decode = best(lambda works=rows, run=run: run(works), chosen.repeats)
        prompt = _work(engine, chosen.tokens)
        prefill = best(lambda row=prompt.row, run=run: run([Work(row, 0, chosen.tokens)]), chosen.repeats)
        timing = best(lambda rows=rows, engine=engine: _account(engine, rows), chosen.repeats)
        print(f"{precision}: {chosen.rows} rows {decode:.1f} ms, {chosen.tokens} tokens {prefill:.1f} ms")
        print(f"  timing of the {chosen.rows} rows takes {timing:.3f} ms, {timing / decode:.3%} of their step")


def _work(engine: object, tokens: int) -> Work:
    """A row of so many tokens of which the last one is to be computed."""
    row = _row([FIRST_WORD + at for at in range(tokens)])
    row.lease = Lease("steps")
    engine._blocks.grow(row.lease, tokens)  # type: ignore[attr-defined]
    return Work(row, tokens - 1, 1)


def _account(engine: object, works: Sequence[Work]) -> None:
    """What a step does beside its work so that each request has its times and its share of busy seconds."""
    began = time.monotonic()
    advances = [Advance(work.row, work.tokens) for work in works]
    for _ in advances:  # around its detokenization
        time.monotonic()
        time.monotonic()
    engine._split(time.monotonic() - began, advances)  # type: ignore[attr-defined]


def best(run: Callable[[], object], repeats: int) -> float:
    """CPU milliseconds of this thread."""
    times: Sequence[float] = [_timed(run) for _ in range(repeats)]
    return 1e3 * min(times)


def _timed(run: Callable[[], object]) -> float:
    began = time.thread_time()
    run()
    return time.thread_time() - began


if __name__ == "__main__":
    main()
