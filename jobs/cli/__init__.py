"""The command line, `tidemark`.

Here: commands, their help, and what they print; a module for each kind of command. What a command does is elsewhere,
and is imported when the command runs, so that help is quick. Errors are one text and exit code 1, wrong usage is exit
code 2, and nothing is ever answered with a stack trace (it is in the log `cli.log`, or on screen with
TIDEMARK_DEBUG=1).
"""

from __future__ import annotations

import os
import sys

from jobs import console
from jobs.cli.shared import app, load_settings
from pipelines.errors import TidemarkError

# Each adds its commands to the help, in this order.
# isort: off
import jobs.cli.processes
import jobs.cli.bases
import jobs.cli.lineages
import jobs.cli.answers
import jobs.cli.data
import jobs.cli.ads_dump
import jobs.cli.contracts
import jobs.cli.sequences
import jobs.cli.patterns
import jobs.cli.ads
import jobs.cli.ads_freshness
import jobs.cli.ads_care
import jobs.cli.replays
import jobs.cli.upkeep
import jobs.cli.seeing
import jobs.cli.exploring
import jobs.cli.quality
import jobs.cli.repair
import jobs.cli.trying  # noqa: F401
# isort: on


def main() -> None:
    """The entry point: runs a command, and turns what goes wrong into one text and an exit code."""
    as_json = "--json" in sys.argv[1:]
    try:
        app()
    except TidemarkError as error:
        console.show_error(error, as_json)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115 - what is left of the output has no reader
        raise SystemExit(0) from None
    except Exception as error:  # a person gets a sentence; the trace goes to the log
        if os.environ.get("TIDEMARK_DEBUG"):
            raise
        console.show_error(error, as_json)
        _log_trace()
    else:
        return
    raise SystemExit(1)


def _log_trace() -> None:
    import contextlib
    import logging
    from logging.handlers import RotatingFileHandler

    from pipelines import logs

    with contextlib.suppress(Exception):
        path = load_settings().paths.logs / "cli.log"
        path.parent.mkdir(parents=True, exist_ok=True)
        handler = RotatingFileHandler(path, maxBytes=2**20, backupCount=1)
        handler.setFormatter(logs.JsonLines("cli"))
        log = logging.getLogger("cli")
        log.addHandler(handler)
        log.propagate = False
        log.error("$ %s", " ".join(sys.argv), exc_info=True)
        print(f"the whole trace is in {path}", file=sys.stderr)
