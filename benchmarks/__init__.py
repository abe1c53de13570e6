"""Measurements that justify a choice in the code: each a module to run, `python -m benchmarks.NAME`."""
