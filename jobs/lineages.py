"""A new lineage of an index, beside the one that is served: started, compared, published as a pair, and gone back from.

Here: the steps, each of which may be broken off and run again; what is served is touched by `publish` and `back` alone.
Not here: streams (`jobs.streams`), the code that is kept for them (`jobs.code`), the rules of the pointers
(`pipelines.indexing`), and what two lineages are compared by (`quality.comparison`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from jobs import code, controls, processes
from pipelines import failpoints
from pipelines.errors import TidemarkError
from pipelines.indexing import delta, lineages
from pipelines.indexing.base import BadBase
from pipelines.indexing.position import EMPTY, Position, merge_all
from pipelines.indexing.versions import Pointer, Versions, reaches
from pipelines.settings import Settings

if TYPE_CHECKING:
    from jobs.build import Report
    from jobs.code import Kept
    from jobs.controls import Beside
    from pipelines.indexing.base import Manifest
    from quality.comparison import Comparison

CATCH_UP_TIMEOUT_S = 900.0
SIGN_OF_LIFE_S = 10.0
Say = Callable[[str], None]


class LineageError(TidemarkError):
    """There is no new lineage, no former one, or it is not what it was taken for."""


class Row(NamedTuple):
    """One lineage of one index.

    Attributes:
        lineage: Its fingerprint.
        is_here: Whether the code of this checkout has it.
        state: served, candidate (it has a base that is not served), former (its streams have ended), or "".
        versions: How many bases of it there are, and the newest.
        epochs, delta_bytes: What its delta holds.
        fed_by: The process that feeds it now.
        behind: How many records it lacks of the most that any of the index's lineages, or the archive, has.
        kept_code: The copy of its code that can feed it.
    """

    lineage: str
    is_here: bool
    state: str
    versions: int
    newest: str | None
    epochs: int
    delta_bytes: int
    fed_by: str | None
    behind: int
    kept_code: str | None


# ------------------------------------------------------------------------------------------------ looking


def rows(settings: Settings, index: str) -> list[Row]:
    """The lineages of an index, the served one first, then by their newest base."""
    versions = Versions(settings.paths.indices, index)
    manifests, served, here = versions.manifests(), versions.served(), code.lineages_here()[index]
    known = {*(m.lineage for m in manifests), *lineages.of_index(settings.paths.delta, index), here}
    newest = {m.lineage: m for m in manifests}
    ends = {mark: _position(settings, index, mark, newest.get(mark)) for mark in known}
    head = merge_all([*ends.values(), _archived(settings, index)])
    kept = code.all_kept(settings)
    found = []
    for mark in known:
        path = delta.table_path(settings.paths.delta, index, mark)
        feeding, of_it = lineages.feeding(path), [m for m in manifests if m.lineage == mark]
        is_served = served is not None and served.lineage == mark
        state = "served" if is_served else "former" if lineages.order(path).is_ended else ""
        epochs, size = delta.size(path)
        found.append(
            Row(
                lineage=mark,
                is_here=mark == here,
                state=state or ("candidate" if of_it else ""),
                versions=len(of_it),
                newest=newest[mark].version if of_it else None,
                epochs=epochs,
                delta_bytes=size,
                fed_by=feeding.name if feeding else None,
                behind=_behind(ends[mark], head),
                kept_code=next((k.name for k in kept if k.lineages.get(index) == mark), None),
            )
        )
    return sorted(found, key=lambda row: (row.state == "served", row.newest or ""), reverse=True)


def _position(settings: Settings, index: str, mark: str, newest: Manifest | None) -> Position:
    path = delta.table_path(settings.paths.delta, index, mark)
    return lineages.Progress(path, newest.cut if newest else EMPTY).position()


def _archived(settings: Settings, index: str) -> Position:
    from pipelines import lake
    from pipelines.curate import SOURCES
    from pipelines.indices import INDICES, topics

    held = merge_all(lake.position(settings, source.raw_table) for source in SOURCES.values())
    return Position(held.restricted_to(topics(INDICES[index])).topics)


def _behind(has: Position, head: Position) -> int:
    return sum(
        max(0, offset - has.topics.get(topic, {}).get(partition, 0))
        for topic, offsets in head.topics.items()
        for partition, offset in offsets.items()
    )


def code_of_served(settings: Settings) -> Kept | None:
    """The kept code that should feed what is served, where the code of this process would not; None: this one does.

    What a process beside the main one feeds, and what has ended, needs no one else.
    """
    here, wanted = code.lineages_here(), {}
    beside = {
        (index, kept.lineages.get(index))
        for entry in controls.beside(settings.paths.run)
        for kept in code.all_kept(settings)
        if kept.name == entry.code
        for index in entry.indices
    }
    for index in here:
        served = Versions(settings.paths.indices, index).served()
        if served is not None and (index, served.lineage) not in beside:
            path = delta.table_path(settings.paths.delta, index, served.lineage)
            if not lineages.order(path).is_ended:
                wanted[index] = served.lineage
    if wanted.items() <= here.items():
        return None
    return code.feeding(settings, wanted)


# ------------------------------------------------------------------------------------------------ starting


def start(
    settings: Settings,
    indices: Sequence[str] | None,
    say: Say = lambda text: None,
    report: Report = lambda step: None,
    timeout_s: float = CATCH_UP_TIMEOUT_S,
) -> dict[str, Comparison]:
    """Build a candidate of each index whose lineage changed, feed it beside what is served, compare when it is fresh.

    What is there of an attempt before is used.

    Raises:
        LineageError: Nothing changed, or nothing is served yet.
        BuildError: A candidate could not be built, or did not pass its gate.
        NotCaughtUp: It did not catch up in time; its streams go on, and `compare` and `publish` can be run later.
    """
    from jobs import build as builder

    changed = _changed(settings, indices)
    missing = [index for index in changed if not _has_good_candidate(settings, index)]
    if missing:
        say(f"building candidates of {', '.join(missing)}; they are not published")
        built = builder.build(settings, indices=missing, is_published=False, report=report)
        if (problem := built.problem()) is not None:
            raise problem
    candidates = {index: _require_candidate(settings, index) for index in changed}
    for index, manifest in candidates.items():
        path = delta.table_path(settings.paths.delta, index, manifest.lineage)
        lineages.begin_at(path, manifest.cut)
        if lineages.order(path).is_ended:
            lineages.reopen(path, EMPTY)
    feed_beside(settings, code.keep(settings), changed, say)
    for index, manifest in candidates.items():
        _await_caught_up(settings, index, manifest, say, timeout_s)
    return {index: compare(settings, index) for index in changed}


def _changed(settings: Settings, indices: Sequence[str] | None) -> list[str]:
    here = code.lineages_here()
    for index in indices or ():
        if index not in here:
            raise LineageError(f"there is no index {index!r}", remedy=f"name one of {', '.join(here)}")
    found, unserved = [], []
    for index in indices or here:
        served = Versions(settings.paths.indices, index).served()
        if served is None:
            unserved.append(index)
        elif served.lineage != here[index]:
            found.append(index)
    if indices and unserved:
        raise LineageError(f"{', '.join(unserved)} serves nothing yet", remedy="`tidemark build` comes first")
    if not found or (indices and len(found) < len(indices)):
        same = ", ".join(index for index in indices or here if index not in found)
        raise LineageError(
            f"the transforms and schemas of {same} are those of what is served",
            remedy="edit a transform or a schema first; `tidemark lineage list` shows what there is",
        )
    return found


def _candidate(settings: Settings, index: str) -> Manifest | None:
    """The newest base of this code's lineage that is newer than what is served, and that its delta reaches back to."""
    versions, here = Versions(settings.paths.indices, index), code.lineages_here()[index]
    pointer = versions.pointer()
    found = [
        manifest
        for manifest in versions.manifests()
        if manifest.lineage == here and (pointer is None or manifest.version > pointer.version)
    ]
    return next((m for m in reversed(found) if reaches(settings.paths.delta, m)), None)


def _has_good_candidate(settings: Settings, index: str) -> bool:
    from pipelines.indices import INDICES
    from quality import gates

    found = _candidate(settings, index)
    return found is not None and all(f.passed for f in gates.examine(settings, INDICES[index], found.version))


def _require_candidate(settings: Settings, index: str) -> Manifest:
    found = _candidate(settings, index)
    if found is None:
        raise LineageError(
            f"{index} has no candidate of this code's lineage", remedy=f"`tidemark lineage start {index}`"
        )
    return found


def _await_caught_up(settings: Settings, index: str, manifest: Manifest, say: Say, timeout_s: float) -> None:
    served = _require_served(settings, index)
    said = [0.0]

    def report(has: Position, wanted: Position) -> None:
        if time.monotonic() - said[0] > 5:
            said[0] = time.monotonic()
            say(f"{index}: {_behind(has, wanted):,} records to catch up with")

    lineages.await_caught_up(settings.paths.delta, served, manifest, timeout_s, report)
    say(f"{index}: {manifest.version} has caught up with {served.version}")


def _require_served(settings: Settings, index: str) -> Manifest:
    served = Versions(settings.paths.indices, index).served()
    if served is None:
        raise LineageError(f"{index} serves nothing yet", remedy="`tidemark build` comes first")
    return served


# ------------------------------------------------------------------------------------------------ comparing, moving


def compare(settings: Settings, index: str) -> Comparison:
    """What is served against the candidate, each with its delta.

    Raises:
        LineageError: There is no candidate, or the two are read in ways that cannot be compared.
    """
    from pipelines.indices import INDICES
    from quality import comparison

    versions = Versions(settings.paths.indices, index)
    served, candidate = _require_served(settings, index), _require_candidate(settings, index)
    old, new = versions.path(served.version), versions.path(candidate.version)
    try:
        return comparison.compare(INDICES[index], settings.paths.delta, old, new)
    except BadBase as error:
        raise LineageError(
            f"{candidate.version} cannot be compared with {served.version}: {error.what}",
            where=f"index {index}",
            remedy=f"`tidemark lineage publish {index} --force`, then start serving anew with this code",
        ) from error


def publish(
    settings: Settings, index: str, *, is_forced: bool = False, say: Say = lambda text: None
) -> Pointer:
    """Serve the candidate with its delta; then the streams of the lineage that was served stop.

    May be run again after it was broken off. When nothing is left to change, the main streaming process is started
    anew with this code, and those beside it stop.

    Args:
        is_forced: Publish although the comparison has findings. The gate of a base holds all the same.

    Raises:
        LineageError: There is no candidate, or the comparison has findings.
        NotCaughtUp: The candidate does not hold yet what is served.
        NotPublished: The base did not pass its gate.
        SwapFailed: A replica did not swap.
    """
    from jobs import moves

    here, served = code.lineages_here()[index], _require_served(settings, index)
    if served.lineage != here:
        candidate = _require_candidate(settings, index)
        refused = [] if is_forced else [f for f in compare(settings, index).findings if not f.passed]
        if refused:
            raise LineageError(
                f"{candidate.version} lacks too much of what {served.version} has",
                where=f"index {index}: " + "; ".join(f.description for f in refused),
                remedy="see `tidemark lineage compare`; if it is meant so, publish with --force",
            )
        version = candidate.version
    else:
        version = served.version  # it was broken off after the pointer moved, or is done
    pointer = moves.publish(settings, index, version, say)
    settle(settings, say)
    return pointer


def back(settings: Settings, index: str, say: Say = lambda text: None) -> tuple[Pointer, bool]:
    """Serve the newest base of the lineage before, with its delta, and start its streams again where its code is kept.

    Returns:
        The pointer, and whether its streams run again; where they do not, it is served marked as stale.

    Raises:
        LineageError: There is no former lineage.
        VersionError: Its delta no longer reaches back to its base.
    """
    from jobs import moves

    versions, served = Versions(settings.paths.indices, index), _require_served(settings, index)
    former = [m for m in versions.manifests() if m.version < served.version and m.lineage != served.lineage]
    if not former:
        raise LineageError(
            f"{index} has no base of another lineage than {served.lineage} to go back to",
            remedy="`tidemark rollback` goes back within a lineage; `tidemark versions` lists what there is",
        )
    target = former[-1]
    until = lineages.progress(settings.paths.delta, served).position()
    pointer = moves.rollback(settings, index, target.version, without_delta=False, say=say)
    path = delta.table_path(settings.paths.delta, index, target.lineage)
    kept = code.feeding(settings, {index: target.lineage})
    if kept is None:
        say(f"no code of {target.lineage} is kept: {index} is served marked as stale")
        return pointer, False
    lineages.reopen(path, until)
    if not _shows_life(path):  # the process that fed it does not run any more
        feed_beside(settings, kept, [index], say)
    say(f"{index}: the streams of {target.lineage} run again")
    return pointer, True


def _shows_life(path: Path) -> bool:
    asked_at = time.time()
    while (found := lineages.feeding(path)) is None or found.at < asked_at:
        if time.time() > asked_at + SIGN_OF_LIFE_S:
            return False
        time.sleep(0.2)
    return True


# ------------------------------------------------------------------------------------------------ processes


def feed_beside(settings: Settings, kept: Kept, indices: Sequence[str], say: Say = lambda text: None) -> None:
    """Feed these indices with that code, in a process beside the main one; what else it feeds, it goes on feeding.

    Other processes beside it no longer feed them, unless they feed what is served.
    """
    run = settings.paths.run
    entries, mine = controls.beside(run), f"streams-{kept.name.partition('-')[0]}"
    wanted = {index for entry in entries if entry.name == mine for index in entry.indices} | set(indices)
    others = [
        entry._replace(
            indices=tuple(i for i in entry.indices if i not in indices or _is_served(settings, entry, i))
        )
        for entry in entries
        if entry.name != mine
    ]
    _set_beside(settings, [*others, controls.Beside(mine, kept.name, tuple(sorted(wanted)))], say)


def _is_served(settings: Settings, entry: Beside, index: str) -> bool:
    served = Versions(settings.paths.indices, index).served()
    of_entry = next((k.lineages for k in code.all_kept(settings) if k.name == entry.code), {})
    return served is not None and of_entry.get(index) == served.lineage


def _set_beside(settings: Settings, wanted: Sequence[Beside], say: Say) -> None:
    """Stop what should not run beside the main process (any more), then start what should."""
    run, keeper = settings.paths.run, processes.supervisor(settings)
    before = {process.name: process for process in processes.local(settings)}
    held, wanted = controls.beside(run), [entry for entry in wanted if entry.indices]
    gone = [before[entry.name] for entry in held if entry not in wanted]
    if gone:
        processes.down(keeper, gone, say)
    controls.set_beside(run, wanted)
    names = {entry.name for entry in wanted}
    processes.up(keeper, [process for process in processes.local(settings) if process.name in names], say)


def settle(settings: Settings, say: Say = lambda text: None) -> None:
    """Once this code's lineages are all served, the main streaming process runs it, and none is needed beside it.

    Until that is ready the process beside it goes on: what changed stays fresh all the while.
    """
    here = code.lineages_here()
    served = {index: Versions(settings.paths.indices, index).served() for index in here}
    if any(manifest is not None and manifest.lineage != here[index] for index, manifest in served.items()):
        return
    if controls.beside(settings.paths.run):
        keeper = processes.supervisor(settings)
        main = processes.choose(processes.local(settings), ["streams"])
        if not all(_is_fed_by_main(settings, *lineage) for lineage in here.items()):
            processes.down(keeper, main, say)
            processes.up(keeper, main, say)
        failpoints.hit("lineages.after_main")
        _set_beside(settings, [], say)
    code.drop_unused(settings, _needed(settings))


def _is_fed_by_main(settings: Settings, index: str, mark: str) -> bool:
    found = lineages.feeding(delta.table_path(settings.paths.delta, index, mark))
    return found is not None and found.name == "streams"


def _needed(settings: Settings) -> list[tuple[str, str]]:
    here = code.lineages_here()
    return [
        *here.items(),
        *((index, m.lineage) for index in here for m in Versions(settings.paths.indices, index).manifests()),
    ]


def to_json(found: Sequence[Row]) -> list[dict[str, Any]]:
    """For `--json`."""
    return [row._asdict() for row in found]
