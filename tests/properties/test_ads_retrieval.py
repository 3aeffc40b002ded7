"""Ads that may be shown, under entries of the bypass: exactly those that a naive reading of the rows names, in order.

The oracle reads source rows with dictionaries and comparisons, and shares no code with handlers, retrieval or
overrides. A document is what its rows were when it was made; an entry replaces a row's light columns where it is newer
than the row was then.
"""

from __future__ import annotations

import math
import operator
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.ads import joined, overrides, retrieval
from pipelines.ads.index import ADS
from pipelines.ads.overrides import Entries, Entry, Overridden
from pipelines.ads.retrieval import Context
from pipelines.ads.schema import CONTROL, DIMENSIONS
from pipelines.indexing import base as bases
from pipelines.indexing import documents
from pipelines.indexing.documents import DocumentsView, Layer
from pipelines.indexing.position import EMPTY, Position
from tests import ads_world, serving_world
from tests.properties.harness import SCRATCH, cases

Row = dict[str, Any]
KEYS = {
    "advertisers": ["v0", "v1"],
    "campaigns": ["c0", "c1", "c2"],
    "ad_groups": ["g0", "g1", "g2", "g3"],
    "pins": ["p0", "p1", "p2"],
    "images": ["i0", "i1"],
    "ads": [f"a{number}" for number in range(8)],
}
CONTROL_TABLES = ("ads", "ad_groups", "campaigns", "advertisers")
LIGHT = {
    "advertisers": ("status", "balance_usd_micros"),
    "campaigns": ("status", "daily_budget_usd_micros", "lifetime_budget_usd_micros"),
    "ad_groups": ("status", "daily_budget_usd_micros"),
    "ads": ("status",),
}
SPELLED = {  # dimension → column, how accounts spell values, how requests do
    "country": ("countries", ["US", "de"], ["us", " DE"]),
    "interest": ("interests", ["Oak", "tea"], ["oak ", "TEA"]),
    "age": ("age_buckets", ["18-24", "65+"], ["18-24", "65+"]),
    "gender": ("genders", ["female"], ["female"]),
    "device": ("devices", ["web"], ["web"]),
    "keyword": ("keywords", ["sofa"], ["Sofa"]),
    "language": ("languages", ["en"], ["EN"]),
}
CATEGORIES = ["Home", "toys"]


class Made(NamedTuple):
    """Ads' documents: when they were made, the rows as they were then, and the facts."""

    time: int
    rows: dict[str, dict[str, Row]]
    facts: pa.Table


class World:
    """Rows of an account as they are, and of each ad the rows as they were when its document was made."""

    def __init__(self, chance: random.Random) -> None:
        self.chance = chance
        self.rows = {table: {key: self._row(table, 1) for key in keys} for table, keys in KEYS.items()}
        self.made: dict[str, dict[str, Row]] = {}
        self.made_at: dict[str, int] = {}
        self._time = 0
        self.entries: dict[tuple[str, str], Entry] = {}

    def _row(self, table: str, stand: int) -> Row:
        row = {"stand": stand, "is_there": self.chance.random() < 0.95}
        return row | (getattr(self, f"_{table}")() if row["is_there"] else {})

    def _maybe(self, value: Any, share: float = 0.8) -> Any:
        return value if self.chance.random() < share else None

    def _status(self) -> Any:
        return self.chance.choice(["active"] * 8 + ["paused", None])

    def _budget(self) -> Any:
        return self.chance.choice([None, 10, 10, 5, 0])

    def _when(self) -> Any:
        return self.chance.choice([None, None, 10, 20, 30])

    def _some(self, values: list[str], share: float) -> Any:
        return self._maybe([value for value in values if self.chance.random() < share])

    def _advertisers(self) -> Row:
        blocked = self._some(CATEGORIES, 0.2)
        money = {"balance_usd_micros": self._budget(), "spend_cap_usd_micros": self._maybe(100)}
        return {"status": self._status(), "blocked_categories": blocked, **money}

    def _campaigns(self) -> Row:
        return {
            "advertiser_id": self._maybe(self.chance.choice(KEYS["advertisers"]), 0.97),
            "status": self._status(),
            "daily_budget_usd_micros": self._budget(),
            "lifetime_budget_usd_micros": self._budget(),
            "is_budget_shared": self._maybe(self.chance.random() < 0.3),
            "bid_multiplier": self._maybe(self.chance.choice([0.5, 1.5])),
            "starts_at": self._when(),
            "ends_at": self._when(),
        }

    def _ad_groups(self) -> Row:
        targeted = {column: self._some(values, 0.2) for column, values, _ in SPELLED.values()}
        excluded = {f"excluded_{column}": self._some(values, 0.1) for column, values, _ in SPELLED.values()}
        return {
            "campaign_id": self.chance.choice(KEYS["campaigns"]),
            "status": self._status(),
            "bid_usd_micros": self._maybe(self.chance.choice([1_000, 1_001, 9_999])),
            "daily_budget_usd_micros": self._budget(),
            "placements": self._some(["search"], 0.2),
            "starts_at": self._when(),
            **targeted,
            **excluded,
        }

    def _ads(self) -> Row:
        return {
            "ad_group_id": self.chance.choice(KEYS["ad_groups"]),
            "pin_id": self._maybe(self.chance.choice(KEYS["pins"]), 0.95),
            "status": self._status(),
            "review_status": self.chance.choice(["approved"] * 9 + ["pending"]),
            "bid_multiplier": self._maybe(2.0),
            "impressions_7d": self._maybe(500),
            "clicks_7d": self._maybe(self.chance.choice([0, 7])),
            "hides_7d": self._maybe(30),
        }

    def _pins(self) -> Row:
        return {
            "image_signature": self._maybe(self.chance.choice(KEYS["images"]), 0.95),
            "category": self._maybe(self.chance.choice(CATEGORIES)),
            "is_available": self.chance.choice([True, True, None, False]),
        }

    def _images(self) -> Row:
        shares = {"sharpness": self._maybe(0.7), "safety": self._maybe(0.9), "text_share": self._maybe(0.25)}
        return {**shares, "visual_embedding": self._maybe(list(embedding(self.chance)))}

    def change(self) -> None:
        """A row says something else; of some of the control rows an entry is sent, late or never."""
        table = self.chance.choice(list(KEYS))
        key = self.chance.choice(KEYS[table])
        stand = self.rows[table][key]["stand"] + self.chance.randrange(1, 4)
        if table in LIGHT and self.rows[table][key]["is_there"] and self.chance.random() < 0.7:
            light = {name: value for name, value in self._row(table, stand).items() if name in LIGHT[table]}
            self.rows[table][key] = {**self.rows[table][key], "stand": stand, **light}
        else:
            self.rows[table][key] = self._row(table, stand)

    def entry(self) -> Entry:
        """An entry of a row as it is, now and then as if it had been older."""
        table = self.chance.choice(list(LIGHT))
        key = self.chance.choice(KEYS[table])
        row = self.rows[table][key]
        stand = max(1, row["stand"] - self.chance.choice([0, 0, 0, 2]))
        values = {name: row.get(name) for name in LIGHT[table]}
        if stand != row["stand"]:
            values |= {"status": "paused"}
        return Entry(table, key, stand, values)

    def took(self, entry: Entry) -> None:
        """The oracle knows an entry: the greatest stand of a row counts."""
        held = self.entries.get((entry.table, entry.key))
        if held is None or entry.stand > held.stand:
            self.entries[entry.table, entry.key] = entry

    def documents(self, ads: list[str]) -> Made:
        """Ads' documents are made of the rows as they are."""
        self._time += 1
        parts = []
        made = {ad: {table: dict(row) for table, row in self._joined(ad).items()} for ad in ads}
        for family, inputs in joined.INPUTS.items():
            names = {
                i.table: {f.name for f in joined.arrow_schema(family).field(i.table).type} for i in inputs
            }
            rows = [
                {
                    "ad_id": ad,
                    **{
                        table: {name: value for name, value in row.items() if name in names[table]}
                        for table, row in made[ad].items()
                        if table in names
                    },
                }
                for ad in ads
            ]
            parts.append(ads_world.facts_of(family, joined.joined(family, rows)))
        return Made(self._time, made, pa.concat_tables(parts))

    def arrived(self, made: Made) -> None:
        """Documents are served from now on, where no later ones are."""
        for ad, rows in made.rows.items():
            if made.time > self.made_at.get(ad, 0):
                self.made[ad], self.made_at[ad] = rows, made.time

    def _joined(self, ad: str) -> dict[str, Row]:
        found = {"ads": self.rows["ads"][ad]}
        for table, (by, column) in {
            "ad_groups": ("ads", "ad_group_id"),
            "campaigns": ("ad_groups", "campaign_id"),
            "advertisers": ("campaigns", "advertiser_id"),
            "pins": ("ads", "pin_id"),
            "images": ("pins", "image_signature"),
        }.items():
            key = found.get(by, {}).get(column)
            if key is not None:
                found[table] = self.rows[table][key]
        return found


def context_of(chance: random.Random) -> Context:
    """A request, with some things said and others not."""
    said = {
        dimension: [value for value in spelled if chance.random() < 0.6]
        for dimension, (_, _, spelled) in SPELLED.items()
    }
    one = {name: values[0] for name, values in said.items() if name not in ("interest", "keyword") and values}
    return Context(
        **one,
        placement=chance.choice([None, "search", "board"]),
        interests=tuple(said["interest"]),
        keywords=tuple(said["keyword"]),
        category=chance.choice([None, None, "home", "Toys "]),
        excluded_advertisers=chance.choice([(), (), ("v1",)]),
        excluded_categories=chance.choice([(), (), ("toys",)]),
        visual_embedding=chance.choice([None, None, embedding(chance)]),
    )


def embedding(chance: random.Random) -> tuple[float, ...]:
    """Of an image, or of what is looked for: few different ones, of which some are equally near."""
    return tuple(chance.choice([(1.0, 0.0), (0.0, 2.0), (-1.0, 0.5)]) + (0.0,) * (DIMENSIONS - 2))


# ------------------------------------------------------------------------------------------------------------- oracle


def as_served(world: World, ad: str) -> tuple[dict[str, Row], list[Entry]]:
    """The rows that an ad's document was made of, with the values of newer entries; and these."""
    rows, newer = {table: dict(row) for table, row in world.made[ad].items()}, []
    keys = {"ads": ad}
    for table, by, column in (
        ("ad_groups", "ads", "ad_group_id"),
        ("campaigns", "ad_groups", "campaign_id"),
        ("advertisers", "campaigns", "advertiser_id"),
    ):
        if (key := rows.get(by, {}).get(column)) is not None:
            keys[table] = key
    for table in CONTROL_TABLES:
        entry = world.entries.get((table, keys.get(table, "")))
        if entry is not None and entry.stand > rows.get(table, {}).get("stand", 0):
            rows[table] = {**rows.get(table, {}), **entry.values}
            newer.append(entry)
    return rows, newer


def clean(text: str) -> str:
    return text.strip().lower()


def is_eligible(rows: Mapping[str, Row], context: Context, time_ms: int) -> bool:
    """Whether an ad of these rows may be shown."""
    if not all(rows.get(table, {}).get("is_there") for table in (*CONTROL_TABLES, "pins", "images")):
        return False
    ad, group, campaign, advertiser = (rows[table] for table in CONTROL_TABLES)
    if any(row.get("status") != "active" for row in (ad, group, campaign, advertiser)):
        return False
    if ad["review_status"] != "approved":
        return False
    said: dict[str, set[str]] = {
        "countries": {context.country or ""},
        "languages": {context.language or ""},
        "age_buckets": {context.age or ""},
        "genders": {context.gender or ""},
        "devices": {context.device or ""},
        "interests": set(context.interests),
        "keywords": set(context.keywords),
        "placements": {context.placement or ""},
    }
    for column, values in said.items():
        asked = {clean(value) for value in values if value}
        if group.get(column) and not asked & {clean(value) for value in group[column]}:
            return False
        if asked & {clean(value) for value in group.get(f"excluded_{column}") or ()}:
            return False
    if context.category and clean(context.category) in map(clean, advertiser.get("blocked_categories") or ()):
        return False
    if any(row.get("starts_at") is not None and row["starts_at"] > time_ms for row in (group, campaign)):
        return False
    if campaign.get("ends_at") is not None and campaign["ends_at"] <= time_ms:
        return False
    of_group = None if campaign.get("is_budget_shared") else group.get("daily_budget_usd_micros")
    limits = (
        of_group,
        campaign.get("daily_budget_usd_micros"),
        campaign.get("lifetime_budget_usd_micros"),
        advertiser.get("balance_usd_micros"),
    )
    if 0 in limits or group.get("bid_usd_micros") is None:
        return False
    if campaign["advertiser_id"] in context.excluded_advertisers:
        return False
    pin = rows["pins"]
    return pin.get("is_available") is not False and pin.get("category") not in context.excluded_categories


def or_else(value: Any, default: float) -> float:
    return default if value is None else value


def score(rows: Mapping[str, Row], context: Context) -> float | None:
    """What an impression is worth, or how alike the image is, if that is asked; None: it has nothing to compare."""
    ad, image = rows["ads"], rows["images"]
    if context.visual_embedding is not None:
        own = image["visual_embedding"]
        return None if own is None else sum(map(operator.mul, own, context.visual_embedding))
    multiplier = or_else(ad["bid_multiplier"], 1.0) * or_else(rows["campaigns"]["bid_multiplier"], 1.0)
    bid = math.floor(rows["ad_groups"]["bid_usd_micros"] * multiplier)
    shown = or_else(ad["impressions_7d"], 0) + 1000
    quality = (or_else(image["sharpness"], 0.5) + 0.5 + 0.5) / 3
    quality *= (1 - 0.5 * or_else(image["text_share"], 0)) * or_else(image["safety"], 0.5)
    clicks, hides = (or_else(ad["clicks_7d"], 0) + 5) / shown, or_else(ad["hides_7d"], 0) / shown
    return bid * clicks * (0.5 + quality) * (1 - hides)


def check(world: World, served: Overridden) -> None:
    """What is answered is what the oracle says."""
    there = {ad: as_served(world, ad) for ad, rows in world.made.items() if rows["ads"]["is_there"]}
    assert dict(served.newer) == {ad.encode(): tuple(newer) for ad, (_, newer) in there.items() if newer}
    for ad, (rows, newer) in there.items():
        document = served.view.get([ad.encode()])[0]
        assert document is not None and document["control"]["ad_status"] == rows["ads"]["status"]
        assert document["control"]["balance_usd_micros"] == rows.get("advertisers", {}).get(
            "balance_usd_micros"
        )
        assert overrides.newer_than(served.view, ad.encode()) == tuple(newer)
    for _ in range(3):
        context, time_ms = context_of(world.chance), world.chance.choice([5, 10, 15, 20, 25, 40])
        eligible = [ad for ad, (rows, _) in there.items() if is_eligible(rows, context, time_ms)]
        scored = sorted(
            (-worth, ad) for ad in eligible if (worth := score(there[ad][0], context)) is not None
        )
        k = world.chance.choice([1, 3, 500])
        found = retrieval.candidates(served.view, context, time_ms, k)
        assert len(found) == len(scored[:k])
        by_ad = {ad: -negative for negative, ad in scored}
        assert [key.decode() for key, _ in found] == [ad for _, ad in scored[:k]]
        assert all(math.isclose(by_ad[key.decode()], value, rel_tol=1e-12) for key, value in found)


def check_as_from_nothing(served: Overridden, entries: Entries, chance: random.Random) -> None:
    """What was kept from step to step is what one look at everything makes."""
    ads = [ad.encode() for ad in KEYS["ads"]]
    whole = overrides.over(served.plain, entries, [], None)
    assert dict(served.newer) == dict(whole.newer)
    assert served.view.get(ads) == whole.view.get(ads)
    assert served.view.position == whole.view.position
    columns = ("ad_group_id", "ad_status", "targeting_terms")
    assert served.view.values(CONTROL, columns, ads) == whole.view.values(CONTROL, columns, ads)
    for family in joined.INPUTS:
        assert served.view.versions(family, ads).tolist() == whole.view.versions(family, ads).tolist()
    for field, keys in (("ad_group", "ad_groups"), ("campaign", "campaigns"), ("servable", "")):
        for term in KEYS.get(keys, [True, False]):
            assert served.view.match({field: term}) == whole.view.match({field: term})
    asked = context_of(chance), chance.choice([5, 10, 15, 20, 25, 40]), 500
    assert retrieval.candidates(served.view, *asked) == retrieval.candidates(whole.view, *asked)


def run(seed: int, steps: int) -> None:
    """An account that changes, whose documents come late, and whose bases are swapped."""
    chance = random.Random(seed)
    world, entries = World(chance), Entries()
    folder = Path(tempfile.mkdtemp(prefix="tidemark-", dir=SCRATCH))
    try:
        first = world.documents(KEYS["ads"][: chance.randrange(9)])
        world.arrived(first)
        facts, late = [first.facts], list[Made]()
        view = DocumentsView(bases.empty(ADS)).folded(facts[0], EMPTY)
        served: Overridden | None = None
        for step in range(steps):
            fresh: list[Entry] = []
            match chance.choice(
                ["change", "change", "entry", "entry", "document", "document", "base", "forget"]
            ):
                case "change":
                    for _ in range(chance.randrange(1, 5)):
                        world.change()
                case "entry":
                    for _ in range(chance.randrange(1, 5)):
                        entry = world.entry()
                        world.took(entry)
                        if entries.add(entry):
                            fresh.append(entry)
                case "document":
                    late.append(world.documents(chance.sample(KEYS["ads"], chance.randrange(1, 4))))
                    if chance.random() < 0.7:
                        made = late.pop(chance.randrange(len(late)))
                        world.arrived(made)
                        facts.append(made.facts)
                        view = view.folded(made.facts, EMPTY)
                case "base":
                    known = facts[: chance.randrange(len(facts) + 1)]  # what came after it is in the delta
                    if known and sum(table.num_rows for table in known):
                        base = ads_world.base_of(
                            pa.concat_tables(known), folder / f"b{step}", chance.choice([1, 2])
                        )
                        view = DocumentsView(base)
                        for table in facts:
                            view = view.folded(table, EMPTY)
                case "forget":
                    served = None
            served = overrides.over(view, entries, fresh, served)
            check(world, served)
            check_as_from_nothing(served, entries, chance)
    finally:
        shutil.rmtree(folder)


@contextmanager
def few_rows(count: int) -> Iterator[None]:
    """Walk from the best down where more documents than this pass."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "FEW_ROWS", count)
        yield


@cases(60)
@given(st.integers(0, 2**32), st.integers(1, 12), st.sampled_from([1, 8_192]))
def test_candidates_equal_the_oracle(seed: int, steps: int, count: int) -> None:
    with few_rows(count):
        run(seed, steps)


BUGS: dict[str, tuple[Any, str, Callable[[Any], Any]]] = {
    "the placement is not asked of": (
        retrieval,
        "_filter",
        lambda made: lambda context: made(context)._replace(clauses=made(context).clauses[:-1]),
    ),
    "an ad that has no money left is shown": (retrieval, "_MONEY", lambda money: money[1:]),
    "an older entry counts, too": (
        Entries,
        "add",
        lambda add: lambda entries, entry: _taken(add, entries, entry),
    ),
    "the ads of an advertiser are not found": (
        overrides,
        "_FIELDS",
        lambda fields: {**fields, "advertisers": "campaign"},
    ),
    "an ad whose document has caught up stays under its entries": (
        Layer,
        "without",
        lambda without: lambda layer, spec, keys: layer,
    ),
    "an ad whose document has caught up is still found as it was under its entries": (
        documents.changed,
        "pruned",
        lambda pruned: lambda parts: tuple((part, is_alive | True) for part, is_alive in parts),
    ),
    "an ad under entries is not looked at again when its document changes": (
        DocumentsView,
        "keys_since",
        lambda keys_since: lambda view, fold: [],
    ),
    "an ad under entries is found as its document says, too": (
        documents.changed.Changed,
        "under",
        lambda under: (
            lambda held, base, above: documents.changed.Changed((*held._parts, *above), held._masks)
        ),
    ),
}


def _taken(add: Callable[[Entries, Entry], bool], entries: Entries, entry: Entry) -> bool:
    entries._held[entry.table].pop(entry.key, None)
    return add(entries, entry)


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_found(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, name, planted = BUGS[bug]
    monkeypatch.setattr(owner, name, planted(getattr(owner, name)))
    with pytest.raises(AssertionError):
        run_many(150)


def run_many(count: int) -> None:
    """So many accounts."""
    for seed in range(count):
        run(seed, 12)


def test_a_document_that_was_made_before_an_entry_and_comes_after_it_is_under_it() -> None:
    entries = Entries()
    limits = {"daily_budget_usd_micros": None, "lifetime_budget_usd_micros": None}
    entry = Entry("campaigns", "c1", 2, {"status": "paused", **limits})
    assert entries.add(entry)
    empty = DocumentsView(bases.empty(ADS))
    before = overrides.over(empty, entries, [entry], None)
    assert not before.newer
    view = empty.folded(serving_world.ads_facts(serving_world.account()), EMPTY)
    served = overrides.over(view, entries, [], before)
    assert dict(served.newer) == dict.fromkeys((b"a1", b"a2", b"a3"), (entry,))
    shown = retrieval.candidates(served.view, Context(country="US"), 5, 10)
    assert [key for key, _ in shown] == [b"a4"]


def test_only_ads_that_changed_are_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[list[bytes]] = []
    make = overrides._made_again
    monkeypatch.setattr(
        overrides, "_made_again", lambda view, newer: made.append(sorted(newer)) or make(view, newer)
    )
    rows = serving_world.account()
    view = DocumentsView(bases.empty(ADS)).folded(serving_world.ads_facts(rows), EMPTY)
    entries = Entries()
    paused = [Entry("ads", ad, 2, {"status": "paused"}) for ad in ("a1", "a2", "a4")]
    assert all(entries.add(entry) for entry in paused)
    served = overrides.over(view, entries, paused, None)
    changed = {**rows, "ads": {"a1": rows["ads"]["a1"] | {"stand": 2}, "a2": rows["ads"]["a2"]}}
    view = view.folded(serving_world.ads_facts(changed), Position({"moved": {0: 1}}, frozenset()))
    served = overrides.over(view, entries, [], served)
    fresh = Entry("ads", "a3", 2, {"status": "active"})
    assert entries.add(fresh)
    served = overrides.over(view, entries, [fresh], served)
    assert made == [[b"a1", b"a2", b"a4"], [], [b"a3"]]  # a1 has caught up, and a2 is as it was
    assert served.view.position == view.position
    assert set(served.newer) == {b"a2", b"a3", b"a4"}
    shown = retrieval.candidates(served.view, Context(country="US"), 5, 10)
    assert [key for key, _ in shown] == [b"a1", b"a3"]


def test_a_layer_is_not_merged_with_the_runs_below_it_and_stays_shallow() -> None:
    rows = serving_world.account()
    view = DocumentsView(bases.empty(ADS)).folded(serving_world.ads_facts(rows), EMPTY)
    entries, served = Entries(), None
    for stand in range(2, 60):
        key = f"a{1 + stand % 4}"
        entry = Entry("ads", key, stand, {"status": ("active", "paused")[stand % 3 % 2]})
        assert entries.add(entry)
        if stand % 7 == 0:
            caught_up = {**rows, "ads": {key: rows["ads"][key] | {"stand": stand}}}
            view = view.folded(serving_world.ads_facts(caught_up), EMPTY)
        served = overrides.over(view, entries, [entry], served)
        assert served.view.runs[: len(view.runs)] == view.runs
        assert sum(len(run) for run in served.layer.runs) <= 2 * len(served.newer)
        assert len(served.layer.runs) <= 3 and len(served.layer.parts) <= 3
        check_as_from_nothing(served, entries, random.Random(stand))
