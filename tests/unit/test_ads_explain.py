"""Why an ad is or is not served: one case a cause, on a real repository and a view of what was made of it.

Whether the verdict says that an ad is served is what retrieval answers to a context that every targeting takes.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pytest

from pipelines.ads import enrichment, evidence, explain, publisher, repository, retrieval, updater
from pipelines.ads.evidence import Origin
from pipelines.ads.explain import Lag, Said
from pipelines.ads.index import ADS
from pipelines.ads.joined import INPUTS
from pipelines.ads.overrides import Entries, Entry
from pipelines.ads.repository import Repository, Update
from pipelines.ads.retrieval import Context
from pipelines.ads.updater import Event
from pipelines.indexing import base as bases
from pipelines.indexing.delta import DeltaWriter, Marker
from pipelines.indexing.documents import DocumentsView
from pipelines.indexing.overlay import Overlay
from pipelines.indexing.position import EMPTY, Position
from tests.ads_world import base_of, facts_of

NOW_MS = time.time_ns() // 1_000_000
DAY_MS = 86_400_000
NO_LAG = Lag(0, 0)
SERVED = {
    "advertisers": ("v1", {"status": "active", "balance_usd_micros": 9}),
    "campaigns": ("c1", {"advertiser_id": "v1", "status": "active", "daily_budget_usd_micros": 5}),
    "ad_groups": ("g1", {"campaign_id": "c1", "status": "active", "bid_usd_micros": 7}),
    "ads": ("a1", {"ad_group_id": "g1", "pin_id": "p1", "status": "active", "review_status": "approved"}),
    "pins": ("p1", {"image_signature": "i1", "title": "A red chair"}),
    "images": ("i1", {"safety": 1.0}),
}
"""Table → the row of an ad that is served; its version is 10."""


class Case(NamedTuple):
    """What is said after (or in place of) what makes the ad served, and what the verdict must say."""

    says: str
    later: Sequence[Event] = ()
    without: Sequence[str] = ()
    is_served: bool = False


def said(table: str, key: str, version: int = 17, **values: Any) -> Event:
    return Event(Update(table, key, version, values))


def gone(table: str, key: str, version: int = 18) -> Event:
    return Event(Update(table, key, version, None))


def waiting(table: str, arrived: int = 1) -> Event:
    """A record of a transaction of three."""
    key, values = SERVED[table]
    return Event(Update(table, key, 10, values), arrived, "t9", 3)


CASES = [
    Case("served since 20", is_served=True),
    Case("not served: campaign c1 paused by version 17 at 20", [said("campaigns", "c1", status="paused")]),
    Case(
        "not served: ad group g1 archived by version 17 at 20", [said("ad_groups", "g1", status="archived")]
    ),
    Case("not served: ad a1 paused by version 17 at 20", [said("ads", "a1", status="paused")]),
    Case("not served: advertiser v1 draft by version 17 at 20", [said("advertisers", "v1", status="draft")]),
    Case(
        "not served: campaign without a status: campaign c1, by version 17 at",
        [said("campaigns", "c1", status=None)],
    ),
    Case("not served: review pending by version 17 at 20", [said("ads", "a1", review_status="pending")]),
    Case("not served: ad group unknown: ad a1 waits for g1", without=["ad_groups"]),
    Case("not served: campaign unknown: ad group g1 waits for c1", without=["campaigns"]),
    Case("not served: advertiser unknown: campaign c1 waits for v1", without=["advertisers"]),
    Case("not served: no ad group: ad a1 names none", [said("ads", "a1", ad_group_id=None)]),
    Case("not served: campaign c1 was deleted by version 18 at 20", [gone("campaigns", "c1")]),
    Case("not served: ad a1 was deleted by version 18 at 20", [gone("ads", "a1")]),
    Case("not served: ad unknown: no record of a1 is written", without=["ads"]),
    Case(
        "not served: ad unknown: no record of a1 is written; its record waits in transaction t9: 1 of 3 are there",
        [waiting("ads")],
        ["ads"],
    ),
    Case(
        "not served: campaign unknown: ad group g1 waits for c1; its record waits in transaction t9: 1 of 3",
        [waiting("campaigns")],
        ["campaigns"],
    ),
    Case(
        "waits for c1; its record is held back with transaction t9: budget is negative",
        [waiting("campaigns"), Event(None, 0, "t9", refusal="budget is negative")],
        ["campaigns"],
    ),
    Case("not served: no image signature: pin p1 names none", [said("pins", "p1", image_signature=None)]),
    Case("not served: image unknown: pin p1 waits for i1", without=["images"]),
    Case("not served: pin unknown: ad a1 waits for p1", without=["pins"]),
    Case("not served: no pin: ad a1 names none", [said("ads", "a1", pin_id=None)]),
    Case("its product is not available: pin p1, by version 17", [said("pins", "p1", is_available=False)]),
    Case("not served: no bid: ad group g1, by version 17", [said("ad_groups", "g1", bid_usd_micros=None)]),
    Case(
        "nothing is left of its balance: advertiser v1, by ver",
        [said("advertisers", "v1", balance_usd_micros=0)],
    ),
    Case(
        "the budget of a day is 0: campaign c1, by version 17",
        [said("campaigns", "c1", daily_budget_usd_micros=0)],
    ),
    Case(
        "the budget of the campaign is 0: campaign c1, by version 17",
        [said("campaigns", "c1", lifetime_budget_usd_micros=0)],
    ),
    Case(
        f"removed by garbage collection on {explain.iso(NOW_MS)}",
        [said("ads", "a1", status="archived"), said("ads", "a1", NOW_MS, collected_at=NOW_MS)],
    ),
    Case("served since 20", [said("ads", "a1", NOW_MS, collected_at=NOW_MS)], is_served=True),
    Case(f"it ended at {explain.iso(NOW_MS - DAY_MS)}", [said("campaigns", "c1", ends_at=NOW_MS - DAY_MS)]),
    Case(
        f"it runs from {explain.iso(NOW_MS + DAY_MS)} on",
        [said("ad_groups", "g1", starts_at=NOW_MS + DAY_MS)],
    ),
]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Repository]:
    store = Repository(f"sqlite:{tmp_path / 'repository.db'}")
    publisher.subscribe(store)
    yield store
    store.close()


def begin(store: Repository, without: Sequence[str] = ()) -> None:
    rows = [
        Event(Update(table, *row))
        for table, row in SERVED.items()
        if table not in without
        for row in [(row[0], 10, row[1])]
    ]
    updater.apply(store, rows)


def send_keys(store: Repository) -> None:
    """As the publisher leaves the repository once the keys are sent."""
    with store.writing() as connection:
        repository.acknowledge(connection, publisher.SUBSCRIBER, repository.last_change(connection))


def facts(store: Repository) -> Iterator[Any]:
    with store.reading() as connection:
        for family in INPUTS:
            yield facts_of(family, enrichment.look_up(connection, family, ["a1"]))


class Served(NamedTuple):
    """A view, and where it is from."""

    view: DocumentsView
    origin: Origin


def served(store: Repository, folder: Path) -> Served:
    """What is served of the ad as it is now: by an epoch of a delta, over no base."""
    writer = DeltaWriter(ADS, folder / "delta")
    marker = Marker("ads_control", 1, 0, EMPTY, Position({"ads-control@x": {0: 1}}), transformed_at_ms=NOW_MS)
    writer.commit(marker, pa.concat_tables(list(facts(store))))
    overlay = Overlay(bases.empty(ADS), writer.path, 1_000)
    overlay.catch_up()
    return Served(overlay.view, Origin(writer.path))


def verdict_of(
    store: Repository, found: Served, lag: Lag = NO_LAG, entries: Sequence[Entry] = ()
) -> explain.Verdict:
    held = Entries()
    for entry in entries:
        held.add(entry)
    told = evidence.gather(store, found.view, "a1", lag, held, found.origin)
    assert [stage.stage for stage in explain.stages(told)].count("served") == len(INPUTS)
    return explain.verdict(told)


@pytest.mark.parametrize("case", CASES, ids=[case.says[-40:] for case in CASES])
def test_each_cause_is_told(store: Repository, tmp_path: Path, case: Case) -> None:
    begin(store, case.without)
    updater.apply(store, case.later)
    send_keys(store)
    found = served(store, tmp_path)
    verdict = verdict_of(store, found)
    assert case.says in verdict.text
    assert verdict.is_served is case.is_served
    answered = retrieval.candidates(found.view, Context(), time.time_ns() // 1_000_000, 5)
    assert [key for key, _ in answered] == ([b"a1"] if case.is_served else [])


PAUSED = said("campaigns", "c1", status="paused")
AHEAD = {"status": "paused", "daily_budget_usd_micros": 5, "lifetime_budget_usd_micros": None}
STOPPED = "the stream ads_control is stopped"
OF_CONTENT = {"content": "the stream ads_content is stopped"}
NOT_RUNNING = "the process ads does not run"


@pytest.mark.parametrize(
    ("is_sent", "lag", "waits"),
    [
        (True, Lag(0, 0, streams={"control": STOPPED}), rf"key sent \d\.\d s ago, {STOPPED}"),
        (
            True,
            Lag(0, 0, serving="the base is served without its delta"),
            "the base is served without its delta",
        ),
        (
            True,
            Lag(0, 0, streams={"content": "the stream ads_content is stopped"}),
            r"key sent \d\.\d s ago, on its way",
        ),
        (False, Lag(0, 0), r"changed \d\.\d s ago, its key is not sent: it is on its way"),
        (
            False,
            Lag(0, 0, publisher="the process ads does not run"),
            "its key is not sent: the process ads does not run",
        ),
    ],
)
def test_what_a_newer_version_waits_for_is_told(
    store: Repository, tmp_path: Path, is_sent: bool, lag: Lag, waits: str
) -> None:
    begin(store)
    send_keys(store)
    found = served(store, tmp_path)
    updater.apply(store, [PAUSED])
    if is_sent:
        send_keys(store)
    still = verdict_of(store, found, lag)
    assert still.is_served
    assert re.fullmatch(rf"still served: campaign c1 paused by version 17 at \S+, .*{waits}", still.text)
    ahead = Entry("campaigns", "c1", 10**9, AHEAD)
    stopped = verdict_of(store, found, lag, [ahead])
    assert not stopped.is_served
    told = rf"not served: campaign c1 paused .*; a newer version is not yet served: .*{waits}"
    assert re.fullmatch(told, stopped.text)


def test_an_ad_that_was_started_is_not_yet_served(store: Repository, tmp_path: Path) -> None:
    begin(store)
    updater.apply(store, [PAUSED])
    send_keys(store)
    found = served(store, tmp_path)
    updater.apply(store, [said("campaigns", "c1", 19, status="active"), said("images", "i9", safety=0.5)])
    verdict = verdict_of(store, found, Lag(0, 0, publisher="it is paused"))
    assert not verdict.is_served
    assert re.fullmatch(r"not yet served: changed .* s ago, its key is not sent: it is paused", verdict.text)


def test_what_brought_a_version_is_told(store: Repository, tmp_path: Path) -> None:
    begin(store)
    send_keys(store)
    base = base_of(pa.concat_tables(list(facts(store))), tmp_path / "b1")
    of_base = Served(DocumentsView(base), Origin(None, NOW_MS))
    assert verdict_of(store, of_base).text == f"served since {explain.iso(NOW_MS)}, by base b1"
    assert verdict_of(store, served(store, tmp_path)).text.endswith("by epoch ads_control/1/0")


def test_a_refused_record_is_told(store: Repository, tmp_path: Path) -> None:
    begin(store, ["campaigns"])
    send_keys(store)
    found = served(store, tmp_path)
    told = evidence.gather(store, found.view, "a1", Lag(0, 0), Entries(), found.origin)
    refused = Said("campaigns", "c1", 0, (), "t/0/5", NOW_MS, "out_of_range: a budget is not negative")
    campaign = told.parts["campaigns"]._replace(said=(refused,))
    verdict = explain.verdict(told._replace(parts={**told.parts, "campaigns": campaign}))
    assert verdict.text.endswith(
        "waits for c1; its record was refused: out_of_range: a budget is not negative"
    )
