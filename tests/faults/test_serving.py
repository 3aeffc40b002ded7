"""Serving killed while it swaps, a base whose file is broken, and both roll backs, through the shipped process."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines import indices
from pipelines.indexing import delta, facts
from pipelines.indexing.delta import DeltaWriter, Marker
from pipelines.indexing.position import Position
from pipelines.indexing.spec import lineage
from pipelines.indexing.versions import Versions
from pipelines.settings import Settings
from tests import serving_world as world
from tests.conftest import small_settings
from tests.faults import running

CUT = world.CUT


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Settings]:
    """Bases of a small world, published; the delta has two newer events of one user at offsets CUT and CUT + 1."""
    settings = small_settings(tmp_path / "home")
    world.build_world(settings)
    commit(settings, 0, CUT, "live-1", "3")
    commit(settings, 1, CUT + 1, "live-2", "3")
    with running.everything_stopped(settings):
        yield settings


def commit(settings: Settings, epoch: int, offset: int, event_id: str, pin: str) -> None:
    """An epoch of one purchase, in both deltas that the stream feeds."""
    happened, counted = world.event("u0", event_id, pin, "purchase", world.NEWEST_MS + offset)
    start, end = (Position({world.INTERACTIONS: {0: at}}) for at in (offset, offset + 1))
    for index, row in (("user_events", happened), ("pin_counts", counted)):
        spec = indices.INDICES[index]
        writer = DeltaWriter(spec, delta.table_path(settings.paths.delta, index, lineage(spec)))
        writer.commit(Marker("user_interactions", 1, epoch, start, end, records=1), facts.table(spec, [row]))


def publish_next(settings: Settings, event_id: str = "live-1", cut: int = CUT + 1) -> dict[str, str]:
    """Newer bases of both indices: what the first had, and the first live event."""
    happened, counted = world.event("u0", event_id, "3", "purchase", world.NEWEST_MS + CUT)
    events, position = world.history(), Position({world.INTERACTIONS: {0: cut}})
    return {
        "user_events": world.publish(
            settings, "user_events", [*(e for e, _ in events), happened], position, {}
        ),
        "pin_counts": world.publish(settings, "pin_counts", [*(c for _, c in events), counted], position, {}),
    }


def live_events(settings: Settings) -> set[str]:
    found = running.serving(settings, "/v1/users/u0/events", limit=1000).body["events"]
    ids = [event["event_id"] for event in found]
    assert len(ids) == len(set(ids))
    return {event_id for event_id in ids if event_id.startswith("live")}


def purchases(settings: Settings, pin: str = "3") -> int:
    return int(running.serving(settings, f"/v1/pins/{pin}/counts").body["totals"]["purchase"])


def served(settings: Settings) -> dict[str, str]:
    return {i["index"]: i["base_version"] for i in running.serving(settings, "/v1/indices").body["indices"]}


def in_history(pin: str = "3") -> int:
    return sum(counted["key"] == pin.encode() and counted["amounts"][0] for _, counted in world.history())


def ready(settings: Settings) -> None:
    running.await_that(lambda: running.tidemark_ready(settings), "serving to be ready", 30)


def test_killed_while_it_swaps_a_base_it_comes_back_with_everything(home: Settings) -> None:
    at_start = len(indices.INDICES)  # each index adopts its base once
    process = running.start(home, "serving", f"replica.before_swap:{at_start + 1}")
    ready(home)
    expected = in_history() + 2
    assert live_events(home) == {"live-1", "live-2"}
    assert purchases(home) == expected
    published = publish_next(home)
    running.await_death(process, 30)
    running.start(home, "serving")
    ready(home)
    assert {index: served(home)[index] for index in published} == published
    assert live_events(home) == {"live-1", "live-2"}
    assert purchases(home) == expected


def test_a_broken_file_is_refused_by_name_and_the_old_base_is_served(home: Settings) -> None:
    running.start(home, "serving")
    ready(home)
    before = served(home)
    spec = indices.INDICES["user_events"]
    versions = Versions(home.paths.indices, spec.name)
    good = versions.path(before["user_events"])
    copy = versions.new_path(versions.new_version(lineage(spec)))
    copy_as(good, copy)
    damaged = next(copy.glob("*/rows-interactions.arrow"))
    damage(damaged)
    refused = running.tidemark(home, "publish", "user_events", copy.name, "--json")
    assert refused.returncode == 1
    assert damaged.name in refused.stdout
    assert "Traceback" not in refused.stdout + refused.stderr
    assert served(home) == before
    assert live_events(home) == {"live-1", "live-2"}


def test_a_file_that_breaks_after_it_was_published_is_not_swapped_to(home: Settings) -> None:
    running.start(home, "serving")
    ready(home)
    before = served(home)
    spec = indices.INDICES["user_events"]
    versions = Versions(home.paths.indices, spec.name)
    copy = versions.new_path(versions.new_version(lineage(spec)))
    copy_as(versions.path(before["user_events"]), copy)
    pointer = versions.folder / "pointer.json"
    fields = json.loads(pointer.read_text())
    damaged = next(copy.glob("*/identities.arrow"))
    damage(damaged)
    draft = pointer.with_suffix(".draft")
    draft.write_text(json.dumps(fields | {"version": copy.name, "generation": fields["generation"] + 1}))
    draft.replace(pointer)

    def error() -> str:
        found = running.serving(home, "/v1/indices").body["indices"]
        return next(i["error"] or "" for i in found if i["index"] == "user_events")

    running.await_that(lambda: damaged.name in error(), "the replica to name the broken file", 20)
    assert served(home) == before
    assert live_events(home) == {"live-1", "live-2"}


def copy_as(source: Path, target: Path) -> None:
    """The same base under a newer version's name."""
    import shutil

    shutil.copytree(source, target)
    manifest = target / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"version": target.name}))


def damage(file: Path) -> None:
    """One bit of a file, in its middle."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.chmod(0o644)
    file.write_bytes(content)


def test_rolled_back_the_older_base_has_the_delta_since_its_own_cut(home: Settings) -> None:
    running.start(home, "serving")
    ready(home)
    first, expected = served(home), in_history() + 2
    publish_next(home)
    running.await_that(lambda: served(home) != first, "the swap", 20)
    for index in ("user_events", "pin_counts"):
        assert running.tidemark(home, "rollback", index, "--json").returncode == 0
    assert served(home) == first
    assert live_events(home) == {"live-1", "live-2"}
    assert purchases(home) == expected


def test_rolled_back_without_the_delta_the_base_alone_answers_until_resume(home: Settings) -> None:
    running.start(home, "serving")
    ready(home)
    first, expected = served(home), in_history()
    publish_next(home)
    running.await_that(lambda: served(home) != first, "the swap", 20)
    for index in ("user_events", "pin_counts"):
        assert running.tidemark(home, "rollback", index, "--without-delta", "--json").returncode == 0
    assert served(home) == first
    assert live_events(home) == set()
    assert purchases(home) == expected
    answer = running.serving(home, "/v1/users/u0/events")
    assert answer.headers["tidemark-stale"] == "true"
    for index in ("user_events", "pin_counts"):
        assert running.tidemark(home, "resume", index, "--json").returncode == 0
    running.await_that(lambda: live_events(home) == {"live-1", "live-2"}, "the delta to be served again", 20)
    assert purchases(home) == expected + 2


def test_going_back_by_publish_is_refused_and_names_the_way(home: Settings) -> None:
    running.start(home, "serving")
    ready(home)
    first = served(home)["user_events"]
    publish_next(home)
    refused = running.tidemark(home, "publish", "user_events", first)
    assert refused.returncode == 1
    assert "rollback" in refused.stderr
