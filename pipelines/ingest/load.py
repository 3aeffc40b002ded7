"""Loads: history from files or DataFrames into the raw tables, each once and as a whole.

Belongs here: making a record of each source row, refusing what its contract refuses, one commit. Does not belong here:
what a particular source's columns mean (`complete_journey`).

A load is one commit of the raw table, and its id is in that commit's position: from then on it is accepted, and doing
it again changes nothing. What its contract refuses is written to `raw.dead_letters` before that. If the process dies
between the two, nothing was loaded: dead letters count from the moment when the raw table has their load (see
`dead_letters`), and the next attempt replaces them.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pipelines import failpoints, lake
from pipelines.contracts import Contract, frames
from pipelines.indexing.position import Position
from pipelines.ingest import mapping, sources, writers
from pipelines.ingest.mapping import ROW, TIME_FORMAT, FieldMapping
from pipelines.ingest.sources import FOUND, Dialect, LoadError
from pipelines.settings import Settings

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame, SparkSession


class LoadResult(NamedTuple):
    """What a load did.

    Attributes:
        load_id: The load.
        table: The raw table.
        rows: Rows of the source, all of them in `raw`.
        refused: How many of them the contract refuses, by reason.
        is_repeat: Whether the load had been done before; then nothing was changed.
        position: Covers the load; a base whose cut covers it has it.
        warnings: What is odd about the accepted rows.
        seconds: How long it took.
    """

    load_id: str
    table: str
    rows: int
    refused: Mapping[str, int]
    is_repeat: bool
    position: Position
    warnings: tuple[str, ...] = ()
    seconds: float = 0.0

    @property
    def accepted(self) -> int:
        """Rows that keep the contract."""
        return self.rows - sum(self.refused.values())

    def to_json(self) -> dict[str, Any]:
        """For `--json`; the position as the token that clients pass."""
        return {
            **self._asdict(),
            "accepted": self.accepted,
            "refused": dict(self.refused),
            "position": self.position.token(),
            "warnings": list(self.warnings),
        }


def raw_spec(contract: Contract) -> lake.TableSpec:
    """The raw table of a contract's topic."""
    return lake.TABLES[f"raw.{contract.name}"]


def load(
    spark: SparkSession,
    settings: Settings,
    contract: Contract,
    records: DataFrame,
    load_id: str,
    warnings: tuple[str, ...] = (),
) -> LoadResult:
    """Append records to the raw table of their topic, once.

    Args:
        spark: The session.
        settings: Where the lake is.
        contract: Of the topic.
        records: `value` (the record as JSON text or bytes) and `load_row` (its number in the source, the same whenever
            it is computed); `key` may be there.
        load_id: Names the load for good. It stands beside the topic's name in positions, so that one id may be used for
            each topic of a source.
        warnings: Passed through to the result.
    """
    from pyspark.sql import functions as F

    started = time.monotonic()
    full_id = qualified(contract, load_id)
    spec = raw_spec(contract)
    for needed in (spec, lake.RAW_DEAD_LETTERS):
        lake.ensure(spark, needed)
    with _alone(settings, full_id), writers.appending(settings):
        this = Position(loads=frozenset({full_id}))
        if lake.position(settings, spec.name).covers(this):
            return _repeated(spark, spec, contract, full_id, this, started)
        now_ms = time.time_ns() // 1_000_000
        now = F.timestamp_millis(F.lit(now_ms))
        key = F.col("key").cast("binary") if "key" in records.columns else F.lit(None).cast("binary")
        raw = records.select(
            F.lit(None).cast("string").alias("topic_id"),
            F.lit(None).cast("int").alias("partition"),
            F.lit(None).cast("bigint").alias("offset"),
            F.lit(full_id).alias("load_id"),
            F.col("load_row").cast("bigint").alias("load_row"),
            now.alias("broker_time"),
            key.alias("key"),
            F.col("value").cast("binary").alias("value"),
            now.alias("ingested_at"),
        )
        refused = _bury(spark, contract, raw, full_id)
        failpoints.hit("load.after_dead_letters")
        lake.append(raw, spec, {lake.LOAD_ID: full_id, **lake.bringing(settings, spec.name, this, now_ms)})
    rows = _rows_of(settings, spec, full_id)
    seconds = round(time.monotonic() - started, 2)
    return LoadResult(full_id, spec.name, rows, refused, False, this, warnings, seconds)


def qualified(contract: Contract, load_id: str) -> str:
    """The id under which a load stands in positions and in the raw table."""
    if not load_id or len(load_id) > 200:
        raise LoadError(
            "a load id has 1 to 200 characters", where=load_id[:40], remedy="choose another load id"
        )
    return f"{contract.name}:{load_id}"


def records_of(df: DataFrame, fields: Mapping[str, Column], row: Column, key: str | None = None) -> DataFrame:
    """Records for `load`: each row as the JSON that its contract wants.

    Args:
        df: The source's rows.
        fields: JSON field → expression over them. A field that is null is left out.
        row: The number of the row in the source.
        key: The field that records are keyed by.
    """
    from pyspark.sql import functions as F

    value = F.to_json(
        F.struct(*[expression.alias(name) for name, expression in fields.items()]),
        {"timestampFormat": TIME_FORMAT, "ignoreNullFields": "true"},
    )
    keyed = fields[key].cast("string").cast("binary") if key else F.lit(None).cast("binary")
    return df.select(row.alias("load_row"), keyed.alias("key"), value.alias("value"))


def load_files(
    spark: SparkSession,
    settings: Settings,
    path: Path | str,
    contract: Contract | None = None,
    *,
    by: FieldMapping | None = None,
    dialect: Dialect = FOUND,
    load_id: str | None = None,
) -> LoadResult:
    """Load a file, or a folder of files, of Parquet, CSV or JSON lines, as one load.

    Args:
        spark: The session.
        settings: Where the lake is.
        path: The file or folder.
        contract: Of the topic; a mapping names it too.
        by: What the columns mean. Without one, columns are named as the contract's fields (`op` may be one), and JSON
            lines are the records themselves.
        dialect: How CSV is to be read, where that is not to be found out.
        load_id: By default made from the content of the files, the mapping and the dialect.

    Raises:
        LoadError: There is nothing to read there, a file cannot be read, or a needed column is missing.
        BadMapping: The mapping does not fit the source.
    """
    if by is not None and contract is not None and by.contract is not contract:
        raise LoadError(f"the mapping is for {by.contract.topic}, not for {contract.topic}", where=path)
    contract = by.contract if by is not None else contract
    assert contract is not None
    files = sources.files_of(path)
    kind = sources.format_of(files[0])
    if kind != "csv" and dialect != FOUND:
        raise LoadError("delimiter, encoding, header and columns are for CSV", where=path)
    is_plain = kind == "jsonl" and by is None
    read_as = f"{Path(path).resolve()} {dialect} {is_plain}"
    staging = settings.paths.run / "loads" / hashlib.sha256(read_as.encode()).hexdigest()[:24]
    seen = sources.look(files)
    name = load_id or content_id(seen, by, dialect)
    staged = sources.stage(seen, staging, dialect, has_fields=not is_plain)
    with nanoseconds_as_long(spark):
        df = read_parquet(spark, staged) if kind == "parquet" else read_staged(spark, staged)
        if is_plain:
            key = f"get_json_object(cast({sources.VALUE} AS string), '$.{contract.key_field}')"
            records = df.selectExpr(f"{ROW} AS load_row", f"{key} AS key", sources.VALUE)
        elif by is None and kind == "parquet":
            records = _by_name(df, contract, path)
        else:
            named = [name for name in df.columns if name != ROW]
            records = mapping.records(_as_texts(df), by or mapping.by_name(contract, named, path))
        result = load(spark, settings, contract, records, name)
    shutil.rmtree(staging, ignore_errors=True)
    return result


def content_id(files: list[sources.Seen], by: FieldMapping | None, dialect: Dialect) -> str:
    """A load id by what is in the files and how it is read: the same files under another name are the same load."""
    parts = [
        *(file.digest for file in files),
        by.text if by else "",
        "" if dialect == FOUND else str(dialect),
    ]
    return f"content-{hashlib.sha256(' '.join(parts).encode()).hexdigest()[:24]}"


_ROWS_A_FILE = 2**40


def _by_name(df: DataFrame, contract: Contract, path: Path | str) -> DataFrame:
    """Records of typed columns that are named as the contract's fields."""
    from pyspark.sql import functions as F

    columns = [name for name in df.columns if name != ROW]
    mapping.check_key(contract, columns, path)
    return records_of(df, {name: F.col(f"`{name}`") for name in columns}, F.col(ROW), contract.key_field)


def _as_texts(df: DataFrame) -> DataFrame:
    """The same rows with every column as text, times as ISO 8601 in UTC."""
    texts = [
        f"date_format(`{name}`, {lake.quoted(TIME_FORMAT)}) AS `{name}`"
        if kind == "timestamp"
        else f"cast(`{name}` AS string) AS `{name}`"
        for name, kind in df.dtypes
        if name != ROW
    ]
    return df.selectExpr(ROW, *texts)


def read_staged(spark: SparkSession, files: list[Path]) -> DataFrame:
    """The rows of staged files, numbered as `read_parquet` numbers them; a column that a file lacks is null there."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    found = pa.unify_schemas([pq.read_schema(file) for file in files])
    columns = ", ".join(f"`{f.name}` {'binary' if pa.types.is_binary(f.type) else 'string'}" for f in found)
    df = spark.read.schema(columns).parquet(*map(str, files))
    number = "cast(substring_index(_metadata.file_name, '-', 1) AS bigint)"
    return df.selectExpr(f"{number} * {_ROWS_A_FILE} + _metadata.row_index AS {ROW}", *df.columns)


def read_parquet(spark: SparkSession, files: list[Path]) -> DataFrame:
    """The rows of the files; `_row` numbers them by file and place, the same each time. Times are taken as UTC.

    Nanosecond times, which Spark does not know, are cut to microseconds; read within `nanoseconds_as_long`.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq
    from pyspark.sql import functions as F

    parts = []
    for number, file in enumerate(files):
        try:
            schema = pq.read_schema(file)
        except (pa.ArrowInvalid, OSError) as error:
            raise LoadError(f"not a Parquet file: {error}", where=file, remedy="give another file") from error
        df = spark.read.parquet(str(file))
        kinds = dict(df.dtypes)
        columns = []
        for field in schema:
            column = F.col(f"`{field.name}`")
            if pa.types.is_timestamp(field.type) and kinds[field.name] == "bigint":
                column = F.timestamp_micros(F.expr(f"`{field.name}` div 1000"))
            elif kinds[field.name] == "timestamp_ntz":
                column = column.cast("timestamp")
            columns.append(column.alias(field.name))
        row = (F.col("_metadata.row_index") + F.lit(number * _ROWS_A_FILE)).alias(ROW)
        parts.append(df.select(*columns, row))
    merged = parts[0]
    for part in parts[1:]:
        merged = merged.unionByName(part, allowMissingColumns=True)
    return merged


@contextlib.contextmanager
def nanoseconds_as_long(spark: SparkSession) -> Iterator[None]:
    """Lets Spark read nanosecond times, as integers, for as long as this is open (reading is lazy: load inside)."""
    name = "spark.sql.legacy.parquet.nanosAsLong"
    before = spark.conf.get(name, "false") or "false"
    spark.conf.set(name, "true")
    try:
        yield
    finally:
        spark.conf.set(name, before)


def _bury(spark: SparkSession, contract: Contract, raw: DataFrame, full_id: str) -> dict[str, int]:
    """Write the refused ones to the dead letters, in place of those of an attempt that came to nothing; by reason."""
    from pyspark.sql import functions as F

    spec = lake.RAW_DEAD_LETTERS
    of_this_load = (F.col("topic") == contract.topic) & (F.col("load_id") == full_id)
    if not lake.read(spark, spec.name).filter(of_this_load).isEmpty():
        topic, load_id = lake.quoted(contract.topic), lake.quoted(full_id)
        lake.delete(spark, spec, f"topic = {topic} AND load_id = {load_id}")
    letters = (
        frames.refused(contract, raw)
        .withColumns({"topic": F.lit(contract.topic), "ingested_at": F.col("broker_time")})
        .persist()
    )
    try:
        counted = {row["reason"]: row["count"] for row in letters.groupBy("reason").count().collect()}
        if counted:
            lake.append(letters.coalesce(1), spec, {lake.LOAD_ID: full_id})
        return dict(sorted(counted.items()))
    finally:
        letters.unpersist()


def _repeated(
    spark: SparkSession,
    spec: lake.TableSpec,
    contract: Contract,
    full_id: str,
    this: Position,
    started: float,
) -> LoadResult:
    """The result of a load that was done before, from the tables."""
    from pyspark.sql import functions as F

    of_this_load = F.col("load_id") == full_id
    rows = lake.read(spark, spec.name).filter(of_this_load).count()
    letters = lake.read(spark, lake.RAW_DEAD_LETTERS.name).filter(
        of_this_load & (F.col("topic") == contract.topic)
    )
    refused = {
        row["reason"]: row["count"] for row in letters.groupBy("reason").count().orderBy("reason").collect()
    }
    return LoadResult(full_id, spec.name, rows, refused, True, this, (), round(time.monotonic() - started, 2))


def _rows_of(settings: Settings, spec: lake.TableSpec, full_id: str) -> int:
    """The rows that a load's commit added, as the commit counted them."""
    for snapshot in lake.ancestors(settings, spec.name):
        if snapshot.summary.get(lake.LOAD_ID) == full_id:
            return int(snapshot.summary.get("added-records", 0))
    raise LoadError(
        "the commit of the load is not to be found", where=f"{spec.name}, {full_id}", remedy="load it again"
    )


@contextlib.contextmanager
def _alone(settings: Settings, full_id: str) -> Iterator[None]:
    """One process at a time does a load."""
    folder = settings.paths.run / "loads"
    folder.mkdir(parents=True, exist_ok=True)
    name = hashlib.sha256(full_id.encode()).hexdigest()[:24]
    with (folder / f"{name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
