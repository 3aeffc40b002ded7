"""Files of history: which there are, how their text is to be read, and their rows as Parquet in a staging folder.

Belongs here: formats, CSV dialects found or given, staging. Does not belong here: what columns mean (`mapping`), and
committing them (`load`).

Files are staged: each becomes a Parquet file with the same rows in the same order (CSV and JSON lines as texts, Parquet
as it is), written under another name first, so that what is loaded does not change while it is. A load that was broken
off goes on with the files that are staged already; Spark then reads all formats alike, and a row has the same number
each time.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import errno
import gzip
import hashlib
import io
import os
import re
import shutil
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import IO, Any, NamedTuple

import orjson
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from pipelines.contracts.contract import Refused, read_json
from pipelines.errors import TidemarkError

FORMATS = {
    ".parquet": "parquet",
    ".csv": "csv",
    ".tsv": "csv",
    ".txt": "csv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
}
GZIP = ".gz"
SAMPLE_BYTES = 1 << 20
SAMPLE_ROWS = 200
MAX_LINE_BYTES = 16 << 20
"""A longer line is not a record of anything; it would not fit a block of the reader either."""
DELIMITERS = ",;\t|"
LINES_A_BATCH = 50_000
"""Rows of a row group too: Spark's tasks are made of whole ones."""
BYTES_A_BATCH = 64 << 20
NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
"""A disk, a quota or a limit is full."""
VALUE = "value"
csv.field_size_limit(MAX_LINE_BYTES)
_NUMBER = re.compile(r"[-+]?\d[\d.,:/ T-]*")


class LoadError(TidemarkError):
    """A source cannot be loaded."""


class Dialect(NamedTuple):
    """How the text of CSV files is to be read. What is None is found out, for each file.

    Attributes:
        delimiter: One character.
        encoding: As Python names it; found: by its byte order mark, UTF-8, or else windows-1252.
        has_header: Whether the first row names the columns.
        columns: Their names, where no header has them; c1, c2 … if None.
    """

    delimiter: str | None = None
    encoding: str | None = None
    has_header: bool | None = None
    columns: tuple[str, ...] | None = None


FOUND = Dialect()


class Table(NamedTuple):
    """The columns of a CSV file, and how many lines come before its first row."""

    delimiter: str
    encoding: str
    columns: tuple[str, ...]
    skipped_rows: int


def files_of(path: Path | str) -> list[Path]:
    """The file, or the files of a folder in the order of their names; what begins with a dot or `_` is left out.

    Raises:
        LoadError: There is none, a file is of no known format, or of another than the first.
    """
    path = Path(path)
    found = sorted(path.rglob("*")) if path.is_dir() else [path]
    files = [
        file
        for file in found
        if file.is_file() and not any(p.startswith((".", "_")) for p in file.relative_to(path).parts)
    ]
    if not files:
        raise LoadError(
            "there is no file to load", where=path, remedy=f"give a file ({known_formats()}), or a folder"
        )
    kinds = {format_of(file): file for file in reversed(files)}
    if len(kinds) > 1:
        named = ", ".join(f"{file.name} ({kind})" for kind, file in sorted(kinds.items()))
        raise LoadError(
            f"the folder has files of several formats: {named}", where=path, remedy="load them one by one"
        )
    return files


def format_of(file: Path) -> str:
    """`parquet`, `csv` or `jsonl`, by the file's name.

    Raises:
        LoadError: The name says nothing.
    """
    suffixes = [suffix.lower() for suffix in file.suffixes]
    if suffixes and suffixes[-1] == GZIP:
        suffixes.pop()
    kind = FORMATS.get(suffixes[-1]) if suffixes else None
    if kind is None:
        raise LoadError("its name says no format", where=file, remedy=f"rename it to {known_formats()}")
    return kind


def known_formats() -> str:
    """The endings of files that can be loaded."""
    return ", ".join(FORMATS) + f"; text also with {GZIP}"


class Seen(NamedTuple):
    """A file as it was when it was looked at: the SHA-256 of its content in hex, its size and time of change."""

    path: Path
    digest: str
    size: int
    changed_ns: int

    def require_same(self) -> None:
        """Raises `LoadError` if the file was changed since."""
        now = self.path.stat()
        if (now.st_size, now.st_mtime_ns) != (self.size, self.changed_ns):
            raise LoadError("changed while it was read", where=self.path, remedy="load it once it is written")


def look(files: Sequence[Path]) -> list[Seen]:
    """The files as they are now; each is read once."""
    found = []
    for file in files:
        before = file.stat()
        with file.open("rb") as opened:
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
        found.append(Seen(file, digest, before.st_size, before.st_mtime_ns))
    return found


# ------------------------------------------------------------------------------------------------ staging


def stage(files: Sequence[Seen], folder: Path, dialect: Dialect, *, has_fields: bool) -> list[Path]:
    """Each file as Parquet, in the order given, named by its number: `000017.parquet`.

    What is staged is kept by what is in its source: a file that was read before is not read again, one that was mended
    is, whatever else has come or gone.

    Args:
        files: All of one format, none with the content of another.
        folder: Of this source, dialect and choice of fields alone.
        dialect: For CSV.
        has_fields: Whether the fields of JSON objects are wanted as columns; else a line is one binary `value`.

    Raises:
        LoadError: A file cannot be read, with its line; or the disk is full.
    """
    numbered = folder / "numbered"
    with _room(folder):
        shutil.rmtree(numbered, ignore_errors=True)
        numbered.mkdir(parents=True)
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        kept = list(pool.map(lambda file: _stage_one(file, folder, dialect, has_fields), files))
    finally:
        pool.shutdown(cancel_futures=True)
    staged = [numbered / f"{number:06d}.parquet" for number in range(len(files))]
    with _room(folder):
        for source, target in zip(kept, staged, strict=True):
            os.link(source, target)
    return staged


def _stage_one(seen: Seen, folder: Path, dialect: Dialect, has_fields: bool) -> Path:
    file = seen.path
    target = folder / f"{seen.digest[:32]}.parquet"
    if target.exists():
        return target
    part = target.with_suffix(".part")
    try:
        with _room(folder):
            _STAGERS[format_of(file)](file, part, dialect, has_fields)
            seen.require_same()
            part.replace(target)
    except OSError as error:
        raise LoadError(f"cannot be read: {error}", where=file, remedy="look at the file") from error
    finally:
        part.unlink(missing_ok=True)
    return target


@contextlib.contextmanager
def _room(folder: Path) -> Iterator[None]:
    """Says what to do when there is none."""
    try:
        yield
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        raise full_disk(folder) from error


def full_disk(*folders: Path) -> LoadError:
    """There is no room in one of the folders."""
    room = ", ".join(f"{folder} ({_free_mb(folder):,} MB free)" for folder in folders)
    return LoadError(
        "the disk is full; nothing was loaded",
        where=room,
        remedy="make room and load again: it goes on with the files that are read already",
    )


def _free_mb(folder: Path) -> int:
    there = next(one for one in (folder, *folder.parents) if one.exists())
    return shutil.disk_usage(there).free >> 20


def _stage_parquet(file: Path, target: Path, dialect: Dialect, has_fields: bool) -> None:
    shutil.copyfile(file, target)
    try:
        pq.read_schema(target)
    except (pa.ArrowInvalid, OSError) as error:
        raise LoadError(
            f"not a Parquet file, or a truncated one: {error}", where=file, remedy="fetch it again"
        ) from error


def _stage_csv(file: Path, target: Path, dialect: Dialect, has_fields: bool) -> None:
    table = read_table(file, dialect)
    bad: list[Any] = []

    def refuse(row: Any) -> str:
        bad.append(row)
        return "error"

    reads = pa.csv.ReadOptions(
        use_threads=False,  # else rows have no numbers
        block_size=MAX_LINE_BYTES,
        column_names=list(table.columns),
        skip_rows=table.skipped_rows,
        encoding=table.encoding,
    )
    parses = pa.csv.ParseOptions(
        delimiter=table.delimiter, newlines_in_values=True, invalid_row_handler=refuse
    )
    converts = pa.csv.ConvertOptions(
        column_types={name: pa.string() for name in table.columns},
        null_values=[""],
        strings_can_be_null=True,
        quoted_strings_can_be_null=False,
    )
    schema = pa.schema([(name, pa.string()) for name in table.columns])
    rows = 0
    try:
        with _opened(file) as source, pq.ParquetWriter(target, schema, compression="zstd") as writer:
            try:
                reader = pa.csv.open_csv(source, reads, parses, converts)
            except pa.ArrowInvalid as error:
                if "Empty CSV" in str(error):
                    return
                raise
            last = None
            for batch in reader:
                writer.write_batch(batch, row_group_size=LINES_A_BATCH)
                rows += batch.num_rows
                last = batch.column(-1)[-1].as_py() if batch.num_rows else last
    except _BROKEN_GZIP as error:
        raise _broken_gzip(error, f"{file}, after row {rows}") from error
    except (pa.ArrowInvalid, UnicodeDecodeError) as error:
        message, where, remedy = _csv_complaint(file, table, bad, rows + table.skipped_rows, error)
        raise LoadError(message, where=where, remedy=remedy) from error
    if last and "\n" in last and not _ends_with_quote(file, table.encoding):
        raise LoadError(
            "a quote is never closed",
            where=f"{file}, row {rows + table.skipped_rows}",
            remedy="look for a quote without its pair; the file may be truncated",
        )


def _ends_with_quote(file: Path, encoding: str) -> bool:
    """Whether the last cell of a file was closed: the reader takes what an open one swallowed for its text."""
    end = b""
    with _opened(file) as source:
        while piece := source.read(SAMPLE_BYTES):
            end = (end + piece)[-64:]
    return end.decode(encoding.removesuffix("-sig"), "ignore").rstrip().endswith('"')


_BROKEN_GZIP = (EOFError, gzip.BadGzipFile, zlib.error)


def _broken_gzip(error: Exception, where: str) -> LoadError:
    return LoadError(
        f"the compressed file is truncated or broken: {error}", where=where, remedy="fetch it again"
    )


def _csv_complaint(
    file: Path, table: Table, bad: list[Any], rows: int, error: Exception
) -> tuple[str, str, str]:
    """What was wrong, where, what to do. So many rows were read, the header among them."""
    if bad:
        row = bad[0]
        return (
            f"a row has {row.actual_columns} columns where {row.expected_columns} are expected: {row.text[:120]!r}",
            f"{file}, row {row.number}" if row.number is not None else str(file),
            "mend the row; or give --delimiter if the columns are not separated as was found "
            f"({table.delimiter!r})",
        )
    if "straddling" in str(error) or "block" in str(error):
        return (
            f"a row is longer than {MAX_LINE_BYTES >> 20} MB, or a quote is never closed",
            f"{file}, row {rows + 1}",
            "look for a quote without its pair; one record is one row",
        )
    line = undecodable_line(file, table.encoding)
    if line is not None:
        return f"the text is not {table.encoding}", f"{file}, line {line}", "give --encoding"
    return (
        f"not readable as CSV: {error}",
        f"{file}, after row {rows}",
        "look at the file; it may be truncated",
    )


def undecodable_line(file: Path, encoding: str) -> int | None:
    """The first line that is not text in an encoding, from 1; None where all are. Its memory is bounded."""
    number = 1
    with contextlib.suppress(*_BROKEN_GZIP, OSError), _opened(file) as source:
        decode = codecs.getincrementaldecoder(encoding)()
        while piece := source.readline(SAMPLE_BYTES):
            try:
                decode.decode(piece)
            except UnicodeDecodeError:
                return number
            number += piece.endswith(b"\n")
    return None


def _stage_lines(file: Path, target: Path, dialect: Dialect, has_fields: bool) -> None:
    """JSON lines: as they are, or their fields as columns of text (what is not text, as its JSON)."""
    if not has_fields:
        with pq.ParquetWriter(target, _PLAIN, compression="zstd") as writer:
            for batch in _batches(_lines(file)):
                writer.write_batch(pa.record_batch([pa.array([line for _, line in batch])], schema=_PLAIN))
        return
    first = next(_batches(_lines(file)), [])
    names = dict.fromkeys(name for number, line in first for name in _object(file, number, line))
    if not _write_fields(file, target, names):
        _write_fields(file, target, dict.fromkeys(_field_names(file)))


_PLAIN = pa.schema([(VALUE, pa.binary())])


def _write_fields(file: Path, target: Path, names: dict[str, None]) -> bool:
    """Write these fields of the objects as columns; false, and nothing of use, as soon as an object has another."""
    schema = pa.schema([(name, pa.string()) for name in names])
    with pq.ParquetWriter(target, schema, compression="zstd") as writer:
        for batch in _batches(_lines(file)):
            objects = [_object(file, number, line) for number, line in batch]
            if any(one.keys() - names.keys() for one in objects):
                return False
            columns = [pa.array([_text(one.get(name)) for one in objects], pa.string()) for name in names]
            writer.write_table(pa.table(columns, schema=schema))
    return True


def _batches(lines: Iterator[tuple[int, bytes]]) -> Iterator[list[tuple[int, bytes]]]:
    """Lines in batches of bounded size."""
    batch: list[tuple[int, bytes]] = []
    size = 0
    for number, line in lines:
        batch.append((number, line))
        size += len(line)
        if len(batch) == LINES_A_BATCH or size >= BYTES_A_BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _lines(file: Path) -> Iterator[tuple[int, bytes]]:
    """The lines that are not blank, each with its number from 1."""
    with _opened(file) as source:
        number = 0
        try:
            while line := source.readline(MAX_LINE_BYTES + 1):
                number += 1
                if len(line) > MAX_LINE_BYTES:
                    raise LoadError(
                        f"a line is longer than {MAX_LINE_BYTES >> 20} MB",
                        where=f"{file}, line {number}",
                        remedy="one record is one line",
                    )
                if stripped := line.strip():
                    yield number, stripped
        except _BROKEN_GZIP as error:
            raise _broken_gzip(error, f"{file}, after line {number}") from error


def _object(file: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        read = read_json(line, MAX_LINE_BYTES)
    except Refused as error:
        raise LoadError(
            error.refusal.detail, where=f"{file}, line {number}", remedy="mend or remove the line"
        ) from error
    if not isinstance(read, dict):
        raise LoadError("not a JSON object", where=f"{file}, line {number}", remedy="one object is one line")
    return read


def _text(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    return orjson.dumps(value).decode()


def _field_names(file: Path) -> list[str]:
    names: dict[str, None] = {}
    for number, line in _lines(file):
        names.update(dict.fromkeys(_object(file, number, line)))
    return list(names)


_STAGERS = {"csv": _stage_csv, "jsonl": _stage_lines, "parquet": _stage_parquet}


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[IO[bytes]]:
    with file.open("rb") as raw:
        if file.suffix.lower() == GZIP:
            with gzip.GzipFile(fileobj=raw) as unpacked:
                yield unpacked  # type: ignore[misc]
        else:
            yield raw


def sample(file: Path, dialect: Dialect) -> pa.Table:
    """The first rows of a file, as columns of text."""
    kind = format_of(file)
    if kind == "parquet":
        first = next(pq.ParquetFile(file).iter_batches(SAMPLE_ROWS), None)
        read = pa.table(first) if first is not None else pq.read_schema(file).empty_table()
        return pa.table(
            {name: [_shown(v) for v in read.column(name).to_pylist()] for name in read.column_names}
        )
    if kind == "jsonl":
        objects = [_object(file, number, line) for number, line in islice(_lines(file), SAMPLE_ROWS)]
        names = dict.fromkeys(name for found in objects for name in found)
        return pa.table(
            {name: pa.array([_text(o.get(name)) for o in objects], pa.string()) for name in names}
        )
    table = read_table(file, dialect)
    with _opened(file) as source:
        text = codecs.getincrementaldecoder(table.encoding)("replace").decode(source.read(SAMPLE_BYTES))
    rows = _rows(text, table.delimiter, SAMPLE_ROWS)[table.skipped_rows :]
    whole = [row for row in rows if len(row) == len(table.columns)]
    return pa.table(
        {name: pa.array([row[i] for row in whole], pa.string()) for i, name in enumerate(table.columns)}
    )


def _shown(value: Any) -> str | None:
    return None if value is None else str(value)


# ------------------------------------------------------------------------------------------------ CSV as it is found


def read_table(file: Path, given: Dialect) -> Table:
    """How a CSV file is to be read: what was given, and for the rest what its first rows show.

    Raises:
        LoadError: It is empty where a header is needed, a column is named twice, or the encoding is not known.
    """
    try:
        with _opened(file) as source:
            sample = source.read(SAMPLE_BYTES)
    except _BROKEN_GZIP as error:
        raise _broken_gzip(error, str(file)) from error
    encoding = given.encoding or encoding_of(sample)
    try:
        codecs.lookup(encoding)
        text = codecs.getincrementaldecoder(encoding)("replace").decode(sample)
    except LookupError as error:
        raise LoadError(
            f"there is no encoding {encoding!r}", where=file, remedy="as utf-8, latin-1"
        ) from error
    delimiter = given.delimiter or delimiter_of(text)
    rows = _rows(text, delimiter, SAMPLE_ROWS)
    if not rows:
        return Table(delimiter, encoding, given.columns or ("c1",), 0)
    is_header = given.has_header
    if is_header is None:
        is_header = given.columns is None and looks_like_header(rows[0])
    found = [name.strip() for name in rows[0]] if is_header else None
    columns = given.columns or tuple(found or (f"c{i}" for i in range(1, len(rows[0]) + 1)))
    if twice := same_names(columns):
        raise LoadError(
            f"columns are named twice: {', '.join(twice)}",
            where=file,
            remedy="give their names with --columns, and --header if the first row is one",
        )
    if len(columns) != len(rows[0]):
        raise LoadError(
            f"{len(columns)} columns are given, the file has {len(rows[0])}", where=file, remedy="name each"
        )
    return Table(delimiter, encoding, columns, int(is_header))


def same_names(columns: Sequence[str]) -> list[str]:
    """The names that are not told apart: Spark and the other engines take `A` for `a`."""
    plain = [name.casefold() for name in columns]
    return sorted({name for name in columns if plain.count(name.casefold()) > 1})


def encoding_of(sample: bytes) -> str:
    """The encoding of a text by its first bytes: a byte order mark, UTF-8, or else windows-1252."""
    for mark, name in (
        (codecs.BOM_UTF8, "utf-8-sig"),
        (codecs.BOM_UTF16_LE, "utf-16"),
        (codecs.BOM_UTF16_BE, "utf-16"),
    ):
        if sample.startswith(mark):
            return name
    try:
        codecs.getincrementaldecoder("utf-8")().decode(sample)
    except UnicodeDecodeError:
        return "windows-1252"
    return "utf-8"


def delimiter_of(text: str) -> str:
    """The character that splits the first rows into the most columns, the same number in each."""

    def columns(delimiter: str) -> int:
        widths = [len(row) for row in _rows(text, delimiter, SAMPLE_ROWS)]
        return min(widths, default=1) if len(set(widths[:-1] or widths)) == 1 else 1

    return max(DELIMITERS, key=columns)


def looks_like_header(row: Sequence[str]) -> bool:
    """Whether every cell could name a column: not empty, no number or time, and none twice."""
    cells = [cell.strip() for cell in row]
    return len(set(cells)) == len(cells) and all(cell and not _NUMBER.fullmatch(cell) for cell in cells)


def _rows(text: str, delimiter: str, count: int) -> list[list[str]]:
    with contextlib.suppress(csv.Error):
        return list(islice((row for row in csv.reader(io.StringIO(text), delimiter=delimiter) if row), count))
    return []
