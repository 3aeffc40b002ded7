"""Routes about sequences: those of many users, by a declared definition or by one that comes with the request."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson
import pyarrow as pa

from pipelines.serving import operations
from pipelines.serving.inputs import (
    MAX_USERS,
    Batch,
    Problem,
    ids_of,
    ids_rule,
    natural_of,
    now_ms_of,
    read_object,
    text_of,
)
from pipelines.serving.routing import ARROW, Answer, Call, add, json_answer
from pipelines.serving.standing import EVENTS, PINS, Standing
from pipelines.users import sequences
from pipelines.users.sequences import BadDefinition, Definition, Sequences

if TYPE_CHECKING:
    from fastapi import FastAPI

    from pipelines.serving.standing import Ground
    from pipelines.users.sequence_files import Library

MAX_VERSION = 1_000_000
FEW_EVENTS = 1_000
"""Requests for at most so many events, which take 2 ms or so, are answered at once: behind batches, in the one thread
aside, they would wait for tens of ms."""
SAID = b"tidemark.sequences"
"""The metadata of an Arrow answer's schema in which stands what is not a column, as JSON."""
_BODY = {
    "user_ids": ids_rule(MAX_USERS),
    "name": "of a declared sequence",
    "version": "of it, a whole number; the newest that is published, if it is absent",
    "definition": {"in place of a name": list(sequences.FIELDS)},
    "now_ms": "ms since 1970; now, if it is absent",
}
log = logging.getLogger(__name__)


def register(app: FastAPI, ground: Ground, library: Library) -> None:
    """Add the routes. Declared sequences with a problem are not served, and told of in the log."""
    for problem in library.problems:
        log.error("a sequence is not served: %s", problem)

    async def query(call: Call) -> Answer:
        position = call.query("min_position").min_position()
        said = read_object(await call.body(), call.header(b"content-type"), _BODY)
        users, definition = ids_of(said, "user_ids", MAX_USERS), _definition(said, library)
        now_ms = now_ms_of(said)
        standing = await ground.at(position, EVENTS, PINS)
        asked = (standing, users, definition, now_ms, ARROW in _accepted(call))
        if len(users.ids) * definition.max_length <= FEW_EVENTS:
            return _answer(*asked)
        return await ground.aside(_answer, *asked)

    add(app, "POST", "/v1/sequences:query", query, operations.SEQUENCES)


def _definition(said: dict[str, Any], library: Library) -> Definition:
    """What a body wants: a declared sequence, or the definition that it brings."""
    name, given = said.get("name"), said.get("definition")
    if (name is None) == (given is None):
        raise Problem(400, "name", "exactly one of name and definition is needed", _BODY)
    try:
        if given is None:
            version = natural_of(said, "version", "version", 1, MAX_VERSION)
            return library.find(text_of(name, "name"), version)
        if said.get("version") is not None:
            raise Problem(400, "version", "it is that of a name, and there is none", "no version")
        return sequences.parse(given)
    except BadDefinition as error:
        parts = [part for part in ("definition" if name is None else "", error.field) if part]
        raise Problem(400, ".".join(parts), error.message, error.allowed) from None


def _answer(standing: Standing, users: Batch, definition: Definition, now_ms: int, is_arrow: bool) -> Answer:
    """Read and write; of a hundred long sequences that takes tens of ms."""
    views = standing.views
    found = sequences.read(views[EVENTS], views[PINS], definition, users.keys, now_ms)
    about = {"name": definition.name, "version": definition.version, "now_ms": now_ms}
    if is_arrow:
        return Answer(_arrow(users, found, about), standing.headers, content_type=ARROW)
    return json_answer({**about, "sequences": _written(users, found)}, standing.headers)


def _accepted(call: Call) -> list[str]:
    """The media types that a client accepts, without their parameters."""
    return [one.split(";")[0].strip().lower() for one in call.header(b"accept").split(",")]


def _written(users: Batch, found: Sequences) -> list[dict[str, Any]]:
    """Sequences as JSON, in the order in which users were asked for."""
    events = found.table.to_pylist()
    ends = np.cumsum(found.lengths).tolist()
    return [
        {"user_id": user, "events": events[end - length : end], "is_complete": is_complete}
        for user, length, end, is_complete in zip(
            users.ids, found.lengths.tolist(), ends, found.is_complete.tolist(), strict=True
        )
    ]


def _arrow(users: Batch, found: Sequences, about: dict[str, Any]) -> bytes:
    """Sequences as an Arrow stream, a row an event: the user, and the definition's columns."""
    lengths = found.lengths.tolist()
    told = [
        {"user_id": user, "length": length, "is_complete": is_complete}
        for user, length, is_complete in zip(users.ids, lengths, found.is_complete.tolist(), strict=True)
    ]
    of = pa.array(np.repeat(np.arange(len(lengths)), found.lengths))
    table = found.table.add_column(0, "user_id", pa.array(users.ids, pa.string()).take(of))
    table = table.replace_schema_metadata({SAID: orjson.dumps({**about, "users": told})})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    return sink.getvalue().to_pybytes()
