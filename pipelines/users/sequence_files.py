"""Declared sequences: a file each in `conf/sequences/`, and the ledger of what was published.

Belongs here: reading the files, which changes a published version may undergo, and publishing. What a definition may
say is ``sequences``'.

Version 1 of a name is `<name>.yaml`, version n `<name>.v<n>.yaml`. The ledger, `published.yaml`, keeps what each
published version meant, in plain values: who reads a version gets what was published under it, or an error. Of a
published version description and owner may change, and fields and enrichments may be added; all else needs a new
version. A file that goes leaves its entry behind, so that its number is never given another meaning.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from pipelines import ledger, strict_yaml
from pipelines.settings import ROOT
from pipelines.users.sequences import REQUIRED, BadDefinition, Definition, nearest, parse

FOLDER = ROOT / "conf" / "sequences"
LEDGER = ledger.FILE
REQUIRED_IN_FILE = (*REQUIRED, "name", "version", "description", "owner")
_SETS = ("actions", "surfaces", "categories")
_EXTENDED = ("fields", "enrich")
_HEAD = "# What each published version of a sequence means. `tidemark sequences publish NAME` writes it; commit it.\n"

Meaning = Mapping[str, Any]
"""What a version promises to who reads it: the definition's fields that say which events come, and what of each."""
Ledger = Mapping[str, Mapping[int, Meaning]]
"""Name → version → what was published."""


class Library(NamedTuple):
    """All that is declared. A definition with a problem is not among the definitions; the others are served."""

    definitions: Mapping[tuple[str, int], Definition]
    published: Ledger
    problems: tuple[BadDefinition, ...]

    def is_published(self, definition: Definition) -> bool:
        """Whether its version is one that others may rely on."""
        return definition.version in self.published.get(definition.name or "", {})

    def find(self, name: str, version: int | None = None) -> Definition:
        """A definition; without a version the newest one that is published.

        Raises:
            BadDefinition: There is none; with those that there are.
        """
        versions = {
            number: held for (held_name, number), held in self.definitions.items() if held_name == name
        }
        if not versions:
            names = sorted({held for held, _ in self.definitions})
            raise BadDefinition("name", f"there is no such sequence{nearest(name, names)}", names)
        if version is None:
            stand = [number for number, held in versions.items() if self.is_published(held)]
            if not stand:
                raise BadDefinition("version", "none is published, so one has to be named", sorted(versions))
            return versions[max(stand)]
        if version not in versions:
            raise BadDefinition("version", f"there is no version {version} of {name}", sorted(versions))
        return versions[version]


def file_name(name: str, version: int) -> str:
    """The file in which a version is declared."""
    return f"{name}.yaml" if version == 1 else f"{name}.v{version}.yaml"


def load(folder: Path | None = None) -> Library:
    """Read all files of a folder, `conf/sequences/` by default.

    Raises:
        BadDefinition: The ledger cannot be read. What is wrong with a definition is among the library's problems.
    """
    folder = FOLDER if folder is None else folder
    published = read_ledger(folder)
    definitions: dict[tuple[str, int], Definition] = {}
    problems = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.name == LEDGER or path.name.startswith("."):
            continue
        try:
            found = read_file(path)
            check_published(found, published, path)
        except BadDefinition as error:
            problems.append(error)
        else:
            assert found.name is not None and found.version is not None
            definitions[found.name, found.version] = found
    return Library(definitions, published, tuple(problems))


def read_file(path: Path) -> Definition:
    """The definition in a file.

    Raises:
        BadDefinition: It cannot be read, says what may not be said, or has another file's name.
    """
    if not path.name.endswith(".yaml") or not path.is_file():
        raise BadDefinition(
            "", "it is not read: it is no file *.yaml", "another name, or another place", path
        )
    try:
        found = parse(_yaml(path), REQUIRED_IN_FILE)
    except BadDefinition as error:
        raise error.at(path) from None
    assert found.name is not None and found.version is not None
    expected = file_name(found.name, found.version)
    if expected == LEDGER:
        raise BadDefinition("name", f"{LEDGER} is the ledger", "another name", path)
    if path.name != expected:
        raise BadDefinition(
            "name", f"version {found.version} of {found.name} is in a file of another name", expected, path
        )
    return found


def _yaml(path: Path) -> Any:
    try:
        return strict_yaml.load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise BadDefinition("", f"the file cannot be read: {error}", "YAML", path) from error


# ----------------------------------------------------------------------------------------------- what may change


def meaning(definition: Definition) -> Meaning:
    """What a version promises, in plain values; the same for definitions that mean the same."""
    said = definition._asdict()
    sets = {name: sorted(said[name]) for name in _SETS}
    plain = {name: said[name] for name in ("age_ms", "max_length", "deduplicate_by", "order")}
    return sets | plain | {name: list(said[name]) for name in _EXTENDED}


def differences(published: Meaning, definition: Definition) -> list[str]:
    """How a definition breaks what was published under its version; none where it keeps it."""
    now, found = meaning(definition), []
    for name, value in now.items():
        before = published.get(name)
        if name in _EXTENDED:
            gone = [one for one in before or () if one not in value]
            found += [f"{name} had {', '.join(gone)}"] if gone else []
        elif (value or None) != (before or None):
            found.append(f"{name} was {_said(before)} and is {_said(value)}")
    return found


def _said(value: Any) -> str:
    if value is None or value == []:
        return "not limited"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def check_published(definition: Definition, published: Ledger, path: Path) -> None:
    """Whether a definition keeps what was published under its version.

    Raises:
        BadDefinition: It does not; with the fields that differ, and what to do.
    """
    name, version = definition.name or "", definition.version or 0
    versions = published.get(name, {})
    broken = differences(versions[version], definition) if version in versions else []
    if broken:
        following = max(versions) + 1
        raise BadDefinition(
            "version",
            f"version {version} was published with another meaning: {'; '.join(broken)}",
            f"version {following} in {file_name(name, following)} for the change, and this file as it was",
            path,
        )


# ---------------------------------------------------------------------------------------------------- publishing


def read_ledger(folder: Path) -> Ledger:
    """What was published; nothing where there is no ledger yet.

    Raises:
        BadDefinition: It cannot be read.
    """
    path = folder / LEDGER
    said = (_yaml(path) or {}) if path.exists() else {}
    if not ledger.is_ledger(said):
        raise BadDefinition("", "the ledger is not names with versions", "the one that was committed", path)
    return said


def publish(folder: Path, name: str, version: int | None = None) -> Definition:
    """Write into the ledger what a version means; without a version, the newest that has a file.

    Raises:
        BadDefinition: There is no such definition, or something is wrong with this or any other file.
    """
    library = load(folder)
    for problem in library.problems:
        raise problem
    newest = max((number for held, number in library.definitions if held == name), default=None)
    found = library.find(name, newest if version is None else version)
    assert found.name is not None and found.version is not None
    of_name = {**library.published.get(name, {}), found.version: meaning(found)}
    ledger.write(folder, _HEAD, {**library.published, name: of_name})
    return found
