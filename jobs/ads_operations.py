"""Operating the ads index by hand: the base alone and back, and dropping stale keys; each whole, and safe to repeat.

Belongs here: which switches belong together, and their order. Does not belong here: what each switch does (the
repository's pauses, `jobs.controls`, `jobs.moves`).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from jobs import moves, processes
from jobs.controls import RUNNING, STOPPED, Controls
from pipelines.ads import backlog, bypass, publisher, repository
from pipelines.ads.index import ADS
from pipelines.ads.repository import Dropped
from pipelines.indexing import delta
from pipelines.indexing import position as positions
from pipelines.indexing.spec import lineage
from pipelines.indexing.versions import Pointer, VersionError, Versions
from pipelines.settings import Settings

SUBSCRIBERS = (publisher.SUBSCRIBER, bypass.SUBSCRIBER)


def serve_base_alone(settings: Settings, say: moves.Say = lambda text: None) -> Pointer:
    """Stop sending keys and what goes ahead, stop the streams, and serve the base that is served without its delta.

    The source is still written to the repository, and its changes are kept: `resume` loses nothing.

    Raises:
        VersionError: No base is served; nothing was changed.
        ProcessError: A stream did not stop.
        SwapFailed: A replica did not swap.
    """
    served = Versions(settings.paths.indices, ADS.name).pointer()
    if served is None:
        raise VersionError(
            "ads serves no base that could be served alone", remedy="`tidemark build ads` makes one"
        )
    with _writing(settings) as connection:
        for name in SUBSCRIBERS:
            repository.pause(connection, name)
    _switch(settings, STOPPED)
    if not served.with_delta:
        return served
    return moves.rollback(settings, ADS.name, served.version, without_delta=True, say=say)


def resume(settings: Settings, say: moves.Say = lambda text: None) -> Pointer | None:
    """Send keys again from where it stopped, start the streams, and serve the delta again; None: no base is served.

    Raises:
        ProcessError: A stream did not start.
        SwapFailed: A replica did not swap.
    """
    with _writing(settings) as connection:
        for name in SUBSCRIBERS:
            repository.unpause(connection, name)
    _switch(settings, RUNNING)
    is_served = Versions(settings.paths.indices, ADS.name).pointer() is not None
    return moves.resume(settings, ADS.name, say) if is_served else None


def drop_stale(settings: Settings, age_s: float, *, is_dry: bool = False) -> list[Dropped]:
    """Drop the keys that are older and that the streams have not taken; they are stopped meanwhile.

    Returns:
        What was dropped, or would be.

    Raises:
        BrokerError: The broker cannot be reached.
        ProcessError: A stream did not stop, or did not start again.
    """
    now_ms = time.time_ns() // 1_000_000
    before_ms = now_ms - round(1000 * age_s)
    if is_dry:
        found = backlog.stale(settings, before_ms, _taken(settings))
        return [Dropped(now_ms, one.topic, backlog.STALE, one.keys) for one in found if one.keys]
    board = Controls(settings.paths.run)
    running = [name for name in ADS.streams if board.should_run(name)]
    _switch(settings, STOPPED, running)
    store = repository.opened(settings)
    try:
        return backlog.drop(settings, store, backlog.stale(settings, before_ms, _taken(settings)))
    finally:
        store.close()
        _switch(settings, RUNNING, running)


def _taken(settings: Settings) -> positions.Position:
    return delta.Ends(delta.table_path(settings.paths.delta, ADS.name, lineage(ADS))).position()


def _switch(settings: Settings, state: str, names: tuple[str, ...] | list[str] = tuple(ADS.streams)) -> None:
    """Ask for streams to run or to stop, and wait until they do, if their process runs."""
    board = Controls(settings.paths.run)
    for name in names:
        board.ask(name, state)
    for name in names if board.status() else ():
        if not board.await_state(name, state):
            found = board.status().get(name, {})
            raise processes.ProcessError(
                f"{name} was asked to be {state}, and is {found.get('state', 'silent')}: {found.get('detail', '')}",
                where=str(settings.paths.logs / "streams.log"),
                remedy="it is tried again by itself; see `tidemark status`, then repeat this",
            )


@contextmanager
def _writing(settings: Settings) -> Iterator[repository.Connection]:
    store = repository.opened(settings)
    try:
        with store.writing() as connection:
            yield connection
    finally:
        store.close()
