"""Files as they are found: formats, dialects, staging, and what is said of those that cannot be read."""

from __future__ import annotations

import base64
import gzip
import random
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipelines.contracts import PIN_UPDATES, USER_INTERACTIONS
from pipelines.ingest import mapping, sources
from pipelines.ingest.sources import FOUND, Dialect, LoadError
from pipelines.settings import ROOT


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def staged(path: Path, dialect: Dialect = FOUND, *, has_fields: bool = True) -> list[dict[str, object]]:
    files = sources.stage(sources.look([path]), path.parent / "staging", dialect, has_fields=has_fields)
    return pq.read_table(files[0]).to_pylist()


@pytest.mark.parametrize(
    ("content", "delimiter", "encoding", "columns"),
    [
        ("a,b\n1,2\n", ",", "utf-8", ("a", "b")),
        ("a;b\n1,5;2,5\n", ";", "utf-8", ("a", "b")),
        ("a\tb\n1\t2\n", "\t", "utf-8", ("a", "b")),
        ("a|b\n1|2\n", "|", "utf-8", ("a", "b")),
        ("1,x\n2,y\n", ",", "utf-8", ("c1", "c2")),
        ("2024-01-01,x\n2024-01-02,y\n", ",", "utf-8", ("c1", "c2")),
        (b"\xef\xbb\xbfa,b\n1,2\n", ",", "utf-8-sig", ("a", "b")),
        ("a,b\n1,é\n".encode("cp1252"), ",", "windows-1252", ("a", "b")),
        ("a,b\n1,é\n".encode("utf-16"), ",", "utf-16", ("a", "b")),
        ('a,b\n"x, y",2\n', ",", "utf-8", ("a", "b")),
        ("only\nx\ny\n", ",", "utf-8", ("only",)),
    ],
)
def test_a_dialect_is_found(
    tmp_path: Path, content: str | bytes, delimiter: str, encoding: str, columns: tuple[str, ...]
) -> None:
    table = sources.read_table(write(tmp_path / "x.csv", content), FOUND)
    assert (table.delimiter, table.encoding, table.columns) == (delimiter, encoding, columns)


def test_csv_is_staged_as_text_row_by_row(tmp_path: Path) -> None:
    rows = staged(write(tmp_path / "x.csv", 'id,text\n007,"two\nlines"\n8,\n9,""\n'))
    assert rows == [{"id": "007", "text": "two\nlines"}, {"id": "8", "text": None}, {"id": "9", "text": ""}]
    bad = tmp_path / "bad"
    bad.mkdir()
    assert staged(write(bad / "y.csv", 'a,b\n1,"two\nlines"\n')) == [{"a": "1", "b": "two\nlines"}]
    assert staged(write(bad / "x.csv", "a,b\n1,é\n".encode("cp1252"))) == [{"a": "1", "b": "é"}]


def test_what_is_given_wins(tmp_path: Path) -> None:
    file = write(tmp_path / "x.csv", "a;b\n1;2\n")
    given = Dialect(delimiter=";", has_header=False, columns=("x", "y"))
    assert staged(file, given) == [{"x": "a", "y": "b"}, {"x": "1", "y": "2"}]


def test_an_empty_file_and_one_of_a_header_have_no_rows(tmp_path: Path) -> None:
    for number, content in enumerate(("", "a,b\n")):
        folder = tmp_path / str(number)
        folder.mkdir()
        assert staged(write(folder / "x.csv", content)) == []


def test_json_lines(tmp_path: Path) -> None:
    lines = '{"a": "x", "n": 1.50}\n\n{"a": null, "o": {"b": [1]}}\n'
    assert staged(write(tmp_path / "x.jsonl", lines)) == [
        {"a": "x", "n": "1.5", "o": None},
        {"a": None, "n": None, "o": '{"b":[1]}'},
    ]
    other = tmp_path / "plain"
    other.mkdir()
    with gzip.open(other / "x.jsonl.gz", "wb") as packed:
        packed.write(b'{"a": 1}\n{"broken\n')
    assert [row["value"] for row in staged(other / "x.jsonl.gz", has_fields=False)] == [
        b'{"a": 1}',
        b'{"broken',
    ]


LONG = b"a,b\n" + b"".join(b"%d,%d\n" % (n, n * n) for n in range(150_000))
LONG_BROKEN = (packed := gzip.compress(LONG))[:500] + bytes(200) + packed[700:]


@pytest.mark.parametrize(
    ("name", "content", "dialect", "told", "where"),
    [
        ("x.csv", "a,b\n1,2\n1,2,3\n", FOUND, "3 columns where 2", "row 3"),
        ("x.csv", "a,b\n1,2\n1\n", FOUND, "1 columns where 2", "row 3"),
        ("x.csv", b"a,b\n1,2\n\xff,3\n", Dialect(encoding="utf-8"), "not utf-8", "line 3"),
        ("x.csv", "a,b\n1,2\n", Dialect(encoding="klingon"), "no encoding", "x.csv"),
        ("x.csv", "a,a\n1,2\n", Dialect(has_header=True), "named twice: a", "x.csv"),
        ("x.csv", "a,b\n1,2\n", Dialect(columns=("x",)), "1 columns are given", "x.csv"),
        ("x.jsonl", '{"a": 1}\n{"a": \n', FOUND, "not JSON", "line 2"),
        ("x.jsonl", "[1]\n", FOUND, "not a JSON object", "line 1"),
        ("x.jsonl", '{"a": 1, "a": 2}\n', FOUND, 'the key "a" is there twice', "line 1"),
        ("x.jsonl", b'{"a": 1}\n{"a": "\xe9"}\n', FOUND, "not UTF-8", "line 2"),
        ("x.csv", "id,Id\nx,y\n", FOUND, "named twice: Id, id", "x.csv"),
        ("x.csv", 'a,b\n1,2\n3,"4\n5,6\n', FOUND, "a quote is never closed", "row 3"),
        ("x.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 10_000)[:-20], FOUND, "truncated", "after line"),
        ("x.csv.gz", gzip.compress(b"a,b\n" + b"1,2\n" * 10_000)[:-20], FOUND, "truncated", "x.csv.gz"),
        ("x.csv.gz", gzip.compress(LONG)[:-20], FOUND, "truncated", "after row"),
        ("x.csv.gz", LONG_BROKEN, FOUND, "broken", "x.csv.gz"),
        ("x.csv.gz", b"a,b\n1,2\n", FOUND, "broken", "x.csv.gz"),
        ("x.parquet", b"PAR1" + bytes(100), FOUND, "not a Parquet file, or a truncated one", "x.parquet"),
    ],
)
def test_what_cannot_be_read_is_refused_with_its_place(
    tmp_path: Path, name: str, content: str | bytes, dialect: Dialect, told: str, where: str
) -> None:
    with pytest.raises(LoadError, match=told) as caught:
        staged(write(tmp_path / name, content), dialect)
    assert where in str(caught.value)
    assert not list((tmp_path / "staging").glob("*.parquet"))


def test_a_line_without_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MAX_LINE_BYTES", 1000)
    with pytest.raises(LoadError, match="longer than") as caught:
        staged(write(tmp_path / "x.jsonl", "{}\n" + "x" * 5000), has_fields=False)
    assert "line 2" in str(caught.value)
    with pytest.raises(LoadError, match="longer than|never closed"):
        staged(write(tmp_path / "x.csv", 'a,b\n1,"' + "x" * 5000))


STAGE_ALONE = """
import resource, sys
from pathlib import Path
from pipelines.ingest import sources

file, limit = Path(sys.argv[1]), int(sys.argv[2])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    seen = sources.Seen(file, "0" * 64, file.stat().st_size, file.stat().st_mtime_ns)
    sources.stage([seen], file.parent / "staging", sources.FOUND, has_fields=False)
    print("staged")
except sources.LoadError as error:
    print(error)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def staged_alone(file: Path, limit_bytes: int = 0) -> tuple[str, int]:
    """What a process of its own says, and by how many MB its memory grew at most."""
    command = [sys.executable, "-c", STAGE_ALONE, str(file), str(limit_bytes)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=120)
    told, _, grown = done.stdout.strip().rpartition("\n")
    return told, int(grown)


@pytest.mark.parametrize(
    ("name", "start", "where"),
    [
        ("x.csv", b"a,b\n1,2\n3,", "row 3"),
        ("x.csv", b'a,b\n1,2\n3,"', "row 3"),
        ("x.jsonl", b'{}\n{"a": "', "line 2"),
        ("x.csv.gz", b"a,b\n1,2\n3,", "row 3"),
        ("x.jsonl.gz", b'{}\n{"a": "', "line 2"),
    ],
)
def test_a_line_of_2_gb_is_refused_in_little_memory(
    tmp_path: Path, name: str, start: bytes, where: str
) -> None:
    file = tmp_path / name
    with file.open("wb") as opened:
        if file.suffix == ".gz":  # a bomb of 2 MB
            opened.write(gzip.compress(start))
            opened.write(gzip.compress(bytes(1 << 20)) * 2048)
        else:  # a hole in the file, which takes no disk
            opened.write(start)
            opened.truncate(2 << 30)
    told, grown_mb = staged_alone(file)
    assert "longer than 16 MB" in told
    assert f"{file}, {where}" in told
    assert grown_mb < 600  # Arrow reads blocks of 16 MB ahead, more of them where it has to wait


@pytest.mark.parametrize("name", ["x.csv", "x.jsonl"])
def test_no_room_while_staging_is_said_and_leaves_nothing(tmp_path: Path, name: str) -> None:
    """A limit on the size of files stands for a full disk: it works on every machine."""
    lines = (base64.b64encode(random.randbytes(300)).decode() for _ in range(4000))
    file = write(tmp_path / name, "a,b\n" + "".join(f"{line},1\n" for line in lines))
    told, _ = staged_alone(file, 100_000)
    assert "the disk is full" in told
    assert str(tmp_path / "staging") in told
    assert "make room" in told
    assert not list((tmp_path / "staging").glob("*.pa*"))
    assert staged_alone(file)[0] == "staged"


def test_staging_goes_on_where_it_was_broken_off(tmp_path: Path) -> None:
    files = [write(tmp_path / f"{n}.csv", f"a\n{n}\n") for n in (1, 2)]
    broken = write(tmp_path / "3.csv", "a\n1,2\n")
    staging = tmp_path / "staging"
    with pytest.raises(LoadError):
        sources.stage(sources.look([*files, broken]), staging, FOUND, has_fields=True)
    before = {file.name: file.stat().st_mtime_ns for file in staging.glob("*.parquet")}
    assert len(before) == 2
    write(broken, "a\n3\n")
    write(files[1], "a\n22\n")
    first = write(
        tmp_path / "0.csv", "a\n0\n"
    )  # what is there is known by its content, whatever comes before it
    done = sources.stage(sources.look([first, *files, broken]), staging, FOUND, has_fields=True)
    assert [file.name for file in done] == [f"{n:06d}.parquet" for n in range(4)]
    assert [pq.read_table(file)["a"].to_pylist() for file in done] == [["0"], ["1"], ["22"], ["3"]]
    assert {name: (staging / name).stat().st_mtime_ns for name in before} == before


def test_a_file_that_changes_while_it_is_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(tmp_path / "x.csv", "a\n1\n")
    read = sources._stage_csv

    def meanwhile(*given: object) -> None:
        read(*given)  # type: ignore[arg-type]
        write(file, "a\n1\n2\n")

    monkeypatch.setitem(sources._STAGERS, "csv", meanwhile)
    with pytest.raises(LoadError, match="changed while"):
        staged(file)


def test_files_of_a_folder(tmp_path: Path) -> None:
    for name in ("b.csv", "a.csv", "_part.csv", ".hidden.csv"):
        write(tmp_path / name, "a\n1\n")
    assert [file.name for file in sources.files_of(tmp_path)] == ["a.csv", "b.csv"]
    write(tmp_path / "c.jsonl", "{}\n")
    with pytest.raises(LoadError, match="several formats"):
        sources.files_of(tmp_path)
    with pytest.raises(LoadError, match="no file"):
        sources.files_of(tmp_path / "nothing")
    with pytest.raises(LoadError, match="no format"):
        sources.files_of(write(tmp_path / "x.xls", b""))


def test_a_mapping_is_suggested(tmp_path: Path) -> None:
    file = write(
        tmp_path / "x.csv",
        "InvoiceNo,StockCode,Quantity,InvoiceDate,CustomerID,item-name\n"
        "536365,85123A,6,2010-12-01 08:26:00,17850.0,x\n",
    )
    draft = mapping.suggest(USER_INTERACTIONS, sources.sample(file, FOUND))
    assert "user_id: CustomerID" in draft
    assert "pin_id: StockCode" in draft
    assert 'event_time: {from: InvoiceDate, type: time, format: "yyyy-MM-dd HH:mm:ss"}' in draft
    assert "quantity: {from: Quantity, type: number}" in draft
    assert "# action: no column" in draft
    read = mapping.read(write(tmp_path / "m.yaml", draft))
    assert read.fields["event_time"].format == "yyyy-MM-dd HH:mm:ss"
    assert "catalogue.title: '`item-name`'" in mapping.suggest(PIN_UPDATES, sources.sample(file, FOUND))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a: [", "cannot be read"),
        ("fields: {}", "`topic` and `fields`"),
        ("topic: user-interactions\nfields: {user_id: a}\nmore: 1", "no more"),
        ("topic: user-interactions\nfields: {pin_id: a}", "user_id is missing"),
        ("topic: user-interactions\nfields: {user_id: {from: a, type: money}}", "no type 'money'"),
        ("topic: user-interactions\nfields: {user_id: {from: a, value: b}}", "is no field"),
    ],
)
def test_a_bad_mapping_says_why(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(mapping.BadMapping, match=told):
        mapping.read(write(tmp_path / "m.yaml", text))
