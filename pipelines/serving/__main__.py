"""`python -m pipelines.serving`: one process that follows the indices and answers over HTTP until it is stopped."""

from __future__ import annotations

import os

for _threads in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(
        _threads, "1"
    )  # before numpy is loaded: a small solve is not worth waking other cores for

import sys  # noqa: E402

import uvicorn  # noqa: E402

from pipelines import indices, interpreter, logs, settings  # noqa: E402
from pipelines.errors import TidemarkError  # noqa: E402
from pipelines.serving import bypass  # noqa: E402
from pipelines.serving.app import create_app  # noqa: E402


def main() -> int:
    """Run; the exit status."""
    logs.configure("serving")
    interpreter.take_turns()  # while one thread folds an epoch, the one that answers must get its turn
    try:
        configured = settings.load()
        replica = bypass.under_entries(indices.replica(configured), configured)
        app = create_app(configured, replica)
    except TidemarkError as error:
        print(error, file=sys.stderr)
        return 1
    replica.start()
    interpreter.collect_rarely()
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            host=configured.serving.host,
            port=configured.serving.port,
            loop="uvloop",
            http="httptools",
            ws="none",
            lifespan="off",
            access_log=False,
            log_config=None,
            log_level="warning",
            server_header=False,
            date_header=False,
            timeout_graceful_shutdown=5,
        )
    )
    try:
        server.run()
    finally:
        replica.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
