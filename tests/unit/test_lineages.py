"""Lineages beside each other: reading the other's base and delta, comparing, what is refused, incarnations."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pytest
from typer.testing import CliRunner

from jobs import cli, code, controls, processes
from jobs import lineages as moving
from pipelines.indexing import build, delta, facts, lineages, streaming
from pipelines.indexing.base import BadBase, Manifest, open_base
from pipelines.indexing.delta import DeltaWriter, Marker
from pipelines.indexing.overlay import Overlay
from pipelines.indexing.position import EMPTY, Position
from pipelines.indexing.spec import (
    Documents,
    Family,
    IndexSpec,
    Inverted,
    Read,
    Sums,
    Timeline,
    Vector,
    lineage,
)
from pipelines.indexing.streaming import Committed
from pipelines.indexing.versions import Versions
from pipelines.settings import Settings
from quality import comparison
from quality.comparison import compare
from tests.properties.specs import unchanged

TOPIC = "things@1"
TEXT, NUMBER, FLAG = ("text", pa.string()), ("number", pa.int64()), ("is_new", pa.bool_())
VECTOR = pa.schema([("vector", pa.list_(pa.float32()))])
Row = Mapping[str, Any]


def spec_of(
    columns: Mapping[str, Sequence[tuple[str, pa.DataType]]], read: Read, access: Sequence[Any] = ()
) -> IndexSpec:
    families = [Family(name, pa.schema(list(of)), "things", unchanged) for name, of in columns.items()]
    return IndexSpec("things", tuple(families), read, tuple(access))


OLD = spec_of({"main": [TEXT, NUMBER]}, Documents("main"))
NEW = spec_of(
    {"main": [TEXT, FLAG], "more": [NUMBER]}, Documents("main"), [Inverted("flag", "main", "is_new")]
)


def said(family: str, key: str, payload: Row | None, version: int = 1, **more: Any) -> Row:
    row = {"family": family, "identity": [key.encode()], "key": key.encode(), "version": (version,)}
    return row | {"content_hash": 0, "is_deleted": payload is None, "payload": payload} | more


class Place(NamedTuple):
    """An index on disk, with two lineages."""

    root: Path

    @property
    def versions(self) -> Versions:
        return Versions(self.root / "indices", "things")

    @property
    def deltas(self) -> Path:
        return self.root / "delta"

    def build(self, spec: IndexSpec, rows: Sequence[Row], cut: int) -> Manifest:
        version = self.versions.new_version(lineage(spec))
        meta = build.Meta(version, at(cut), None)
        folder = self.versions.new_path(version)
        return build.build_local(spec, facts.table(spec, rows), folder, meta, shard_count=2)

    def commit(self, spec: IndexSpec, start: int, end: int, rows: Sequence[Row]) -> None:
        writer = DeltaWriter(spec, self.path(spec))
        writer.commit(Marker("things", 1, start, at(start), at(end)), facts.table(spec, rows))

    def path(self, spec: IndexSpec) -> Path:
        return delta.table_path(self.deltas, "things", lineage(spec))

    def compare(self, spec: IndexSpec, old: Manifest, new: Manifest, **more: Any) -> comparison.Comparison:
        folders = [self.versions.path(manifest.version) for manifest in (old, new)]
        return compare(spec, self.deltas, *folders, **more)


def at(offset: int) -> Position:
    return Position({TOPIC: {0: offset}})


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


# ------------------------------------------------------------------------------------------------ reading the other's


def test_new_code_reads_the_old_pair_without_the_columns_and_families_that_it_lacks(place: Place) -> None:
    manifest = place.build(OLD, [said("main", "a", {"text": "A", "number": 1})], 1)
    place.commit(OLD, 1, 2, [said("main", "b", {"text": "B", "number": 2})])
    base = open_base(NEW, place.versions.path(manifest.version))
    overlay = Overlay(base, place.path(OLD), 100)
    overlay.catch_up()
    wanted = [{"main": {"text": text, "is_new": None}} for text in ("A", "B")]
    assert overlay.view.get([b"a", b"b"]) == wanted
    assert overlay.view.match({"flag": True}) == []


def test_old_code_reads_the_new_pair_without_what_it_does_not_know(place: Place) -> None:
    rows = [said("main", "a", {"text": "A", "is_new": True}), said("more", "a", {"number": 5})]
    manifest = place.build(NEW, rows, 1)
    later = [said("main", "b", {"text": "B", "is_new": False}), said("more", "b", {"number": 6})]
    place.commit(NEW, 1, 2, later)
    overlay = Overlay(open_base(OLD, place.versions.path(manifest.version)), place.path(NEW), 100)
    overlay.catch_up()
    assert overlay.view.get([b"a", b"b"]) == [{"main": {"text": t, "number": None}} for t in ("A", "B")]


def test_a_vector_that_an_old_base_lacks_is_found_nowhere(place: Place) -> None:
    manifest = place.build(OLD, [said("main", "a", {"text": "A", "number": 1})], 1)
    embedded = Family("near", VECTOR, None, unchanged)
    with_vector = OLD._replace(
        families=(*OLD.families, embedded), access=(Vector("near", "near", "vector", 4),)
    )
    view = Overlay(open_base(with_vector, place.versions.path(manifest.version)), None, 100).view
    assert view.get([b"a"], ["main"]) == [{"main": {"text": "A", "number": 1}}]
    assert view.search("near", [1, 0, 0, 0], 3) == []


def test_a_retyped_column_is_cast_where_that_can_be_and_refused_where_it_cannot(place: Place) -> None:
    manifest = place.build(OLD, [said("main", "a", {"text": "A", "number": 1})], 1)
    folder = place.versions.path(manifest.version)
    wider = spec_of({"main": [TEXT, ("number", pa.string())]}, Documents("main"))
    assert Overlay(open_base(wider, folder), None, 9).view.get([b"a"]) == [
        {"main": {"text": "A", "number": "1"}}
    ]
    other = spec_of({"main": [("text", pa.int64())]}, Documents("main"))
    with pytest.raises(BadBase, match=f"{manifest.lineage}, which this code cannot read"):
        open_base(other, folder)


def test_a_base_keeps_its_own_horizon_and_other_amounts_are_refused(place: Place) -> None:
    columns = {"main": [TEXT]}
    short, long = spec_of(columns, Timeline(age_ms=10)), spec_of(columns, Timeline(age_ms=99, count=3))
    manifest = place.build(short, [said("main", "a", {"text": "A"}, id=b"1", time_ms=5)], 1)
    assert open_base(long, place.versions.path(manifest.version)).spec.read == short.read
    hourly, daily = (spec_of(columns, Sums(width, ("n",))) for width in (10, 20))
    counted = place.build(hourly, [said("main", "a", {"text": "A"}, id=b"1", amounts=[1])], 1)
    with pytest.raises(BadBase, match="serve it with the code of its lineage"):
        open_base(daily, place.versions.path(counted.version))


# ------------------------------------------------------------------------------------------------ comparing


def test_documents_are_compared_by_key_and_column_at_a_common_position(place: Place) -> None:
    new = spec_of({"main": [TEXT, NUMBER, FLAG]}, Documents("main"))
    mine = [said("main", key, {"text": key, "number": n}) for n, key in enumerate("abcd")]
    old_base = place.build(OLD, mine, 4)
    theirs = [
        said("main", key, {"text": key.upper(), "number": n, "is_new": n > 1}) for n, key in enumerate("abc")
    ]
    new_base = place.build(new, [*theirs, said("main", "z", {"text": "z", "number": 9})], 4)
    place.commit(OLD, 4, 5, [said("main", "a", {"text": "A", "number": 0}, 2)])
    place.commit(new, 4, 5, [said("main", "a", {"text": "A", "number": 0, "is_new": True}, 2)])
    place.commit(new, 5, 6, [said("main", "b", {"text": "later", "number": 7, "is_new": True}, 3)])
    found = place.compare(new, old_base, new_base)
    assert Position({TOPIC: {0: 5}}).to_text() == found.position
    assert (found.old.keys, found.new.keys, found.keys_only_old, found.keys_only_new) == (4, 4, 1, 1)
    assert (found.keys_differing, found.entries_differing) == (2, 2)
    assert [(c.name, c.differing) for c in found.columns] == [("main.text", 2)]
    assert found.columns[0].examples == (("b", "main", "b", "B"), ("c", "main", "c", "C"))
    assert (found.added, found.removed) == ({"main.is_new": 3}, ())
    assert (found.examples_only_old, found.examples_only_new) == (("d",), ("z",))
    assert [(f.name, f.passed) for f in found.findings] == [("keeps_keys", False), ("keeps_entries", False)]


def test_an_epoch_across_the_common_position_leaves_its_keys_out(place: Place) -> None:
    new = spec_of({"main": [TEXT, NUMBER, FLAG]}, Documents("main"))
    old_base = place.build(OLD, [said("main", k, {"text": k, "number": 1}) for k in "ab"], 2)
    new_base = place.build(new, [said("main", k, {"text": k, "number": 1, "is_new": None}) for k in "ab"], 2)
    place.commit(OLD, 2, 3, [said("main", "a", {"text": "3", "number": 1}, 3)])
    place.commit(new, 2, 5, [said("main", "b", {"text": "4", "number": 1, "is_new": None}, 4)])
    found = place.compare(new, old_base, new_base)
    assert (found.keys_in_motion, found.keys_differing, found.old.keys) == (1, 1, 1)


def test_sums_and_timelines_are_compared_by_bucket_and_by_event(place: Place) -> None:
    rows = [
        said("main", "a", {"text": "x"}, id=b"%d" % n, time_ms=n, amounts=[n, 1]) | {"identity": [b"%d" % n]}
        for n in (1, 2, 13)
    ]
    sums = spec_of({"main": [TEXT]}, Sums(10, ("value", "count")))
    changed = sums._replace(families=(sums.families[0]._replace(stream="other"),))
    less = [{**row, "amounts": [2 * row["amounts"][0], 1]} for row in rows[:2]]
    found = place.compare(changed, place.build(sums, rows, 3), place.build(changed, less, 3))
    assert (found.old.entries, found.new.entries, found.entries_only_old) == (2, 1, 1)
    assert [(c.name, c.differing, c.examples[0][1:]) for c in found.columns] == [("value", 1, ("0", 3, 6))]
    events = spec_of({"main": [TEXT]}, Timeline())
    upper = events._replace(families=(events.families[0]._replace(stream="other"),))
    loud = [{**row, "payload": {"text": "X"}} for row in rows[1:]]
    found = place.compare(upper, place.build(events, rows, 3), place.build(upper, loud, 3))
    assert (found.entries_only_old, found.entries_differing, found.keys_differing) == (1, 2, 1)
    assert [c.name for c in found.columns] == ["main.text"]


def test_of_many_keys_a_sample_is_compared(place: Place) -> None:
    new = spec_of({"main": [TEXT, NUMBER, FLAG]}, Documents("main"))
    mine = [said("main", str(n), {"text": "x", "number": n}) for n in range(50)]
    found = place.compare(new, place.build(OLD, mine, 1), place.build(new, mine, 1), max_keys=10)
    assert (found.is_sample, found.old.keys, found.new.keys) == (True, 10, 10)


# ------------------------------------------------------------------------------------------------ what is refused


def test_a_candidate_must_hold_what_is_served_and_be_fed(place: Place) -> None:
    old, new = place.build(OLD, [], 1), place.build(NEW, [], 2)
    place.commit(OLD, 1, 5, [said("main", "a", {"text": "A", "number": 1})])
    with pytest.raises(lineages.NotCaughtUp, match="has come to .* which is served, has"):
        lineages.await_caught_up(place.deltas, old, new, 0.0)
    lineages.begin_at(place.path(NEW), at(2))
    place.commit(NEW, 2, 5, [])
    assert lineages.await_caught_up(place.deltas, old, new, 0.0) == at(5)
    lineages.say_feeding(place.path(OLD), "streams", place.root)
    with pytest.raises(lineages.NotCaughtUp, match="nobody feeds it"):
        lineages.await_caught_up(place.deltas, old, new, 0.0)
    with pytest.raises(lineages.NotCaughtUp, match="streams feeds the one that is served"):
        lineages.require_succession(place.deltas, old, new)
    lineages.say_feeding(place.path(NEW), "streams-1", place.root)
    assert lineages.await_caught_up(place.deltas, old, new, 0.0) == at(5)
    assert not lineages.begin_at(place.path(NEW), at(4)), "it has begun"
    with pytest.raises(lineages.NotCaughtUp, match="begins after the cut"):
        lineages.await_caught_up(place.deltas, old, place.build(NEW, [], 1), 0.0)


def test_an_end_is_an_order_that_can_be_taken_back(place: Place) -> None:
    old, new = place.build(OLD, [], 1), place.build(NEW, [], 1)
    for spec in (OLD, NEW):
        place.commit(spec, 1, 2, [])
    assert lineages.end_others(place.deltas, new) == [old.lineage]
    assert lineages.end_others(place.deltas, new) == []
    assert lineages.order(place.path(OLD)).is_ended
    lineages.reopen(place.path(OLD), at(7))
    assert lineages.order(place.path(OLD)) == lineages.Order(False, at(7))
    assert lineages.order(place.path(NEW)) == lineages.Order(False, EMPTY)


def test_two_lives_of_a_stream_never_have_the_same_number(tmp_path: Path) -> None:
    """One of old code that committed nothing yet counts too: the delta knows only what was committed."""
    ids = {"things": "things@1"}
    nothing = Committed(0, EMPTY)
    names = ("things-aaaa", "things-bbbb", "things-cccc")
    begun = [streaming.begin(tmp_path, name, ids, lambda: nothing, 1).number for name in names]
    assert begun == [1, 2, 3]
    assert streaming.begin(tmp_path, names[0], ids, lambda: nothing, 1).number == 1


def test_a_new_lineages_stream_begins_at_the_cut_of_its_base(place: Place) -> None:
    lineages.begin_at(place.path(NEW), at(17))
    stream = streaming.HotStream("things", ("things",), lambda rows: rows)
    run = streaming.HotStreamRun(stream, [NEW], deltas=place.deltas, checkpoints=place.root / "checkpoints")
    life = streaming.begin(place.root / "checkpoints", "things-1", {"things": TOPIC}, run.committed, 1)
    assert json.loads(life.starting_offsets) == {"things": {"0": 17}}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["start"], "those of what is served"),
        (["start", "pins"], "pins serves nothing yet"),
        (["start", "pin"], "there is no index 'pin'"),
        (["compare", "pins"], "pins serves nothing yet"),
        (["publish", "pins"], "`tidemark build` comes first"),
        (["back", "pins"], "pins serves nothing yet"),
        (["back", "nothing"], "there is no index"),
    ],
)
def test_commands_without_anything_to_work_on_say_what_comes_first(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.setattr("jobs.cli.lineages.load_settings", lambda: settings)
    found = CliRunner().invoke(cli.app, ["lineage", *arguments])
    assert found.exit_code == 1
    assert message in str(found.exception)


# ------------------------------------------------------------------------------------------------ kept code


def test_code_is_kept_once_found_by_what_it_feeds_and_dropped_when_nobody_needs_it(
    settings: Settings,
) -> None:
    kept = code.keep(settings)
    assert code.keep(settings) == kept
    assert code.all_kept(settings) == [kept]
    assert (kept.folder / "jobs" / "streams.py").exists()
    assert (kept.folder / "conf" / "local.yaml").exists()
    one = dict([next(iter(kept.lineages.items()))])
    assert code.feeding(settings, one) == kept
    assert code.feeding(settings, {"pins": "of another time"}) is None
    code.drop_unused(settings, one.items())
    assert code.all_kept(settings) == [kept]
    code.drop_unused(settings, [("pins", "of another time")])
    assert code.all_kept(settings) == []
    with pytest.raises(code.CodeError, match="is not kept"):
        code.named(settings, kept.name)


def test_the_main_streams_run_the_code_of_what_is_served_unless_a_process_beside_them_does(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = code.lineages_here()
    before = here | {"pins": "before"}
    folder = settings.paths.code / "aaaa-bbbb"
    folder.mkdir(parents=True)
    (folder / code.LINEAGES).write_text(json.dumps(before))
    served = {
        name: Manifest(name, "v", mark, EMPTY, None, "", {}, {}, {}, ()) for name, mark in before.items()
    }
    monkeypatch.setattr(Versions, "served", lambda self: served.get(self.index))
    assert moving.code_of_served(settings) == code.Kept(folder, before)
    controls.set_beside(settings.paths.run, [controls.Beside("streams-aaaa", folder.name, ("pins",))])
    assert moving.code_of_served(settings) is None, "a process beside feeds it"
    controls.set_beside(settings.paths.run, [])
    lineages.end(delta.table_path(settings.paths.delta, "pins", "before"))
    assert moving.code_of_served(settings) is None, "nobody needs to feed what has ended"


# ------------------------------------------------------------------------------------------------ processes beside


def test_a_process_beside_runs_kept_code_and_says_when_that_is_gone(settings: Settings) -> None:
    kept = code.keep(settings)
    controls.set_beside(
        settings.paths.run, [controls.Beside("streams-1", kept.name, ("pins", "user_events"))]
    )
    (beside,) = [p for p in processes.local(settings) if p.name == "streams-1"]
    assert beside.folder == kept.folder
    assert dict(beside.environment)["PYTHONPATH"].split(":")[0] == str(kept.folder)
    wanted = ["jobs.streams", "--beside", "streams-1", "--index", "pins", "--index", "user_events"]
    assert list(beside.command())[2:] == wanted
    code.drop_unused(settings, [])
    with pytest.raises(code.CodeError, match="is not kept"):
        beside.command()


def test_a_stream_whose_lineages_have_ended_is_not_missing(tmp_path: Path) -> None:
    board = controls.Controls(tmp_path, "streams-1")
    board.report({"pin_updates": {"state": controls.ENDED}, "archive": {"state": controls.RUNNING}})
    assert board.what_is_missing() is None
    assert controls.Controls(tmp_path).what_is_missing() is not None


def test_a_newer_candidate_takes_the_place_of_the_one_before_but_not_of_what_is_served(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, list[str]]] = []
    for verb in ("up", "down"):
        monkeypatch.setattr(
            processes,
            verb,
            lambda keeper, chosen, say, verb=verb: asked.append((verb, [p.name for p in chosen])),
        )
    copies = {
        name: code.Kept(settings.paths.code / f"{name}-0", {"pins": name, "user_events": name})
        for name in "abc"
    }
    for kept in copies.values():
        kept.folder.mkdir(parents=True)
        (kept.folder / code.LINEAGES).write_text(json.dumps(kept.lineages))
    served = Manifest("pins", "v", "a", EMPTY, None, "", {}, {}, {}, ())
    monkeypatch.setattr(Versions, "served", lambda self: served)
    moving.feed_beside(settings, copies["a"], ["pins"])
    moving.feed_beside(settings, copies["b"], ["pins"])
    moving.feed_beside(settings, copies["b"], ["user_events"])
    moving.feed_beside(settings, copies["c"], ["pins"])
    assert controls.beside(settings.paths.run) == [
        controls.Beside("streams-a", "a-0", ("pins",)),
        controls.Beside("streams-b", "b-0", ("user_events",)),
        controls.Beside("streams-c", "c-0", ("pins",)),
    ]
    assert asked[-2:] == [("down", ["streams-b"]), ("up", ["streams-a", "streams-b", "streams-c"])]
