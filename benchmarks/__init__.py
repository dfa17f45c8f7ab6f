"""Measurements. Each compares both sides in one run and writes `benchmarks/results/NAME.json`."""
