"""What is computed: transforms on Spark DataFrames and Arrow tables, with no orchestration in them.

Belongs here: everything that could run without Dagster. Does not belong here: assets, checks, schedules, the
command line (see `assets/`, `quality/`, `jobs/`).
"""
