"""How far each stream is behind its topics, and the sensor that tells Dagster.

Here: records and seconds behind, measured against the broker's ends, the state and the epoch, as observations of the
streams' assets. Not here: what a stream is (`assets.streams`), and keeping it going (`jobs.streams`). Whatever cannot
be asked (no broker, no streaming process) is said in the observation, and nothing fails.
"""

from __future__ import annotations

import functools
import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import dagster as dg

from assets import streams
from jobs.controls import Controls, beside
from pipelines.errors import TidemarkError
from pipelines.indexing.position import EMPTY, Position, meet_all, merge_all

if TYPE_CHECKING:
    from pipelines.indexing import delta
    from pipelines.settings import Settings

EVERY_S = 300
NOT_RUNNING = "not running"
_DATA_VERSION = "dagster/data_version"


class Lag(NamedTuple):
    """How a stream is doing.

    Attributes:
        stream: Its name.
        state: As the streaming process says: running, stopped, failing, …; `not running` without one.
        epoch: The newest that it reports.
        position: Up to where everything is committed, in every delta that it feeds.
        records_behind: How many records its topics have after that; None: the broker could not be asked.
        seconds_behind: The age of the oldest of them; 0 where there is none.
        missing: What could not be asked, or what the stream lacks.
    """

    stream: str
    state: str
    epoch: int | None
    position: Position
    records_behind: int | None = None
    seconds_behind: float | None = None
    missing: str = ""

    def metadata(self) -> dict[str, Any]:
        """For an asset's observation; what is not known is left out, so that Dagster plots the rest."""
        found = {
            "state": self.state,
            "epoch": self.epoch,
            "records_behind": self.records_behind,
            "seconds_behind": self.seconds_behind,
            "position": dg.JsonMetadataValue(self.position.to_json()["topics"]),
            "missing": self.missing or None,
        }
        return {name: value for name, value in found.items() if value is not None}


def lags(settings: Settings) -> list[Lag]:
    """How each stream is doing, the archive first."""
    from pipelines.contracts import CONTRACTS
    from pipelines.indices import STREAMS
    from pipelines.ingest import archive

    states = _states(settings)
    ends = _Ends(settings)
    topics = {archive.STREAM: tuple(CONTRACTS)} | {name: s.topics for name, s in STREAMS.items()}
    return [_lag(name, of, _committed(settings, name), states.get(name), ends) for name, of in topics.items()]


def _lag(
    name: str, topics: tuple[str, ...], position: Position, status: Mapping[str, Any] | None, ends: _Ends
) -> Lag:
    said = status or {"state": NOT_RUNNING, "detail": "`tidemark up streams` starts it"}
    lag = Lag(name, str(said["state"]), said.get("epoch"), position, missing=str(said.get("detail") or ""))
    try:
        behind = [ends.behind(topic, position) for topic in topics]
    except TidemarkError as error:
        return lag._replace(missing="; ".join(filter(None, [lag.missing, str(error)])))
    return lag._replace(
        records_behind=sum(records for records, _ in behind),
        seconds_behind=max((seconds for _, seconds in behind), default=0.0),
    )


def _states(settings: Settings) -> dict[str, dict[str, Any]]:
    """What the streaming processes say, by stream; the main one stands before those beside it."""
    boards = [Controls(settings.paths.run, entry.name) for entry in beside(settings.paths.run)]
    found: dict[str, dict[str, Any]] = {}
    for board in [*boards, Controls(settings.paths.run)]:
        found |= board.status()
    return found


def _committed(settings: Settings, stream: str) -> Position:
    """Up to where a stream has committed everything."""
    from pipelines import lake
    from pipelines.contracts import CONTRACTS
    from pipelines.indexing import delta, lineages
    from pipelines.indices import INDICES
    from pipelines.ingest import archive

    if stream == archive.STREAM:
        return merge_all(lake.position(settings, c.raw_table) for c in CONTRACTS.values())
    fed = [
        path
        for spec in INDICES.values()
        if stream in spec.streams
        for mark in lineages.of_index(settings.paths.delta, spec.name)
        if not lineages.order(path := delta.table_path(settings.paths.delta, spec.name, mark)).is_ended
    ]
    return meet_all([_ends_of(path).position().merge(delta.floor(path)) for path in fed]) if fed else EMPTY


@functools.cache
def _ends_of(path: Path) -> delta.Ends:
    """Kept for as long as this process lives: it reads only what is new."""
    from pipelines.indexing import delta

    return delta.Ends(path)


class _Ends:
    """Where the topics end now; each is asked for once."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._asked: dict[str, tuple[str, dict[int, tuple[int, int]]] | TidemarkError] = {}

    def behind(self, topic: str, position: Position) -> tuple[int, float]:
        """How many records a topic has after a position, and how old the oldest of them is, in seconds."""
        from pipelines.ingest import broker

        topic_id, offsets = self._of(topic)
        held = position.topics.get(topic_id, {})
        firsts = {p: max(first, held.get(p, 0)) for p, (first, _) in offsets.items()}
        left = {p: first for p, first in firsts.items() if first < offsets[p][1]}
        if not left:
            return 0, 0.0
        times = broker.times(self._settings, topic, left)
        oldest = min(times.values(), default=None)
        age = 0.0 if oldest is None else max(0.0, time.time() - oldest / 1000)
        return sum(offsets[p][1] - first for p, first in left.items()), round(age, 1)

    def _of(self, topic: str) -> tuple[str, dict[int, tuple[int, int]]]:
        if topic not in self._asked:
            self._asked[topic] = self._ask(topic)
        found = self._asked[topic]
        if isinstance(found, TidemarkError):
            raise found
        return found

    def _ask(self, topic: str) -> tuple[str, dict[int, tuple[int, int]]] | TidemarkError:
        from pipelines.ingest import broker

        failed = next((found for found in self._asked.values() if isinstance(found, TidemarkError)), None)
        if failed is not None:  # one wait for a broker that is away is enough
            return failed
        try:
            topic_id = broker.topic_ids(self._settings, [topic])[topic]
            return topic_id, broker.offsets(self._settings, topic)
        except TidemarkError as error:
            return error


# ------------------------------------------------------------------------------------------------ the sensor


@dg.sensor(
    name="stream_lag",
    minimum_interval_seconds=EVERY_S,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="how far each stream is behind, as observations; a stream that is caught up, or goes on, is fresh",
    required_resource_keys={"platform"},
)
def stream_lag(context: dg.SensorEvaluationContext) -> dg.SensorResult:
    """Observes every stream; one that has caught up, or went on since the last look, is reported as updated."""
    found = lags(context.resources.platform.settings)
    before = json.loads(context.cursor or "{}")
    return dg.SensorResult(
        asset_events=[event for lag in found for event in _events(lag, before.get(lag.stream))],
        cursor=json.dumps({lag.stream: lag.position.to_text() for lag in found}),
    )


def _events(lag: Lag, before: str | None) -> Iterator[dg.AssetObservation | dg.AssetMaterialization]:
    position = lag.position.to_text()
    # What is built of the stream is out of date when this changes, and not at each look.
    version = {_DATA_VERSION: hashlib.sha256(position.encode()).hexdigest()[:16]}
    yield dg.AssetObservation(streams.key(lag.stream), metadata=lag.metadata(), tags=version)
    has_moved = before is not None and before != position
    if lag.records_behind == 0 or has_moved:
        yield dg.AssetMaterialization(streams.key(lag.stream), metadata=lag.metadata(), tags=version)
