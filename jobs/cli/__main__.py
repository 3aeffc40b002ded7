"""`python -m jobs.cli`: the same as `tidemark`."""

from jobs.cli import main

main()
