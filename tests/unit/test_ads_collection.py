"""Garbage collection: what is inactive for long goes and can come back, and what is purged no older record raises."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from pipelines.ads import collection, repository, rows, updater
from pipelines.ads.collection import NoSuchRun, Plan
from pipelines.ads.repository import Repository, Update
from pipelines.ads.schema import ADS, CONTROL
from pipelines.contracts import ADS_CHANGES, Refusal, decode
from tests.ads_world import has_document

DAY_MS = 86_400_000
NOW_MS = 1_717_243_200_000
DAYS, GRACE = 30, 7


class Topic:
    """The topic and the updater behind it; what it took can be taken again."""

    def __init__(self, store: Repository) -> None:
        self.store, self.taken = store, list[bytes]()

    def send(self, topic: str, records: Sequence[tuple[bytes, bytes]]) -> None:
        assert topic == ADS_CHANGES.topic
        self.taken += [value for _, value in records]
        self.again([value for _, value in records])

    def again(self, values: Sequence[bytes]) -> None:
        decoded = [decode(ADS_CHANGES, value, NOW_MS) for value in values]
        assert not [one for one in decoded if isinstance(one, Refusal)]
        updater.apply(self.store, [updater.event(one) for one in decoded if not isinstance(one, Refusal)])


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Repository]:
    store = Repository(f"sqlite:{tmp_path / 'repository.db'}")
    yield store
    store.close()


@pytest.fixture
def topic(store: Repository) -> Topic:
    return Topic(store)


def said(store: Repository, table: str, key: str, version: int, **values: Any) -> None:
    with store.writing() as connection:
        repository.write(connection, [Update(table, key, version, values or None)])


def account(store: Repository) -> None:
    """One ad that is active, one archived, one of an archived campaign, one that has ended, one that was deleted."""
    for group, campaign in (("g1", "c1"), ("g2", "c2"), ("g3", "c1")):
        said(store, "ad_groups", group, 1, campaign_id=campaign, status="active")
    said(store, "ad_groups", "g3", 2, ends_at=NOW_MS - DAY_MS)
    said(store, "campaigns", "c1", 1, advertiser_id="v1", status="active")
    said(store, "campaigns", "c2", 1, advertiser_id="v1", status="archived")
    said(store, "advertisers", "v1", 1, status="active")
    for ad, group in (
        ("active", "g1"),
        ("archived", "g1"),
        ("of_campaign", "g2"),
        ("ended", "g3"),
        ("deleted", "g1"),
    ):
        said(store, "ads", ad, 3, ad_group_id=group, status="active", review_status="approved", name="x")
    said(store, "ads", "archived", 4, status="archived")
    said(store, "ads", "deleted", 4)


def run(store: Repository, topic: Topic, day: float) -> Plan:
    planned = collection.plan(store, DAYS, GRACE, NOW_MS + round(day * DAY_MS))
    collection.carry_out(store, topic, planned)
    return planned


def row(store: Repository, ad: str) -> rows.Row:
    with store.reading() as connection:
        return repository.read(connection, "ads", [ad])[ad]


INACTIVE = ["archived", "ended", "of_campaign"]


def test_what_is_inactive_for_long_goes_and_a_run_can_be_undone(store: Repository, topic: Topic) -> None:
    account(store)
    assert set(run(store, topic, 0).inactive) == {*INACTIVE, "deleted"}
    assert run(store, topic, DAYS - 1).collected == []
    assert topic.taken == []
    planned = collection.plan(store, DAYS, GRACE, NOW_MS + DAYS * DAY_MS)
    assert planned.collected == INACTIVE and has_document(store) == {
        "active",
        *INACTIVE,
    }  # it was a plan alone
    collection.carry_out(store, topic, planned)
    assert has_document(store) == {"active"}
    assert collection.runs(store) == {planned.run: 3}
    topic.again(topic.taken)
    assert run(store, topic, DAYS + 1).collected == []

    assert collection.undo(store, topic, planned.run) == INACTIVE
    assert has_document(store) == {"active", *INACTIVE}
    with pytest.raises(NoSuchRun):
        collection.undo(store, topic, planned.run)
    topic.again(topic.taken)  # in any order, any number of times
    topic.again(topic.taken[::-1])
    assert has_document(store) == {"active", *INACTIVE}


def test_what_is_made_active_again_is_served_at_once(store: Repository, topic: Topic) -> None:
    account(store)
    run(store, topic, 0)
    run(store, topic, DAYS)
    said(store, "ads", "archived", 5, status="active")
    said(store, "campaigns", "c2", 5, status="paused")
    said(store, "ad_groups", "g3", 5, ends_at=NOW_MS + 900 * DAY_MS)
    assert has_document(store) == {"active", *INACTIVE}
    planned = run(store, topic, DAYS + GRACE)
    assert sorted(planned.released) == INACTIVE and planned.purged == [] and collection.runs(store) == {}


def test_what_is_purged_no_older_record_raises(store: Repository, topic: Topic) -> None:
    account(store)
    run(store, topic, 0)
    run(store, topic, DAYS)
    stand = rows.stand(row(store, "archived"), ADS, CONTROL)
    assert run(store, topic, DAYS + GRACE - 1).purged == []
    planned = run(store, topic, DAYS + GRACE)
    assert (planned.purged, planned.stripped) == (INACTIVE, ["deleted"])
    assert not rows.is_there(row(store, "archived"), ADS)
    assert rows.stand(row(store, "archived"), ADS, CONTROL) > stand  # or the tombstone would be the older one
    topic.again(topic.taken[::-1])
    assert not rows.is_there(row(store, "archived"), ADS)
    assert run(store, topic, DAYS + GRACE + 1).stripped == INACTIVE
    purged = row(store, "archived")
    assert {value for column, value in purged.values.items() if column != "collected_at"} == {None}
    assert run(store, topic, DAYS + GRACE + 2).stripped == []

    said(store, "ads", "archived", 3, ad_group_id="g1", status="active", review_status="approved", name="x")
    said(store, "ads", "archived", 4, status="active", is_removable=True)
    assert not rows.is_there(row(store, "archived"), ADS) and has_document(store) == {"active"}
    said(store, "ads", "archived", 9, ad_group_id="g1", status="active")
    assert has_document(store) == {"active", "archived"}  # newer than all that was known of it
    assert rows.stand(row(store, "archived"), ADS, CONTROL) > rows.stand(purged, ADS, CONTROL)
