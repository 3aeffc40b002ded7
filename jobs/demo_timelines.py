"""The demo's part about timelines: each household's is what the source says of it, and so is what is asked of them.

Here: the source's purchases read by pyarrow and pandas, and the checks. It shares no code with `pipelines.users` and
knows of the load only what its columns mean; Spark is not started.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from jobs import client
from jobs.story import Check
from pipelines.settings import Settings

if TYPE_CHECKING:
    import pandas as pd

    from pipelines.indexing.timelines import TimelineView

HOUSEHOLDS = ("1", "18", "900", "1228", "2489")
DAY_MS = 86_400_000
AGES_DAYS = (1, 7, 30, 90)
FIELDS = ("event_id", "time_ms", "pin_id", "quantity", "value_usd_micros")
NEWEST = 256
"""So many purchases has the sequence `purchase_history`."""
_COLUMNS = {
    "household_id": "user_id",
    "basket_id": "basket_id",
    "product_id": "pin_id",
    "quantity": "quantity",
    "sales_value": "value_usd_micros",
    "transaction_timestamp": "time_ms",
}


def show(settings: Settings, base: str, fraction: float) -> list[Check]:
    """Compare every timeline of the served base with the source, and some answers over HTTP with pandas."""
    began = time.monotonic()
    purchases = source()
    served = _served(settings, purchases)
    timelines = compare(totals_of(purchases), served, is_whole=fraction == 1)
    households = [one for one in HOUSEHOLDS if one in served.index] or sorted(served.index)[: len(HOUSEHOLDS)]
    mine = purchases[purchases["user_id"].isin(households)]
    now_ms = int(purchases["time_ms"].max())
    return [
        timelines._replace(found=f"{timelines.found}; {time.monotonic() - began:.1f} s"),
        _counters(base, mine, households, now_ms),
        _sequences(base, mine, households, now_ms),
    ]


def source() -> pd.DataFrame:
    """The purchases of the source, a row each: user_id, event_id, pin_id (texts), quantity, value_usd_micros, time_ms.

    Rows of no quantity are left out: the contract refuses them.
    """
    import numpy as np
    import pandas as pd
    import pyarrow.parquet as pq

    from pipelines.ingest import complete_journey

    path = complete_journey.folder() / "transactions.parquet"
    found = pq.read_table(path, columns=list(_COLUMNS)).to_pandas().rename(columns=_COLUMNS)
    found = found[found["quantity"] >= 1].reset_index(drop=True)
    pins, users, baskets = (found[name].astype(str) for name in ("pin_id", "user_id", "basket_id"))
    return pd.DataFrame(
        {
            "user_id": users,
            "event_id": baskets + ":" + pins,
            "pin_id": pins,
            "quantity": found["quantity"],
            "value_usd_micros": np.rint(found["value_usd_micros"] * 1_000_000).astype("int64"),
            "time_ms": found["time_ms"].astype("datetime64[ms]").astype("int64"),
        }
    )


# ------------------------------------------------------------------------------------------ the base that is served


def totals_of(purchases: pd.DataFrame) -> pd.DataFrame:
    """By user: events, and the sums of quantity and value."""
    groups = purchases.groupby("user_id")
    return groups.agg(
        events=("quantity", "size"),
        quantity=("quantity", "sum"),
        value_usd_micros=("value_usd_micros", "sum"),
    )


def compare(wanted: pd.DataFrame, served: pd.DataFrame, is_whole: bool) -> Check:
    """Whether the totals are the same of each household; of a share of them, of each that is served."""
    if not is_whole:
        wanted = wanted.loc[wanted.index.intersection(served.index)]
    off = (served.reindex(wanted.index) != wanted).any(axis=1)
    strange = [*wanted.index[off], *served.index.difference(wanted.index)]
    events, quantity, value = (int(served[name].sum()) for name in wanted)
    found = f"{len(served):,} households, {events:,} purchases, {quantity:,} pieces, USD {value / 1e6:,.2f}"
    if strange:
        found += f"; {len(strange)} of the households are unlike: {', '.join(strange[:5])}"
    what = "each household's timeline in the base has the purchases of the source: number, quantity, value"
    return Check(what, len(served) > 0 and not strange, found)


def _served(settings: Settings, purchases: pd.DataFrame) -> pd.DataFrame:
    """The totals in the base alone, of the households and the time of the source: live purchases come later."""
    import numpy as np

    users = purchases["user_id"].unique().astype(object)
    from_ms, to_ms = int(purchases["time_ms"].min()), int(purchases["time_ms"].max()) + 1
    found = _base(settings).within([user.encode() for user in users], from_ms, to_ms)
    events = found.read(["action", "quantity", "value_usd_micros"]).to_pandas()
    events["user_id"] = users[np.asarray(found.of)]
    return totals_of(events[events["action"] == "purchase"])


def _base(settings: Settings) -> TimelineView:
    """The timelines of the base that is published, without its delta."""
    from pipelines.indexing import base as bases
    from pipelines.indexing.timelines import TimelineView
    from pipelines.indexing.versions import Versions
    from pipelines.users.index import USER_EVENTS

    versions = Versions(settings.paths.indices, USER_EVENTS.name)
    pointer = versions.pointer()
    if pointer is None:
        return TimelineView(bases.empty(USER_EVENTS))
    return TimelineView(bases.open_base(USER_EVENTS, versions.path(pointer.version)))


# ------------------------------------------------------------------------------------------ answers over HTTP


def counted(mine: pd.DataFrame, age_ms: int, now_ms: int) -> dict[tuple[str, str], int]:
    """(user, pin) → purchases in the last while, as pandas counts them."""
    inside = mine[(mine["time_ms"] > now_ms - age_ms) & (mine["time_ms"] <= now_ms)]
    groups = inside.groupby(["user_id", "pin_id"], as_index=False).size()
    return {(user, pin): n for user, pin, n in groups.itertuples(index=False)}


def newest(mine: pd.DataFrame, user: str, now_ms: int) -> list[dict[str, Any]]:
    """The user's newest purchases, the oldest of them first, as pandas sorts them."""
    of_user = mine[(mine["user_id"] == user) & (mine["time_ms"] <= now_ms)]
    ordered = of_user.sort_values(["time_ms", "event_id"]).tail(NEWEST)
    return [dict(zip(FIELDS, row, strict=True)) for row in ordered[list(FIELDS)].itertuples(index=False)]


def _counters(base: str, mine: pd.DataFrame, households: list[str], now_ms: int) -> Check:
    asked, off, purchases = 0, [], 0
    for age in AGES_DAYS:
        for now in (now_ms, now_ms - 100 * DAY_MS):
            body = {
                "user_ids": households,
                "where": {"action": ["purchase"]},
                "age_ms": age * DAY_MS,
                "group_by": ["user_id", "pin_id"],
                "now_ms": now,
            }
            answer = client.request(base, "/v1/counters:query", body=body).body
            found = {(one["user_id"], one["pin_id"]): one["count"] for one in answer["counts"]}
            asked, purchases = asked + 1, purchases + sum(found.values())
            if found != counted(mine, age * DAY_MS, now):
                off.append(f"{age} days to {now} ms")
    what = (
        f"counters over {AGES_DAYS[0]} to {AGES_DAYS[-1]} days say over HTTP what pandas counts in the source"
    )
    said = f"{asked} questions about {len(households)} households, {purchases:,} purchases counted"
    return Check(what, not off and purchases > 0, said + (f"; not so: {', '.join(off)}" if off else ""))


def _sequences(base: str, mine: pd.DataFrame, households: list[str], now_ms: int) -> Check:
    off, events = [], 0
    for now in (now_ms, now_ms - 100 * DAY_MS):
        body = {"user_ids": households, "name": "purchase_history", "now_ms": now}
        answer = client.request(base, "/v1/sequences:query", body=body).body
        for one in answer["sequences"]:
            found = [{name: event[name] for name in FIELDS} for event in one["events"]]
            events += len(found)
            if found != newest(mine, one["user_id"], now) or not one["is_complete"]:
                off.append(f"{one['user_id']} at {now} ms")
    what = "the sequence purchase_history says over HTTP what pandas sorts out of the source"
    said = f"{events:,} events of {len(households)} households at two times, each field the same"
    return Check(what, not off and events > 0, said + (f"; not so: {', '.join(off)}" if off else ""))
