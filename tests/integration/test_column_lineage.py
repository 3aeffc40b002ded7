"""Column lineage, read off real plans: planted transforms with exact answers, then every table that is computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pyarrow as pa
import pytest
from pyspark.sql import DataFrame, SparkSession, Window
from pyspark.sql import functions as F

from assets import columns
from pipelines import column_lineage, derived
from pipelines.column_lineage import Lineage, Untraceable, trace
from pipelines.index_rows import FACT_DOCS

ORDERS = (
    "shop string, user string, price bigint, quantity int, day date, place struct<city:string,zip:string>"
)
USERS = "user string, name string, age int"


@pytest.fixture(scope="module")
def orders(spark: SparkSession) -> DataFrame:
    return spark.createDataFrame([], ORDERS).alias("raw.orders")


@pytest.fixture(scope="module")
def users(spark: SparkSession) -> DataFrame:
    return spark.createDataFrame([], USERS).alias("raw.users")


def told(lineage: Lineage) -> dict[str, set[str]]:
    """Path → `column kind`, as text; `rows` are what decides about rows."""
    found = {
        path: {f"{d.table.removeprefix('raw.')}.{d.column} {d.kind}" for d in deps}
        for path, deps in lineage.columns.items()
    }
    return found | {"rows": {f"{d.table.removeprefix('raw.')}.{d.column} {d.kind}" for d in lineage.rows}}


def doubled(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    yield from batches


def shouted(text: str) -> str:
    return text.upper()


Transform = Callable[[DataFrame, DataFrame], DataFrame]
PLANTED: dict[str, tuple[Transform, dict[str, set[str]]]] = {
    "renamed": (
        lambda orders, users: orders.select(F.col("shop").alias("store")).withColumnRenamed(
            "store", "seller"
        ),
        {"seller": {"orders.shop identity"}, "rows": set()},
    ),
    "an expression of two, a constant": (
        lambda orders, users: orders.selectExpr("price * quantity AS total", "1 AS one"),
        {
            "total": {"orders.price transformation", "orders.quantity transformation"},
            "one": set(),
            "rows": set(),
        },
    ),
    "filtered": (
        lambda orders, users: orders.filter("price > 0").select("user"),
        {"user": {"orders.user identity"}, "rows": {"orders.price filter"}},
    ),
    "joined": (
        lambda orders, users: orders.join(users, "user").select("name", "price"),
        {
            "name": {"users.name identity"},
            "price": {"orders.price identity"},
            "rows": {"orders.user join", "users.user join"},
        },
    ),
    "joined with itself": (
        lambda orders, users: (
            users.alias("old")
            .join(users.alias("young"), F.expr("old.age > young.age"))
            .selectExpr("old.name AS older", "young.user AS younger")
        ),
        {
            "older": {"users.name identity"},
            "younger": {"users.user identity"},
            "rows": {"users.age join"},
        },
    ),
    "those without": (
        lambda orders, users: orders.join(users.filter("age > 17"), "user", "left_anti").select("shop"),
        {
            "shop": {"orders.shop identity"},
            "rows": {"orders.user join", "users.user join", "users.age filter"},
        },
    ),
    "aggregated": (
        lambda orders, users: orders.groupBy("user").agg(
            F.sum(F.col("price") * 2).alias("spent"), F.count(F.lit(1)).alias("orders")
        ),
        {
            "user": {"orders.user identity"},
            "spent": {"orders.price aggregation"},
            "orders": set(),
            "rows": {"orders.user group_by"},
        },
    ),
    "an expression of an aggregate": (
        lambda orders, users: orders.groupBy().agg((F.max("price") - F.min("quantity")).alias("spread")),
        {"spread": {"orders.price aggregation", "orders.quantity aggregation"}, "rows": set()},
    ),
    "united": (
        lambda orders, users: orders.selectExpr("user AS who", "shop").unionByName(
            users.selectExpr("upper(name) AS who"), allowMissingColumns=True
        ),
        {
            "who": {"orders.user identity", "users.name transformation"},
            "shop": {"orders.shop identity"},
            "rows": set(),
        },
    ),
    "over a window": (
        lambda orders, users: orders.select(
            F.lag("price").over(Window.partitionBy("user").orderBy("day")).alias("before"),
            F.row_number().over(Window.partitionBy("user").orderBy("day")).alias("number"),
            F.sum("quantity").over(Window.partitionBy("shop")).alias("sold"),
        ),
        {
            "before": {"orders.price transformation", "orders.user window", "orders.day window"},
            "number": {"orders.user transformation", "orders.day transformation"},
            "sold": {"orders.quantity aggregation", "orders.shop window"},
            "rows": set(),
        },
    ),
    "the first of each": (
        lambda orders, users: (
            orders.withColumn("n", F.row_number().over(Window.partitionBy("user").orderBy("day")))
            .filter("n = 1")
            .select("shop")
        ),
        {"shop": {"orders.shop identity"}, "rows": {"orders.user filter", "orders.day filter"}},
    ),
    "a case": (
        lambda orders, users: orders.selectExpr(
            "CASE WHEN quantity > 1 THEN price WHEN day IS NULL THEN 0 ELSE length(shop) END AS value",
            "if(quantity > 1, shop, user) AS who",
        ),
        {
            "value": {
                "orders.price identity",
                "orders.shop transformation",
                "orders.quantity condition",
                "orders.day condition",
            },
            "who": {"orders.shop identity", "orders.user identity", "orders.quantity condition"},
            "rows": set(),
        },
    ),
    "structs, put together and taken apart": (
        lambda orders, users: orders.selectExpr(
            "struct(place.city, price + 1 AS more) AS both", "place AS whole"
        ).selectExpr("both", "both.city AS city", "whole.zip AS zip", "to_json(whole) AS text"),
        {
            "both": {"orders.place.city transformation", "orders.price transformation"},
            "both.city": {"orders.place.city identity"},
            "both.more": {"orders.price transformation"},
            "city": {"orders.place.city identity"},
            "zip": {"orders.place.zip identity"},
            "text": {"orders.place transformation"},
            "rows": set(),
        },
    ),
    "by Python, value by value": (
        lambda orders, users: orders.select(F.udf(shouted, "string")("shop").alias("loud"), "user"),
        {"loud": {"orders.shop opaque"}, "user": {"orders.user identity"}, "rows": set()},
    ),
    "by Python, whole rows": (
        lambda orders, users: (
            orders.select("user", (F.col("price") * 2).alias("price"))
            .mapInArrow(doubled, "user string, price bigint")
            .selectExpr("user AS who", "price + 1 AS more")
        ),
        {
            "who": {"orders.user opaque", "orders.price opaque"},
            "more": {"orders.user opaque", "orders.price opaque"},
            "rows": set(),
        },
    ),
    "distinct, and in order": (
        lambda orders, users: orders.select("shop").distinct().orderBy(F.length("shop")).limit(3),
        {"shop": {"orders.shop identity"}, "rows": {"orders.shop group_by", "orders.shop sort"}},
    ),
    "one of each": (
        lambda orders, users: orders.dropDuplicates(["user"]).select("shop"),
        {"shop": {"orders.shop identity"}, "rows": {"orders.user group_by"}},
    ),
    "exploded": (
        lambda orders, users: orders.select("user", F.explode(F.split("shop", ",")).alias("part")),
        {"user": {"orders.user identity"}, "part": {"orders.shop transformation"}, "rows": set()},
    ),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_transform(orders: DataFrame, users: DataFrame, name: str) -> None:
    transform, expected = PLANTED[name]
    assert told(trace(transform(orders, users))) == expected


def test_what_code_makes_up_depends_on_nothing(spark: SparkSession) -> None:
    assert told(trace(spark.range(3).selectExpr("id + 1 AS id"))) == {"id": set(), "rows": set()}


def test_a_step_that_is_not_known_is_refused_by_its_name(orders: DataFrame, users: DataFrame) -> None:
    with pytest.raises(Untraceable, match="Expand"):
        trace(orders.rollup("user").count())
    orders.createOrReplaceTempView("orders")
    with pytest.raises(Untraceable, match="subquery"):
        trace(orders.sparkSession.sql("SELECT (SELECT max(price) FROM orders) AS highest FROM orders"))


def test_a_lineage_is_the_same_read_again(orders: DataFrame, users: DataFrame) -> None:
    lineage = trace(PLANTED["over a window"][0](orders, users))
    assert column_lineage.from_json(lineage.to_json()) == lineage


# ------------------------------------------------------------------------------------------------ our own tables


@pytest.fixture(scope="module")
def lineages(spark: SparkSession) -> dict[str, Lineage]:
    return derived.lineages(spark)


def test_every_column_of_every_curated_and_feature_table_has_an_answer(lineages: dict[str, Lineage]) -> None:
    specs = derived.specs()
    built = {name for name in specs if name.startswith(("curated.", "features."))}
    assert built <= lineages.keys()
    for name in built:
        for column in specs[name].columns:
            sources = lineages[name].sources(column.name)
            assert sources, f"{name}.{column.name}"
            assert all(specs[table].columns for table, _ in sources)


def test_every_source_is_a_column_that_is_declared(lineages: dict[str, Lineage]) -> None:
    specs = derived.specs()
    declared = {(name, column.name) for name, spec in specs.items() for column in spec.columns}
    for name, lineage in lineages.items():
        assert {path for path in lineage.columns if "." not in path} == {c.name for c in specs[name].columns}
        used = {d for deps in lineage.columns.values() for d in deps} | set(lineage.rows)
        assert {(d.table, d.column.partition(".")[0]) for d in used} <= declared, name


def test_what_a_contract_decides_in_python_is_of_all_that_it_reads(lineages: dict[str, Lineage]) -> None:
    found = lineages["curated.pins_offer"].of("offer")
    assert {d.kind for d in found if d.is_direct} == {"opaque"}
    assert {"key", "value", "broker_time"} <= {d.column for d in found}
    assert {d.table for d in found} == {"raw.pin_updates"}


def test_rows_of_an_index_are_followed_into_their_structs(lineages: dict[str, Lineage]) -> None:
    pins = lineages["index.pins"]
    title = pins.of("payload_catalogue.title")
    assert {(d.column, d.kind) for d in title} == {
        ("catalogue.title", "identity"),
        ("is_deleted", "condition"),
    }
    assert pins.sources("payload_embedding.vector") == [("features.pin_vectors", "vector")]
    assert {table for table, _ in pins.sources("key")} == {
        "curated.pins_catalogue",
        "curated.pins_offer",
        "features.pin_vectors",
    }
    assert pins.sources("family") == [], "a literal"
    amounts = lineages["index.pin_counts"].sources("amounts")
    assert sorted(amounts) == [("curated.user_interactions", name) for name in ("action", "pin_id")]
    kept = lineages["index.user_events"].sources("payload_interactions.indexed_brand")
    assert ("curated.pins_catalogue", "catalogue.brand") in kept
    assert FACT_DOCS.keys() <= pins.columns.keys()


def test_a_model_is_made_of_interactions(lineages: dict[str, Lineage]) -> None:
    of_vector = lineages["models.pin_als"].of("vector")
    assert {(d.column, d.kind) for d in of_vector} == {
        ("action", "opaque"),
        ("pin_id", "opaque"),
        ("user_id", "opaque"),
    }
    assert lineages["features.pin_vectors"].sources("vector") == [("models.pin_als", "vector")]


def test_it_is_shown_as_dagster_shows_it(lineages: dict[str, Lineage]) -> None:
    spec = derived.specs()["index.pins"]
    shown = columns.lineage_metadata(lineages["index.pins"], spec)
    by_column = shown["dagster/column_lineage"].deps_by_column
    assert [(d.asset_key.path, d.column_name) for d in by_column["payload_offer"]] == [
        (["curated", "pins_offer"], "offer")
    ]
    assert column_lineage.from_json(shown[columns.LINEAGE].value) == lineages["index.pins"]
    curated = derived.specs()["curated.pins_offer"]
    note = columns.lineage_metadata(lineages["curated.pins_offer"], curated)["tidemark/lineage_note"]
    assert "offer_hash" in note and "code that a plan does not show" in note


def test_a_plan_that_cannot_be_traced_fails_no_build(orders: DataFrame) -> None:
    spec = derived.specs()["curated.pins_offer"]
    shown = columns.traced(orders.rollup("user").count(), spec)
    assert "Expand" in shown[columns.LINEAGE]
    assert [column.name for column in shown["dagster/column_schema"].columns] == [
        c.name for c in spec.columns
    ]
