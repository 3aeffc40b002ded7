"""Jobs of the ads account that a person asks for in Dagster: documents made again, of all or by a predicate.

Belongs here: the jobs and their configuration. Does not belong here: what is sent (`pipelines.ads.refresh`).
"""

# No `from __future__ import annotations`: Dagster reads the annotations of ops as they are.

import dagster as dg
from pydantic import Field

from assets.platform import Platform
from pipelines.ads import publisher, refresh, repository
from pipelines.ads.refresh import Choice
from pipelines.ingest import broker
from pipelines.ingest.producer import Producer


class Refresh(dg.Config):
    """Which ads: those named, those of a row (`column` of `refresh.PREDICATES`, and its `key`), or else all."""

    ad_ids: list[str] = Field(default_factory=list)
    column: str = ""
    key: str = ""
    families: list[str] = Field(default_factory=lambda: list(refresh.FAMILIES))


@dg.op(description="send the keys of ads to the topics for what may wait")
def send_keys(context: dg.OpExecutionContext, config: Refresh, platform: dg.ResourceParam[Platform]) -> None:
    settings = platform.settings
    choice = Choice(tuple(config.ad_ids) or None, (config.column, config.key) if config.column else None)
    broker.ensure_topics(settings, publisher.TOPICS)
    store = repository.opened(settings)
    try:
        with Producer(settings) as producer:
            context.add_output_metadata(dict(refresh.send(store, producer, choice, config.families)))
    finally:
        store.close()


@dg.job(description="documents of ads made again by the hot streams: all of them, or those chosen")
def ads_refresh() -> None:
    send_keys()
