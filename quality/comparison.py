"""Two lineages of an index compared: what the served pair of base and delta answers against what a candidate's does.

Belongs here: reading both at a common position, what is only in one, what differs and in which column, from the
specification alone, and the findings that stand in the way of publishing. A transform is changed on purpose: that
values differ is told, not forbidden. Moving the pointer is ``jobs``'.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from pipelines.indexing import delta
from pipelines.indexing import facts as fact
from pipelines.indexing import position as positions
from pipelines.indexing.base import open_base, read_manifest
from pipelines.indexing.delta import Epoch, Tailer
from pipelines.indexing.overlay import PORTION_FACTS
from pipelines.indexing.position import Position
from pipelines.indexing.spec import IndexSpec, Sums, Timeline
from pipelines.indexing.sums import SumsView
from pipelines.indexing.timelines import TimelineView
from pipelines.indexing.view import View, view
from quality.gates import Finding

MAX_LOST_PCT = 5
"""Of the keys, and of what they hold, how much a candidate may lack before it takes `--force` to publish it."""
MAX_KEYS = 100_000
"""Of more keys than this a sample is compared, the same on both sides: those of the least hash."""
EXAMPLES = 3
CHUNK = 2_000

Entries = dict[Any, dict[str, Any]]
"""What a key holds, by column: a document's families, a timeline's events, the buckets of sums."""


class Side(NamedTuple):
    """One lineage: how much of it was compared."""

    lineage: str
    version: str
    keys: int
    entries: int


class Column(NamedTuple):
    """How many entries differ in a column, of those that both have; an example is (key, entry, old, new)."""

    name: str
    differing: int
    examples: tuple[tuple[str, str, Any, Any], ...]


class Comparison(NamedTuple):
    """What two lineages answer at a position that both have come to.

    Attributes:
        entries_only_old: What the candidate lacks, with what the keys hold that it lacks (`entries_only_new`: has
            besides).
        columns: The columns in which something differs. Those that only the candidate declares make no difference;
            they are `added`, name → how many entries fill them. `removed` are those that it lacks.
        keys_in_motion: Left out, because records after the position were folded with others before it.
        is_sample: Whether only a part of the keys was compared.
    """

    index: str  # type: ignore[assignment]  # hides tuple.index, which nobody needs
    read: str
    position: str
    old: Side
    new: Side
    keys_only_old: int
    keys_only_new: int
    keys_differing: int
    entries_only_old: int
    entries_only_new: int
    entries_differing: int
    columns: tuple[Column, ...]
    added: dict[str, int]
    removed: tuple[str, ...]
    examples_only_old: tuple[str, ...]
    examples_only_new: tuple[str, ...]
    keys_in_motion: int
    is_sample: bool

    @property
    def findings(self) -> list[Finding]:
        """What stands in the way of publishing, or does not."""
        return [
            _kept("keys", self.keys_only_old, self.old.keys),
            _kept("entries", self.entries_only_old, self.old.entries),
        ]

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            **self._asdict(),
            "old": self.old._asdict(),
            "new": self.new._asdict(),
            "columns": [column._asdict() for column in self.columns],
            "findings": [finding._asdict() for finding in self.findings],
        }


def _kept(what: str, lost: int, of: int) -> Finding:
    passed = 100 * lost <= MAX_LOST_PCT * of
    return Finding(
        f"keeps_{what}", passed, f"the candidate lacks {lost} of {of} {what}; at most {MAX_LOST_PCT} % may go"
    )


def compare(spec: IndexSpec, deltas: Path, old: Path, new: Path, max_keys: int = MAX_KEYS) -> Comparison:
    """Compare two bases of different lineages, each with its delta.

    Args:
        spec: The index as this code declares it; the old lineage is read as far as the two agree.
        deltas: Root of the deltas.
        old: Folder of the base that is served.
        new: Folder of the candidate.
        max_keys: Compare a sample of so many keys at most.

    Raises:
        BadBase: a base cannot be read, or not by this code.
    """
    sides = [_Side(spec, deltas, folder) for folder in (old, new)]
    common = positions.meet_all([side.end() for side in sides])
    moving: set[bytes] = set()
    for side in sides:
        moving |= side.fold(common)
    views = [side.view for side in sides]
    keys, is_sample = _sample(sorted(set(_keys(views[0])) | set(_keys(views[1]))), max_keys)
    still = [key for key in keys if fact.hash_bytes(key) not in moving]
    declared = [_columns(side.base.manifest.declaration if side.base.manifest else {}) for side in sides]
    added = declared[1] - declared[0] if declared[0] else set()
    tally = _Tally(added)
    horizon = max((v.base.horizon_from_ms or 0 for v in views), default=0) or None
    for start in range(0, len(still), CHUNK):
        chunk = still[start : start + CHUNK]
        for key, before, after in zip(chunk, *(_entries(v, chunk, horizon) for v in views), strict=True):
            tally.add(key, before, after)
    names = [
        Side(side.manifest.lineage, side.manifest.version, keys_of, entries_of)
        for side, keys_of, entries_of in zip(sides, tally.keys, tally.entries, strict=True)
    ]
    return Comparison(
        index=spec.name,
        read=type(spec.read).__name__,
        position=common.to_text(),
        old=names[0],
        new=names[1],
        keys_only_old=tally.only[0],
        keys_only_new=tally.only[1],
        keys_differing=tally.keys_differing,
        entries_only_old=tally.entries_only[0],
        entries_only_new=tally.entries_only[1],
        entries_differing=tally.entries_differing,
        columns=tuple(
            Column(name, count, tuple(tally.examples[name])) for name, count in tally.differing.most_common()
        ),
        added={name: tally.filled[name] for name in sorted(added)},
        removed=tuple(sorted(declared[0] - declared[1])),
        examples_only_old=tuple(tally.examples_only[0]),
        examples_only_new=tuple(tally.examples_only[1]),
        keys_in_motion=len(keys) - len(still),
        is_sample=is_sample,
    )


class _Side:
    """A base, and its delta up to a position."""

    def __init__(self, spec: IndexSpec, deltas: Path, folder: Path) -> None:
        self.manifest = read_manifest(folder)
        self.base = open_base(spec, folder, verify_files=False)
        self.path = delta.table_path(deltas, spec.name, self.manifest.lineage)
        self.view: View = view(self.base)

    def end(self) -> Position:
        return self.base.cut.merge(delta.Ends(self.path).position())

    def fold(self, until: Position) -> set[bytes]:
        """Fold what lies before a position, and the epochs that lie across it; gives the key hashes of the latter."""
        across: list[Epoch] = []
        waiting: list[pa.Table] = []
        for epoch in Tailer(self.base.spec, self.path).snapshot():
            if self.base.cut.covers(epoch.marker.end) or _is_after(epoch, until):
                continue
            if not until.covers(epoch.marker.end):
                across.append(epoch)
                continue
            waiting.append(epoch.facts)
            if sum(facts.num_rows for facts in waiting) >= PORTION_FACTS:
                self._fold(waiting)
                waiting = []
        self._fold(waiting)
        facts = [epoch.facts for epoch in across]
        moving = {hashed for table in facts for hashed in table.column("key_hash").to_pylist()}
        if isinstance(self.view, SumsView):  # an edit takes back from a key that it does not name
            for table in facts:
                held = self.view.held_by(fact.hashes(table.column("identity_hash")))
                moving |= {a.tobytes() + b.tobytes() for a, b in _big_endian(held)}
        self._fold(facts)
        return moving

    def _fold(self, facts: list[pa.Table]) -> None:
        if facts:
            self.view = self.view.folded(pa.concat_tables(facts), positions.EMPTY)


def _big_endian(hashed: fact.Hashes) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    return zip(hashed.lookup.astype(">u8"), hashed.check.astype(">u8"), strict=True)


def _is_after(epoch: Epoch, until: Position) -> bool:
    return all(
        offset >= until.topics.get(topic, {}).get(partition, 0)
        for topic, offsets in epoch.marker.start.topics.items()
        for partition, offset in offsets.items()
    )


def _keys(of: View) -> Iterator[bytes]:
    for shard in of.base.shards:
        yield from shard.key_bytes.to_pylist()
    named = (
        [run.adjustments.key for run in of.runs]
        if isinstance(of, SumsView)
        else [run.facts.column("key") for run in of.runs]
    )
    for column in named:
        yield from column.drop_null().to_pylist()


def _sample(keys: list[bytes], most: int) -> tuple[list[bytes], bool]:
    if len(keys) <= most:
        return keys, False
    return sorted(keys, key=fact.hash_bytes)[:most], True


def _entries(of: View, keys: Sequence[bytes], horizon: int | None) -> list[Entries]:
    """What each key holds, of the families that streams feed: a model's vectors are another thing in every base."""
    spec = of.spec
    if isinstance(of, SumsView):
        assert isinstance(spec.read, Sums)
        names = spec.read.amounts
        found = [of.sums(key, horizon) for key in keys]
        return [{b: dict(zip(names, amounts, strict=True)) for b, amounts in s.items()} for s in found]
    if isinstance(of, TimelineView):
        assert isinstance(spec.read, Timeline)
        family = spec.families[0].name
        return [
            {
                row.pop("id"): {
                    name if name in _joined(spec) else f"{family}.{name}": v for name, v in row.items()
                }
                for row in of.timeline(key).table.to_pylist()
                if horizon is None or row["time_ms"] >= horizon
            }
            for key in keys
        ]
    fed = [f.name for f in spec.families if f.stream is not None]
    return [
        {
            name: {f"{name}.{column}": v for column, v in values.items()}
            for name, values in (doc or {}).items()
        }
        for doc in of.get(keys, fed)
    ]


def _joined(spec: IndexSpec) -> set[str]:
    return {family.name for family in spec.families[1:]}


def _columns(declaration: Mapping[str, Any]) -> set[str]:
    return {f"{family}.{name}" for family, names in declaration.get("families", {}).items() for name in names}


class _Tally:
    """Counts what was compared; `added` are columns that only the candidate has."""

    def __init__(self, added: set[str]) -> None:
        self._added = added
        self.keys, self.entries, self.only, self.entries_only = [0, 0], [0, 0], [0, 0], [0, 0]
        self.keys_differing = self.entries_differing = 0
        self.differing: Counter[str] = Counter()
        self.filled: Counter[str] = Counter()
        self.examples: dict[str, list[tuple[str, str, Any, Any]]] = {}
        self.examples_only: tuple[list[str], list[str]] = ([], [])

    def add(self, key: bytes, before: Entries, after: Entries) -> None:
        for side, (mine, theirs) in enumerate([(before, after), (after, before)]):
            self.keys[side] += bool(mine)
            self.entries[side] += len(mine)
            self.entries_only[side] += len(mine.keys() - theirs.keys())
            if mine and not theirs:
                self.only[side] += 1
                if len(self.examples_only[side]) < EXAMPLES:
                    self.examples_only[side].append(_text(key))
        for entry in after.values():
            self.filled.update(name for name in self._added if entry.get(name) is not None)
        changed = [
            self._differ(key, entry, before[entry], after[entry]) for entry in before.keys() & after.keys()
        ]
        self.entries_differing += sum(changed)
        self.keys_differing += bool(before and after and (any(changed) or before.keys() != after.keys()))

    def _differ(self, key: bytes, entry: Any, before: dict[str, Any], after: dict[str, Any]) -> bool:
        names = [n for n in after if n not in self._added and before.get(n) != after[n]]
        for name in names:
            self.differing[name] += 1
            shown = self.examples.setdefault(name, [])
            if len(shown) < EXAMPLES:
                shown.append((_text(key), _text(entry), before.get(name), after[name]))
        return bool(names)


def _text(value: Any) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)
