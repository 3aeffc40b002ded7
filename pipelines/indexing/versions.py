"""The versions of an index: which there are, which is served, and moving between them.

Belongs here: the pointers, their rules (publish goes forward, roll back goes back), what is kept. Building a version is
``build``'s, serving it a replica's.

Files beside the versions in ``indices/<index>/``: ``pointer.json`` is the fleet's pointer and changes by one atomic
replace; ``pointers/<replica>.json`` is one replica's own, so that a canary goes first; ``replicas/<replica>.json`` says
what that replica serves; ``history.jsonl`` every change.
"""

from __future__ import annotations

import datetime
import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from pipelines.errors import TidemarkError
from pipelines.indexing import delta
from pipelines.indexing.base import MANIFEST, BadBase, Manifest, check_files, read_manifest
from pipelines.indexing.files import BrokenArtifact, replace_text


class VersionError(TidemarkError):
    """A version is not there, or a move between versions is not allowed."""


class SwapFailed(TidemarkError):
    """A replica did not swap to what the pointer says."""


class Pointer(NamedTuple):
    """What is to be served: a version, with or without the delta. ``generation`` grows with every change."""

    version: str
    with_delta: bool
    generation: int
    changed_at: str
    action: str  # publish, rollback or resume


class ReplicaState(NamedTuple):
    """What a replica says it serves; ``error`` says why it did not swap to ``generation``."""

    replica: str
    pid: int
    pid_started: int
    generation: int
    version: str | None
    error: str | None


class Versions:
    """The versions of one index under ``root/<index>``."""

    def __init__(self, root: Path, index: str) -> None:
        self.index = index
        self.folder = root / index

    def new_version(self, lineage: str) -> str:
        """A name for the next version: the time and the lineage; it sorts after all names that are there."""
        name = self._stamp()
        newest = max(self.names(), default="")
        while name <= newest[: len(name)]:
            time.sleep(0.002)
            name = self._stamp()
        return f"{name}-{lineage}"

    def _stamp(self) -> str:
        return datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%S%f")[:-3] + "Z"

    def path(self, version: str) -> Path:
        """Where a version lies.

        Raises:
            VersionError: the name is no version's, or there is no such version; it says which there are.
        """
        names = self.names()
        if version not in names:
            shown = ", ".join(names[-5:]) or "none yet: `tidemark build` makes one"
            raise VersionError(f"{self.index} has no version {version!r}", remedy=f"choose one of: {shown}")
        return self.folder / version

    def new_path(self, version: str) -> Path:
        """Where a version that is being built will lie."""
        return self.folder / version

    def names(self) -> list[str]:
        """The versions that are there, oldest first."""
        return sorted(
            path.parent.name
            for path in self.folder.glob(f"*/{MANIFEST}")
            if path.parent.suffix != ".building"
        )

    def manifests(self) -> list[Manifest]:
        """The manifests of the versions that are there, oldest first; unreadable ones are left out."""
        found = []
        for name in self.names():
            try:
                found.append(read_manifest(self.folder / name))
            except BadBase:
                continue
        return found

    def pointer(self, replica: str | None = None) -> Pointer | None:
        """The fleet's pointer, or a replica's own where it has one; None before the first publish.

        Raises:
            VersionError: the pointer's file cannot be read.
        """
        own = self._read_pointer(self.folder / "pointers" / f"{replica}.json") if replica else None
        fleet = self._read_pointer(self.folder / "pointer.json")
        return own or fleet

    def served(self) -> Manifest | None:
        """The manifest of what the fleet's pointer names; None before the first publish, or where that is gone."""
        pointer = self.pointer()
        if pointer is None or pointer.version not in self.names():
            return None
        return read_manifest(self.folder / pointer.version)

    def publish(self, version: str, *, replica: str | None = None) -> Pointer:
        """Serve a version that is newer than, or the same as, what is served; ends serving without the delta.

        ``replica`` moves that replica alone (a canary); publishing to the fleet ends all canaries.

        Raises:
            VersionError: no such version, or an older one than is served.
            BrokenArtifact: a file of it differs from its checksum.
        """
        directory = self.path(version)
        with self._locked():
            served = self.pointer(replica)
            if served is not None and version < served.version:
                raise VersionError(
                    f"{self.index} serves {served.version}, which is newer than {version}",
                    remedy=f"go back with `tidemark rollback {self.index} --to {version}`",
                )
            check_files(directory, read_manifest(directory))
            return self._point(version, True, "publish", replica)

    def rollback(self, version: str | None, *, deltas: Path, without_delta: bool = False) -> Pointer:
        """Serve an older version: with the delta since its own cut, or the base alone until ``publish`` or ``resume``.

        Args:
            version: None: the newest one older than what is served.
            deltas: Root of the deltas, to see how far back the delta reaches.

        Raises:
            VersionError: nothing is served, no such older version, or the delta no longer reaches back to its cut.
            BrokenArtifact: a file of it differs from its checksum.
        """
        with self._locked():
            served = self.pointer()
            if served is None:
                raise VersionError(f"{self.index} serves no version", remedy="`tidemark publish` comes first")
            older = [name for name in self.names() if name < served.version]
            chosen = version or (older[-1] if older else None)
            if chosen is None:
                raise VersionError(
                    f"{self.index} has no version older than {served.version}", remedy="build one"
                )
            directory = self.path(chosen)
            if chosen > served.version:
                raise VersionError(
                    f"{chosen} is newer than {served.version}, which is served",
                    remedy=f"go forward with `tidemark publish {self.index} {chosen}`",
                )
            manifest = read_manifest(directory)
            check_files(directory, manifest)
            if not without_delta and not reaches(deltas, manifest):
                raise VersionError(
                    f"the delta of {self.index} no longer reaches back to the cut of {chosen}",
                    remedy="roll back with --without-delta, or to a newer version",
                )
            return self._point(chosen, not without_delta, "rollback", None)

    def resume(self) -> Pointer:
        """Serve the delta again after a roll back without it.

        Raises:
            VersionError: nothing is served.
        """
        with self._locked():
            served = self.pointer()
            if served is None:
                raise VersionError(f"{self.index} serves no version", remedy="`tidemark publish` comes first")
            return served if served.with_delta else self._point(served.version, True, "resume", None)

    def confirm(self, version: str) -> None:
        """Remember a version as good: it is kept until another one is confirmed."""
        self.path(version)
        replace_text(self.folder / "confirmed.json", json.dumps({"version": version}))

    def prune(self, *, keep: int, hours: float) -> list[str]:
        """Delete the versions that need not be kept, and what builds that died left so long ago; returns their names.

        Kept are the newest ``keep``, those younger than ``hours``, the served ones, and the last confirmed.
        """
        with self._locked():
            names = self.names()
            oldest = datetime.datetime.now(datetime.UTC) - datetime.timedelta(hours=hours)
            kept = set(names[-keep:]) | self._in_use()
            dropped = [
                m.version for m in self.manifests() if datetime.datetime.fromisoformat(m.built_at) < oldest
            ]
            dropped = [name for name in dropped if name not in kept]
            for name in dropped:
                shutil.rmtree(self.folder / name)
            for unfinished in self.folder.glob("*.building"):
                if unfinished.stat().st_mtime < oldest.timestamp():
                    shutil.rmtree(unfinished)
            return dropped

    def history(self) -> list[dict[str, Any]]:
        """Every change of a pointer, oldest first."""
        try:
            lines = (self.folder / "history.jsonl").read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            return []
        return [json.loads(line) for line in lines]

    def report(self, state: ReplicaState) -> None:
        """Say what a replica serves."""
        replace_text(self.folder / "replicas" / f"{state.replica}.json", json.dumps(state._asdict()))

    def replicas(self) -> list[ReplicaState]:
        """What the replicas whose process is alive on this machine say they serve."""
        states = []
        for path in sorted((self.folder / "replicas").glob("*.json")):
            try:
                state = ReplicaState(**json.loads(path.read_text(encoding="utf-8")))
            except (ValueError, TypeError, FileNotFoundError):
                continue
            if process_started(state.pid) == state.pid_started:
                states.append(state)
        return states

    def wait_swapped(
        self, pointer: Pointer, timeout_s: float, report: Callable[[str], None] | None = None
    ) -> None:
        """Return when every local replica serves what its pointer says.

        Raises:
            SwapFailed: a replica refused, or did not swap in time; it names the replica and why.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            waiting = [s for s in self.replicas() if s.generation < pointer.generation]
            failed = [s for s in self.replicas() if s.generation >= pointer.generation and s.error]
            if failed:
                raise SwapFailed(
                    f"replica {failed[0].replica} did not swap to {pointer.version}: {failed[0].error}",
                    where=self.index,
                    remedy="roll back, or build again; it serves what it served before",
                )
            if not waiting:
                return
            if report:
                report(f"waiting for {', '.join(s.replica for s in waiting)}")
            if time.monotonic() > deadline:
                raise SwapFailed(
                    f"replica {waiting[0].replica} did not swap to {pointer.version} in {timeout_s:.0f} s",
                    where=self.index,
                    remedy="look at its log; the pointer stays as it is",
                )
            time.sleep(0.05)

    def _in_use(self) -> set[str]:
        used = {pointer.version for pointer in (self.pointer(), *self._own_pointers()) if pointer}
        with suppress(FileNotFoundError):
            used.add(json.loads((self.folder / "confirmed.json").read_text(encoding="utf-8"))["version"])
        return used | {state.version for state in self.replicas() if state.version}

    def _own_pointers(self) -> list[Pointer | None]:
        return [self._read_pointer(path) for path in (self.folder / "pointers").glob("*.json")]

    def _point(self, version: str, with_delta: bool, action: str, replica: str | None) -> Pointer:
        newest = max((p.generation for p in (self.pointer(), *self._own_pointers()) if p), default=0)
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        pointer = Pointer(version, with_delta, newest + 1, now, action)
        with (self.folder / "history.jsonl").open("a", encoding="utf-8") as history:
            history.write(json.dumps({**pointer._asdict(), "index": self.index, "replica": replica}) + "\n")
        path = self.folder / "pointers" / f"{replica}.json" if replica else self.folder / "pointer.json"
        replace_text(path, json.dumps(pointer._asdict()))
        if replica is None:
            shutil.rmtree(self.folder / "pointers", ignore_errors=True)
        return pointer

    def _read_pointer(self, path: Path) -> Pointer | None:
        try:
            return Pointer(**json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError) as error:
            raise VersionError(
                f"{path.name} is no pointer: {error}",
                where=str(path),
                remedy=f"`tidemark publish {self.index} …`",
            ) from error

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def reaches(deltas: Path, manifest: Manifest) -> bool:
    """Whether the delta of a base's lineage still holds everything after the base's cut: none of it was retired."""
    return manifest.cut.covers(delta.floor(delta.table_path(deltas, manifest.index, manifest.lineage)))


def process_started(pid: int) -> int | None:
    """When a process began, in clock ticks since boot; None if there is none. With it a pid is never mistaken."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return None


def this_replica(name: str, generation: int, version: str | None, error: str | None) -> ReplicaState:
    """The state of a replica in this process."""
    pid = os.getpid()
    return ReplicaState(name, pid, process_started(pid) or 0, generation, version, error)


__all__ = ["BrokenArtifact", "Pointer", "ReplicaState", "SwapFailed", "VersionError", "Versions", "reaches"]
