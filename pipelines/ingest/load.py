"""Loads: history from files or DataFrames into the raw tables, each once and as a whole.

Belongs here: making a record of each source row, refusing what its contract refuses, one commit. Does not belong here:
what a particular source's columns mean (`complete_journey`).

A load is one commit of the raw table, and its id is in that commit's position: from then on it is accepted, and doing
it again changes nothing. What its contract refuses is written to `raw.dead_letters` before that, and its files to
`ops.loads`. If the process dies in between, nothing was loaded: both count from the moment when the raw table has the
load (see `dead_letters` and `loaded_files`), and the next attempt replaces them.

A file whose content was loaded before, and read in the same way, is not loaded again: of a folder that grows, a load
brings the new files.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pipelines import failpoints, lake
from pipelines.contracts import Contract, frames
from pipelines.indexing.position import Position
from pipelines.ingest import evolution, loaded_files, mapping, sources, writers
from pipelines.ingest.loaded_files import LoadedFile
from pipelines.ingest.mapping import LOAD_ROW, OWN, ROW, TIME_FORMAT, FieldMapping
from pipelines.ingest.sources import FOUND, Dialect, LoadError, Seen
from pipelines.settings import Settings

if TYPE_CHECKING:
    import pyarrow as pa
    from pyspark.sql import Column, DataFrame, SparkSession

ROW_BITS = 40
"""A row's number in a load is its file's, shifted by so much, and its place in the file."""


class LoadResult(NamedTuple):
    """What a load did.

    Attributes:
        load_id: The load; if nothing was new, the newest of those that brought the files.
        table: The raw table.
        rows: Rows that it brought, all of them in `raw`; if nothing was new, those that are there already.
        refused: How many of them the contract refuses, by reason.
        is_repeat: Whether nothing was new; then nothing was changed.
        position: Covers the load and those before it; a base whose cut covers it has it.
        warnings: What is odd about the source.
        seconds: How long it took.
        already_loaded: Files that were not loaded again, each with the load that brought its content.
    """

    load_id: str
    table: str
    rows: int
    refused: Mapping[str, int]
    is_repeat: bool
    position: Position
    warnings: tuple[str, ...] = ()
    seconds: float = 0.0
    already_loaded: Mapping[str, str] = {}

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
            "already_loaded": dict(self.already_loaded),
        }


def raw_spec(contract: Contract) -> lake.TableSpec:
    """The raw table of a contract's topic."""
    return lake.TABLES[contract.raw_table]


def load(
    spark: SparkSession,
    settings: Settings,
    contract: Contract,
    records: DataFrame,
    load_id: str,
    warnings: tuple[str, ...] = (),
) -> LoadResult:
    """Append records to the raw table of their topic, once: an id that the table has is not loaded again.

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
    with _alone(settings, contract):
        full_id = qualified(contract, load_id)
        if (done := _repeated(spark, settings, contract, full_id)) is not None:
            return done
        whole = LoadedFile(
            full_id, raw_spec(contract).name, 0, None, None, None, None, records.count(), {}, warnings, _now()
        )
        return _load(spark, settings, contract, records, [whole])


def _load(
    spark: SparkSession,
    settings: Settings,
    contract: Contract,
    records: DataFrame,
    files: Sequence[LoadedFile],
) -> LoadResult:
    """Commit a load that the raw table does not have. What is refused of its files is not known before."""
    from pyspark.sql import functions as F

    started = time.monotonic()
    spec, full_id, loaded_at = raw_spec(contract), files[0].load_id, files[0].loaded_at
    for needed in (spec, lake.RAW_DEAD_LETTERS, lake.OPS_LOADS):
        lake.ensure(spark, needed)
    evolution.declare(settings, contract)
    now_ms = int(loaded_at.timestamp() * 1000)
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
    with _failures_told(settings), writers.appending(settings):
        refused = _bury(spark, settings, evolution.current(settings, contract), raw, full_id)
        failpoints.hit("load.after_dead_letters")
        files = [file._replace(refused=refused.get(file.number, {})) for file in files]
        loaded_files.record(spark, files)
        failpoints.hit("load.after_files")
        this = Position(loads=frozenset({full_id}))
        lake.append(raw, spec, {lake.LOAD_ID: full_id, **lake.bringing(settings, spec.name, this, now_ms)})
    failpoints.hit("load.after_commit")
    return _result(files, False, started)


def _result(
    files: Sequence[LoadedFile],
    is_repeat: bool,
    started: float,
    already_loaded: Mapping[str, str] | None = None,
) -> LoadResult:
    """What the files say, those of the newest load among them last."""
    newest = files[-1]
    return LoadResult(
        newest.load_id,
        newest.table,
        sum(file.rows for file in files),
        loaded_files.total(file.refused for file in files),
        is_repeat,
        Position(loads=frozenset({newest.load_id})),
        tuple(dict.fromkeys(warning for file in files for warning in file.warnings)),
        round(time.monotonic() - started, 2),
        already_loaded or {},
    )


def _now() -> datetime:
    """In whole milliseconds, as records have their times."""
    return datetime.fromtimestamp(time.time_ns() // 1_000_000 / 1000, UTC)


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
    """Load the new ones of a folder of files of Parquet, CSV or JSON lines, or one file, as one load.

    Args:
        spark: The session.
        settings: Where the lake is.
        path: The file or folder.
        contract: Of the topic; a mapping names it too.
        by: What the columns mean. Without one, columns are named as the contract's fields (`op` may be one), and JSON
            lines are the records themselves.
        dialect: How CSV is to be read, where that is not to be found out.
        load_id: By default made from the content of the new files, the mapping and the dialect.

    Raises:
        LoadError: There is nothing to read there, a file cannot be read, a needed column is missing, or the id names
            a load of other files.
        BadMapping: The mapping does not fit the source.
    """
    started = time.monotonic()
    path = Path(path)
    if by is not None and contract is not None and by.contract is not contract:
        raise LoadError(f"the mapping is for {by.contract.topic}, not for {contract.topic}", where=path)
    contract = by.contract if by is not None else contract
    assert contract is not None
    files = sources.files_of(path)
    kind = sources.format_of(files[0])
    if kind != "csv" and dialect != FOUND:
        raise LoadError("delimiter, encoding, header and columns are for CSV", where=path)
    reading = reading_of(kind, by, dialect)
    with _alone(settings, contract):
        wanted = qualified(contract, load_id) if load_id else None
        seen = sources.look(files)
        held = loaded_files.counting(settings, raw_spec(contract).name)
        new, known = _told_apart(seen, held, reading, wanted)
        full_id = wanted or qualified(contract, content_id(new, reading))
        if own := {file.digest: file for file in held if file.load_id == full_id}:
            _require_same_content(own, new, reading, path)
            known, new = [*known, *((file, own[file.digest]) for file in seen if file.digest in own)], []
        already = {_name(file, path): loaded.load_id for file, loaded in known}
        if not new:
            brought = {loaded.digest: loaded for _, loaded in known}.values()
            return _result(sorted(brought, key=lambda file: file.loaded_at), True, started, already)
        if (done := _repeated(spark, settings, contract, full_id)) is not None:
            return done
        is_plain = kind == "jsonl" and by is None
        staging = settings.paths.run / "loads" / _short(f"{path.resolve()} {dialect} {is_plain}")
        staged = sources.stage(new, staging, dialect, has_fields=not is_plain)
        names = [_name(file, path) for file in new]
        with nanoseconds_as_long(spark), _failures_told(settings, path, names):
            records, warnings = _records(spark, staged, names, contract, by, kind, path)
            at = _now()
            loaded = [
                LoadedFile(
                    full_id,
                    raw_spec(contract).name,
                    number,
                    names[number],
                    file.digest,
                    reading,
                    file.size,
                    _rows_in(staged[number]),
                    {},
                    warnings.get(number, ()),
                    at,
                )
                for number, file in enumerate(new)
            ]
            result = _load(spark, settings, contract, records, loaded)
        shutil.rmtree(staging, ignore_errors=True)
    seconds = round(time.monotonic() - started, 2)
    return result._replace(already_loaded=already | _copies(seen, new, path, full_id), seconds=seconds)


def reading_of(kind: str, by: FieldMapping | None, dialect: Dialect) -> str:
    """A fingerprint of how files are read: with another one, the same file is other records."""
    return _short(f"{kind} {by.meaning() if by else ''} {dialect}")


def content_id(files: Sequence[Seen], reading: str) -> str:
    """A load id by what is in the files and how it is read: the same files under another name are the same load."""
    return f"content-{_short(' '.join([*(file.digest for file in files), reading]))}"


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _name(file: Seen, path: Path) -> str:
    """A file's name in what is loaded."""
    return file.path.relative_to(path).as_posix() if path.is_dir() else file.path.name


def _told_apart(
    seen: Sequence[Seen], held: Sequence[LoadedFile], reading: str, wanted: str | None
) -> tuple[list[Seen], list[tuple[Seen, LoadedFile]]]:
    """The files that no load (other than the one that is asked for) has brought, each content once; and the others."""
    brought = {file.digest: file for file in held if file.reading == reading and file.load_id != wanted}
    new = {file.digest: file for file in reversed(seen) if file.digest not in brought}
    known = [(file, brought[file.digest]) for file in seen if file.digest in brought]
    return [file for file in seen if new.get(file.digest) is file], known


def _copies(seen: Sequence[Seen], new: Sequence[Seen], path: Path, full_id: str) -> dict[str, str]:
    """The files whose content another file of this load has."""
    digests = {file.digest for file in new}
    chosen = {file.path for file in new}
    return {_name(file, path): full_id for file in seen if file.digest in digests and file.path not in chosen}


def _require_same_content(
    own: Mapping[str | None, LoadedFile], new: Sequence[Seen], reading: str, path: Path
) -> None:
    """Whether a load that is there is of these files: an id names one content for good."""
    if all(file.reading == reading for file in own.values()) and own.keys() == {file.digest for file in new}:
        return
    other = [_name(file, path) for file in new if file.digest not in own]
    shown = ", ".join(other[:3]) + (f" and {len(other) - 3} more" if len(other) > 3 else "")
    raise LoadError(
        f"the load {next(iter(own.values())).load_id} is there, of other files, or the same read in another way"
        + (f"; it has no {shown}" if other else ""),
        where=path,
        remedy="an id names one content for good: choose another, or leave --load-id out",
    )


# ------------------------------------------------------------------------------------------------ records of rows


def _records(
    spark: SparkSession,
    staged: Sequence[Path],
    names: Sequence[str],
    contract: Contract,
    by: FieldMapping | None,
    kind: str,
    path: Path,
) -> tuple[DataFrame, dict[int, tuple[str, ...]]]:
    """A record of each row of the staged files; and by the file's number, what is odd about it.

    Files that have the same columns are read together. What differs between files is made alike as texts of JSON, so
    that a column may be a number in one file and a text in another.
    """
    import functools

    import pyarrow.parquet as pq

    schemas = [pq.read_schema(file).remove_metadata() for file in staged]
    if kind == "jsonl" and by is None:
        key = f"get_json_object(cast({sources.VALUE} AS string), '$.{contract.key_field}')"
        df = _read_alike(spark, staged, schemas[0])
        return df.selectExpr(f"{LOAD_ROW} AS load_row", f"{key} AS key", sources.VALUE), {}
    columns = list(dict.fromkeys(name for schema in schemas for name in schema.names))
    _require_distinct(columns, path)
    alike: dict[pa.Schema, list[int]] = {}
    for number, schema in enumerate(schemas):
        alike.setdefault(schema, []).append(number)
    parts = []
    for schema, numbers in alike.items():
        df = _read_alike(spark, [staged[number] for number in numbers], schema)
        if by is None and kind == "parquet":
            parts.append(_by_name(df, contract, names[numbers[0]]))
            continue
        chosen = by or mapping.by_name(contract, schema.names, names[numbers[0]])
        parts.append(mapping.records(_as_texts(df, columns, names if chosen.uses_row else ()), chosen))
    warnings = {} if kind == "jsonl" else _lacking(schemas, names, columns)
    return functools.reduce(lambda one, other: one.unionByName(other), parts), warnings


def _require_distinct(columns: Sequence[str], path: Path) -> None:
    if same := sources.same_names(columns):
        raise LoadError(
            f"columns differ only in upper and lower case: {', '.join(same)}",
            where=path,
            remedy="name a column alike in all files",
        )
    if own := set(columns) & set(OWN):
        raise LoadError(
            f"the column {own.pop()} has a name of the loader's own", where=path, remedy="rename it"
        )


def _lacking(
    schemas: Sequence[pa.Schema], names: Sequence[str], columns: Sequence[str]
) -> dict[int, tuple[str, ...]]:
    """What is said of files without columns that other files of the load have."""
    return {
        number: (f"{names[number]} has no {', '.join(missing)}, which other files have",)
        for number, schema in enumerate(schemas)
        if (missing := [name for name in columns if name not in schema.names])
    }


def _rows_in(staged: Path) -> int:
    import pyarrow.parquet as pq

    return int(pq.read_metadata(staged).num_rows)


def _by_name(df: DataFrame, contract: Contract, where: Path | str) -> DataFrame:
    """Records of typed columns that are named as the contract's fields."""
    from pyspark.sql import functions as F

    columns = [name for name in df.columns if name != LOAD_ROW]
    mapping.check_key(contract, columns, where)
    fields = {name: F.col(mapping.identifier(name)) for name in columns}
    return records_of(df, fields, F.col(LOAD_ROW), contract.key_field)


def _as_texts(df: DataFrame, columns: Sequence[str], files: Sequence[str]) -> DataFrame:
    """The same rows with every column as text, times as ISO 8601 in UTC, and those that they lack as null.

    Args:
        df: Rows as `_read_alike` gives them.
        columns: All that there are in the load.
        files: The names of its files, by number, where rows are to have names.
    """
    kinds = dict(df.dtypes)
    texts = [_text_of(name, kinds.get(name)) for name in columns]
    if files:
        listed = ", ".join(map(lake.quoted, files))
        file = f"element_at(array({listed}), cast(shiftright({LOAD_ROW}, {ROW_BITS}) AS int) + 1)"
        texts.append(f"concat({file}, ':', {LOAD_ROW} & {2**ROW_BITS - 1}) AS {ROW}")
    return df.selectExpr(LOAD_ROW, *texts)


def _text_of(column: str, kind: str | None) -> str:
    name = mapping.identifier(column)
    if kind is None:
        return f"cast(NULL AS string) AS {name}"
    if kind == "timestamp":
        return f"date_format({name}, {lake.quoted(TIME_FORMAT)}) AS {name}"
    return f"cast({name} AS string) AS {name}"


def _read_alike(spark: SparkSession, staged: Sequence[Path], schema: pa.Schema) -> DataFrame:
    """The rows of staged files of one schema, numbered by file and place."""
    number = "cast(substring_index(_metadata.file_name, '.', 1) AS bigint)"
    return _read(spark, staged, schema, f"{number} << {ROW_BITS} | _metadata.row_index")


def read_parquet(spark: SparkSession, file: Path) -> DataFrame:
    """The rows of a file; `_load_row` numbers them by place, the same each time. Times are taken as UTC.

    Nanosecond times, which Spark does not know, are cut to microseconds; read within `nanoseconds_as_long`.
    """
    import pyarrow.parquet as pq

    return _read(spark, [file], pq.read_schema(file), "_metadata.row_index")


def _read(spark: SparkSession, files: Sequence[Path], schema: pa.Schema, row: str) -> DataFrame:
    import pyarrow as pa

    df = spark.read.parquet(*map(str, files))
    kinds = dict(df.dtypes)
    columns = []
    for field in schema:
        name = mapping.identifier(field.name)
        if pa.types.is_timestamp(field.type) and kinds[field.name] == "bigint":
            columns.append(f"timestamp_micros({name} div 1000) AS {name}")
        elif kinds[field.name] == "timestamp_ntz":
            columns.append(f"cast({name} AS timestamp) AS {name}")
        else:
            columns.append(name)
    return df.selectExpr(*columns, f"{row} AS {LOAD_ROW}")


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


# ------------------------------------------------------------------------------------------------ the commit


def _bury(
    spark: SparkSession, settings: Settings, contract: Contract, raw: DataFrame, full_id: str
) -> dict[int, dict[str, int]]:
    """Write the refused ones to the dead letters, in place of those of an attempt that came to nothing.

    New fields of the others are learned.

    Returns:
        How many they are, by the number of their file and by reason.
    """
    from pyspark.sql import functions as F

    spec = lake.RAW_DEAD_LETTERS
    of_this_load = (F.col("topic") == contract.topic) & (F.col("load_id") == full_id)
    if not lake.read(spark, spec.name).filter(of_this_load).isEmpty():
        topic, load_id = lake.quoted(contract.topic), lake.quoted(full_id)
        lake.delete(spark, spec, f"topic = {topic} AND load_id = {load_id}")
    told = {"topic": F.lit(contract.topic), "ingested_at": F.col("broker_time")}
    found = frames.examined(contract, raw).withColumns(told).persist()
    try:
        evolution.learn_from(settings, contract, frames.new_fields(found))
        letters = frames.letters(found)
        number = F.shiftright("load_row", ROW_BITS).alias("number")
        counted: dict[int, dict[str, int]] = {}
        for row in letters.groupBy(number, "reason").count().orderBy("reason").collect():
            counted.setdefault(row["number"], {})[row["reason"]] = row["count"]
        if counted:
            lake.append(letters.coalesce(1), spec, {lake.LOAD_ID: full_id})
        return counted
    finally:
        found.unpersist()


def _repeated(spark: SparkSession, settings: Settings, contract: Contract, full_id: str) -> LoadResult | None:
    """The result of a load that the raw table has, from the tables themselves; None if it has not."""
    from pyspark.sql import functions as F

    started = time.monotonic()
    spec = raw_spec(contract)
    if full_id not in lake.position(settings, spec.name).loads:
        return None
    of_this_load = F.col("load_id") == full_id
    rows = lake.read(spark, spec.name).filter(of_this_load).count()
    letters = lake.read(spark, lake.RAW_DEAD_LETTERS.name).filter(
        of_this_load & (F.col("topic") == contract.topic)
    )
    refused = {
        row["reason"]: row["count"] for row in letters.groupBy("reason").count().orderBy("reason").collect()
    }
    this = Position(loads=frozenset({full_id}))
    return LoadResult(full_id, spec.name, rows, refused, True, this, (), round(time.monotonic() - started, 2))


_DAMAGED = re.compile(r"FAILED_READ_FILE[^\n]*/numbered/(\d+)[.]parquet")
_SIGNS_OF_NO_ROOM = (
    "No space left on device",
    "Disk quota exceeded",
    "File too large",
    "database or disk is full",
)


@contextlib.contextmanager
def _failures_told(settings: Settings, path: Path | None = None, names: Sequence[str] = ()) -> Iterator[None]:
    """What Java says of a full disk or an unreadable file, as an error that says what to do."""
    from py4j.protocol import Py4JJavaError
    from pyspark.errors import PySparkException

    try:
        yield
    except (Py4JJavaError, PySparkException, OSError) as error:
        text = str(error)
        if any(sign in text for sign in _SIGNS_OF_NO_ROOM):
            raise sources.full_disk(*_written_to(settings)) from error
        if path and (damaged := _DAMAGED.search(text)):
            number = int(damaged[1])
            raise LoadError(
                "a Parquet file is damaged: its pages cannot be read",
                where=path / names[number] if path.is_dir() else path,
                remedy="fetch it again",
            ) from error
        raise


def _written_to(settings: Settings) -> list[Path]:
    """The folders on this machine that a load writes to."""
    warehouse = settings.lake.warehouse
    local = [Path(warehouse.removeprefix("file://"))] if warehouse.startswith("file://") else []
    return [*local, settings.paths.run]


@contextlib.contextmanager
def _alone(settings: Settings, contract: Contract) -> Iterator[None]:
    """One process at a time loads into a raw table: what is new is decided and committed in one go."""
    folder = settings.paths.run / "loads"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{contract.name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
