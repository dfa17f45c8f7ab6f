"""The engine against what a user would pick instead: same model, same requests, same two threads.

model.py        the random model that every engine loads
workloads.py    what is asked of it
contestants.py  who is measured: name, environment, precisions, widths
serving/        one file for each engine: load, serve
run_one.py      one engine, one workload, in a process of its own
roofline.py     what the processor could do at best
peers.py        the environments of the other engines
measure.py      interleaved rounds, medians, ratios, promises, results/engine.json
"""
