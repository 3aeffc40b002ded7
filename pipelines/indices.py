"""The registry: one line an index, one line a stream.

Belongs here: which indices and hot streams there are, and what follows from both. An index declares itself in the
package of its domain.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import pyarrow as pa

from pipelines.ads import repository
from pipelines.ads.index import ADS, CONTENT_STREAM, CONTROL_STREAM
from pipelines.ads.relations import RepositoryState
from pipelines.contracts import (
    PIN_UPDATES,
    USER_FOLLOWS,
    USER_INTERACTIONS,
    Contract,
    ads_keys,
    contract_of,
    decode_table,
)
from pipelines.errors import TidemarkError
from pipelines.indexing import base as bases
from pipelines.indexing import delta
from pipelines.indexing.freshness import Stages
from pipelines.indexing.overlay import Overlay
from pipelines.indexing.replica import Follower, Replica
from pipelines.indexing.spec import IndexSpec, NoState, State, Sums, Timeline, check, limited, lineage
from pipelines.indexing.streaming import HotStream
from pipelines.indexing.versions import Versions
from pipelines.pins.changes import PIN_CHANGES
from pipelines.pins.index import PINS
from pipelines.settings import Settings, SettingsError
from pipelines.users import pattern_files
from pipelines.users.follows import USER_FOLLOWS_INDEX
from pipelines.users.index import DAY_MS, PIN_COUNTS, USER_EVENTS
from pipelines.users.index import STREAM as EVENTS_STREAM
from pipelines.users.patterns import index as patterns
from pipelines.users.relations import PinsState


class FieldsLearned(TidemarkError):
    """A query decodes by a contract that has grown since."""


_STAGES = Stages("ad_id", (("event", "event_time"), ("updated", "committed_at")))


def _accepted(contract: Contract, records: pa.Table) -> pa.Table:
    return decode_table(contract, records).accepted


def _stream(contract: Contract) -> HotStream:
    return HotStream(contract.name, (contract.topic,), functools.partial(_accepted, contract))


def _keys(name: str, topic: str, backfill_topic: str) -> HotStream:
    """Keys of documents to make again: those of what changed, and beside them some of those that may wait."""
    decode = functools.partial(_accepted, contract_of(topic))
    return HotStream(name, (topic, backfill_topic), decode, frozenset([backfill_topic]), _STAGES)


def as_known(stream: HotStream, known: Callable[[Contract], Contract]) -> HotStream:
    """A stream that decodes each epoch by its contract as it is by then: fields are learned while it runs."""
    topic = stream.topics[0]  # all are under one contract
    return stream._replace(decode=lambda records: _accepted(known(contract_of(topic)), records))


USER_PROFILES = patterns.spec_of(lambda: pattern_files.load().patterns)
_SPECS = (PINS, PIN_CHANGES, USER_EVENTS, PIN_COUNTS, USER_PROFILES, USER_FOLLOWS_INDEX, ADS)

INDICES: dict[str, IndexSpec] = {spec.name: check(spec) for spec in _SPECS}
STREAMS: dict[str, HotStream] = {
    stream.name: stream
    for stream in (
        _stream(USER_INTERACTIONS),
        _stream(PIN_UPDATES),
        _stream(USER_INTERACTIONS)._replace(name=patterns.STREAM),
        _stream(USER_FOLLOWS),
        _keys(CONTROL_STREAM, ads_keys.CONTROL, ads_keys.CONTROL_BACKFILL),
        _keys(CONTENT_STREAM, ads_keys.CONTENT, ads_keys.CONTENT_BACKFILL),
    )
}
ADS_STREAMS = (CONTROL_STREAM, CONTENT_STREAM)
KEYED = frozenset(
    family.stream for spec in INDICES.values() for family in spec.families if family.keyed and family.stream
)
"""The streams that go by steps, and keep something of each key."""
STATES: dict[str, Callable[[Settings], State]] = {
    name: lambda settings: RepositoryState(repository.opened(settings)) for name in ADS_STREAMS
}
STATES[EVENTS_STREAM] = lambda settings: PinsState(
    Versions(settings.paths.indices, PINS.name).pointer, functools.partial(overlay, settings, PINS.name)
)
"""Stream → what its transforms look up, for those that do."""


def as_known_now(
    stream: HotStream, known: Callable[[Contract], Contract]
) -> tuple[HotStream, Callable[[], None]]:
    """A stream that decodes in Spark's workers, by its contract as it is now; and what raises once that is another."""
    contract = contract_of(stream.topics[0])
    now = known(contract)

    def require_same() -> None:
        if known(contract).fields != now.fields:
            raise FieldsLearned(
                f"fields of {contract.topic} were learned",
                where=stream.name,
                remedy="its query begins anew by itself",
            )

    return stream._replace(decode=functools.partial(_accepted, now)), require_same


def state(settings: Settings, stream: str) -> State:
    """What the transforms of a stream look up."""
    return STATES[stream](settings) if stream in STATES else NoState()


def as_built(settings: Settings, spec: IndexSpec) -> IndexSpec:
    """An index with the horizon and the count that the settings give its next bases.

    Raises:
        SettingsError: They name an index that has neither, or no whole number.
    """
    age_ms = getattr(spec.read, "age_ms", None)
    days = _limits("horizon_days", settings.build.horizon_days, (Timeline, Sums)).get(spec.name)
    count = _limits("newest_events", settings.build.newest_events, (Timeline,)).get(spec.name)
    return limited(spec, age_ms if days is None else days * DAY_MS or None, count or None)


def horizon_ms(settings: Settings, spec: IndexSpec) -> int | None:
    """How far back before the newest record the next bases of an index reach; None: to the beginning.

    Raises:
        SettingsError: As `as_built`.
    """
    found: int | None = getattr(as_built(settings, spec).read, "age_ms", None)
    return found


def _limits(name: str, said: Mapping[str, str], kinds: tuple[type, ...]) -> dict[str, int]:
    known = [index for index, spec in INDICES.items() if isinstance(spec.read, kinds)]
    for index, value in said.items():
        if index not in known or not value.isascii() or not value.isdigit():
            raise SettingsError(
                f"{index}: {value} is not allowed",
                where=f"build.{name}",
                remedy=f"give a whole number to some of {', '.join(known)}",
            )
    return {index: int(value) for index, value in said.items()}


def topics(spec: IndexSpec) -> frozenset[str]:
    """The names of the topics that feed an index."""
    return frozenset(topic for stream in spec.streams for topic in STREAMS[stream].topics)


def overlay(settings: Settings, index: str) -> Overlay:
    """The published base, and the delta after it as far as it goes now: what a replica answers from, to look at.

    Raises:
        BadBase: The base cannot be opened.
    """
    spec, versions = INDICES[index], Versions(settings.paths.indices, index)
    pointer = versions.pointer()
    base = bases.open_base(spec, versions.path(pointer.version)) if pointer else bases.empty(spec)
    of_lineage = base.manifest.lineage if base.manifest else lineage(spec)
    path = delta.table_path(settings.paths.delta, index, of_lineage)
    has_delta = pointer is None or pointer.with_delta
    found = Overlay(base, path if has_delta else None, settings.overlay.max_facts)
    found.catch_up()
    return found


def replica(settings: Settings, name: str = "default") -> Replica:
    """A replica of every index."""
    return Replica(
        {
            spec.name: Follower(
                spec,
                settings.paths.indices,
                settings.paths.delta,
                topics=topics(spec),
                max_facts=settings.overlay.max_facts,
                replica=name,
                minutes=settings.paths.freshness,
            )
            for spec in INDICES.values()
        }
    )
