"""One engine, one workload, in this process: `python -m benchmarks.engine.run_one --engine headrace --width 16`.

Prints one JSON object on the last line of stdout. Loading and a short warm-up lie outside the time that is measured.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.engine.contestants import CONTESTANTS
from benchmarks.engine.model import FULL, SMALL
from benchmarks.engine.serving import Setup
from benchmarks.engine.workloads import WORKLOADS

THREADS = 2


def main() -> None:
    """Run it in the engine's own interpreter: another one cannot import it."""
    chosen = _options().parse_args()
    setup = Setup(_folder(chosen), chosen.precision, chosen.width, THREADS, reuse=chosen.reuse)
    began = time.perf_counter()
    serving = CONTESTANTS[chosen.engine].load(setup)
    load_seconds = time.perf_counter() - began
    figures = WORKLOADS[chosen.workload](serving, setup, quick=chosen.quick)
    record = {
        "workload": chosen.workload,
        "engine": chosen.engine,
        "precision": chosen.precision,
        "width": chosen.width,
        "reuse": chosen.reuse,
        "version": serving.version,
        "load_seconds": round(load_seconds, 2),
        **figures,
    }
    sys.stdout.write(f"\n{json.dumps(record)}\n")


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engine.run_one")
    parser.add_argument("--engine", choices=CONTESTANTS, default="headrace")
    parser.add_argument("--workload", choices=WORKLOADS, default="mixed")
    parser.add_argument("--precision", choices=("bf16", "fp16", "fp32", "int8"), default="bf16")
    parser.add_argument("--width", type=int, default=16, help="rows computed together")
    parser.add_argument("--reuse", action="store_true", help="let requests share cached keys and values")
    parser.add_argument("--quick", action="store_true", help="a small model and few requests")
    parser.add_argument("--model", type=Path, help="the model's folder; by default the random one, made on first use")
    return parser


def _folder(chosen: Any) -> Path:
    if chosen.model:
        return Path(chosen.model)
    from benchmarks.engine.model import make

    return make(SMALL if chosen.quick else FULL)


if __name__ == "__main__":
    main()
