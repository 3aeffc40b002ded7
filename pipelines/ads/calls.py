"""What the process `ads` answers by call: changes, what documents are made of, and backfills.

Belongs here: a call's body, the work that it asks for, and what its answer promises. The work itself is that of the
topics, by the same functions. Does not belong here: threads and processes (`service`), HTTP's own matters
(`pipelines.ingest.http`).

A change by call is in the topic before it is in the repository, so that the archive has it, whatever happens then. It
is sent while the repository's one writer waits for the broker: what the answer says became visible by it, and not by
the consumer, which reads it again without effect.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import orjson

from pipelines.ads import enrichment, handlers, joined, refresh, repository, schema, updater
from pipelines.ads.metrics import CALL, Metrics
from pipelines.ads.publisher import Sent
from pipelines.ads.refresh import FAMILIES, PREDICATES, BadChoice, Choice
from pipelines.ads.repository import Change, Repository
from pipelines.ads.updater import Held
from pipelines.contracts import ADS_CHANGES, Refusal, decode
from pipelines.indexing.position import EMPTY
from pipelines.ingest import http
from pipelines.ingest.http import MAX_BODY_BYTES, Endpoint, Problem
from pipelines.ingest.producer import Delivery, Producer, position_of
from pipelines.tracing import Trace, ranges_of

MAX_WAIT_MS = 5_000
MAX_ENRICHED = 1_000
MAX_BACKFILLED = 100_000
log = logging.getLogger(__name__)

Answer = tuple[int, dict[str, Any]]


class Desk(Protocol):
    """What calls need of the process."""

    store: Repository
    producer: Producer
    metrics: Metrics
    sent: Sent

    def tell(self) -> None:
        """Something was committed that others wait for."""


# ------------------------------------------------------------------------------------------------ changes


def update(desk: Desk, body: bytes, trace: Trace) -> Answer:
    """Take change records: those that keep the contract into the topic and the repository, the others not at all.

    Raises:
        Problem: The body is not records; nothing was looked at further, and nothing was sent.
        NotDelivered: The broker did not acknowledge every valid record; nothing was written to the repository.
        RepositoryError: The repository is away. What the topic has of the records is written once it is back.
    """
    began = time.perf_counter()
    records, options = http.records_and("changes", body, ["wait_ms"])
    wait_ms = _wait_ms(options)
    values = [orjson.dumps(record) for record in records]
    now_ms = time.time_ns() // 1_000_000
    decided = [decode(ADS_CHANGES, value, now_ms) for value in values]
    accepted = [
        (row, value) for row, value in zip(decided, values, strict=True) if not isinstance(row, Refusal)
    ]
    refusals = [row for row in decided if isinstance(row, Refusal)]
    desk.metrics.count(CALL, len(accepted), [refusal.reason for refusal in refusals])
    written = _written(desk, accepted, trace) if accepted else _Written([], {}, {}, 0)
    rows = [row for row, _ in accepted]
    concerned = {*written.changes, *((row["table"], row["key"]) for row in rows)}
    keys = desk.sent.wait(written.seq, concerned, wait_ms / 1000)
    _log(len(decided), written, refusals, trace, began)
    lines = iter(_accepted(written, rows))
    answer: dict[str, Any] = {
        "accepted": len(accepted),
        "refused": len(refusals),
        "position": position_of(written.deliveries).merge(keys or EMPTY).token() if accepted else None,
        "is_published": keys is not None,
        "waiting": [_waiting(one) for one in written.held.values()],
        "results": [
            http.refused(number, row) if isinstance(row, Refusal) else {"index": number, **next(lines)}
            for number, row in enumerate(decided)
        ],
    }
    return (200, answer) if accepted else (400, answer | http.none_accepted(refusals[0]))


class _Written(NamedTuple):
    """Where the broker has the records, what they made visible by table and key, which transactions wait, and the
    number of the repository's newest change then."""

    deliveries: list[Delivery]
    changes: dict[tuple[str, str], Change]
    held: dict[str, Held]
    seq: int


def _written(desk: Desk, accepted: Sequence[tuple[Mapping[str, Any], bytes]], trace: Trace) -> _Written:
    events = [updater.event(row) for row, _ in accepted]
    named = {event.transaction_id for event in events if event.transaction_id is not None}
    records = [(row[ADS_CHANGES.key_field].encode(), value) for row, value in accepted]
    with desk.store.writing() as connection:
        changes = updater.write(connection, events)
        held = {one.id: one for one in updater.held(connection, named)} if named else {}
        seq = repository.last_change(connection)
        deliveries = desk.producer.send(ADS_CHANGES.topic, records, trace)
    desk.metrics.observe_commit(changes)
    desk.tell()
    return _Written(deliveries, {(change.table, change.key): change for change in changes}, held, seq)


def _wait_ms(options: Mapping[str, Any]) -> int:
    found = options.get("wait_ms", 0)
    if type(found) is not int or not 0 <= found <= MAX_WAIT_MS:
        raise Problem(
            400, "wait_ms", "wait_ms is not a time to wait", f"a whole number from 0 to {MAX_WAIT_MS}"
        )
    return found


def _accepted(written: _Written, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of each accepted record its position, its transaction if it waits, and what became visible of its row."""
    lines = []
    for row, delivery in zip(rows, written.deliveries, strict=True):
        change = written.changes.get((row["table"], row["key"]))
        line = {
            "status": "accepted",
            "position": delivery.position.token(),
            "visible": change and _visible(change),
        }
        if row["transaction_id"] in written.held:
            line["waits_for"] = row["transaction_id"]
        lines.append(line)
    return lines


def _visible(change: Change) -> dict[str, Any]:
    return {
        "table": change.table,
        "key": change.key,
        "changed": sorted(change.changed),
        "version": change.version,
    }


def _waiting(one: Held) -> dict[str, Any]:
    return {
        "transaction": one.id,
        "state": one.state,
        "expected": one.expected,
        "arrived": one.arrived,
        "detail": one.detail,
    }


def _log(count: int, written: _Written, refusals: Sequence[Refusal], trace: Trace, began: float) -> None:
    said = {
        "topic": ADS_CHANGES.topic,
        "places": ranges_of(delivery.place for delivery in written.deliveries),
        "refused": [{"reason": one.reason, "detail": one.detail} for one in refusals[:10]],
        "took_ms": round(1000 * (time.perf_counter() - began), 1),
    }
    log.info("took %d of %d changes", len(written.deliveries), count, extra=trace.fields | said)


# ------------------------------------------------------------------------------------------------ documents


def enrich(desk: Desk, body: bytes, trace: Trace) -> Answer:
    """The documents that the handlers make now, of one point of the repository; nothing is written.

    Raises:
        Problem: The body is not ads and families.
    """
    parsed = http.read(body, '{"ad_ids": [...], "families": [...]}')
    http.require_only(parsed, ["ad_ids", "families"])
    keys, families = _ids(parsed.get("ad_ids"), MAX_ENRICHED), _families(parsed)
    with desk.store.reading() as connection:
        rows = {
            family: enrichment.look_up(connection, family, keys)
            for family in dict.fromkeys((schema.CONTROL, *families))
        }
    made = {family: handlers.run(family, found).to_pylist() for family, found in rows.items()}
    flat = {family: found.flatten() for family, found in rows.items()}
    is_there = flat[schema.CONTROL].column("ads.is_there").to_pylist()
    ads = [
        {
            "ad_id": key,
            "is_servable": is_there[place] and made[schema.CONTROL][place]["is_servable"],
            "not_servable": made[schema.CONTROL][place]["blocked_by"] if is_there[place] else "ad unknown",
            "families": {
                family: {
                    "version": {
                        name.partition(".")[0]: flat[family].column(name)[place].as_py()
                        for name in joined.versions(family)
                    },
                    "document": made[family][place] if is_there[place] else None,
                }
                for family in families
            },
        }
        for place, key in enumerate(keys)
    ]
    return 200, {"ads": ads}


# ------------------------------------------------------------------------------------------------ backfills


def backfill(desk: Desk, body: bytes, trace: Trace) -> Answer:
    """Send the keys of ads to the topics for what may wait.

    Raises:
        Problem: The body does not choose ads.
        NotDelivered: The broker did not take them all.
    """
    choice, families = choice_of(body)
    try:
        sent = refresh.send(desk.store, desk.producer, choice, families)
    except BadChoice as error:
        raise Problem(400, error.where or "families", error.what, error.remedy or "") from None
    desk.metrics.count_keys(sent)
    return 200, {"sent": sent, "ads": max(sent.values())}


def choice_of(body: bytes) -> tuple[Choice, list[str]]:
    """Which ads and families a body chooses.

    Raises:
        Problem: None, or in more than one way.
    """
    ways = '{"ad_ids": [...]}, {"where": {"campaign_id": "..."}} or {"all": true}'
    parsed = http.read(body, ways)
    http.require_only(parsed, ["ad_ids", "where", "all", "families"])
    named = [name for name in ("ad_ids", "where", "all") if name in parsed]
    if len(named) != 1:
        raise Problem(400, named[1] if named else "body", "ads are chosen in exactly one way", ways)
    families = _families(parsed)
    if named == ["ad_ids"]:
        return Choice(ad_ids=tuple(_ids(parsed["ad_ids"], MAX_BACKFILLED))), families
    if named == ["where"]:
        return Choice(where=_predicate(parsed["where"])), families
    if parsed["all"] is not True:
        raise Problem(400, "all", "all is not true", ways)
    return Choice(), families


def _predicate(found: Any) -> tuple[str, str]:
    allowed = f"an object with one of {', '.join(PREDICATES)}, a text"
    if not isinstance(found, dict) or len(found) != 1:
        raise Problem(400, "where", "where is not one column and its value", allowed)
    ((name, key),) = found.items()
    if name not in PREDICATES or not isinstance(key, str) or not key:
        raise Problem(400, f"where.{name[:100]}", "ads cannot be chosen by it", allowed)
    return name, key


def _ids(found: Any, most: int) -> list[str]:
    allowed = f"1 to {most:,} texts that are not empty"
    if not isinstance(found, list) or not 1 <= len(found) <= most:
        raise Problem(400, "ad_ids", "ad_ids is not a list of ids, or has too few or too many", allowed)
    for place, key in enumerate(found):
        if not isinstance(key, str) or not key or "\0" in key:
            raise Problem(400, f"ad_ids[{place}]", "an id is a text that is not empty", allowed)
    return list(dict.fromkeys(found))


def _families(parsed: Mapping[str, Any]) -> list[str]:
    found = parsed.get("families", list(FAMILIES))
    allowed = f"some of {', '.join(FAMILIES)}"
    if not isinstance(found, list) or not found:
        raise Problem(400, "families", "families is not a list of families", allowed)
    for name in found:
        if name not in FAMILIES:
            raise Problem(400, "families", f"there is no family {str(name)[:60]!r}", allowed)
    return list(dict.fromkeys(found))


# ------------------------------------------------------------------------------------------------ endpoints


def endpoints() -> list[Endpoint]:
    """The calls, with their documentation."""
    error = http.said("changes", "what is wrong", "what would be right")
    failures = {
        400: ("Nothing was done.", error),
        413: (f"The body has more than {MAX_BODY_BYTES} bytes.", error),
        503: ("The broker or the repository does not answer; try again after Retry-After seconds.", error),
    }
    examples = [dict(example) for example in ADS_CHANGES.examples]
    line = {
        "index": 0,
        "status": "accepted",
        "position": "eyJ0b3BpY3MiOnt9fQ",
        "visible": {"table": "campaigns", "key": "c1", "changed": ["status"], "version": 17},
    }
    taken = {
        "accepted": 1,
        "refused": 0,
        "position": "eyJ0b3BpY3MiOnt9fQ",
        "is_published": True,
        "waiting": [],
        "results": [line],
    }
    version = {"ads": 5, "ad_groups": 3, "campaigns": 2, "advertisers": 1}
    made = {
        "ad_id": "a1",
        "is_servable": False,
        "not_servable": "campaign paused",
        "families": {schema.CONTROL: {"version": version, "document": {"is_servable": False}}},
    }
    return [
        Endpoint(
            "/v1/ads:update",
            "ads_update",
            "Take changes of an account's rows.",
            "Each record is checked by the contract of `ads-changes`. A refused one is not written. The others are "
            "written to the topic and applied to the repository; each is listed with its position and with what became "
            "visible of its row by this call: null where nothing did, because the repository had it, or because its "
            "transaction waits for the rest (`waits_for`, and `waiting`). With `wait_ms` (at most "
            f"{MAX_WAIT_MS:,}) the answer comes once the keys of the concerned documents are sent, or when the time is "
            "over: where `is_published` says true, its position covers them, and serving that is asked with it as "
            "`min_position` answers with these changes. 503: nothing is promised; send the request "
            "again, repeats change nothing.",
            update,
            {
                "several": {"summary": "Several records", "value": {"changes": examples}},
                "one": {"summary": "One record alone", "value": examples[1]},
                "read": {
                    "summary": "To be read at once",
                    "value": {"changes": examples[:1], "wait_ms": 2_000},
                },
            },
            {200: ("At least one record was accepted.", taken), **failures},
        ),
        Endpoint(
            "/v1/ads:enrich",
            "ads_enrich",
            "What documents are made of the rows as they are now.",
            "The handlers of the streams and of the batch, on one point of the repository. Nothing is written.",
            enrich,
            {"some": {"summary": "Some ads", "value": {"ad_ids": ["a1"], "families": [schema.CONTROL]}}},
            {200: ("Each ad once, in the order asked for.", {"ads": [made]}), **failures},
        ),
        Endpoint(
            "/v1/ads:backfill",
            "ads_backfill",
            "Have the documents of ads made again.",
            "The keys go to topics of their own, which changes overtake. The answer comes when all of them are sent.",
            backfill,
            {
                "some": {"summary": "Some ads", "value": {"ad_ids": ["a1"]}},
                "where": {"summary": "Those of a row", "value": {"where": {"campaign_id": "c1"}}},
                "all": {"summary": "All", "value": {"all": True, "families": [schema.CONTROL]}},
            },
            {
                200: ("How many keys each topic got.", {"sent": {"ads-control-backfill": 1}, "ads": 1}),
                **failures,
            },
        ),
    ]
