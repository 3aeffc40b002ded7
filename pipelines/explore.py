"""The registry of views: one line a domain, and the views about the platform itself.

Belongs here: which views there are, and those about tables of `ops`. Does not belong here: what a view is (`views`),
and those of a domain (its own `views`).
"""

from __future__ import annotations

from pipelines import index_views
from pipelines.ads import views as ads
from pipelines.indices import INDICES
from pipelines.recommend import views as recommend
from pipelines.users import views as users
from pipelines.views import View

_EPOCH_MS = "date_diff('millisecond', TIMESTAMP '1970-01-01 00:00:00 UTC', committed_at)"


def _stage(name: str) -> str:
    return f"CAST(json_extract_scalar(stages, '$.{name}') AS bigint)"


FRESHNESS_BY_STAGE = View(
    name="freshness_by_stage",
    doc="how long each stage of a hot stream took, by index and hour: its epochs, and its live documents as served",
    sql=f"""
        WITH epochs AS (
            SELECT "index" AS index_name, stream, date_trunc('hour', committed_at) AS hour, "rows" AS record_count,
                   {_stage("started_at_ms")} - {_stage("broker_time_min_ms")} AS waited_ms,
                   {_stage("decoded_at_ms")} - {_stage("started_at_ms")} AS decode_ms,
                   {_stage("transformed_at_ms")} - {_stage("decoded_at_ms")} AS transform_ms,
                   {_EPOCH_MS} - {_stage("transformed_at_ms")} AS commit_ms,
                   {_EPOCH_MS} - {_stage("broker_time_min_ms")} AS total_ms
            FROM ops.epochs
        ), hours AS (
            SELECT index_name, stream, hour, count(*) AS epochs, sum(record_count) AS records,
                   avg(waited_ms) AS mean_waited_ms, avg(decode_ms) AS mean_decode_ms,
                   avg(transform_ms) AS mean_transform_ms, avg(commit_ms) AS mean_commit_ms,
                   avg(total_ms) AS mean_total_ms, max(total_ms) AS max_total_ms
            FROM epochs GROUP BY index_name, stream, hour
        ), minutes AS (
            SELECT "index" AS index_name, stream, minute, max(documents) AS documents,
                   max(p90_ms) AS p90_ms, max(max_ms) AS max_ms
            FROM ops.freshness WHERE kind = 'live' AND stage = 'served' GROUP BY "index", stream, minute
        ), served AS (
            SELECT index_name, stream, date_trunc('hour', minute) AS hour, sum(documents) AS documents,
                   max(p90_ms) AS max_served_p90_ms, max(max_ms) AS max_served_ms,
                   avg(CASE WHEN p90_ms <= 60000 THEN 100e0 ELSE 0e0 END) AS minutes_within_60s_pct
            FROM minutes GROUP BY index_name, stream, date_trunc('hour', minute)
        )
        SELECT h.index_name, h.stream, h.hour, epochs, records, mean_waited_ms, mean_decode_ms, mean_transform_ms,
               mean_commit_ms, mean_total_ms, max_total_ms, documents, max_served_p90_ms, max_served_ms,
               minutes_within_60s_pct
        FROM hours AS h LEFT JOIN served AS s
             ON s.index_name = h.index_name AND s.stream = h.stream AND s.hour = h.hour
    """,
    columns={
        "index_name": "which index",
        "stream": "which hot stream",
        "hour": "in which its epochs were committed, UTC",
        "epochs": "how many",
        "records": "how many they read",
        "mean_waited_ms": "from the broker's time of the oldest record to the epoch's start",
        "mean_decode_ms": "deciding the records by their contract",
        "mean_transform_ms": "making facts of them",
        "mean_commit_ms": "writing and committing them to the delta",
        "mean_total_ms": "from the oldest record's broker time to the commit",
        "max_total_ms": "the same, of the slowest epoch",
        "documents": "live ones that became served, of streams that declare when their documents were begun",
        "max_served_p90_ms": "from there to being served, 90 percent of a minute's documents; of the worst minute",
        "max_served_ms": "the same, of the slowest document",
        "minutes_within_60s_pct": "minutes in which 90 percent of the documents were served within 60 s",
    },
    examples=(
        "SELECT index_name, stream, sum(records) AS records, max(max_total_ms) AS max_total_ms"
        " FROM explore.freshness_by_stage GROUP BY index_name, stream ORDER BY index_name, stream",
        "SELECT index_name, stream, hour, documents, max_served_p90_ms, minutes_within_60s_pct"
        " FROM explore.freshness_by_stage WHERE documents > 0 ORDER BY index_name, stream, hour",
    ),
)

BASES = View(
    name="bases",
    doc="each base version of an index: when it was built and published, and what became of it",
    sql="""
        SELECT "index" AS index_name, version, max(lineage) AS lineage,
               min(CASE WHEN event = 'built' THEN at END) AS built_at,
               min(CASE WHEN event = 'published' THEN at END) AS published_at,
               max_by(event, at) AS last_event, max("rows") AS facts, max(bytes) AS bytes
        FROM ops.index_versions GROUP BY "index", version
    """,
    columns={
        "index_name": "which index",
        "version": "which base version",
        "lineage": "fingerprint of transform and schema",
        "built_at": "when, UTC",
        "published_at": "when it was published first, UTC; null if it never was",
        "last_event": "built, refused, published, rolled_back or deleted",
        "facts": "in it",
        "bytes": "size of its files",
    },
    examples=(
        "SELECT index_name, count(*) AS bases, max(published_at) AS last_published_at FROM explore.bases"
        " GROUP BY index_name ORDER BY index_name",
    ),
)

SERVED = tuple(index_views.view(spec) for spec in INDICES.values())
"""What is served of each index."""

VIEWS: dict[str, View] = {
    view.name: view
    for view in (*users.VIEWS, *recommend.VIEWS, *ads.VIEWS, *SERVED, FRESHNESS_BY_STAGE, BASES)
}
"""Every view by its name."""
