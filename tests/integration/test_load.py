"""Loads on real Spark: once, as a whole, with their dead letters; and the real input in part."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from pipelines import failpoints, lake
from pipelines.contracts import PIN_UPDATES, USER_INTERACTIONS
from pipelines.ingest import complete_journey, dead_letters, load
from pipelines.ingest.dead_letters import NoSuchLetter
from pipelines.ingest.load import LoadError
from pipelines.settings import Settings

EVENT = {"user_id": "u", "event_id": "e", "pin_id": "p", "action": "view", "event_time": 0}
GOOD, BAD = json.dumps(EVENT), json.dumps({**EVENT, "quantity": 0})


class Crash(Exception):
    """Stands for the death of the process."""


def records(spark: SparkSession, *values: str) -> DataFrame:
    return spark.createDataFrame(
        [(i, v, "k") for i, v in enumerate(values)], "load_row int, value string, key string"
    )


def count(spark: SparkSession, name: str) -> int:
    return lake.read(spark, name).count()


def test_a_load_is_done_once(own_spark: SparkSession, settings: Settings) -> None:
    first = load.load(own_spark, settings, USER_INTERACTIONS, records(own_spark, GOOD, BAD, "{"), "one")
    assert (first.rows, first.accepted, first.is_repeat) == (3, 1, False)
    assert first.refused == {"broken_json": 1, "out_of_range": 1}
    assert lake.position(settings, first.table).covers(first.position)
    again = load.load(own_spark, settings, USER_INTERACTIONS, records(own_spark, GOOD), "one")
    assert (again.rows, again.refused, again.is_repeat) == (3, first.refused, True)
    assert again.position == first.position
    assert count(own_spark, "raw.user_interactions") == 3
    assert count(own_spark, "raw.dead_letters") == 2
    other = load.load(own_spark, settings, USER_INTERACTIONS, records(own_spark, GOOD), "two")
    assert (other.rows, other.refused, other.is_repeat) == (1, {}, False)
    assert lake.position(settings, first.table).loads == first.position.loads | other.position.loads


def test_raw_has_the_bytes_as_they_came(own_spark: SparkSession, settings: Settings) -> None:
    load.load(own_spark, settings, USER_INTERACTIONS, records(own_spark, GOOD, "{"), "one")
    rows = lake.read(own_spark, "raw.user_interactions").orderBy("load_row").collect()
    assert [(bytes(row["value"]).decode(), bytes(row["key"])) for row in rows] == [(GOOD, b"k"), ("{", b"k")]
    assert [(row["load_id"], row["load_row"], row["topic_id"]) for row in rows] == [
        ("user_interactions:one", 0, None),
        ("user_interactions:one", 1, None),
    ]


@pytest.mark.parametrize("second", [[GOOD, BAD, "{"], [GOOD]], ids=["same", "mended"])
def test_a_load_that_died_is_invisible_and_starts_anew(
    own_spark: SparkSession, settings: Settings, monkeypatch: pytest.MonkeyPatch, second: list[str]
) -> None:
    def crash(name: str) -> None:
        raise Crash(name)

    with monkeypatch.context() as patched:
        patched.setattr(failpoints, "hit", crash)
        with pytest.raises(Crash):
            load.load(own_spark, settings, USER_INTERACTIONS, records(own_spark, GOOD, BAD, "{"), "one")
    assert count(own_spark, "raw.user_interactions") == 0
    assert dead_letters.listed(settings) == []
    assert dead_letters.counted(settings) == {}
    done = load.load(own_spark, settings, USER_INTERACTIONS, records(own_spark, *second), "one")
    assert (done.rows, done.is_repeat) == (len(second), False)
    assert len(dead_letters.listed(settings)) == len(second) - 1
    assert count(own_spark, "raw.dead_letters") == len(second) - 1


def test_an_empty_load(own_spark: SparkSession, settings: Settings) -> None:
    result = load.load(own_spark, settings, PIN_UPDATES, records(own_spark, GOOD).limit(0), "none")
    assert (result.rows, result.refused) == (0, {})
    assert load.load(own_spark, settings, PIN_UPDATES, records(own_spark, GOOD), "none").is_repeat


def test_one_id_may_be_used_for_each_topic(own_spark: SparkSession, settings: Settings) -> None:
    load.load(own_spark, settings, USER_INTERACTIONS, records(own_spark, GOOD), "one")
    pin = json.dumps({"pin_id": "p", "catalogue": {}})
    assert not load.load(own_spark, settings, PIN_UPDATES, records(own_spark, pin), "one").is_repeat
    with pytest.raises(LoadError, match="1 to 200"):
        load.load(own_spark, settings, PIN_UPDATES, records(own_spark, pin), "")


def test_dead_letters_are_listed_and_explained(own_spark: SparkSession, settings: Settings) -> None:
    load.load(own_spark, settings, USER_INTERACTIONS, records(own_spark, GOOD, BAD, "{", "\x1b"), "one")
    load.load(own_spark, settings, PIN_UPDATES, records(own_spark, "[]"), "two")
    assert dead_letters.counted(settings) == {
        ("pin-updates", "not_an_object"): 1,
        ("user-interactions", "broken_json"): 2,
        ("user-interactions", "out_of_range"): 1,
    }
    assert [letter.topic for letter in dead_letters.listed(settings)] == ["pin-updates"] + 3 * [
        "user-interactions"
    ]
    assert len(dead_letters.listed(settings, limit=2)) == 2
    assert len(dead_letters.listed(settings, topic="user_interactions")) == 3
    assert len(dead_letters.listed(settings, load_id="two")) == 1
    assert dead_letters.listed(settings, since=datetime(2100, 1, 1, tzinfo=UTC)) == []
    assert len(dead_letters.listed(settings, since=datetime(2020, 1, 1, tzinfo=UTC))) == 4
    (letter,) = dead_letters.listed(settings, reason="out_of_range")
    assert letter.place == "user-interactions/user_interactions:one/1"
    assert letter.value == BAD.encode()
    assert json.dumps(letter.to_json())
    told = dead_letters.explain(settings, letter.place)
    assert told.letter == letter
    assert told.now is not None
    assert told.now.field == "quantity"
    assert told.text == BAD
    assert json.dumps(told.to_json())
    escape = dead_letters.explain(settings, "user-interactions/user_interactions:one/3")
    assert escape.text == "\\x1b"
    for place in ("user-interactions/user_interactions:one/0", "user-interactions/1/1", "x/y/1", "x", ""):
        with pytest.raises(NoSuchLetter):
            dead_letters.explain(settings, place)


def write(path: Path, **columns: Any) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def test_a_parquet_file_whose_columns_are_fields(
    own_spark: SparkSession, settings: Settings, tmp_path: Path
) -> None:
    times = [datetime(2020, 1, 1, 0, 0, 0, 123456), datetime(2020, 1, 2), None]
    for unit in ("ns", "us", "ms"):
        columns = {
            "user_id": ["a", "b", "c"],
            "event_id": [f"{unit}1", f"{unit}2", f"{unit}3"],
            "pin_id": ["p", "q", None],
            "action": ["view", "save", None],
            "event_time": pa.array(times).cast(pa.timestamp(unit), safe=False),
            "op": [None, None, "delete"],
        }
        file = write(tmp_path / f"{unit}.parquet", **columns)
        result = load.load_files(own_spark, settings, file, USER_INTERACTIONS)
        assert (result.rows, result.refused) == (3, {})
        renamed = file.rename(tmp_path / f"again-{unit}.parquet")
        assert load.load_files(own_spark, settings, renamed, USER_INTERACTIONS).is_repeat
    row = (
        lake.read(own_spark, "raw.user_interactions")
        .filter("load_row = 0 and value like '%us1%'")
        .collect()[0]
    )
    assert json.loads(row["value"])["event_time"] == "2020-01-01T00:00:00.123456Z"
    assert bytes(row["key"]) == b"a"


def test_a_folder_of_files_numbers_its_rows(
    own_spark: SparkSession, settings: Settings, tmp_path: Path
) -> None:
    write(tmp_path / "a.parquet", pin_id=["1", "2"], catalogue=[{"title": "x"}, {"title": None}])
    write(tmp_path / "b.parquet", pin_id=["3"], version=[2], op=["delete"])
    result = load.load_files(own_spark, settings, tmp_path, PIN_UPDATES, load_id="folder")
    assert (result.rows, result.refused) == (3, {})
    rows = lake.read(own_spark, "raw.pin_updates").orderBy("load_row").collect()
    assert [row["load_row"] for row in rows] == [0, 1, 2**40]


def test_what_cannot_be_loaded(own_spark: SparkSession, settings: Settings, tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="no file"):
        load.load_files(own_spark, settings, tmp_path, PIN_UPDATES)
    with pytest.raises(LoadError, match="no file"):
        load.load_files(own_spark, settings, tmp_path / "x.parquet", PIN_UPDATES)
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(b"PAR1")
    with pytest.raises(LoadError, match="not a Parquet file"):
        load.load_files(own_spark, settings, broken, PIN_UPDATES)
    with pytest.raises(LoadError, match="no column pin_id"):
        load.load_files(own_spark, settings, write(tmp_path / "other.parquet", x=[1]), PIN_UPDATES)


# ------------------------------------------------------------------------------------------------ the real input


@pytest.fixture
def small_journey(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder like the package's, with few rows."""
    folder = tmp_path / "journey"
    folder.mkdir()
    times = pa.array(
        [datetime(2017, 1, 1, 11, 53, 26), datetime(2017, 1, 2), datetime(2017, 1, 3), datetime(2017, 1, 4)]
    )
    write(
        folder / "transactions.parquet",
        household_id=[900, 900, 901, 901],
        basket_id=[31198570044, 31198570045, 31198570046, 31198570047],
        product_id=[10, 10, 11, 99],
        quantity=[1, 3, 0, 1],
        sales_value=[0.57, 1.0, 0.0, 2.01],
        transaction_timestamp=times,
    )
    write(
        folder / "products.parquet",
        product_id=[10, 11, 12],
        department=["GROCERY", "GROCERY", "TOYS"],
        brand=["National", "Private", None],
        product_category=["ICE", None, None],
        product_type=["ICE - CUBED", None, None],
        package_size=["22 LB", None, "1 CT"],
    )
    write(
        folder / "demographics.parquet",
        **{name: ["x"] for name in ("age", "income", "home_ownership", "marital_status")},
        **{name: ["y"] for name in ("household_size", "household_comp", "kids_count")},
        household_id=[900],
    )
    monkeypatch.setattr(complete_journey, "folder", lambda: folder)
    return folder


def test_what_the_real_input_means(own_spark: SparkSession, settings: Settings, small_journey: Path) -> None:
    done = complete_journey.load_all(own_spark, settings)
    assert (done.interactions.rows, done.interactions.refused) == (4, {"out_of_range": 1})
    assert done.interactions.warnings == ("1 rows name 1 products that the catalogue lacks: kept",)
    assert (done.pins.rows, done.pins.refused, done.households) == (3, {}, 1)
    values = lake.read(own_spark, "raw.user_interactions").orderBy("load_row").select("value").collect()
    assert json.loads(values[0]["value"]) == {
        "user_id": "900",
        "event_id": "31198570044:10",
        "pin_id": "10",
        "action": "purchase",
        "event_time": "2017-01-01T11:53:26.000000Z",
        "quantity": 1,
        "value_usd_micros": 570_000,
    }
    pins = [
        json.loads(row["value"])
        for row in lake.read(own_spark, "raw.pin_updates").orderBy("load_row").collect()
    ]
    assert pins[0]["catalogue"] == {
        "title": "ICE - CUBED, 22 LB",
        "category": "ICE",
        "department": "GROCERY",
        "brand": "National",
    }
    assert pins[0]["offer"] == {"price_usd_micros": 333_333, "is_available": True}
    assert [("offer" in pin, pin["version"]) for pin in pins] == [(True, 1), (False, 1), (False, 1)]
    assert pins[1]["catalogue"] == {"department": "GROCERY", "brand": "Private"}
    again = complete_journey.load_all(own_spark, settings)
    assert again.interactions.is_repeat
    assert again.pins.is_repeat
    assert again.households == 1
    assert count(own_spark, "raw.user_interactions") == 4
    assert count(own_spark, "raw.households") == 1


def test_a_fraction_is_always_the_same_households(
    own_spark: SparkSession, settings: Settings, small_journey: Path
) -> None:
    none = complete_journey.load_all(own_spark, settings, 0)
    assert (none.interactions.rows, none.pins.rows, none.households) == (0, 0, 0)
    half = complete_journey.load_all(own_spark, settings, 0.5)
    assert half.interactions.load_id != none.interactions.load_id
    with pytest.raises(LoadError, match="0 to 1"):
        complete_journey.load_all(own_spark, settings, 1.5)


def test_dollars_become_micros_exactly(own_spark: SparkSession) -> None:
    cents = own_spark.range(0, 200_000).select((F.col("id") / 100).alias("usd"), F.col("id"))
    wrong = cents.filter(complete_journey._micros(F.col("usd")) != F.col("id") * 10_000)
    assert wrong.isEmpty()
