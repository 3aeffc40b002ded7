"""What runs: Dagster definitions, the streaming process, the local processes, the command line and the demo."""
