"""What a change concerns, and what is joined, against a naive join of everything in plain Python."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from random import Random
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from pipelines.ads import enrichment, handlers, joined, prepared, repository
from pipelines.ads.repository import Repository, Update
from pipelines.ads.schema import CONTENT, CONTROL, PERFORMANCE

ADS = ("a1", "a2", 'a"3\\')
GROUPS = ("g1", "g'2 ü")
PATHS = {
    CONTROL: {
        "ads": (),
        "ad_groups": ("ad_group_id",),
        "campaigns": ("campaign_id",),
        "advertisers": ("advertiser_id",),
    },
    CONTENT: {"ads": (), "pins": ("pin_id",), "images": ("image_signature",)},
    PERFORMANCE: {"ads": ()},
}
"""Family → table → the column of the table before it that names its row."""
COLUMNS: dict[str, dict[str, Sequence[Any]]] = {
    "ads": {
        "ad_group_id": (*GROUPS, None),
        "pin_id": ("p1", "p2"),
        "status": ("active", "paused"),
        "clicks_7d": (1, 2),
        "not_declared": (1,),
    },
    "ad_groups": {"campaign_id": ("c1", "c2"), "bid_usd_micros": (5, 6), "name": ("x", "y")},
    "campaigns": {"advertiser_id": ("v1", None), "status": ("active", "paused")},
    "advertisers": {"status": ("active", "paused"), "industry": ("x", "y")},
    "pins": {"image_signature": ("i1", "i2"), "title": ("x", "y")},
    "images": {"safety": (0.5, 1.0)},
}
NOT_ITS_OWN = {"clicks_7d", "not_declared"}
"""Columns that do not make an ad."""
KEYS = {
    "ads": ADS,
    "ad_groups": GROUPS,
    "campaigns": ("c1", "c2"),
    "advertisers": ("v1",),
    "pins": ("p1", "p2"),
    "images": ("i1", "i2"),
}


@st.composite
def histories(draw: st.DrawFn) -> list[list[Update]]:
    """Commits of updates; versions only grow, so that the last word stands."""
    version, commits = 0, []
    for _ in range(draw(st.integers(1, 8))):
        commit = []
        for _ in range(draw(st.integers(1, 4))):
            version += 1
            table = draw(st.sampled_from(list(COLUMNS)))
            key = draw(st.sampled_from(KEYS[table]))
            columns = {name: st.sampled_from(values) for name, values in COLUMNS[table].items()}
            values = draw(st.fixed_dictionaries({}, optional=columns))
            commit.append(Update(table, key, version, None if draw(st.integers(0, 5)) == 0 else values))
        commits.append(commit)
    return commits


class Naive:
    """Everything that was said, as plain rows: what a column was last set to after the row's last deletion."""

    def __init__(self) -> None:
        self.said: list[Update] = []

    def row(self, table: str, key: Any) -> dict[str, Any] | None:
        found: dict[str, Any] = {}
        for update in self.said:
            if (update.table, update.key) == (table, key):
                found = {} if update.values is None else {**found, **update.values}
        return found or None

    def keys(self, family: str, ad: str) -> dict[str, Any]:
        """Table → which of its rows the ad is joined of."""
        found = {"ads": ad}
        for table, by in PATHS[family].items():
            if by:
                found[table] = (self.row(*list(found.items())[-1]) or {}).get(by[0])
        return found

    def joined(self, family: str, ad: str) -> dict[str, Any]:
        return {table: self.row(table, key) for table, key in self.keys(family, ad).items()}


def emptied(store: Repository) -> None:
    with store.writing() as connection:
        for table in repository.METADATA.sorted_tables:
            connection.execute(table.delete())


def documents(store: Repository, family: str) -> dict[str, str]:
    """What the handlers make of each ad now."""
    with store.reading() as connection:
        rows = enrichment.look_up(connection, family, ADS)
    made = handlers.run(family, rows).to_pylist()
    there = rows.column("ads").to_pylist()
    return {
        ad: json.dumps([row["is_there"], document])
        for ad, row, document in zip(rows.column(joined.KEY).to_pylist(), there, made, strict=True)
    }


@settings(deadline=None, max_examples=30)
@given(histories())
def test_a_joined_row_is_what_a_naive_join_finds(store: Repository, commits: list[list[Update]]) -> None:
    emptied(store)
    naive = Naive()
    for commit in commits:
        with store.writing() as connection:
            repository.write(connection, commit)
        naive.said += commit
    for family in PATHS:
        with store.reading() as connection:
            rows = enrichment.look_up(connection, family, (*ADS, ADS[0], "never said")).to_pylist()
        assert [row[joined.KEY] for row in rows] == [*ADS, "never said"]
        for row in rows:
            wanted = naive.joined(family, row[joined.KEY])
            for table, said in wanted.items():
                assert row[table]["is_there"] == bool((said or {}).keys() - NOT_ITS_OWN)
                for column, value in (said or {}).items():
                    if column in row[table]:
                        assert row[table][column] == value
                assert said is not None or all(
                    value is None for name, value in row[table].items() if name not in ("is_there", "stand")
                )


@settings(deadline=None, max_examples=150)
@given(histories(), st.integers(1, 20), st.randoms(use_true_random=False))
def test_rows_that_are_kept_from_one_look_up_to_the_next_are_as_they_are_now(
    store: Repository, commits: list[list[Update]], most_rows: int, chance: Random
) -> None:
    emptied(store)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(prepared, "MOST_ROWS", most_rows)
        patched.setattr(prepared, "_MOST_PARTS", 1)
        kept = {family: prepared.of_family(family) for family in PATHS}
        for commit in commits:
            with store.writing() as connection:
                repository.write(connection, commit)
            ads = chance.sample(ADS, chance.randint(len(ADS) // 2, len(ADS)))
            with store.reading() as connection:
                for family, tables in kept.items():
                    found = enrichment.look_up(connection, family, ads, tables)
                    assert found == enrichment.look_up(connection, family, ads)


@settings(deadline=None, max_examples=30)
@given(histories())
def test_every_document_that_changes_is_concerned_and_nothing_is_for_what_nobody_reads(
    store: Repository, commits: list[list[Update]]
) -> None:
    emptied(store)
    for commit in commits:
        before = {family: documents(store, family) for family in PATHS}
        with store.writing() as connection:
            changes = repository.write(connection, commit)
        for family in PATHS:
            after = documents(store, family)
            with store.reading() as connection:
                concerned = {
                    ad for change in changes for ad in enrichment.fan_out(connection, family, change)
                }
            assert {ad for ad in ADS if before[family][ad] != after[ad]} <= concerned
            read = handlers.triggers(family)
            if not any(read & change.names for change in changes):
                assert not concerned


@settings(deadline=None, max_examples=100)
@given(histories(), st.integers(1, 4))
def test_changes_together_concern_what_each_concerns_alone(
    store: Repository, commits: list[list[Update]], most: int
) -> None:
    emptied(store)
    naive, changes = Naive(), []
    for commit in commits:
        with store.writing() as connection:
            changes += repository.write(connection, commit)
        naive.said += commit
    for family in PATHS:
        keys = {ad: naive.keys(family, ad) for ad in ADS}
        with store.reading() as connection:
            together = enrichment.fan_outs(connection, family, changes, most)
            alone = [list(enrichment.fan_out(connection, family, change)) for change in changes]
        for change, some, everyone in zip(changes, together, alone, strict=True):
            wanted = {ad for ad in ADS if keys[ad].get(change.table) == change.key}
            if not handlers.triggers(family) & change.names:
                wanted = set()
            assert sorted(everyone) == sorted(wanted)
            assert set(some) <= wanted
            assert len(some) == len(set(some)) == min(most, len(wanted))


def test_a_change_that_nobody_reads_makes_no_work(store: Repository) -> None:
    emptied(store)
    with store.writing() as connection:
        repository.write(
            connection,
            [
                Update("ads", "a1", 1, {"ad_group_id": "g1"}),
                Update("ad_groups", "g1", 2, {"campaign_id": "c1"}),
            ],
        )
        (change,) = repository.write(connection, [Update("ads", "a1", 3, {"not_declared": 1})])
        (seen,) = repository.write(connection, [Update("campaigns", "c1", 4, {"status": "paused"})])
        assert list(enrichment.fan_out(connection, CONTROL, change)) == []
        assert list(enrichment.fan_out(connection, CONTROL, seen)) == ["a1"]
        assert list(enrichment.fan_out(connection, CONTENT, seen)) == []


def test_a_shared_parent_concerns_all_its_ads_and_whoever_has_enough_stops(store: Repository) -> None:
    emptied(store)
    groups = [Update("ad_groups", f"g{n}", 1, {"campaign_id": "c1"}) for n in range(2_500)]
    ads = [Update("ads", f"a{n}", 1, {"ad_group_id": f"g{n}", "pin_id": "p1"}) for n in range(2_500)]
    with store.writing() as connection:
        repository.write(connection, [*groups, *ads])
        paused, retitled = repository.write(
            connection,
            [Update("campaigns", "c1", 2, {"status": "paused"}), Update("pins", "p1", 2, {"title": "x"})],
        )
    with store.reading() as connection:
        for family, change in ((CONTROL, paused), (CONTENT, retitled)):
            found = list(enrichment.fan_out(connection, family, change))
            assert sorted(found) == sorted(ad.key for ad in ads)
            assert len(list(itertools.islice(enrichment.fan_out(connection, family, change), 10))) == 10
            (few,) = enrichment.fan_outs(connection, family, [change], 10)
            assert len(few) == 10
