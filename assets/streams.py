"""The streams as assets that Dagster does not make: they run beside it, and are only looked at (`jobs.lag`).

Belongs here: one external asset a stream. Does not belong here: how a stream is doing, and what hosts it (`jobs`).
"""

import dagster as dg

from pipelines.indices import INDICES, STREAMS
from pipelines.ingest import archive

GROUP = "streams"


def key(name: str) -> dg.AssetKey:
    """The asset key of a stream."""
    return dg.AssetKey([GROUP, name])


ARCHIVE = key(archive.STREAM)


def _described(name: str) -> str:
    topics = ", ".join(f"`{topic}`" for topic in STREAMS[name].topics)
    fed = ", ".join(f"`{spec.name}`" for spec in INDICES.values() if name in spec.streams)
    return f"records of {topics} as facts in the deltas of {fed}, within seconds"


stream_assets = [
    dg.AssetSpec(
        ARCHIVE,
        group_name=GROUP,
        description="every record of every topic, to the raw tables",
        kinds={"kafka", "iceberg"},
        owners=["team:ingest"],
    ),
    *(
        dg.AssetSpec(
            key(name),
            group_name=GROUP,
            description=_described(name),
            kinds={"kafka", "delta"},
            owners=["team:indexing"],
        )
        for name in STREAMS
    ),
]
ALL = dg.AssetSelection.assets(*(asset.key for asset in stream_assets))
