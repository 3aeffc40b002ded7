"""How a base's columns are kept: what is given back is what was put in, whatever its form."""

from __future__ import annotations

import uuid
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.indexing import build, facts
from pipelines.indexing import view as views
from pipelines.indexing.base import open_base
from pipelines.indexing.packing import UUID_BYTES, packed, packed_ids, taken
from pipelines.indexing.position import EMPTY
from pipelines.indexing.timelines import TimelineView
from pipelines.indices import INDICES

EVENTS = INDICES["user_events"]


@settings(deadline=None)
@given(st.lists(st.sampled_from(["", "a", "ü", None]) | st.text(max_size=3), max_size=60), st.data())
def test_texts_are_given_back(texts: list[str | None], data: st.DataObject) -> None:
    column = packed(pa.array(texts, pa.string()))
    rows = data.draw(st.lists(st.integers(0, len(texts) - 1), max_size=9)) if texts else []
    found = taken(column, np.array(rows, np.int64), pa.string())
    assert found.type == pa.string()
    assert found.to_pylist() == [texts[row] for row in rows]


@pytest.mark.parametrize("different", [1, 127, 128, 129, 40_000])
def test_repeated_texts_are_kept_once(different: int) -> None:
    texts = [f"text {number % different}" for number in range(4 * different)]
    column = packed(pa.array(texts))
    assert pa.types.is_dictionary(column.type)
    assert column.nbytes < pa.array(texts).nbytes
    assert taken(column, np.arange(len(texts)), pa.string()).to_pylist() == texts


def test_what_is_said_of_nothing_takes_next_to_nothing() -> None:
    assert packed(pa.nulls(1_000, pa.string())).nbytes <= 1_000 + 125
    assert packed(pa.array([f"{n}" for n in range(100)])).type == pa.string()  # each once: as it is
    assert packed(pa.array([1, 1, 1, 1])).type == pa.int64()


@settings(deadline=None)
@given(st.lists(st.uuids(), min_size=1, max_size=20))
def test_uuids_take_16_bytes_and_keep_their_order(ids: list[uuid.UUID]) -> None:
    texts = sorted(str(one).encode() for one in ids)
    column = packed_ids(pa.array(texts, pa.binary()))
    assert column.type == UUID_BYTES
    assert column.to_pylist() == sorted(one.bytes for one in ids)
    assert taken(column, np.arange(len(texts)), pa.binary()).to_pylist() == texts


@pytest.mark.parametrize("other", [b"e1", str(uuid.uuid4()).upper().encode(), b"\xff" * 36, b"x" * 36, b""])
def test_where_one_is_no_uuid_ids_are_kept_as_they_are(other: bytes) -> None:
    ids = [str(uuid.uuid4()).encode(), other]
    column = packed_ids(pa.array(ids, pa.binary()))
    assert column.type == pa.binary()
    assert column.to_pylist() == ids
    assert packed_ids(pa.array([], pa.binary())).type == pa.binary()


def test_a_timeline_of_uuids(tmp_path: Path) -> None:
    ids = sorted(str(uuid.uuid4()).encode() for _ in range(50))
    rows = facts.table(
        EVENTS,
        [
            {
                "family": "interactions",
                "identity": [b"u", event],
                "key": b"u",
                "version": (1,),
                "content_hash": number,
                "id": event,
                "time_ms": number // 5,
                "payload": {"pin_id": f"p{number % 3}", "action": "view", "quantity": number},
            }
            for number, event in enumerate(ids)
        ],
    )
    build.build_local(EVENTS, rows, tmp_path / "b", build.Meta("b", EMPTY))
    base = open_base(EVENTS, tmp_path / "b")
    assert base.shards[0].rows["interactions"]["id"].type == UUID_BYTES
    view = views.view(base)
    assert isinstance(view, TimelineView)
    first = view.timeline(b"u", 20)
    assert first.table.column("id").to_pylist() == ids[:29:-1]
    last = (first.table.column("time_ms")[-1].as_py(), first.table.column("id")[-1].as_py())
    assert view.timeline(b"u", 100, last).table.column("id").to_pylist() == ids[29::-1]
    assert view.within([b"u"], 3, 5).read(["id"]).column("id").to_pylist() == ids[15:25]
    assert view.within([b"u"], 3, 5).read(["pin_id"]).column("pin_id").to_pylist() == [
        f"p{number % 3}" for number in range(15, 25)
    ]
