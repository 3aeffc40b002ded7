"""Named places where a test can kill the process, to see what is left behind and what a restart makes of it.

Belongs here: the one function. It is shipped and off; TIDEMARK_FAILPOINT=name (or name:3, for the third time that the
process comes by) switches one place on. A place is named after the module and what has just been done.
"""

from __future__ import annotations

import itertools
import os
import signal

VARIABLE = "TIDEMARK_FAILPOINT"

_passed = itertools.count(1)


def hit(name: str) -> None:
    """Die here, at once and without cleaning up, if this is the place that the environment names."""
    chosen = os.environ.get(VARIABLE)
    if not chosen:
        return
    wanted, _, nth = chosen.partition(":")
    if name == wanted and next(_passed) == int(nth or 1):
        os.kill(os.getpid(), signal.SIGKILL)
