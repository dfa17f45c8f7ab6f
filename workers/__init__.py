"""Processes that serve one model: supervisor, Celery consumer, engine host, leases, sweeper."""
