"""Lineages of an index beside each other: where the delta of one begins, whether its streams should run, and do.

Belongs here: two small files beside a delta's table, by which deployments of different code agree without knowing each
other, and how far a pair of base and delta has come. Which code feeds what is the streaming process's; moving the
pointer is ``versions``'.

``_lineage.json`` is an order, to whoever feeds this lineage: go on, or stop. ``_feeding.json`` is written again and
again by whoever does.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from pipelines.errors import TidemarkError
from pipelines.indexing import delta
from pipelines.indexing import position as positions
from pipelines.indexing.base import Manifest
from pipelines.indexing.files import replace_text
from pipelines.indexing.position import EMPTY, Position

ORDER, FEEDING = "_lineage.json", "_feeding.json"
FED_WITHIN_S = 20.0
"""Who has not said for so long that it feeds a lineage does not."""
POLL_S = 0.2


class NotCaughtUp(TidemarkError):
    """The base and delta of one lineage do not hold yet what those of another do."""


class Order(NamedTuple):
    """What is asked of a lineage's streams.

    Attributes:
        is_ended: They should not run: another lineage has taken over.
        catch_up_to: They were begun again after an end: until here the answers are stale.
    """

    is_ended: bool = False
    catch_up_to: Position = EMPTY


class Feeding(NamedTuple):
    """Who feeds a lineage: the process's name for people, its code's folder, and when it said so (s since 1970)."""

    name: str
    code: str
    at: float


def order(path: Path) -> Order:
    """What is asked of the streams of a lineage, whose delta lies at ``path``; without an order they run."""
    found = _read(path / ORDER)
    return Order(bool(found.get("is_ended")), positions.from_json(found["catch_up_to"])) if found else Order()


def end(path: Path) -> None:
    """Its streams stop, wherever they run, and what it serves is stale from now on."""
    _order(path, Order(is_ended=True))


def reopen(path: Path, catch_up_to: Position) -> None:
    """Its streams may run again; they begin where they had committed, and it is stale until they have caught up."""
    _order(path, Order(False, catch_up_to))


def _order(path: Path, given: Order) -> None:
    said = {"is_ended": given.is_ended, "catch_up_to": given.catch_up_to.to_json()}
    replace_text(path / ORDER, json.dumps(said))


def begin_at(path: Path, cut: Position) -> bool:
    """Let the delta of a new lineage begin at the cut of its first base, and not at Kafka's earliest record.

    Returns:
        Whether it does; False where the delta has begun already, which reaches further back.
    """
    if (path / delta.FLOOR).exists() or (path / "_delta_log").exists():
        return False
    replace_text(path / delta.FLOOR, Position(cut.topics).to_text())
    return True


def say_feeding(path: Path, name: str, code: Path) -> None:
    """Say that this process feeds a lineage; to be said again within ``FED_WITHIN_S``."""
    replace_text(path / FEEDING, json.dumps(Feeding(name, str(code), time.time())._asdict()))


def feeding(path: Path) -> Feeding | None:
    """Who feeds a lineage now; None: nobody."""
    try:
        found = Feeding(**_read(path / FEEDING))
    except TypeError:
        return None
    return found if time.time() - found.at < FED_WITHIN_S else None


class Progress:
    """How far base and delta of a lineage have come together; reads only what the delta's log has new."""

    def __init__(self, path: Path, cut: Position) -> None:
        self._ends = delta.Ends(path)
        self._cut = cut

    def position(self) -> Position:
        """The position up to which the pair holds everything."""
        return self._cut.merge(self._ends.position())


def progress(deltas: Path, manifest: Manifest) -> Progress:
    """The progress of a base and the delta of its lineage."""
    return Progress(delta.table_path(deltas, manifest.index, manifest.lineage), manifest.cut)


def await_caught_up(
    deltas: Path,
    served: Manifest,
    candidate: Manifest,
    timeout_s: float,
    report: Callable[[Position, Position], None] = lambda has, wanted: None,
) -> Position:
    """Return when a candidate's base and delta hold what the served pair holds at the moment of the call.

    Returns:
        The position that both cover.

    Raises:
        NotCaughtUp: they did not in time, nobody feeds the candidate although the served one is fed, or the
            candidate's delta does not reach back to the cut of its base.
    """
    mine = delta.table_path(deltas, candidate.index, candidate.lineage)
    where = f"index {candidate.index}, lineage {candidate.lineage}"
    remedy = f"`tidemark lineage start {candidate.index}` builds it, feeds it and waits"
    if not candidate.cut.covers(delta.floor(mine)):
        raise NotCaughtUp(
            f"the delta begins after the cut of {candidate.version}", where=where, remedy="build a newer base"
        )
    wanted = progress(deltas, served).position()
    followed = progress(deltas, candidate)
    deadline = time.monotonic() + timeout_s
    while not (has := followed.position()).covers(wanted):
        report(has, wanted)
        if time.monotonic() > deadline:
            raise NotCaughtUp(
                f"{candidate.version} has come to {has.to_text()}; {served.version}, which is served, has"
                f" {wanted.to_text()}",
                where=where,
                remedy=remedy,
            )
        time.sleep(POLL_S)
    # A base may hold all of it by itself, while its streams are still being started.
    while feeding(delta.table_path(deltas, served.index, served.lineage)) and feeding(mine) is None:
        if time.monotonic() > deadline:
            raise NotCaughtUp("nobody feeds it, so that answers would grow old", where=where, remedy=remedy)
        time.sleep(POLL_S)
    return wanted


def require_succession(deltas: Path, served: Manifest | None, candidate: Manifest) -> None:
    """A build by itself changes the lineage only where no stream is about that freshness could be lost with.

    Raises:
        NotCaughtUp: the candidate is of another lineage than what is served, and that is fed, or holds more.
    """
    if served is None or served.lineage == candidate.lineage:
        return
    if (found := feeding(delta.table_path(deltas, served.index, served.lineage))) is not None:
        raise NotCaughtUp(
            f"{candidate.version} is of a new lineage; {found.name} feeds the one that is served",
            where=f"index {candidate.index}",
            remedy=f"run `tidemark lineage start {candidate.index}`, then `tidemark lineage publish {candidate.index}`",
        )
    await_caught_up(deltas, served, candidate, 0.0)


def of_index(deltas: Path, index: str) -> list[str]:
    """The lineages of an index that have a delta."""
    return sorted(path.name for path in (deltas / index).glob("*") if path.is_dir())


def end_others(deltas: Path, served: Manifest) -> list[str]:
    """The streams of every other lineage of an index stop; gives those lineages that had not ended."""
    ended = []
    for lineage in of_index(deltas, served.index):
        path = delta.table_path(deltas, served.index, lineage)
        if lineage != served.lineage and not order(path).is_ended:
            end(path)
            ended.append(lineage)
    if order(delta.table_path(deltas, served.index, served.lineage)).is_ended:
        reopen(delta.table_path(deltas, served.index, served.lineage), EMPTY)
    return ended


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
