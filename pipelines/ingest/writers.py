"""Turns of the writers of raw tables: any number may append at once; who takes a table back has it alone.

Belongs here: the lock. A commit says what the whole table holds (`lake.bringing`), worked out before it is made: were a
table rolled back in between, the commit would claim records that are gone, and nobody would bring them again.
"""

from __future__ import annotations

import contextlib
import fcntl
import time
from collections.abc import Iterator

from pipelines.errors import TidemarkError
from pipelines.settings import Settings

_POLL_S = 0.2


class WriterBusy(TidemarkError):
    """A raw table is being written."""


@contextlib.contextmanager
def appending(settings: Settings) -> Iterator[None]:
    """Beside others that append; waits while a table is being taken back."""
    with _locked(settings, fcntl.LOCK_SH, None):
        yield


@contextlib.contextmanager
def alone(settings: Settings, timeout_s: float = 60.0) -> Iterator[None]:
    """While nobody appends.

    Raises:
        WriterBusy: Somebody still did when the time was over.
    """
    with _locked(settings, fcntl.LOCK_EX, timeout_s):
        yield


@contextlib.contextmanager
def _locked(settings: Settings, kind: int, timeout_s: float | None) -> Iterator[None]:
    path = settings.paths.run / "raw.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    with path.open("w") as file:
        while True:
            try:
                fcntl.flock(file, kind | (0 if deadline is None else fcntl.LOCK_NB))
                break
            except BlockingIOError:
                if deadline is not None and time.monotonic() > deadline:
                    raise WriterBusy(
                        f"a load or the archive has been writing for {timeout_s:.0f} s",
                        where=str(path),
                        remedy="wait until the load has ended, or `tidemark stop archive`, then try again",
                    ) from None
                time.sleep(_POLL_S)
        yield
