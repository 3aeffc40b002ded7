"""Kept code: a copy of the source whose streams feed a lineage, so that they can be started after the checkout changed.

Here: keeping a copy under the home, finding the one that feeds certain lineages, dropping those that nobody needs. Not
here: dependencies (they are the environment's, of all code alike), and which lineages are served (`jobs.lineages`).

A copy lies in `code/<its lineages>-<its content>/`, whole or not at all, with `lineages.json` beside the packages.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, NamedTuple

from pipelines.errors import TidemarkError
from pipelines.settings import ROOT, Settings

PARTS = ("pipelines", "assets", "quality", "jobs", "conf")
LINEAGES = "lineages.json"


class CodeError(TidemarkError):
    """Code that is needed is not kept."""


class Kept(NamedTuple):
    """A copy: its folder, and the lineage of each index that its streams feed."""

    folder: Path
    lineages: dict[str, str]

    @property
    def name(self) -> str:
        return self.folder.name

    def environment(self) -> dict[str, str]:
        """What a process needs to run this code; its working folder is `folder`."""
        others = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
        return {"PYTHONPATH": os.pathsep.join([str(self.folder), *others])}


def lineages_here() -> dict[str, str]:
    """The lineage of each index in the code that runs now."""
    from pipelines.indexing.spec import lineage
    from pipelines.indices import INDICES

    return {name: lineage(spec) for name, spec in INDICES.items()}


def keep(settings: Settings) -> Kept:
    """Keep the code of this process, as it lies on disk. Earlier copies with the same lineages go, unless they run."""
    lineages = lineages_here()
    files = sorted(_sources())
    content = hashlib.sha256()
    for file in files:
        content.update(f"{file.relative_to(ROOT)}\0".encode() + file.read_bytes() + b"\0")
    stem = hashlib.sha256(json.dumps(lineages, sort_keys=True).encode()).hexdigest()[:8]
    kept = Kept(settings.paths.code / f"{stem}-{content.hexdigest()[:8]}", lineages)
    if kept.folder == ROOT:
        return kept
    if not kept.folder.exists():
        draft = kept.folder.with_name(f"{kept.name}.{os.getpid()}.copying")
        for file in files:
            target = draft / file.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(file, target)
        (draft / LINEAGES).write_text(json.dumps(lineages), encoding="utf-8")
        try:
            draft.rename(kept.folder)
        except OSError:  # another process was quicker
            shutil.rmtree(draft, ignore_errors=True)
    os.utime(kept.folder)
    _drop(other for other in all_kept(settings) if other.name.startswith(f"{stem}-") and other != kept)
    return kept


def _sources() -> Iterable[Path]:
    for part in PARTS:
        for path in (ROOT / part).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                yield path


def all_kept(settings: Settings) -> list[Kept]:
    """Every copy, the one that ran last first."""
    files = [file for file in settings.paths.code.glob(f"*/{LINEAGES}") if file.parent.suffix != ".copying"]
    files.sort(key=lambda file: -file.parent.stat().st_mtime)
    return [Kept(file.parent, json.loads(file.read_text("utf-8"))) for file in files]


def feeding(settings: Settings, wanted: Mapping[str, str]) -> Kept | None:
    """The copy whose streams feed all of these lineages (index → lineage); None where none does."""
    return next((kept for kept in all_kept(settings) if wanted.items() <= kept.lineages.items()), None)


def named(settings: Settings, name: str) -> Kept:
    """The copy of that name.

    Raises:
        CodeError: It is not there (any more).
    """
    for kept in all_kept(settings):
        if kept.name == name:
            return kept
    raise CodeError(f"the code {name} is not kept", where=str(settings.paths.code), remedy="start it anew")


def drop_unused(settings: Settings, needed: Iterable[tuple[str, str]]) -> None:
    """Drop the copies that feed none of these (index, lineage) and do not run."""
    wanted = set(needed)
    _drop(kept for kept in all_kept(settings) if not wanted & set(kept.lineages.items()))


def hold() -> IO[str] | None:
    """While the result is open nobody drops the code that this process runs; None where it is no copy."""
    file = ROOT / LINEAGES
    if not file.exists():
        return None
    handle = file.open()
    fcntl.flock(handle, fcntl.LOCK_SH)
    return handle


def _drop(copies: Iterable[Kept]) -> None:
    for kept in list(copies):
        try:
            with (kept.folder / LINEAGES).open() as handle:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(kept.folder)
        except OSError:  # it runs, or another process drops it
            continue
