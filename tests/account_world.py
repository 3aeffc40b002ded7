"""An ads account to look at: bases of planted ads, minutes of serving, and what was dropped.

Belongs here: making it. What is to be seen of it, the tests of the report say.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from pipelines.ads.index import ADS
from pipelines.ads.schema import CONTENT, CONTROL
from pipelines.freshness import Ages, Minute
from pipelines.indexing import build, facts
from pipelines.indexing.position import Position
from pipelines.indexing.spec import lineage
from pipelines.indexing.versions import Versions
from pipelines.settings import Settings
from quality.account import Account, Dropped, collect

AT = datetime(2026, 3, 2, 12, 0, tzinfo=UTC)
STAGES = {"updated": 90, "sent": 160, "committed": 900, "served": 1_300}


def ad(number: int, control: Mapping[str, Any], content: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """The facts of an ad; without content, its pin has not come."""
    key = f"a{number}".encode()
    common = {"identity": [key], "key": key, "version": (1,), "content_hash": 1}
    said = [(CONTROL, control)] + ([(CONTENT, content)] if content is not None else [])
    return [common | {"family": family, "payload": dict(payload)} for family, payload in said]


def publish(settings: Settings, ads: list[list[dict[str, Any]]]) -> str:
    """A base of these ads, served."""
    versions = Versions(settings.paths.indices, ADS.name)
    version = versions.new_version(lineage(ADS))
    rows = [row for one in ads for row in one]
    meta = build.Meta(version, Position(), round(AT.timestamp() * 1_000))
    build.build_local(ADS, facts.table(ADS, rows), versions.new_path(version), meta, shard_count=2)
    versions.publish(version)
    return version


def servable(number: int, **content: Any) -> list[dict[str, Any]]:
    """An ad that may be served."""
    control = {"is_servable": True, "effective_bid_usd_micros": 5, "targeting_terms": ["country:US"]}
    return ad(number, control, content)


def minutes(worst_ms: int = 4_000) -> list[Minute]:
    """Five hours of serving, with one slow minute."""
    found: list[Minute] = []
    for n in range(300):
        by = worst_ms if n == 200 else n % 7 * 40
        stages = {
            stage: Ages(ms + by, ms + by + 100, ms + by + 300, ms + by + 500) for stage, ms in STAGES.items()
        }
        running = max(stages["served"].max_ms, found[-1].running_max_ms if found else 0)
        found.append(Minute(AT - timedelta(minutes=300 - n), 100 + n, stages, running))
    return found


def shown(settings: Settings) -> Account:
    """All that the page can show."""
    publish(settings, [servable(n, title="A chair", image_signature="s") for n in range(200)])
    publish(
        settings, [servable(n, title="A chair", image_signature="s" if n % 3 else None) for n in range(130)]
    )
    days = [Dropped((AT - timedelta(days=n)).date(), "refused: out_of_range", 3 + n) for n in range(5)]
    return collect(settings, AT)._replace(
        live={"ads_content": minutes(), "ads_control": minutes(90_000)},
        backfill={"ads_control": minutes(7_200_000)},
        dropped=tuple(days),
    )
