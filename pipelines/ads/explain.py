"""Why an ad is served or not: one sentence, and what each stage between its database and an answer has of it.

Belongs here: pure functions of the evidence: what keeps an ad from being answered, who said so, and what a newer
version waits for. Does not belong here: finding the evidence (`evidence`), and printing it.

What keeps an ad from being answered is judged on documents, by the rules of `retrieval`; the rows of the repository
tell which of them is to blame, since which version, and when it came.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any, NamedTuple

from pipelines.ads import handlers
from pipelines.ads import rows as registers
from pipelines.ads.joined import INPUTS
from pipelines.ads.overrides import Entry
from pipelines.ads.repository import IS_THERE, Change
from pipelines.ads.rows import Row
from pipelines.ads.schema import CONTENT, CONTROL, TABLES
from pipelines.ads.updater import REFUSED, Held

NAMES = {
    "ads": "ad",
    "ad_groups": "ad group",
    "campaigns": "campaign",
    "advertisers": "advertiser",
    "pins": "pin",
    "images": "image",
}
_HOLDERS = {given.table: given.by for family in (CONTROL, CONTENT) for given in INPUTS[family]}
_STATUSES = (
    ("review ", "ads", "review_status"),
    ("advertiser ", "advertisers", "status"),
    ("campaign ", "campaigns", "status"),
    ("ad group ", "ad_groups", "status"),
    ("ad ", "ads", "status"),
)
"""How `blocked_by` begins, and the column that it is about; a longer beginning comes before its own beginning."""


class Said(NamedTuple):
    """A record about a row, as the archive has it.

    Attributes:
        table: Of the row.
        key: The row's.
        version: Of the record.
        columns: That it sets; None: it deletes the row.
        place: Topic, partition and offset.
        at_ms: The broker's time.
        refusal: Why it was refused; None: it was not.
    """

    table: str
    key: str
    version: int
    columns: tuple[str, ...] | None
    place: str
    at_ms: int
    refusal: str | None = None


class Part(NamedTuple):
    """A row that an ad's document is joined of.

    Attributes:
        table: Its table.
        key: Its key; None: nothing names it.
        row: As the repository has it; `rows.EMPTY`: nothing was ever said of it.
        changes: What the repository still has of its changes, oldest first.
        held: Transactions with records about it that are not written.
        source: Its columns in the source database; None: it is not there, or was not looked for.
        said: Records about it, oldest first.
    """

    table: str
    key: str | None
    row: Row = registers.EMPTY
    changes: tuple[Change, ...] = ()
    held: tuple[Held, ...] = ()
    source: Mapping[str, Any] | None = None
    said: tuple[Said, ...] = ()

    @property
    def is_there(self) -> bool:
        """Whether the repository has the row."""
        return registers.is_there(self.row, TABLES[self.table])

    @property
    def name(self) -> str:
        """`campaign c1`."""
        return f"{NAMES[self.table]} {self.key}"


class Copy(NamedTuple):
    """A family of the document.

    Attributes:
        versions: The stands of what it is joined of; zeros: nothing is known of it.
        document: Its fields; None: there is none, or it is a tombstone.
        origin: What brought it: `base <version>`, or `epoch <name>`; empty: nothing did.
        at_ms: When that was.
    """

    versions: tuple[int, ...]
    document: Mapping[str, Any] | None
    origin: str = ""
    at_ms: int | None = None


class Lag(NamedTuple):
    """What holds up a newer version; None: nothing does.

    Attributes:
        seen: Up to which change keys were sent.
        last: The newest change of the repository.
        publisher: What holds up the sending of keys.
        streams: By family, what holds up the stream that makes it; `stream ads_control is stopped`.
        serving: Why what is served does not follow the delta.
    """

    seen: int
    last: int
    publisher: str | None = None
    streams: Mapping[str, str | None] = {}
    serving: str | None = None


class Evidence(NamedTuple):
    """What was found of an ad.

    Attributes:
        ad_id: Its key.
        now_ms: When.
        parts: Table → the row that its document is joined of.
        made: Family → what enrichment makes of the rows now.
        served: Family → what base and delta have of it.
        lag: What may hold up the newer of the two.
        answered: The control document as it is answered: with the entries that are ahead of it.
        bypass: The newest entries of these rows in `ads-budgets`.
        notes: What could not be looked at.
    """

    ad_id: str
    now_ms: int
    parts: Mapping[str, Part]
    made: Mapping[str, Copy]
    served: Mapping[str, Copy]
    lag: Lag
    answered: Mapping[str, Any] | None = None
    bypass: tuple[Entry, ...] = ()
    notes: tuple[str, ...] = ()


class Verdict(NamedTuple):
    """Whether the ad can be answered now (in a context that its targeting takes), and why."""

    is_served: bool
    text: str


class Blocker(NamedTuple):
    """What keeps a document from being answered: of which table, which column, and in short."""

    table: str
    column: str
    text: str


# ------------------------------------------------------------------------------------------------ verdict


def verdict(evidence: Evidence) -> Verdict:
    """Whether and why an ad is served, by what is served and what it would be by now."""
    now = blocker(*_documents(evidence.made), evidence.now_ms)
    served = blocker(evidence.answered, evidence.served[CONTENT].document, evidence.now_ms)
    late = late_families(evidence)
    if not late:
        is_current = now is None
        return Verdict(is_current, _since(evidence) if now is None else f"not served: {told(evidence, now)}")
    waits = waiting(evidence, late)
    if now is None and served is None:
        return Verdict(True, f"{_since(evidence)}; a newer version is not yet served: {waits}")
    if now is None:
        return Verdict(False, f"not yet served: {waits}")
    if served is None:
        return Verdict(True, f"still served: {told(evidence, now)}, {waits}")
    return Verdict(False, f"not served: {told(evidence, now)}; a newer version is not yet served: {waits}")


def blocker(
    control: Mapping[str, Any] | None, content: Mapping[str, Any] | None, time_ms: int
) -> Blocker | None:
    """What keeps a document from being answered at a time, whatever the context; None: nothing does."""
    if control is None:
        return Blocker("ads", IS_THERE, "ad unknown")
    if (reason := control["blocked_by"]) is not None:
        table, column = next(of for start, *of in _STATUSES if reason.startswith(start))
        return Blocker(table, IS_THERE if reason.endswith(" unknown") else column, reason)
    if control["starts_at_ms"] is not None and control["starts_at_ms"] > time_ms:
        return Blocker("campaigns", "starts_at", f"it runs from {iso(control['starts_at_ms'])} on")
    if control["ends_at_ms"] is not None and control["ends_at_ms"] <= time_ms:
        return Blocker("campaigns", "ends_at", f"it ended at {iso(control['ends_at_ms'])}")
    if control["effective_bid_usd_micros"] is None:
        return Blocker("ad_groups", "bid_usd_micros", "no bid")
    for field, table, column, text in (
        ("balance_usd_micros", "advertisers", "balance_usd_micros", "nothing is left of its balance"),
        (
            "effective_daily_budget_usd_micros",
            "campaigns",
            "daily_budget_usd_micros",
            "the budget of a day is 0",
        ),
        (
            "lifetime_budget_usd_micros",
            "campaigns",
            "lifetime_budget_usd_micros",
            "the budget of the campaign is 0",
        ),
    ):
        if control[field] == 0:
            return Blocker(table, column, text)
    if content is None or not content["has_pin"]:
        return Blocker("pins", IS_THERE, "no pin")
    if not content["has_image"]:
        return Blocker("images", IS_THERE, "no image")
    if content["is_available"] is False:
        return Blocker("pins", "is_available", "its product is not available")
    return None


def late_families(evidence: Evidence) -> list[str]:
    """The families of which what is served is not what enrichment makes now, control first."""
    return [
        family
        for family, made in evidence.made.items()
        if not _same(made.versions, evidence.served[family].versions)
    ]


def told(evidence: Evidence, found: Blocker) -> str:
    """A blocker by the rows of the repository: which one, by which version, and when."""
    if found.column == IS_THERE:
        return _missing(evidence, evidence.parts[found.table], found.text)
    part = evidence.parts[found.table]
    if found.column not in part.row.versions:
        return found.text
    by = _by(part, found.column)
    if found.column == "status" and (value := registers.value(part.row, "status")) is not None:
        return f"{part.name} {value} {by}"
    return f"{found.text}: {part.name}, {by}" if found.column != "review_status" else f"{found.text} {by}"


def waiting(evidence: Evidence, late: Iterable[str]) -> str:
    """What the newer version of the first of these families waits for."""
    family, lag = next(iter(late)), evidence.lag
    concerning = [change for change in _changes(evidence) if change.names & handlers.triggers(family)]
    unsent = [change for change in concerning if change.seq > lag.seen]
    if unsent:
        before = unsent[-1].seq - lag.seen - 1
        why = lag.publisher or (f"{before} changes are before it" if before else "it is on its way")
        return f"changed {_ago(evidence, unsent[-1])}, its key is not sent: {why}"
    sent = f"key sent {_ago(evidence, concerning[-1])}" if concerning else "no change of it is kept any more"
    if (held := lag.streams.get(family)) is not None:
        return f"{sent}, {held}"
    if lag.serving is not None:
        return f"{sent}, {lag.serving}"
    return (
        f"{sent}, on its way"
        if concerning
        else f"{sent}: `tidemark ads refresh {evidence.ad_id}` sends its key"
    )


def _documents(copies: Mapping[str, Copy]) -> tuple[Mapping[str, Any] | None, Mapping[str, Any] | None]:
    return copies[CONTROL].document, copies[CONTENT].document


def _same(left: tuple[int, ...], right: tuple[int, ...]) -> bool:
    return left == right[: len(left)]


def _since(evidence: Evidence) -> str:
    copies = [evidence.served[family] for family in (CONTROL, CONTENT)]
    newest = max(copies, key=lambda copy: copy.at_ms or 0)
    since = f"served since {iso(newest.at_ms)}" if newest.at_ms is not None else "served"
    return f"{since}, by {newest.origin}" if newest.origin else since


def _missing(evidence: Evidence, part: Part, short: str) -> str:
    """Why a row is not there."""
    holder = _HOLDERS[part.table]
    if part.table == "ads" and (collected := _collected(part)) is not None:
        return collected
    if part.key is None:
        assert holder is not None
        what = "image signature" if part.table == "images" else NAMES[part.table]
        by = evidence.parts[holder[0]]
        return f"no {what}: {by.name} names none" if by.is_there else _missing(evidence, by, short)
    if part.row.deleted_version:
        return (
            f"{part.name} was deleted by version {part.row.deleted_version}"
            + _at(_gone_at(part))
            + _held(part)
        )
    refused = [said for said in part.said if said.refusal]
    why = f"; its record was refused: {refused[-1].refusal}" if refused else _held(part)
    if holder is None:
        in_source = "; it is in the source database" if part.source is not None and not why else ""
        return f"ad unknown: no record of {part.key} is written" + in_source + why
    by = evidence.parts[holder[0]]
    return f"{NAMES[part.table]} unknown: {by.name} waits for {part.key}" + why


def _collected(part: Part) -> str | None:
    """Why there is no document of an ad that is there: garbage collection has taken it out."""
    run = registers.value(part.row, "collected_at")
    if run is None or not part.is_there:
        return None
    return f"{part.name} was removed by garbage collection on {iso(run)} (`tidemark ads gc --undo {run}`)"


def _held(part: Part) -> str:
    if not part.held:
        return ""
    one = part.held[0]
    if one.state == REFUSED:
        return f"; its record is held back with transaction {one.id}: {one.detail}"
    expected = "an unknown number" if one.expected is None else one.expected
    return f"; its record waits in transaction {one.id}: {one.arrived} of {expected} are there"


def _by(part: Part, column: str) -> str:
    return f"by version {part.row.versions[column]}" + _at(_set_at(part, column))


def _set_at(part: Part, column: str) -> int | None:
    """When the column became what it is, by what is still known."""
    changed = [change.committed_at_ms for change in part.changes if column in change.changed]
    version = part.row.versions.get(column)
    said = [one.at_ms for one in part.said if one.version == version and column in (one.columns or ())]
    return next(iter([*changed[-1:], *said[-1:]]), None)


def _gone_at(part: Part) -> int | None:
    gone = [change.committed_at_ms for change in part.changes if IS_THERE in change.changed]
    said = [one.at_ms for one in part.said if one.version == part.row.deleted_version and one.columns is None]
    return next(iter([*gone[-1:], *said[-1:]]), None)


def _changes(evidence: Evidence) -> list[Change]:
    return sorted(
        (change for part in evidence.parts.values() for change in part.changes), key=lambda change: change.seq
    )


def _ago(evidence: Evidence, change: Change) -> str:
    return f"{max(0, evidence.now_ms - change.committed_at_ms) / 1000:.1f} s ago"


def _at(at_ms: int | None) -> str:
    return "" if at_ms is None else f" at {iso(at_ms)}"


def iso(at_ms: int) -> str:
    """A time for a person: UTC, to the millisecond.

    Examples:
        >>> iso(1_717_243_200_040)
        '2024-06-01T12:00:00.040Z'
    """
    return datetime.fromtimestamp(at_ms / 1000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


# ------------------------------------------------------------------------------------------------ stages


class Stage(NamedTuple):
    """What one stage has of one thing: `campaigns/c1`, or a family of the document."""

    stage: str
    what: str
    version: str
    at_ms: int | None
    detail: str
    facts: Mapping[str, Any] = {}

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        return {**self._asdict(), "at": None if self.at_ms is None else iso(self.at_ms)}


def stages(evidence: Evidence) -> list[Stage]:
    """The copies of the ad and of what it is joined of, in the order of the way that they take."""
    parts = [part for part in evidence.parts.values() if part.key is not None]
    found = [_database(part) for part in parts if part.source is not None]
    found += [_raw(part, said) for part in parts for said in part.said]
    found += [_repository(part) for part in parts]
    found += [_waits(part, held) for part in parts for held in part.held]
    found += [_keys(evidence, family) for family in evidence.made]
    found += [_copied("enrichment", family, copy, evidence) for family, copy in evidence.made.items()]
    found += [_entry(entry) for entry in evidence.bypass]
    found += [_copied("served", family, copy, evidence) for family, copy in evidence.served.items()]
    return found


def _what(part: Part) -> str:
    return f"{part.table}/{part.key}"


def _database(part: Part) -> Stage:
    source = part.source or {}
    return Stage("database", _what(part), "", None, _some(source), source)


def _raw(part: Part, said: Said) -> Stage:
    columns = "deleted" if said.columns is None else ", ".join(said.columns)
    detail = f"{said.place}: {columns}" + (f"; refused: {said.refusal}" if said.refusal else "")
    return Stage("raw", _what(part), str(said.version or ""), said.at_ms, detail, said._asdict())


def _repository(part: Part) -> Stage:
    values, row = registers.visible(part.row), part.row
    newest = max([*row.versions.values(), row.deleted_version])
    at_ms = part.changes[-1].committed_at_ms if part.changes else None
    facts = {"values": values, "versions": dict(row.versions), "deleted_version": row.deleted_version}
    detail = (
        _some(values) if part.is_there else "deleted" if row.deleted_version else "nothing was said of it"
    )
    return Stage("repository", _what(part), str(newest or ""), at_ms, detail, facts)


def _waits(part: Part, held: Held) -> Stage:
    detail = held.detail or f"{held.arrived} of {held.expected if held.expected is not None else '?'} records"
    return Stage(
        "transaction", _what(part), held.id, held.seen_at_ms, f"{held.state}: {detail}", held._asdict()
    )


def _keys(evidence: Evidence, family: str) -> Stage:
    mine = [change for change in _changes(evidence) if change.names & handlers.triggers(family)]
    sent = [change for change in mine if change.seq <= evidence.lag.seen]
    pending = len(mine) - len(sent)
    detail = f"{pending} of its changes pending" if pending else "all its changes sent"
    at_ms = sent[-1].committed_at_ms if sent else None
    facts = {"seen": evidence.lag.seen, "last": evidence.lag.last, "pending": pending}
    return Stage("keys", family, str(sent[-1].seq if sent else ""), at_ms, detail, facts)


def _copied(stage: str, family: str, copy: Copy, evidence: Evidence) -> Stage:
    version = " ".join(map(str, copy.versions[: len(INPUTS[family])]))
    detail = copy.origin or ("" if any(copy.versions) else "nothing is known of it")
    if copy.document is None and any(copy.versions):
        detail += (": " if detail else "") + "a tombstone"
    elif family == CONTROL and copy.document is not None:
        detail += (": " if detail else "") + (copy.document["blocked_by"] or "servable")
    return Stage(
        stage, family, version, copy.at_ms, detail, {"versions": copy.versions, "document": copy.document}
    )


def _entry(entry: Entry) -> Stage:
    what = f"{entry.table}/{entry.key}"
    return Stage("bypass", what, str(entry.stand), None, _some(entry.values), entry.values)


_SHOWN = 6


def _some(values: Mapping[str, Any]) -> str:
    said = {name: value for name, value in values.items() if value is not None}
    first = [name for name in ("status", "review_status") if name in said]
    names = list(dict.fromkeys([*first, *(name for name in said if name.endswith("_id")), *said]))
    more = f", and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(f"{name}={said[name]}" for name in names[:_SHOWN]) + more
