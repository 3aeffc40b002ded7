"""What is to be seen of the ads account: volumes, coverage, dropped messages, alarms; the page and the metrics."""

from __future__ import annotations

import re
import time

from pipelines.ads import repository, updater
from pipelines.ads.repository import Update
from pipelines.ads.updater import Event
from pipelines.settings import Settings
from quality import account, account_page
from tests import account_world as world


def test_of_nothing_there_is_nothing_unusual(settings: Settings) -> None:
    found = account_page.report(settings)
    assert found.served is None and found.volumes == () and found.alarms == () and found.dropped == ()
    assert "No base is served yet" in (settings.paths.reports / "ads" / "index.html").read_text()
    assert "tidemark_ads_alarms 0.0" in (settings.paths.metrics / "ads.prom").read_text()


def test_coverage_is_of_servable_ads_and_an_empty_list_covers_nothing(settings: Settings) -> None:
    terms = {"is_servable": True, "effective_bid_usd_micros": 7}
    ads = [
        world.servable(1, title="One", image_signature="s1"),
        world.servable(2, title=None, image_signature="s2"),
        world.ad(3, {**terms, "targeting_terms": []}, None),
        world.ad(4, {"is_servable": False, "targeting_terms": ["x"]}, {"title": "Paused"}),
        world.ad(5, {"is_servable": None}, {"title": "Nobody knows"}),
    ]
    version = world.publish(settings, ads)
    (volume,) = account.collect(settings).volumes
    assert (volume.version, volume.documents, volume.servable) == (version, 5, 3)
    wanted = {"image signature": 2, "title": 1, "effective bid": 3, "targeting terms": 2}
    assert dict(volume.covered) == wanted, "the index declares no embedding"
    assert volume.coverage_pct("title") == 33.33


def test_a_jump_of_volume_and_a_loss_of_coverage_are_told(settings: Settings) -> None:
    whole = [world.servable(n, title="t", image_signature="s") for n in range(100)]
    world.publish(settings, whole)
    world.publish(settings, whole[:81])
    assert account.collect(settings).alarms == ()
    lost = [world.servable(n, title="t" if n > 4 else None, image_signature="s") for n in range(60)]
    world.publish(settings, lost)
    alarms = account_page.report(settings).alarms
    assert [alarm.split(":")[0] for alarm in alarms] == ["documents", "servable", "title"]
    assert alarms[0].startswith("documents: 60 in ") and "91.67 % of the servable" in alarms[2]
    text = (settings.paths.metrics / "ads.prom").read_text()
    assert "tidemark_ads_documents 60.0" in text and "tidemark_ads_alarms 3.0" in text
    assert 'tidemark_ads_coverage_pct{field="title"} 91.67' in text


def test_what_is_held_and_what_was_dropped_is_told_with_its_reason(settings: Settings) -> None:
    store = repository.opened(settings)
    one = Update("campaigns", "c1", 1, {"status": "paused"})
    updater.apply(store, [Event(one, 1, "t1", 2), Event(None, 2, "t1", None, "an impossible budget")])
    updater.apply(store, [Event(one._replace(key="c2"), 3, "t2", 3)])
    now_ms = time.time_ns() // 1_000_000
    long_ago = repository.Dropped(1_000, "ads-control", "stale", 5)
    with store.writing() as connection:
        repository.note_dropped(connection, [long_ago, long_ago._replace(at_ms=now_ms, keys=9)])
    store.close()
    dropped = account.collect(settings).dropped
    assert {(d.reason, d.messages) for d in dropped} == {
        ("held: one of its transaction was refused", 1),
        ("held: not all are there", 1),
        ("stale: keys of ads-control", 9),
    }
    assert {d.day.isoformat() for d in dropped} == {time.strftime("%Y-%m-%d", time.gmtime())}


def test_the_page_shows_every_part(settings: Settings) -> None:
    text = account_page.page(world.shown(settings))
    assert text.count('class="chart"') == 2
    assert "the slowest 1.53 min" in text and "Backfill of <code>ads_control</code>" in text
    assert "66.15 %" in text and "-35.0 %" in text and "refused: out_of_range" in text
    labels = re.findall(r'aria-label="ads_control: p90 by stage[^"]*served 1.6 s', text)
    assert labels, "the drawing is told in words"
