"""Topics of the broker that the tests of a run share: made again for a test that must find them empty."""

from __future__ import annotations

import time
from collections.abc import Iterable

from confluent_kafka.admin import AdminClient

from pipelines.ingest import broker
from pipelines.settings import Settings


def make_again(settings: Settings, names: Iterable[str]) -> None:
    """Delete topics with all that they have, and make them anew: they have other ids then."""
    names = list(names)
    admin = AdminClient({"bootstrap.servers": settings.kafka.bootstrap_servers})
    broker.ensure_topics(settings, names)
    for future in admin.delete_topics(names).values():
        future.result()
    while set(names) & set(admin.list_topics(timeout=10).topics):
        time.sleep(0.1)
    broker.ensure_topics(settings, names)
