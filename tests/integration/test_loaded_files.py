"""A folder that grows: each file once, whatever dies in between; and which loads there are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from pyspark.sql import SparkSession

from pipelines import failpoints, lake
from pipelines.contracts import PIN_UPDATES, USER_INTERACTIONS
from pipelines.ingest import dead_letters, load, loaded_files, mapping
from pipelines.ingest.sources import Dialect, LoadError
from pipelines.settings import CATALOG, Settings

HEADER = "user_id,event_id,pin_id,action,event_time\n"


class Crash(Exception):
    """Stands for the death of the process."""


def day(folder: Path, name: str, *events: str) -> Path:
    """A file of events; one whose id begins with `bad` breaks its contract."""
    rows = [f"u,{e},p,{'stare' if e.startswith('bad') else 'view'},2024-05-01T12:00:00Z\n" for e in events]
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(HEADER + "".join(rows))
    return file


def bring(spark: SparkSession, settings: Settings, path: Path, **given: object) -> load.LoadResult:
    return load.load_files(spark, settings, path, USER_INTERACTIONS, **given)  # type: ignore[arg-type]


def events(settings: Settings) -> list[str]:
    """The ids of the events in the raw table."""
    table = lake.open_table(settings, "raw.user_interactions")
    values = table.scan().to_arrow()["value"].to_pylist() if table is not None else []
    return sorted(json.loads(value)["event_id"] for value in values)


def commits(settings: Settings) -> int:
    return sum(lake.LOAD_ID in s.summary for s in lake.ancestors(settings, "raw.user_interactions"))


def test_a_folder_that_grows_brings_its_new_files(
    own_spark: SparkSession, settings: Settings, tmp_path: Path
) -> None:
    shop = tmp_path / "shop"
    day(shop, "1.csv", "a", "bad1")
    day(shop, "2.csv", "b")
    first = bring(own_spark, settings, shop)
    assert (first.rows, first.refused, first.already_loaded) == (2 + 1, {"unknown_action": 1}, {})
    day(shop, "0.csv", "c", "d")  # before the others
    day(shop, "3.csv", "bad2", "e", "bad3")
    shutil.copy(shop / "1.csv", shop / "4.csv")
    shutil.copy(shop / "3.csv", shop / "5.csv")
    second = bring(own_spark, settings, shop)
    assert (second.rows, second.accepted, second.is_repeat) == (5, 3, False)
    assert second.already_loaded == {
        "1.csv": first.load_id,
        "2.csv": first.load_id,
        "4.csv": first.load_id,
        "5.csv": second.load_id,
    }
    assert events(settings) == ["a", "b", "bad1", "bad2", "bad3", "c", "d", "e"]
    assert commits(settings) == 2
    again = bring(own_spark, settings, shop)
    assert (again.is_repeat, again.load_id, again.position) == (True, second.load_id, second.position)
    assert (again.rows, again.refused) == (8, {"unknown_action": 3})
    assert set(again.already_loaded) == {f"{n}.csv" for n in range(6)}
    assert commits(settings) == 2
    listed = loaded_files.listed(settings)
    assert [one.load_id for one in listed] == [second.load_id, first.load_id]
    shown = {name: listed[0].to_json()[name] for name in ("files", "rows", "accepted", "refused", "table")}
    assert shown == {"files": 2, "rows": 5, "accepted": 3, "refused": 2, "table": "raw.user_interactions"}
    by_file = {file.file: (file.rows, file.refused) for file in loaded_files.counting(settings)}
    assert by_file == {
        "0.csv": (2, {}),
        "1.csv": (2, {"unknown_action": 1}),
        "2.csv": (1, {}),
        "3.csv": (3, {"unknown_action": 2}),
    }


def test_another_reading_is_another_content(
    own_spark: SparkSession, settings: Settings, tmp_path: Path
) -> None:
    file = day(tmp_path, "1.csv", "a")
    assert not bring(own_spark, settings, file).is_repeat
    assert not bring(own_spark, settings, file, dialect=Dialect(delimiter=",")).is_repeat
    fields = "{user_id: user_id, event_id: _row, pin_id: pin_id, action: action, event_time: event_time}"
    for comment in ("", "# as before\n"):
        written = tmp_path / "m.yaml"
        written.write_text(f"{comment}topic: user-interactions\nfields: {fields}")
        assert bring(own_spark, settings, file, by=mapping.read(written)).is_repeat == bool(comment)
    assert events(settings) == ["1.csv:0", "a", "a"]


def test_an_id_names_one_content_for_good(
    own_spark: SparkSession, settings: Settings, tmp_path: Path
) -> None:
    shop = tmp_path / "shop"
    day(shop, "1.csv", "a")
    first = bring(own_spark, settings, shop, load_id="one")
    assert first.load_id == "user_interactions:one"
    assert bring(own_spark, settings, shop, load_id="one").is_repeat
    day(shop, "2.csv", "b")
    with pytest.raises(LoadError, match=r"of other files.*it has no 2\.csv"):
        bring(own_spark, settings, shop, load_id="one")
    assert events(settings) == ["a"]
    second = bring(own_spark, settings, shop, load_id="two")
    assert (second.rows, second.already_loaded) == (1, {"1.csv": first.load_id})
    again = bring(own_spark, settings, shop, load_id="two")
    assert (again.is_repeat, again.rows) == (True, 2)
    records = own_spark.createDataFrame([(0, "{}")], "load_row int, value string")
    load.load(own_spark, settings, USER_INTERACTIONS, records, "frame")
    with pytest.raises(LoadError, match="of other files"):
        bring(own_spark, settings, day(tmp_path, "3.csv", "c"), load_id="frame")
    assert {one.load_id: one.files for one in loaded_files.listed(settings)} == {
        "user_interactions:frame": 0,
        "user_interactions:two": 1,
        "user_interactions:one": 1,
    }


PLACES = ("load.after_dead_letters", "load.after_files", "load.after_commit")


def test_dying_between_the_commits_neither_loses_nor_doubles(
    own_spark: SparkSession, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each place: invisible, or there as a whole; then the folder has grown, and a load brings what is missing."""
    shop = tmp_path / "shop"
    expected: list[str] = []
    for number, place in enumerate(PLACES):
        day(shop, f"{number}.csv", f"e{number}", f"bad{number}")

        def crash(name: str, place: str = place) -> None:
            if name == place:
                raise Crash(name)

        before = events(settings), len(dead_letters.listed(settings)), loaded_files.listed(settings)
        with monkeypatch.context() as patched:
            patched.setattr(failpoints, "hit", crash)
            with pytest.raises(Crash):
                bring(own_spark, settings, shop)
        if place != "load.after_commit":
            assert before == (
                events(settings),
                len(dead_letters.listed(settings)),
                loaded_files.listed(settings),
            )
        if number == 1:  # what died was of other files than what is loaded next
            day(shop, "late.csv", "late")
            expected.append("late")
        done = bring(own_spark, settings, shop)
        assert done.is_repeat == (place == "load.after_commit")
        expected += [f"e{number}", f"bad{number}"]
        assert events(settings) == sorted(expected)
        assert len(dead_letters.listed(settings)) == number + 1
        assert sum(one.rows for one in loaded_files.listed(settings)) == len(expected)
    assert bring(own_spark, settings, shop).is_repeat


def test_a_raw_table_that_was_rolled_back_takes_the_files_again(
    own_spark: SparkSession, settings: Settings, tmp_path: Path
) -> None:
    shop = tmp_path / "shop"
    day(shop, "1.csv", "a")
    bring(own_spark, settings, shop)
    before = lake.current_snapshot(settings, "raw.user_interactions")
    assert before is not None
    day(shop, "2.csv", "b", "bad")
    second = bring(own_spark, settings, shop)
    own_spark.sql(
        f"CALL {CATALOG}.system.rollback_to_snapshot('raw.user_interactions', {before.id})"
    ).collect()
    assert [one.rows for one in loaded_files.listed(settings)] == [1]
    third = bring(own_spark, settings, shop)
    assert (third.load_id, third.rows, third.is_repeat) == (second.load_id, 2, False)
    assert events(settings) == ["a", "b", "bad"]
    assert [one.rows for one in loaded_files.listed(settings)] == [2, 1]


def test_each_topic_has_its_own_files(own_spark: SparkSession, settings: Settings, tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text('{"pin_id": "p", "catalogue": {}}\n')
    assert not load.load_files(own_spark, settings, file, PIN_UPDATES).is_repeat
    assert not bring(own_spark, settings, file).is_repeat
    assert load.load_files(own_spark, settings, file, PIN_UPDATES).is_repeat
