"""Declared payloads: files in `conf/payloads/`, and the ledger of what was published.

Belongs here: reading the files, which changes a published schema may undergo, and publishing. What a schema may say,
and deciding a payload by it, is ``payloads``'.

Version 1 of what an action's payload may say is `<action>.yaml`, version n `<action>.v<n>.yaml`; of features,
`features.yaml` and so on. Raw records are decided again at every build: a schema that came to refuse what it took, or
that held from a time that has passed, would take events away that are served. So the ledger, `published.yaml`, keeps
what each published version means, and nothing is decided while files and ledger differ. A published version keeps its
`since` and is only ever widened; all else needs a new version, whose `since` lies ahead when it is published. Owner and
the docs of fields may change at any time.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from pipelines import ledger, strict_yaml
from pipelines.contracts.payloads import FEATURES, BadSchema, Field, Schema, Schemas, parse, plain, time_of

FOLDER = Path(__file__).resolve().parents[2] / "conf" / "payloads"
LEDGER = ledger.FILE
_FILE = re.compile(r"([a-z_]+?)(?:\.v([1-9][0-9]*))?")
_HEAD = (
    "# What each published schema means. `tidemark contracts payloads publish ABOUT` writes it; commit it.\n"
)

Numbered = Mapping[int, Schema]
"""Version → the schema."""
Ledger = Mapping[str, Numbered]
"""About what → what was published of it, as `meaning` has it."""


class Library(NamedTuple):
    """All that is declared. Nothing is decided by any of it while there is a problem."""

    schemas: Schemas
    published: Ledger
    problems: tuple[BadSchema, ...]


@functools.cache
def declared(folder: Path | None = None) -> Schemas:
    """The schemas that hold, as this process finds them when it first asks.

    Raises:
        BadSchema: A file cannot be read, says what may not be said, or is not what was published; the first of these.
    """
    library = load(folder)
    for problem in library.problems:
        raise problem
    return library.schemas


def load(folder: Path | None = None) -> Library:
    """Read all files of a folder, `conf/payloads/` by default.

    Raises:
        BadSchema: The ledger cannot be read. What is wrong with a schema is among the library's problems.
    """
    folder = FOLDER if folder is None else folder
    published = read_ledger(folder)
    found, problems = _read_files(folder)
    if not problems:  # a file that cannot be read is not one that is gone
        for about in sorted({*found, *published}):
            problems += _of_one(about, found.get(about, {}), published.get(about, {}), folder)
    schemas = {about: tuple(schema for _, schema in sorted(found[about].items())) for about in found}
    return Library(schemas, published, tuple(problems))


def file_name(about: str, version: int) -> str:
    """The file in which a version is declared."""
    return f"{about}.yaml" if version == 1 else f"{about}.v{version}.yaml"


def _read_files(folder: Path) -> tuple[dict[str, dict[int, Schema]], list[BadSchema]]:
    found: dict[str, dict[int, Schema]] = {}
    problems = []
    for path in sorted(folder.glob("*.yaml")):
        if path.name == LEDGER:
            continue
        try:
            version, schema = _read_file(path)
        except BadSchema as error:
            problems.append(error)
        else:
            found.setdefault(schema.about, {})[version] = schema
    return found, problems


def _read_file(path: Path) -> tuple[int, Schema]:
    from pipelines.contracts.user_interactions import ACTIONS  # which decides by what is read here

    schema = parse(_yaml(path), path, (*ACTIONS, FEATURES))
    matched = _FILE.fullmatch(path.stem)
    version = int(matched[2] or 1) if matched else 1
    if path.name != file_name(schema.about, version):
        raise BadSchema(
            f"the file is about {schema.about}",
            where=path,
            remedy=f"call it {file_name(schema.about, version)}",
        )
    return version, schema


def _yaml(path: Path) -> Any:
    try:
        return strict_yaml.load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise BadSchema(f"the file cannot be read: {error}", where=path, remedy="use YAML") from error


# ----------------------------------------------------------------------------------------------- what may change


def meaning(schema: Schema) -> Schema:
    """What a schema promises to who sends: the same for schemas that take the same from the same time on."""
    fields = {
        name: field._replace(doc="", one_of=tuple(sorted(field.one_of)))
        for name, field in schema.fields.items()
    }
    return schema._replace(owner="", fields=fields)


def narrowings(published: Schema, schema: Schema) -> list[str]:
    """How a schema breaks what was published under its version; none where it takes all that that took."""
    found = []
    if schema.since_ms != published.since_ms:
        found.append(f"since was {_time(published.since_ms)} and is {_time(schema.since_ms)}")
    gone = [name for name in published.fields if name not in schema.fields]
    found += [f"fields had {', '.join(gone)}"] if gone else []
    for name, field in schema.fields.items():
        if name in published.fields:
            found += _narrowed(published.fields[name], field)
        elif field.is_required:
            found.append(f"{name} is new and required")
    return found


def _narrowed(before: Field, after: Field) -> list[str]:
    if after.type != before.type:
        return [f"{after.name}.type was {before.type} and is {after.type}"]
    is_narrower = {
        "is_required": after.is_required and not before.is_required,
        "least": after.least > before.least,
        "most": after.most < before.most,
        "most_bytes": after.most_bytes < before.most_bytes,
        "most_texts": after.most_texts < before.most_texts,
        "one_of": bool(after.one_of) and not (before.one_of and {*before.one_of} <= {*after.one_of}),
    }
    return [
        f"{after.name}.{bound} was {_said(getattr(before, bound))} and is {_said(getattr(after, bound))}"
        for bound, is_one in is_narrower.items()
        if is_one
    ]


def _time(at_ms: int) -> str:
    return time_of(at_ms).isoformat().replace("+00:00", "Z")


def _said(value: Any) -> str:
    if isinstance(value, tuple):
        return ", ".join(value) or "not limited"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _of_one(about: str, found: Numbered, published: Numbered, folder: Path) -> list[BadSchema]:
    """What is wrong with the versions of one thing, among themselves and against the ledger."""
    if problem := _unkept(about, found, published, folder):
        return problem
    return [
        BadSchema(
            f"version {version} of {about} "
            + ("is not what was published" if version in published else "is not published"),
            where=folder / file_name(about, version),
            remedy=f"run `tidemark contracts payloads publish {about}`, and commit {LEDGER}",
        )
        for version, schema in sorted(found.items())
        if published.get(version) != meaning(schema)
    ]


def _unkept(about: str, found: Numbered, published: Numbered, folder: Path) -> list[BadSchema]:
    """What has to be mended before anything can be published."""
    gone = sorted(published.keys() - found.keys())
    if gone:
        return [
            BadSchema(
                f"version {version} of {about} was published, and its file is gone",
                where=folder / file_name(about, version),
                remedy="put it back as it was",
            )
            for version in gone
        ]
    problems = []
    for version in sorted(published):
        if broken := narrowings(published[version], found[version]):
            following = file_name(about, max(found) + 1)
            problems.append(
                BadSchema(
                    f"version {version} of {about} was published with another meaning: {'; '.join(broken)}",
                    where=folder / file_name(about, version),
                    remedy=f"use {following} for the change, with a `since` that lies ahead, and this file as it was",
                )
            )
    return problems or _out_of_order(about, found, folder)


def _out_of_order(about: str, found: Numbered, folder: Path) -> list[BadSchema]:
    if sorted(found) != list(range(1, len(found) + 1)):
        return [
            BadSchema(
                f"the schemas of {about} are not numbered one by one",
                where=folder,
                remedy=f"call the next one {file_name(about, len(found))}",
            )
        ]
    types: dict[str, str] = {}
    for version, schema in sorted(found.items()):
        for field in schema.fields.values():
            if types.setdefault(field.name, field.type) != field.type:
                return [
                    BadSchema(
                        f"{field.name} of {about} is {field.type}, and was {types[field.name]} before",
                        where=folder / file_name(about, version),
                        remedy="give the field another name",
                    )
                ]
    for (_, before), (version, after) in itertools.pairwise(sorted(found.items())):
        if after.since_ms <= before.since_ms:
            return [
                BadSchema(
                    f"version {version} of {about} is in force no later than the one before",
                    where=folder / file_name(about, version),
                    remedy="give it a later `since`",
                )
            ]
    return []


# ---------------------------------------------------------------------------------------------------- publishing


def read_ledger(folder: Path) -> Ledger:
    """What was published; nothing where there is no ledger yet.

    Raises:
        BadSchema: It cannot be read.
    """
    path = folder / LEDGER
    said = (_yaml(path) or {}) if path.exists() else {}
    if not ledger.is_ledger(said):
        raise BadSchema(
            "the ledger is not names with versions", where=path, remedy="use the one that was committed"
        )
    return {
        about: {
            version: meaning(parse({"about": about, "owner": "published", **entry}, path, (about,)))
            for version, entry in versions.items()
        }
        for about, versions in said.items()
    }


def publish(folder: Path, about: str, now_ms: int) -> Schema:
    """Write into the ledger what all versions of one thing mean, and return the newest.

    Raises:
        BadSchema: There is no such schema, something is wrong with a file, a published version was not just widened, or
            a new one holds from a time that has passed.
    """
    published = read_ledger(folder)
    schemas, problems = _read_files(folder)
    for problem in problems:
        raise problem
    if about not in schemas:
        raise BadSchema(
            f"nothing is declared about {about}",
            where=folder,
            remedy=f"use one of {', '.join(sorted(schemas))}",
        )
    found, before = schemas[about], published.get(about, {})
    for problem in _unkept(about, found, before, folder):
        raise problem
    for version, schema in sorted(found.items()):
        if version not in before and schema.since_ms <= now_ms:
            raise BadSchema(
                f"since: {_time(schema.since_ms)} has passed, and what was taken from then on is decided",
                where=folder / file_name(about, version),
                remedy=f"use a time after {_time(now_ms)}, when all that decides runs with it",
            )
    meant = {**published, about: {number: meaning(one) for number, one in found.items()}}
    said = {name: {number: _plain(one) for number, one in of.items()} for name, of in meant.items()}
    ledger.write(folder, _HEAD, said)
    return found[max(found)]


def _plain(schema: Schema) -> dict[str, Any]:
    return {
        "since": time_of(schema.since_ms),
        "fields": {name: plain(field) for name, field in schema.fields.items()},
    }
