"""Benchmarks, one module each: `make bench NAME=freshness`. Each checks the answers that it times.

The last line that a benchmark prints is one JSON object: what was measured, and on what machine.
"""
