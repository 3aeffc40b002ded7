"""Files of all formats, with and without a mapping, through real Spark into the raw tables."""

from __future__ import annotations

import collections
import csv
import json
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyspark.sql import SparkSession

from pipelines import lake
from pipelines.contracts import PIN_UPDATES, USER_INTERACTIONS
from pipelines.ingest import load, mapping
from pipelines.ingest.mapping import BadMapping
from pipelines.ingest.sources import Dialect, LoadError
from pipelines.settings import ROOT, Settings

DATA = ROOT.parent / "shared" / "data"
DAYS = ("2010-12-01", "2010-12-05", "2011-12-09")
needs_data = pytest.mark.skipif(not DATA.exists(), reason="needs ../shared/data")


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def values(spark: SparkSession, table: str) -> list[Any]:
    rows = lake.read(spark, table).orderBy("load_row").collect()
    return [json.loads(row["value"]) for row in rows]


def reasons(spark: SparkSession) -> dict[tuple[str, str], int]:
    letters = lake.read(spark, "raw.dead_letters").collect()
    return dict(collections.Counter((row["reason"], row["detail"].split(" ")[0]) for row in letters))


CSV = """user_id;event_id;pin_id;action;event_time;quantity;note
a;1;p;view;2024-05-01T12:00:00Z;2;
b;2;q;buy;2024-05-01T12:00:00Z;1;x
c;3;r;view;yesterday;1;
d;4;s;view;2024-05-01T12:00:00Z;many;
"e ""the"" é";5;t;view;2024-05-01T12:00:00Z;;"a;b"
"""


def test_csv_whose_columns_are_fields(own_spark: SparkSession, settings: Settings, tmp_path: Path) -> None:
    file = write(tmp_path / "x.csv", CSV)
    result = load.load_files(own_spark, settings, file, USER_INTERACTIONS)
    assert (result.rows, result.refused) == (5, {"bad_time": 1, "unknown_action": 1, "wrong_type": 1})
    found = values(own_spark, "raw.user_interactions")
    assert found[0] == {
        "user_id": "a",
        "event_id": "1",
        "pin_id": "p",
        "action": "view",
        "event_time": "2024-05-01T12:00:00Z",
        "quantity": 2,
    }
    assert (found[3]["quantity"], found[4]["user_id"], found[4]["note"]) == ("many", 'e "the" é', "a;b")
    assert load.load_files(own_spark, settings, file, USER_INTERACTIONS).is_repeat
    assert not load.load_files(
        own_spark, settings, file, USER_INTERACTIONS, dialect=Dialect(delimiter=";")
    ).is_repeat
    assert not any((settings.paths.run / "loads").glob("*/"))


def test_json_lines_are_the_records(own_spark: SparkSession, settings: Settings, tmp_path: Path) -> None:
    good = '{"user_id": "u", "event_id": "1",  "pin_id": "p", "action": "view", "event_time": 0}'
    write(tmp_path / "x.jsonl", f'{good}\n{{"broken\n')
    result = load.load_files(own_spark, settings, tmp_path, USER_INTERACTIONS)
    assert (result.rows, result.refused) == (2, {"broken_json": 1})
    rows = lake.read(own_spark, "raw.user_interactions").orderBy("load_row").collect()
    assert [bytes(row["value"]).decode() for row in rows] == [good, '{"broken']
    assert [row["key"] and bytes(row["key"]) for row in rows] == [b"u", None]


def test_a_mapping_of_objects(own_spark: SparkSession, settings: Settings, tmp_path: Path) -> None:
    write(tmp_path / "1.csv", "sku,name,price,stock\n1,Soap's,0.99,TRUE\n2,,free,no\n")
    write(tmp_path / "2.csv", "stock,price,sku,name\nfalse,12,3,Tea\n")
    by = mapping.read(
        write(
            tmp_path / "_m.yaml",
            """
topic: pin-updates
fields:
  pin_id: sku
  catalogue.title: name
  offer.price_usd_micros:
    from: coalesce(cast(cast(try_cast(price AS double) * 1e6 AS bigint) AS string), price)
    type: number
  offer.is_available: {from: stock, type: boolean}
  version: {value: 3}
""",
        )
    )
    result = load.load_files(own_spark, settings, tmp_path, by=by)
    assert (result.rows, result.refused) == (3, {"wrong_type": 1})
    assert values(own_spark, "raw.pin_updates") == [
        {
            "pin_id": "1",
            "catalogue": {"title": "Soap's"},
            "offer": {"price_usd_micros": 990_000, "is_available": True},
            "version": 3,
        },
        {
            "pin_id": "2",
            "catalogue": {},
            "offer": {"price_usd_micros": "free", "is_available": "no"},
            "version": 3,
        },
        {
            "pin_id": "3",
            "catalogue": {"title": "Tea"},
            "offer": {"price_usd_micros": 12_000_000, "is_available": False},
            "version": 3,
        },
    ]


def test_what_does_not_fit_is_said(own_spark: SparkSession, settings: Settings, tmp_path: Path) -> None:
    file = write(tmp_path / "x.csv", "a,b\n1,2\n")
    with pytest.raises(LoadError, match="no column user_id; it has a, b"):
        load.load_files(own_spark, settings, file, USER_INTERACTIONS)
    for expression in ("nothing", "a +", "no_such_function(a)"):
        by = mapping.read(
            write(tmp_path / "m.yaml", f"topic: user-interactions\nfields: {{user_id: '{expression}'}}")
        )
        with pytest.raises(BadMapping) as caught:
            load.load_files(own_spark, settings, file, by=by)
        assert "the source has a, b" in str(caught.value)
    with pytest.raises(LoadError, match="is for user-interactions"):
        load.load_files(own_spark, settings, file, PIN_UPDATES, by=by)
    assert lake.open_table(settings, "raw.user_interactions") is None


@needs_data
def test_days_of_a_dirty_shop(own_spark: SparkSession, settings: Settings, tmp_path: Path) -> None:
    with tarfile.open(DATA / "online_retail" / "by-day.tar.gz") as archive:
        for member in archive.getmembers():
            if Path(member.name).stem in DAYS:
                archive.extract(member, tmp_path, filter="data")
    files = sorted(tmp_path.rglob("*.csv"))
    assert len(files) == len(DAYS)
    rows = [row for file in files for row in csv.DictReader(file.open(encoding="utf-8"))]
    expected: collections.Counter[str] = collections.Counter()
    for row in rows:
        if not row["CustomerID"]:
            expected["missing_field"] += 1
        elif int(row["Quantity"]) < 1:
            expected["out_of_range"] += 1
    by = mapping.read(ROOT / "conf" / "mappings" / "online-retail.yaml")
    result = load.load_files(own_spark, settings, files[0].parent, by=by)
    assert (result.rows, result.refused) == (len(rows), dict(expected))
    found = values(own_spark, "raw.user_interactions")
    assert found[0] == {
        "user_id": "17850",
        "event_id": "536365:85123A:6:2.55",
        "pin_id": "85123A",
        "action": "purchase",
        "event_time": "2010-12-01T08:26:00.000000Z",
        "quantity": 6,
    }


@needs_data
def test_impressions_from_parquet(own_spark: SparkSession, settings: Settings) -> None:
    file = DATA / "open_bandit" / "random_women.parquet"
    source = pq.read_table(file)
    by = mapping.read(ROOT / "conf" / "mappings" / "open-bandit.yaml")
    result = load.load_files(own_spark, settings, file, by=by)
    assert (result.rows, result.refused) == (source.num_rows, {})
    found = values(own_spark, "raw.user_interactions")
    actions = collections.Counter(value["action"] for value in found)
    assert actions == collections.Counter(
        "click" if click else "view" for click in source.column("click").to_pylist()
    )
    stamp = source.column("timestamp")[0].as_py()
    assert found[0]["event_time"] == stamp.replace(" ", "T").replace("+00:00", "Z")


def test_files_that_differ_in_their_columns(
    own_spark: SparkSession, settings: Settings, tmp_path: Path
) -> None:
    """Another type of a column, one that is missing, another order; and names that nobody can tell apart."""

    shop = tmp_path / "shop"
    shop.mkdir()

    def put(name: str, **columns: list[Any]) -> None:
        row = {"pin_id": ["p"], "user_id": ["u"], "action": ["view"], "event_time": [0]}
        pq.write_table(pa.table(row | columns), shop / name)

    put("1.parquet", event_id=["1"], quantity=[2], surface=["home"])
    put("2.parquet", surface=["search"], quantity=["many"], event_id=["2"])
    put("3.parquet", event_id=["3"], quantity=[1.0])
    result = load.load_files(own_spark, settings, shop, USER_INTERACTIONS)
    assert (result.rows, result.refused) == (3, {"wrong_type": 2})
    assert result.warnings == ("3.parquet has no surface, which other files have",)
    found = values(own_spark, "raw.user_interactions")
    assert [(value["event_id"], value["quantity"], value.get("surface")) for value in found] == [
        ("1", 2, "home"),
        ("2", "many", "search"),
        ("3", 1.0, None),
    ]
    fields = (
        "user_id: user_id, event_id: event_id, quantity: {from: quantity, type: number}, surface: surface"
    )
    by = mapping.read(write(tmp_path / "_m.yaml", f"topic: user-interactions\nfields: {{{fields}}}"))
    assert load.load_files(own_spark, settings, shop, by=by).rows == 3
    found = values(own_spark, "raw.user_interactions")[-6:]
    assert {(value["event_id"], str(value["quantity"])) for value in found} >= {("2", "many"), ("3", "1.0")}
    put("4.parquet", Event_ID=["4"])
    with pytest.raises(BadMapping, match="quantity.*the source has .*Event_ID"):
        load.load_files(own_spark, settings, shop, by=by)
    put("5.parquet", event_id=["5"], quantity=[1], surface=["home"])
    with pytest.raises(LoadError, match="only in upper and lower case: Event_ID, event_id"):
        load.load_files(own_spark, settings, shop, by=by)


def test_a_damaged_parquet_file_is_named(own_spark: SparkSession, settings: Settings, tmp_path: Path) -> None:
    """Its footer is whole, so that it can only be seen when its pages are read."""
    ids = [str(n) for n in range(20_000)]
    file = tmp_path / "x.parquet"
    pq.write_table(pa.table({"user_id": ids, "event_id": ids}), file, use_dictionary=False)
    whole = file.read_bytes()
    file.write_bytes(whole[:100] + bytes(2000) + whole[2100:])
    with pytest.raises(LoadError, match=r"a Parquet file is damaged.*fetch it again") as caught:
        load.load_files(own_spark, settings, file, USER_INTERACTIONS)
    assert "x.parquet" in str(caught.value)
    assert lake.current_snapshot(settings, "raw.user_interactions") is None
