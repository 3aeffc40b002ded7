"""The index `user_follows`: a timeline by user of the pins and users that the user follows, by when it began.

Belongs here: the declaration and its transform. There is no horizon: what is followed is followed until it is said that
it is not. What an inbox makes of it is `inbox`'s.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pyarrow as pa

from pipelines.indexing import facts
from pipelines.indexing.spec import Family, IndexSpec, State, Timeline

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

STREAM = "user_follows"
LAST_MS = 4_133_980_800_000
"""The end of 2100: no time is later."""

FOLLOW = pa.schema([("pin_id", pa.string()), ("followed_user_id", pa.string()), ("version", pa.int64())])

_ID = "concat(CASE kind WHEN 'pin' THEN 'p' ELSE 'u' END, followed_id)"  # of one length: no two are the same
_TIME_MS = "unix_millis(coalesce(event_time, broker_time))"


def follows(rows: DataFrame, state: State) -> DataFrame:
    """Rows of `user-follows` as events of their users, at the time at which each was followed.

    Where a record does not say when, that is when it was taken; of the same record taken twice, the first time. So that
    all of it is in the rank: of records that say the same the earliest stands, in whatever order they come.
    """
    return facts.frame(
        rows,
        family="follows",
        identity=["user_id", _ID],
        key="user_id",
        id=_ID,
        time_ms=_TIME_MS,
        version=["version", "cast(is_deleted AS bigint)", "content_hash", f"{LAST_MS} - {_TIME_MS}"],
        is_deleted="is_deleted",
        content_hash="content_hash",
        payload="struct(CASE kind WHEN 'pin' THEN followed_id END AS pin_id,"
        " CASE kind WHEN 'user' THEN followed_id END AS followed_user_id, version)",
    )


USER_FOLLOWS_INDEX = IndexSpec(
    name="user_follows",
    families=(Family("follows", FOLLOW, STREAM, follows),),
    read=Timeline(),
)
