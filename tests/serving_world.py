"""A small world to serve: real bases, built in this process and published, followed by a real replica.

Belongs here: making it, and live facts for it. Used by the tests of serving.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines import indices
from pipelines.ads.joined import INPUTS
from pipelines.contracts import ACTIONS
from pipelines.indexing import build, delta, facts
from pipelines.indexing.position import EMPTY, Position
from pipelines.indexing.replica import Replica
from pipelines.indexing.spec import lineage
from pipelines.indexing.versions import Versions
from pipelines.recommend import fold_in
from pipelines.settings import Settings
from tests import ads_world
from tests.ads_world import Rows

INTERACTIONS, UPDATES, FOLLOWS = "user-interactions@one", "pin-updates@two", "user-follows@three"
MODEL_ID = "pin_als/7"
DAY_MS = 86_400_000
NEWEST_MS = 1_700_000_000_000
PIN_COUNT = 40
CUT = 10
ODD_PIN = "50%/ünï.code pin?#"
ODD_USER = "a/b%2F..\u2028☃"
NO_VECTOR, NO_OFFER, UNAVAILABLE = "never-sold", "no-offer", "gone-out"
VECTORS = np.random.default_rng(5).normal(size=(PIN_COUNT, 32)).astype(np.float32)
PINS = [str(i) for i in range(PIN_COUNT - 3)] + [ODD_PIN, NO_OFFER, UNAVAILABLE]
PARAMETERS = fold_in.Parameters(MODEL_ID, fold_in.gram_of(VECTORS))

Row = dict[str, Any]
SEEN = ("surface", "ad_id", "campaign_id", "advertiser_id", "category", "view_type")


def event(user: str, event_id: str, pin: str, action: str, time_ms: int, **said: Any) -> tuple[Row, Row]:
    """An event, as the two indices of what users do hold it."""
    common = {
        "identity": [user.encode(), event_id.encode()],
        "id": event_id.encode(),
        "time_ms": time_ms,
        "version": said.get("version", (1,)),
        "content_hash": 1,
        "is_deleted": said.get("is_deleted", False),
    }
    payload = {
        "pin_id": pin,
        "action": action,
        "quantity": said.get("quantity"),
        "value_usd_micros": None,
        **{name: said.get(name) for name in SEEN},
    }
    happened = common | {"family": "interactions", "key": user.encode(), "payload": payload}
    counted = common | {
        "family": "counts",
        "key": pin.encode(),
        "amounts": [int(action == one) for one in ACTIONS],
        "payload": {"user_id": user, "action": action},
    }
    return happened, counted


def pin(pin_id: str, version: int = 1, is_deleted: bool = False, **said: Any) -> list[Row]:
    """A pin's catalogue and offer."""
    common = {
        "identity": [pin_id.encode()],
        "key": pin_id.encode(),
        "version": (version,),
        "is_deleted": is_deleted,
    }
    catalogue = {
        "title": f"pin {pin_id}",
        "category": said.get("category", "fruit"),
        "department": "food",
        "brand": None,
    }
    rows = [common | {"family": "catalogue", "content_hash": 1, "payload": catalogue}]
    if said.get("offer", True):
        offer = {"price_usd_micros": 1_500_000, "is_available": said.get("is_available", True)}
        rows.append(common | {"family": "offer", "content_hash": 2, "payload": offer})
    return rows


def follow(
    user: str, since_ms: int, *, pin: str | None = None, followed: str | None = None, **said: Any
) -> Row:
    """A follow of a pin or of a user, as the index of follows holds it."""
    about = (f"p{pin}" if followed is None else f"u{followed}").encode()
    return {
        "family": "follows",
        "identity": [user.encode(), about],
        "key": user.encode(),
        "id": about,
        "time_ms": since_ms,
        "version": (said.get("version", 1),),
        "content_hash": 1,
        "is_deleted": said.get("is_deleted", False),
        "payload": {"pin_id": pin, "followed_user_id": followed, "version": said.get("version", 1)},
    }


def change(pin_id: str, version: int, time_ms: int, is_gone: bool = False, **said: Any) -> list[Row]:
    """What a record said of a pin, as the index of changes holds it: its title and its offer, where they are said."""
    rows = []
    for family, names in (("catalogue", ("title",)), ("offer", ("price_usd_micros", "is_available"))):
        told = {name: said[name] for name in names if name in said}
        if told or is_gone:
            about = f"{version:016x} {family}".encode()
            rows.append(
                {
                    "family": "changes",
                    "identity": [pin_id.encode(), about],
                    "key": pin_id.encode(),
                    "id": about,
                    "time_ms": time_ms,
                    "version": (version,),
                    "content_hash": 1,
                    "payload": {"version": version, "family": family, "is_gone": is_gone, **told},
                }
            )
    return rows


def follows() -> list[Row]:
    """The user `fan` follows pins 1, 2 and an odd one, and the users u1 and u2, the last two days or longer."""
    return [
        follow("fan", NEWEST_MS - 10 * DAY_MS, pin="1"),
        follow("fan", NEWEST_MS - 2 * DAY_MS, pin="2"),
        follow("fan", NEWEST_MS - 3 * DAY_MS, pin=ODD_PIN),
        follow("fan", NEWEST_MS - 4 * DAY_MS, followed="u1"),
        follow("fan", NEWEST_MS - 4 * DAY_MS, followed=ODD_USER),
        follow("fan", NEWEST_MS - 5 * DAY_MS, pin="3", version=2, is_deleted=True),
    ]


def changes() -> list[Row]:
    """Pins 1 to 3 and an odd one: new forty days ago, and cheaper three days ago."""
    rows: list[Row] = []
    for pin_id in ("1", "2", "3", ODD_PIN):
        rows += change(
            pin_id,
            1,
            NEWEST_MS - 40 * DAY_MS,
            title=f"pin {pin_id}",
            price_usd_micros=2_000_000,
            is_available=True,
        )
        rows += change(pin_id, 2, NEWEST_MS - 3 * DAY_MS, price_usd_micros=1_500_000, is_available=True)
    return rows


def history() -> list[tuple[Row, Row]]:
    """Who bought what: users u0 to u9, with what is popular at several distances from the newest time."""
    rows = []
    for user in range(10):
        for n in range(8):
            bought = str((user * 5 + n * 3) % 30)
            rows.append(event(f"u{user}", f"e{n}", bought, "purchase", NEWEST_MS - n * 5 * DAY_MS - user))
    rows.append(event(ODD_USER, "e/1", "3", "purchase", NEWEST_MS - DAY_MS))
    rows.append(event("viewer", "e1", "3", "sing", NEWEST_MS - DAY_MS))
    rows.append(event("newcomer", "e1", NO_VECTOR, "purchase", NEWEST_MS - DAY_MS))
    rows.append(event("u0", "gone", "unknown-pin", "purchase", NEWEST_MS - DAY_MS))
    return rows


def catalogue() -> list[Row]:
    """All pins."""
    rows: list[Row] = []
    for number, pin_id in enumerate(PINS):
        category = ("fruit", "bread", "milk")[number % 3]
        rows += pin(pin_id, category=category, offer=pin_id != NO_OFFER, is_available=pin_id != UNAVAILABLE)
        key = pin_id.encode()
        payload = {"vector": VECTORS[number].tolist()}
        rows.append(
            {
                "family": "embedding",
                "identity": [key],
                "key": key,
                "version": (1,),
                "content_hash": 3,
                "payload": payload,
            }
        )
    return rows + pin(NO_VECTOR, category="milk") + pin("alone", category="nobody else")


def publish(
    settings: Settings, index: str, rows: Iterable[Row], cut: Position, parameters: Mapping[str, Any]
) -> str:
    """Build a base of rows and publish it."""
    spec = indices.INDICES[index]
    versions = Versions(settings.paths.indices, index)
    version = versions.new_version(lineage(spec))
    models = {"embedding": MODEL_ID} if index == "pins" else {}
    meta = build.Meta(version, cut, models=models, parameters=parameters)
    build.build_local(spec, facts.table(spec, rows), Path(versions.new_path(version)), meta)
    versions.publish(version)
    return version


def account() -> Rows:
    """A small ads account: a1 to a3 in a group for the US and of one campaign, a4 for everybody in one of its own."""
    active = {"status": "active"}
    ad = {**active, "review_status": "approved", "pin_id": "p1", "ad_group_id": "g1"}
    group = {**active, "bid_usd_micros": 1_000_000}
    return {
        "advertisers": {"v1": {**active, "balance_usd_micros": 5_000_000}},
        "campaigns": {key: {**active, "advertiser_id": "v1"} for key in ("c1", "c2")},
        "ad_groups": {
            "g1": {**group, "campaign_id": "c1", "countries": ["US"]},
            "g2": {**group, "campaign_id": "c2"},
        },
        "ads": {
            "a1": ad,
            "a2": {**ad, "bid_multiplier": 2.0},
            "a3": {**ad, "status": "paused"},
            "a4": {**ad, "ad_group_id": "g2", "bid_multiplier": 0.5},
        },
        "pins": {"p1": {"image_signature": "i1", "title": "A red Chair", "is_available": True}},
        "images": {"i1": {"sharpness": 0.5}},
    }


def ads_facts(rows: Rows) -> pa.Table:
    """The facts of all ads of an account, as its handlers make them."""
    families = (ads_world.joined_rows(family, rows, rows["ads"]) for family in INPUTS)
    return pa.concat_tables(map(ads_world.facts_of, INPUTS, families))


def build_world(settings: Settings) -> dict[str, str]:
    """Publish a base of each index; returns their versions."""
    cut = Position({INTERACTIONS: {0: CUT}}, frozenset())
    events = history()
    return {
        "pins": publish(
            settings,
            "pins",
            catalogue(),
            Position({UPDATES: {0: CUT}}, frozenset()),
            {"als": PARAMETERS.to_json()},
        ),
        "user_events": publish(settings, "user_events", [happened for happened, _ in events], cut, {}),
        "pin_counts": publish(settings, "pin_counts", [counted for _, counted in events], cut, {}),
        "user_follows": publish(
            settings, "user_follows", follows(), Position({FOLLOWS: {0: CUT}}, frozenset()), {}
        ),
        "pin_changes": publish(
            settings, "pin_changes", changes(), Position({UPDATES: {0: CUT}}, frozenset()), {}
        ),
        "ads": ads_world.publish(settings, ads_facts(account())),
        "user_profiles": publish(settings, "user_profiles", [], cut, {}),  # a test folds in what fired
    }


def correct(settings: Settings, pin_ids: tuple[str, str], user_ids: tuple[str, str]) -> None:
    """Commit a delta of one epoch after the bases: of the two users' events e0 and e1 the first is edited, the second
    deleted, and one is added; of the two pins the first is set anew, the second deleted."""
    edited, deleted = user_ids
    happened = [
        event(edited, "e0", pin_ids[0], "save", NEWEST_MS, version=(9,)),
        event(deleted, "e1", pin_ids[0], "save", NEWEST_MS, version=(9,), is_deleted=True),
        event(deleted, "live", pin_ids[1], "purchase", NEWEST_MS),
    ]
    arrived = {
        "user_events": (INTERACTIONS, [row for row, _ in happened]),
        "pin_counts": (INTERACTIONS, [row for _, row in happened]),
        "pins": (UPDATES, [*pin(pin_ids[0], version=7), *pin(pin_ids[1], version=9, is_deleted=True)]),
    }
    for index, (topic, rows) in arrived.items():
        spec = indices.INDICES[index]
        writer = delta.DeltaWriter(spec, delta.table_path(settings.paths.delta, index, lineage(spec)))
        end = Position({topic: {0: CUT + len(rows)}}, frozenset())
        writer.commit(delta.Marker("live", 1, 0, EMPTY, end), facts.table(spec, rows))


@contextmanager
def followed(settings: Settings) -> Iterator[Replica]:
    """A replica that has caught up with all bases, until the end."""
    replica = indices.replica(settings)
    replica.start()
    try:
        deadline = time.monotonic() + 60
        while not (replica.is_ready and all(f.view.base.version for f in replica.followers.values())):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        yield replica
    finally:
        replica.stop()


class Still:
    """A follower's face over a view that a test changes itself: `fold` is what an epoch would do."""

    def __init__(self, follower: Any) -> None:
        self.view = follower.view
        self.topics = follower.topics
        self.versions = follower.versions
        self.status = follower.status
        self.meter = follower.meter
        self.is_stale = False
        self.is_ready = True

    def covers(self, position: Position) -> bool:
        """As a follower does."""
        return bool(self.view.position.covers(position.restricted_to(self.topics)))

    def fold(self, rows: Iterable[Row], position: Position = EMPTY) -> None:
        """Fold rows in, as the next epoch."""
        self.view = self.view.folded(facts.table(self.view.spec, rows), position)


def still(replica: Replica) -> Replica:
    """A replica with the views of another as they are, and no threads."""
    return Replica({index: Still(follower) for index, follower in replica.followers.items()})  # type: ignore[misc]
