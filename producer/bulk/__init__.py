"""Bulk offline generation: one JSONL file in, one JSONL file out, of any length.

    run = BulkRun(producer, BulkOptions(input=Path("in.jsonl"), output=Path("out.jsonl"), model="tiny-chat"))
    run.open()
    report = run.run(on_progress, serve)

The plot is in `run`; `reading` takes lines apart, `sidecar` ties the output file to its batch, `writing` hands over.
"""

from producer.bulk.errors import BulkError, BulkPaused, BulkRefused
from producer.bulk.options import BulkOptions
from producer.bulk.run import BulkProgress, BulkReport, BulkRun

__all__ = ["BulkError", "BulkOptions", "BulkPaused", "BulkProgress", "BulkRefused", "BulkReport", "BulkRun"]
