"""`python -m benchmarks [NAME ...] [--quick]`: run the named benchmarks and print their tables."""

import argparse
import sys
from pathlib import Path

from benchmarks import bulk, gateway, hostile, interactive, quality
from benchmarks.engine.measure import measure as measure_engine

STACK = {
    "bulk": bulk.measure,
    "interactive": interactive.measure,
    "gateway": gateway.measure,
    "hostile": hostile.measure,
}
"""Those that run when none is named."""


def main() -> int:
    """Returns 0 if every promise holds, 1 otherwise."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks")
    names = (*STACK, "engine", "quality")
    parser.add_argument("names", nargs="*", help=f"one or more of {', '.join(names)}; {', '.join(STACK)} if none")
    parser.add_argument("--quick", action="store_true", help="less of everything, nothing recorded")
    parser.add_argument("--rounds", type=int, help="engine: how often each engine is measured (3)")
    parser.add_argument("--width", type=int, help="engine: rows, instead of the best of 16, 24 and 32")
    parser.add_argument("--lock", type=Path, help="engine, quality: a file to hold during each run")
    options = parser.parse_args()
    unknown = set(options.names) - set(names)
    if unknown:
        parser.error(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    held = [_measure(name, options) for name in options.names or STACK]
    return 0 if all(held) else 1


def _measure(name: str, options: argparse.Namespace) -> bool:
    if name == "engine":
        return measure_engine(quick=options.quick, rounds=options.rounds, only_width=options.width, lock=options.lock)
    if name == "quality":
        return quality.measure(quick=options.quick, lock=options.lock)
    return STACK[name](quick=options.quick)


if __name__ == "__main__":
    sys.exit(main())
