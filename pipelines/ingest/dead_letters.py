"""Dead letters: the records that their contract refused, listed and explained.

Belongs here: reading `raw.dead_letters` without Spark, and deciding a letter again by the contract as it is now. Does
not belong here: writing them (`archive`, `load`).

A letter counts once the raw table has its record. What an attempt that came to nothing left behind is not shown.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from pipelines import lake
from pipelines.contracts import CONTRACTS, REASONS, Contract, Refusal, contract_of, decode
from pipelines.errors import TidemarkError
from pipelines.indexing.position import Position
from pipelines.ingest import evolution
from pipelines.ingest.load import raw_spec
from pipelines.settings import Settings

if TYPE_CHECKING:
    from pyiceberg.expressions import BooleanExpression

_SHOWN_BYTES = 2_048


class NoSuchLetter(TidemarkError):
    """There is no dead letter at a place."""


class DeadLetter(NamedTuple):
    """A refused record: where it is from, why it was refused, and its bytes.

    Attributes:
        place: Names it: `topic/partition/offset` or `topic/load id/row`.
        replayed_as: The place of the record as which it was sent again; None if it was not.
    """

    place: str
    topic: str
    topic_id: str | None
    partition: int | None
    offset: int | None
    load_id: str | None
    load_row: int | None
    broker_time: datetime
    reason: str
    detail: str
    key: bytes | None
    value: bytes | None
    replayed_as: str | None = None

    def to_json(self) -> dict[str, Any]:
        """For `--json`: bytes as text (what is not UTF-8 as \\xNN)."""
        return {
            **self._asdict(),
            "broker_time": self.broker_time.astimezone(UTC).isoformat().replace("+00:00", "Z"),
            "key": readable(self.key),
            "value": readable(self.value),
        }


class Explanation(NamedTuple):
    """A dead letter, decided again.

    Attributes:
        letter: The letter.
        meaning: What its reason means.
        now: The refusal by the present contract; None if the record would be accepted today.
        text: The value as text, cut.
        hex: Its first bytes.
    """

    letter: DeadLetter
    meaning: str
    now: Refusal | None
    text: str
    hex: str

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            **self.letter.to_json(),
            "meaning": self.meaning,
            "would_be_accepted_now": self.now is None,
            "now": self.now._asdict() if self.now else None,
            "hex": self.hex,
        }


def listed(
    settings: Settings,
    *,
    topic: str | None = None,
    reason: str | None = None,
    load_id: str | None = None,
    since: datetime | None = None,
    limit: int | None = 100,
) -> list[DeadLetter]:
    """The dead letters that count, newest first.

    Args:
        settings: Where the lake is.
        topic: Only of this topic.
        reason: Only for this reason (a slug).
        load_id: Only of this load.
        since: Only those taken at this time or later.
        limit: At most so many; None: all.

    Raises:
        UnknownTopic: No contract is declared for the topic.
        TidemarkError: There is no such reason.
    """
    found = _rows(settings, topic=topic, reason=reason, load_id=load_id, since=since)
    order = [
        ("broker_time", "descending"),
        ("partition", "ascending"),
        ("offset", "descending"),
        ("load_row", "ascending"),
    ]
    chosen = found.take(pc.sort_indices(found, sort_keys=order)[:limit])
    replayed = _replayed(settings)
    found_letters = [_letter(row) for row in chosen.to_pylist()]
    return [letter._replace(replayed_as=replayed.get(letter.place)) for letter in found_letters]


def counted(
    settings: Settings, *, topic: str | None = None, load_id: str | None = None, since: datetime | None = None
) -> dict[tuple[str, str], int]:
    """How many dead letters count, by (topic, reason)."""
    found = _rows(settings, topic=topic, load_id=load_id, since=since, columns=("topic", "reason"))
    groups = found.group_by(["topic", "reason"]).aggregate([([], "count_all")]).to_pylist()
    return {
        (row["topic"], row["reason"]): row["count_all"]
        for row in sorted(groups, key=lambda row: (row["topic"], row["reason"]))
    }


def explain(settings: Settings, place: str) -> Explanation:
    """Decide a dead letter again, by the contract as it is now.

    Args:
        settings: Where the lake is.
        place: As `listed` gives it.

    Raises:
        NoSuchLetter: There is none at this place.
    """
    topic, _, rest = place.partition("/")
    where, _, number = rest.rpartition("/")
    if topic.replace("_", "-") not in CONTRACTS or not number.isdigit() or not where:
        raise NoSuchLetter(
            f"{place!r} is not the place of a dead letter",
            remedy="give topic/partition/offset or topic/load id/row, as `tidemark dead-letters list` prints it",
        )
    found = _rows(settings, topic=topic, at=(where, int(number)))
    if not found.num_rows:
        raise NoSuchLetter("there is no dead letter", where=place, remedy="see `tidemark dead-letters list`")
    letter = _letter(found.sort_by([("broker_time", "descending")]).slice(0, 1).to_pylist()[0])
    return explained(letter, evolution.current(settings, contract_of(letter.topic)))


def explained(letter: DeadLetter, contract: Contract) -> Explanation:
    """The same, for a letter at hand and its contract as it is now."""
    taken_ms = int(letter.broker_time.timestamp() * 1000)
    row = decode(contract, letter.value, taken_ms)
    return Explanation(
        letter=letter,
        meaning=REASONS.get(letter.reason, "a reason that contracts no longer give"),
        now=row if isinstance(row, Refusal) else None,
        text=readable(letter.value) or "",
        hex=(letter.value or b"")[:64].hex(" "),
    )


def readable(raw: bytes | None) -> str | None:
    """Bytes as text, cut; what is not UTF-8 or cannot be printed is written as an escape."""
    if raw is None:
        return None
    text = raw[:_SHOWN_BYTES].decode("utf-8", "backslashreplace")
    text = "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)
    return text + (f"… ({len(raw)} bytes)" if len(raw) > _SHOWN_BYTES else "")


def _rows(
    settings: Settings,
    *,
    topic: str | None = None,
    reason: str | None = None,
    load_id: str | None = None,
    since: datetime | None = None,
    at: tuple[str, int] | None = None,
    columns: tuple[str, ...] | None = None,
) -> pa.Table:
    from pyiceberg.expressions import And, Or

    if reason is not None and reason not in REASONS:
        raise TidemarkError(f"there is no reason {reason!r}", remedy=f"use one of {', '.join(REASONS)}")
    conditions: list[BooleanExpression] = []
    if topic is not None:
        conditions.append(_equal("topic", contract_of(topic).topic))
    if reason is not None:
        conditions.append(_equal("reason", reason))
    if load_id is not None:
        named = [_equal("load_id", f"{contract.name}:{load_id}") for contract in CONTRACTS.values()]
        conditions.append(Or(_equal("load_id", load_id), *named))
    if since is not None:
        conditions.append(_at_least("broker_time", since.astimezone(UTC).isoformat()))
    if at is not None:
        where, number = at
        of_load = And(_equal("load_id", where), _equal("load_row", number))
        if where.isdigit():
            of_kafka = And(_equal("partition", int(where)), _equal("offset", number))
            conditions.append(Or(of_load, of_kafka))
        else:
            conditions.append(of_load)
    wanted = ("topic", *lake.PROVENANCE.names, "reason") if columns else ("*",)
    held = {c.topic: lake.position(settings, raw_spec(c).name) for c in CONTRACTS.values()}
    table = lake.open_table(
        settings, lake.RAW_DEAD_LETTERS.name
    )  # after the raw tables: their letters are there by then
    if table is None:
        return _empty()
    scan = table.scan(selected_fields=wanted)
    for condition in conditions:
        scan = scan.filter(condition)
    return _counting(scan.to_arrow(), held)


def _equal(column: str, value: str | int) -> BooleanExpression:
    from pyiceberg.expressions import EqualTo

    return EqualTo(column, value)  # type: ignore[call-arg,arg-type]  # its stubs know only how it is read from JSON


def _at_least(column: str, value: str) -> BooleanExpression:
    from pyiceberg.expressions import GreaterThanOrEqual

    return GreaterThanOrEqual(column, value)  # type: ignore[call-arg,arg-type]


def _counting(letters: pa.Table, held: Mapping[str, Position]) -> pa.Table:
    """The letters whose records the raw tables have."""
    names = ("topic", "topic_id", "partition", "offset", "load_id")
    counts = [
        load_id in position.loads
        if load_id is not None
        else offset < position.topics.get(topic_id, {}).get(partition, 0)
        for topic, topic_id, partition, offset, load_id in zip(
            *(letters.column(name).to_pylist() for name in names), strict=True
        )
        for position in (held.get(topic, Position()),)
    ]
    return letters.filter(pa.array(counts, pa.bool_()))


def _letter(row: Mapping[str, Any]) -> DeadLetter:
    return DeadLetter(_place(row), *(row[name] for name in DeadLetter._fields[1:-1]))


def _place(row: Mapping[str, Any]) -> str:
    source = (
        (row["load_id"], row["load_row"]) if row["load_id"] is not None else (row["partition"], row["offset"])
    )
    return "/".join(str(part) for part in (row["topic"], *source))


def _replayed(settings: Settings) -> dict[str, str]:
    """The place of each letter that was sent again, and of the newest record that it became."""
    table = lake.open_table(settings, lake.OPS_REPLAYS.name)
    if table is None:
        return {}
    rows = table.scan().to_arrow().sort_by("replayed_at").to_pylist()
    return {_place(row): f"{row['topic']}/{row['as_partition']}/{row['as_offset']}" for row in rows}


def _empty() -> pa.Table:
    fields = [pa.field("topic", pa.string()), *lake.PROVENANCE, pa.field("key", pa.binary())]
    fields += [
        pa.field("value", pa.binary()),
        pa.field("reason", pa.string()),
        pa.field("detail", pa.string()),
    ]
    return pa.schema(fields).empty_table()
