"""`python -m benchmarks [NAME ...] [--quick]`: run the named benchmarks, or all, and print their tables."""

import argparse
import sys

from benchmarks import bulk, interactive

BENCHMARKS = {"bulk": bulk.measure, "interactive": interactive.measure}


def main() -> int:
    """Returns 0 if every promised ratio holds, 1 otherwise."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks")
    parser.add_argument("names", nargs="*", help=f"one or more of {', '.join(BENCHMARKS)}; all if none")
    parser.add_argument("--quick", action="store_true", help="fewer jobs and rounds, nothing recorded")
    options = parser.parse_args()
    unknown = set(options.names) - set(BENCHMARKS)
    if unknown:
        parser.error(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(BENCHMARKS)}")
    held = [BENCHMARKS[name](quick=options.quick) for name in options.names or BENCHMARKS]
    return 0 if all(held) else 1


if __name__ == "__main__":
    sys.exit(main())
