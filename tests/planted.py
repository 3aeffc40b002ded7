"""Bugs to plant in the heart, and in the evaluator of patterns, one at a time: the tests of the tests.

Belongs here: which text of a shipped function is replaced by which mistake, and how. Does not belong here: finding
them; ``tests/properties/test_planted_bugs.py`` shows that the property tests do, ``test_patterns.py`` for patterns.

A bug is planted by giving the function the code of its altered source, so that every module that imported it has it
too. A text that is no longer there, once, is an error: then the code has moved on and the bug has to be written anew.
"""

from __future__ import annotations

import importlib
import inspect
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import NamedTuple


class Bug(NamedTuple):
    """One mistake in one function."""

    name: str
    where: str
    """module:function or module:Class.method; a module without dots is below ``pipelines.indexing``"""
    old: str
    new: str
    reads: tuple[str, ...]
    """the kinds of read whose property tests must each find it"""


ROWS = ("documents", "timeline")

BUGS = (
    Bug(
        "the vector of a changed document is lost when parts are merged",
        "changed:Part.followed_by",
        "np.append(held[1], other.vectors[name][1])",
        "np.append(held[1], np.zeros(len(other), bool))",
        ("search",),
    ),
    Bug(
        "a vector of other dimensions counts",
        "access:vectors_of",
        "pc.equal(lengths, dimensions)",
        "pc.greater(lengths, 0)",
        ("search",),
    ),
    Bug(
        "the condition on numbers is not asked of changed documents",
        "documents:DocumentsView._changed_holding",
        "if condition is not None:",
        "if False:",
        ("search",),
    ),
    Bug(
        "a family's version is that of the base, whatever came after",
        "documents:DocumentsView.ranks",
        "for run in self.runs",
        "for run in ()",
        ("documents",),
    ),
    Bug(
        "a column of a document that was deleted since the base is still read",
        "documents:DocumentsView._holders",
        "np.where(run.is_deleted[rows], nobody, len(holders))",
        "len(holders)",
        ("documents",),
    ),
    Bug(
        "the content hash is left out of the rank: a tie goes to the one that came last",
        "merge:Ranks.columns",
        ", self.is_deleted, self.content_hash)",
        ", self.is_deleted)",
        ("documents",),
    ),
    Bug("deletion is left out of the rank", "merge:Ranks.columns", "self.is_deleted, ", "", ("timeline",)),
    Bug(
        "only the first place of a version is compared",
        "merge:Ranks.columns",
        "range(4)",
        "range(1)",
        ("sums",),
    ),
    Bug(
        ">= for > while ranks are compared",
        "merge:greater",
        "(mine > other)",
        "(mine >= other)",
        ("documents",),
    ),
    Bug(
        "the content hash is compared without its sign",
        "merge:greater",
        "(mine > other)",
        "(mine.astype(np.uint64) > other.astype(np.uint64))",
        ("timeline",),
    ),
    Bug(
        "the second half of a hash is not checked when the first is found",
        "facts:_find",
        "(sorted_lookup[at] == queries.lookup) & (check[at] == queries.check)",
        "sorted_lookup[at] == queries.lookup",
        ("sums",),
    ),
    Bug(
        "tombstones are dropped when a base is built",
        "build:write_rows_shard",
        "merge(fact.conform(facts, spec))",
        "merge(fact.conform(facts, spec)).filter(pc.invert(pc.field('is_deleted')))",
        ROWS,
    ),
    Bug(
        "an event that replaces another is taken for a new one",
        "rows:fold",
        "is_addition[hit] = False",
        "is_addition[hit] = True",
        ("timeline",),
    ),
    Bug(
        "merged runs forget with which fold their facts came",
        "rows:_compact",
        "older.origins.take(rest).followed_by(newer.origins)",
        "Origins(older.origins.take(rest).followed_by(newer.origins)[0], np.zeros(len(facts), int), "
        "np.ones(len(facts), bool))",
        ("timeline",),
    ),
    Bug(
        "tombstones are dropped when a base of sums is built",
        "build:write_sums_identities",
        "facts = merge(facts)",
        "facts = merge(facts).filter(pc.invert(pc.field('is_deleted')))",
        ("sums",),
    ),
    Bug(
        "the rank of a truncated event is forgotten",
        "build:write_rows_shard",
        '_write_identities(folder, hashes(facts.column("identity_hash")), ranks(facts), {"row": row_of_fact})',
        'known = np.flatnonzero((row_of_fact >= 0) | facts.column("is_deleted").to_numpy()); '
        '_write_identities(folder, hashes(facts.column("identity_hash")).take(known), ranks(facts).take(known), '
        '{"row": row_of_fact[known]})',
        ("timeline",),
    ),
    Bug(
        "the overlay does not compare with the base's rank",
        "rows:fold",
        "~known.is_known | greater(ranked, known.ranks)",
        "np.ones(len(known.is_known), bool)",
        ROWS,
    ),
    Bug(
        "the overlay of sums does not compare with the base's rank",
        "sums:_fold",
        "~known.is_known | greater(ranked, known.ranks)",
        "np.ones(len(known.is_known), bool)",
        ("sums",),
    ),
    Bug(
        "a later epoch wins over an earlier one, whatever their ranks",
        "rows:fold",
        "keep[hit] &= greater(ranked.take(hit), run.ranks.take(at[hit]))",
        "pass",
        ROWS,
    ),
    Bug(
        "an epoch is left out when it begins before the cut",
        "overlay:Overlay._after_cut",
        "epoch.marker.end",
        "epoch.marker.start",
        ("documents",),
    ),
    Bug(
        "a swap forgets the epochs after the cut",
        "overlay:Overlay._fold_snapshot",
        "self._after_cut(tailer.snapshot())",
        "[e for e in self._after_cut(tailer.snapshot()) if self.view.base.manifest is None]",
        ("timeline",),
    ),
    Bug(
        "an epoch that comes while a swap is prepared is lost",
        "replica:Follower._adopt",
        "overlay.catch_up()",
        "overlay._tailer and setattr(overlay._tailer, 'version', overlay._tailer.head())",
        ("sums",),
    ),
    Bug(
        "an epoch is committed twice",
        "delta:DeltaWriter.commit",
        "stored is not None and stored >= marker.epoch",
        "False",
        ("documents",),
    ),
    Bug(
        "the epochs of two streams share one guard",
        "delta:DeltaWriter.commit",
        'f"{marker.stream}/{marker.incarnation}"',
        'f"{marker.incarnation}"',
        ("documents", "sums"),
    ),
    Bug(
        "a new incarnation is taken for the old one",
        "delta:DeltaWriter.commit",
        'f"{marker.stream}/{marker.incarnation}"',
        "marker.stream",
        ("timeline",),
    ),
    Bug(
        "a roll back without the delta serves it all the same",
        "replica:Follower._opened",
        "path if has_delta else None",
        "path",
        ("sums",),
    ),
    Bug(
        "sums are not taken back from the old key",
        "sums:_adjustments",
        "np.flatnonzero(taken.is_counted)",
        "np.flatnonzero(taken.is_counted & (taken.keys.lookup == added.keys.lookup))",
        ("sums",),
    ),
    Bug(
        "what was counted is taken back twice",
        "sums:_adjustments",
        "-down.amounts",
        "-2 * down.amounts",
        ("sums",),
    ),
    Bug(
        "what a deletion says it adds is added",
        "build:contributing",
        '~facts.column("is_deleted").to_numpy().astype(bool)',
        "np.ones(facts.num_rows, bool)",
        ("sums",),
    ),
    Bug(
        "the horizon is applied to the base's events alone",
        "timelines:TimelineView.timeline",
        "if horizon is not None:",
        "if False:",
        ("timeline",),
    ),
    Bug(
        "the floor of a truncated key is ignored",
        "timelines:TimelineView.timeline",
        "if floor is not None:",
        "if False:",
        ("timeline",),
    ),
    Bug(
        "a truncated key is called complete",
        "timelines:TimelineView.timeline",
        "is_complete = cut_ms is None or",
        "is_complete = True or",
        ("timeline",),
    ),
    Bug(
        "a row that the delta replaces is not hidden in a range of the base",
        "timelines:TimelineView.within",
        "hidden_rows[np.isin(hidden_of, queries)]",
        "NO_ROWS",
        ("timeline",),
    ),
    Bug(
        "one hidden row is not made up for when the newest of a range are enough",
        "timelines:TimelineView.within",
        "last - most - len(hidden_rows)",
        "last - most",
        ("timeline",),
    ),
    Bug(
        "a range of the base begins after its first event",
        "timelines:first_at",
        "< time_ms)",
        "<= time_ms)",
        ("timeline",),
    ),
    Bug(
        "what a further family says is taken for an event that is new",
        "timelines:TimelineView.added",
        "& (run.family[rows] == 0)",
        "",
        ("joined",),
    ),
    Bug(
        "a range says that it is whole, whatever was cut off",
        "timelines:TimelineView._within_cut",
        "(answer.cut_ms is None or",
        "(True or",
        ("timeline",),
    ),
    Bug(
        "a timeline that a count cuts short above the base's floor is called complete",
        "timelines:TimelineView.timeline",
        'cut_ms = events.column("time_ms")[read.count].as_py()',
        "pass",
        ("timeline",),
    ),
    Bug(
        "a range that begins before the horizon says that it is whole",
        "timelines:TimelineView.within",
        "is_inside = horizon is None or",
        "is_inside = True or",
        ("timeline",),
    ),
    Bug(
        "events of equal time stand in the wrong order",
        "timelines:_ordered",
        '("id", "descending")',
        '("id", "ascending")',
        ("timeline",),
    ),
    Bug(
        "a row that the delta replaces is not hidden in the base",
        "timelines:TimelineView.timeline",
        "rows[~np.isin(rows, hidden)] if len(hidden) else rows",
        "rows",
        ("timeline",),
    ),
    Bug(
        "one hidden row is not made up for when the newest are sliced",
        "timelines:TimelineView.timeline",
        "end - most - len(hidden)",
        "end - most",
        ("timeline",),
    ),
    Bug(
        "a deleted family of a document stays",
        "documents:DocumentsView._overlay_parts",
        "None if run.is_deleted[row] else {}",
        "parts[name][query] if run.is_deleted[row] else {}",
        ("documents",),
    ),
    Bug(
        "merged runs keep what a newer run replaced",
        "rows:_compact",
        "is_superseded[at[at >= 0]] = True",
        "pass",
        ("timeline",),
    ),
    Bug(
        "a document that changed again is found as it was before, too",
        "changed:without",
        "_without(is_alive, held.find(keys))",
        "is_alive",
        ("search",),
    ),
    Bug(
        "merged parts keep what a newer part replaced",
        "changed:_alive",
        "held if is_alive.all() else held.only(np.flatnonzero(is_alive))",
        "held",
        ("search",),
    ),
    Bug(
        "the terms of a part that was merged stay with the rows that they had",
        "changed:Part.only",
        "place[self.terms.row[kept]]",
        "self.terms.row[kept]",
        ("search",),
    ),
    Bug(
        "a changed document passes with a refused term",
        "changed:Part.passing",
        "passing[self.terms.any_of(field, terms)] = False",
        "pass",
        ("search",),
    ),
    Bug(
        "a changed document is found in the base, too",
        "documents:DocumentsView._passing",
        " & ~self._changed.of(shard)",
        "",
        ("search",),
    ),
)

FIRING, PROFILES = "pipelines.users.patterns.firing", "pipelines.users.profiles"
PATTERN_BUGS = (
    Bug(
        "a span holds the event at its very beginning",
        f"{FIRING}:_counted",
        "<= time_ms - rule",
        "< time_ms - rule",
        (),
    ),
    Bug(
        "a count fires at each event while it is enough",
        f"{FIRING}:_counted",
        " and not was_so_within",
        "",
        (),
    ),
    Bug(
        "what comes at the end of the span is too late",
        f"{FIRING}:_absent",
        "next_ms <= time_ms",
        "next_ms < time_ms",
        (),
    ),
    Bug(
        "an event that is both keeps itself from firing",
        f"{FIRING}:_member",
        "-mark.role",
        "mark.role and -mark.role + 2",
        (),
    ),
    Bug("equal times are ordered as they came", f"{FIRING}:_member", "event_id.encode()", 'b""', ()),
    Bug(
        "what an edited event was had no say in anything",
        f"{FIRING}:_touch",
        "[*([] if old is None else [old]), *(event for _, event in new)]",
        "[event for _, event in new]",
        (),
    ),
    Bug(
        "what follows an event is not judged again",
        f"{FIRING}:_ranges",
        "2 * rule.within_ms",
        "0",
        (),
    ),
    Bug(
        "an older statement rises again",
        f"{FIRING}:_said",
        "event.rank > old.rank",
        "event.rank[0] >= old.rank[0]",
        (),
    ),
    Bug(
        "what is told later is not of a greater version",
        f"{FIRING}:_version",
        "sum(kept.read.values())",
        "0",
        (),
    ),
    Bug(
        "the rank of a deleted event is forgotten",
        f"{FIRING}:_pruned",
        "event.last_ms >= floor",
        "event.marks",
        (),
    ),
    Bug("too little is kept", f"{FIRING}:_pruned", "patterns.kept_ms", "patterns.lateness_ms // 2", ()),
    Bug(
        "what stood in between is not taken back",
        f"{FIRING}:_taken",
        "has_between = by.rows > 1",
        "has_between = False",
        (),
    ),
    Bug(
        "what an event was in between is not taken back",
        f"{FIRING}:_taken",
        "touched[left].rows > 1",
        "False",
        (),
    ),
    Bug(
        "what a stream told before the base knew more is shown",
        f"{PROFILES}:_fired",
        ">= known",
        ">= (0, 0)",
        (),
    ),
    Bug(
        "a horizon cuts off what the base knew",
        f"{FIRING}:whole",
        'Told(b"", MARKED_MS,',
        'Told(b"", 0,',
        (),
    ),
    Bug(
        "what lies ahead is shown",
        f"{PROFILES}:_fired",
        "user, from_ms, now_ms + 1",
        "user, from_ms, 2**62",
        (),
    ),
)


@contextmanager
def planted(bug: Bug) -> Iterator[None]:
    """The shipped code with the bug in it, inside the block."""
    module_name, _, path = bug.where.partition(":")
    whole_name = module_name if "." in module_name else f"pipelines.indexing.{module_name}"
    module = importlib.import_module(whole_name)
    target = module
    for part in path.split("."):
        target = inspect.getattr_static(target, part)
    assert isinstance(target, FunctionType), bug.where
    source = textwrap.dedent(inspect.getsource(target))
    assert source.count(bug.old) == 1, f"{bug.where} has {source.count(bug.old)} times: {bug.old}"
    names = dict(vars(module))
    exec(compile(source.replace(bug.old, bug.new), f"<planted: {bug.name}>", "exec"), names)
    sound = target.__code__
    target.__code__ = names[target.__name__].__code__
    try:
        yield
    finally:
        target.__code__ = sound
