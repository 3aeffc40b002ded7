"""The demo's part about ads: a small real account is served, a campaign is paused, and the answer is another one.

Here: sending the account, asking for ads on a day of 2017, and the checks. Which ads are eligible is worked out from
the records that were sent, and shares no code with `pipelines.ads.retrieval`.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any

from jobs import client, console
from jobs.story import Check, DemoError, headline, say
from pipelines.ads import complete_journey, repository
from pipelines.ads.complete_journey import Record
from pipelines.contracts import ADS_CHANGES
from pipelines.ingest.producer import Producer
from pipelines.settings import Settings

ASKED_AT = datetime(2017, 12, 10, 12, tzinfo=UTC)
INTERESTS = ("CHEESE", "CRACKERS/MISC BKD FD", "FROZEN PIE/DESSERTS", "FROZEN PIZZA")
CAMPAIGN = "18"
SHOWN = 5
_ALL = 500  # more than are eligible, and as many as a call gives
_AT_ONCE = 500
_POLL_S = 0.02

Ad = dict[str, Any]


def show(settings: Settings, base: str) -> list[Check]:
    """Send what is new of the account, ask for ads, pause a campaign, ask again, resume it."""
    headline("A grocer's coupon campaigns of 2017 as an ads account, through Kafka")
    records = complete_journey.records()
    ads = [record["key"] for record in records if record["table"] == "ads"]
    with Producer(settings) as producer:
        send_account(settings, producer, records)
        served = await_served(base, ads)
        if any(ad["control"]["campaign_status"] != "active" for ad in served.values()):
            set_status(producer, "active")  # an interrupted demo left it paused
            await_candidates(base, _are_equal(eligible(records)))
        before = candidates(base)
        headline(f"Ads on {ASKED_AT:%d %B %Y} for somebody who likes {', '.join(INTERESTS).lower()}")
        _print(before, served)
        try:
            set_status(producer, "paused")
            paused, paused_s = await_candidates(
                base, lambda found: all(ad["campaign_id"] != CAMPAIGN for ad in found)
            )
            headline(f"Campaign {CAMPAIGN} is paused: ads {paused_s:.2f} s later")
            _print(paused, served)
        finally:
            set_status(producer, "active")
        resumed, resumed_s = await_candidates(base, lambda found: found == before)
        say(f"resumed: the answer is as before {resumed_s:.2f} s later")
    found = [ad["ad_id"] for ad in before]
    return [
        Check(
            "every ad of the account is served", len(served) == len(ads), f"{len(served):,} = {len(ads):,}"
        ),
        Check(
            "the ads are exactly those of the day's campaigns and of the interests",
            sorted(found) == sorted(eligible(records)),
            f"{len(found)} ads of campaigns {', '.join(sorted({ad['campaign_id'] for ad in before}))}",
        ),
        Check(
            "a pause takes its campaign's ads out of the answer, and no other",
            paused == [ad for ad in before if ad["campaign_id"] != CAMPAIGN] and paused != before,
            f"{len(before) - len(paused)} fewer, {paused_s:.2f} s after the producer's call",
        ),
        Check(
            "resumed, the answer is as before",
            resumed == before,
            f"{resumed_s:.2f} s after the producer's call",
        ),
    ]


# ------------------------------------------------------------------------------------------------ sending


def send_account(settings: Settings, producer: Producer, records: Sequence[Record]) -> None:
    """Send what the repository does not know of the account."""
    store = repository.opened(settings)
    try:
        new = complete_journey.unknown_to(store, records)
    finally:
        store.close()
    producer.send_objects(ADS_CHANGES, new)
    counts = {
        table: sum(1 for _ in rows) for table, rows in itertools.groupby(records, lambda one: one["table"])
    }
    say(", ".join(f"{count:,} {table.replace('_', ' ')}" for table, count in counts.items()))
    say(f"{len(new):,} of {len(records):,} rows are sent" if new else "all of it is there already")


def set_status(producer: Producer, status: str) -> None:
    """Change the campaign's status now; a later change has a greater version."""
    change = {
        "table": "campaigns",
        "key": CAMPAIGN,
        "version": time.time_ns() // 1_000_000,
        "event_time": datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "values": {"status": status},
    }
    producer.send_objects(ADS_CHANGES, [change])


# ------------------------------------------------------------------------------------------------ asking


def await_served(base: str, ads: Sequence[str], timeout_s: float = 120.0) -> dict[str, Ad]:
    """The documents of all these ads, as soon as each has all of its families.

    Raises:
        DemoError: They are not there in time.
    """
    began = time.monotonic()
    served: dict[str, Ad] = {}
    while missing := [ad for ad in ads if ad not in served]:
        if time.monotonic() - began > timeout_s:
            raise DemoError(
                f"{len(missing):,} of {len(ads):,} ads are not served",
                remedy=f"see `tidemark status`, and `tidemark ads enrich {missing[0]}`",
            )
        for start in range(0, len(missing), _AT_ONCE):
            body = {"ad_ids": missing[start : start + _AT_ONCE]}
            found = client.request(base, "/v1/ads:batchGet", body=body).body["documents"]
            served |= {ad["ad_id"]: ad for ad in found if is_whole(ad)}
        time.sleep(10 * _POLL_S)
    say(f"all {len(ads):,} ads are served {time.monotonic() - began:.1f} s later")
    return served


def is_whole(ad: Ad) -> bool:
    """Whether a document has all of its families, and the rows that they are joined of."""
    return (
        all(ad.get(family) is not None for family in ("control", "content", "performance"))
        and ad["control"]["has_campaign"]
        and ad["content"]["has_image"]
    )


def candidates(base: str) -> list[Ad]:
    """All the ads that may be shown to somebody of these interests on that day, the best first."""
    context = {"time_ms": int(ASKED_AT.timestamp() * 1000), "interests": INTERESTS}
    answer = client.request(base, "/v1/ads:candidates", body={"context": context, "k": _ALL})
    found: list[Ad] = answer.body["ads"]
    return found


def await_candidates(
    base: str, are_right: Callable[[list[Ad]], bool], timeout_s: float = 30.0
) -> tuple[list[Ad], float]:
    """The first answer that is right, or the last within the time; and how many seconds that took."""
    began = time.monotonic()
    while True:
        found, taken_s = candidates(base), time.monotonic() - began
        if are_right(found) or taken_s > timeout_s:
            return found, taken_s
        time.sleep(_POLL_S)


def eligible(records: Sequence[Record]) -> list[str]:
    """The ads of the campaigns of that day and of the ad groups for these interests, as the records say."""
    of = {(record["table"], record["key"]): record["values"] for record in records}
    at_ms = ASKED_AT.timestamp() * 1000
    found = []
    for (table, key), ad in of.items():
        if table == "ads":
            group = of["ad_groups", ad["ad_group_id"]]
            campaign = of["campaigns", group["campaign_id"]]
            is_running = campaign["starts_at"] <= at_ms < campaign["ends_at"]
            if is_running and set(group["interests"]) & set(INTERESTS):
                found.append(key)
    return found


def _are_equal(ads: Sequence[str]) -> Callable[[list[Ad]], bool]:
    return lambda found: sorted(ad["ad_id"] for ad in found) == sorted(ads)


def _print(ads: Sequence[Ad], served: dict[str, Ad]) -> None:
    rows = []
    for place, ad in enumerate(ads[:SHOWN], 1):
        document = served[ad["ad_id"]]
        content, performance = document["content"], document["performance"]
        used = f"{performance['conversions_7d']} of {performance['impressions_7d']}"
        rows.append((place, ad["ad_id"], f"{ad['score']:.0f}", content["title"], content["category"], used))
    columns = ("", "ad (campaign:coupon)", "score", "shows", "category", "used in its first week")
    console.table("", columns, rows, f"{len(ads)} ads" if len(ads) > SHOWN else "")
