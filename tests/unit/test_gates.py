"""The gate of a candidate base: it passes what is whole, and names what is not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.indexing import facts
from pipelines.indexing.base import MANIFEST, Manifest, read_manifest
from pipelines.indexing.build import Meta, build_local
from pipelines.indexing.position import EMPTY, Position
from pipelines.indexing.spec import IndexSpec
from pipelines.indices import INDICES
from pipelines.pins.index import DIMENSIONS
from quality import gates

PINS = INDICES["pins"]


def pin(
    number: int, *, vector: list[float] | None = None, has_catalogue: bool = True
) -> list[dict[str, Any]]:
    key = f"p{number}".encode()
    known = {"identity": [key], "key": key, "version": (1,), "content_hash": 1}
    labels = {"title": "t", "category": "c", "department": "d", "brand": "b"}
    rows = [{"family": "offer", "payload": {"price_usd_micros": 5, "is_available": True}}]
    if has_catalogue:
        rows.append({"family": "catalogue", "payload": labels})
    if vector is not None:
        rows.append({"family": "embedding", "payload": {"vector": vector}})
    return [{**known, **row} for row in rows]


def vector(value: float = 0.5, dimensions: int = DIMENSIONS) -> list[float]:
    return [value] * dimensions


def built(folder: Path, pins: list[list[dict[str, Any]]], version: str = "v1", **meta: Any) -> Path:
    table = facts.table(PINS, [row for rows in pins for row in rows])
    given: dict[str, Any] = {
        "models": {"embedding": "m/1"},
        "parameters": {"als": {"model_id": "m/1"}},
    } | meta
    build_local(PINS, table, folder / version, Meta(version, given.pop("cut", EMPTY), **given), shard_count=2)
    return folder / version


def failing(spec: IndexSpec, directory: Path, served: Manifest | None = None) -> set[str]:
    return {finding.name for finding in gates.examine_base(spec, directory, served) if not finding.passed}


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    return built(tmp_path, [pin(n, vector=vector()) for n in range(20)])


def test_a_whole_base_passes_alone_and_beside_itself(whole: Path) -> None:
    assert failing(PINS, whole) == set()
    assert failing(PINS, whole, read_manifest(whole)) == set()


@pytest.mark.parametrize("change", [lambda data: data[:-8], lambda data: data[:-1] + bytes([data[-1] ^ 1])])
def test_a_broken_file_is_named(whole: Path, change: Callable[[bytes], bytes]) -> None:
    victim = whole / "shard-00001" / "rows-catalogue.arrow"
    victim.write_bytes(change(victim.read_bytes()))
    findings = gates.examine_base(PINS, whole, None)
    assert [finding.passed for finding in findings] == [False]
    assert "shard-00001/rows-catalogue.arrow" in findings[0].description


def test_a_base_without_a_manifest_fails(whole: Path) -> None:
    (whole / MANIFEST).unlink()
    assert failing(PINS, whole) == {"is_readable"}


def test_too_great_a_drop_is_named_by_its_count(tmp_path: Path, whole: Path) -> None:
    served = read_manifest(whole)
    assert failing(PINS, built(tmp_path, [pin(n, vector=vector()) for n in range(16)], "v2"), served) == set()
    dropped = built(tmp_path, [pin(n, vector=vector() if n < 15 else None) for n in range(16)], "v3")
    assert failing(PINS, dropped, served) == {"keeps_live_embedding", "keeps_identities"}


def test_offers_without_catalogues_are_named(tmp_path: Path) -> None:
    directory = built(tmp_path, [pin(n, has_catalogue=n < 4) for n in range(10)])
    assert failing(PINS, directory) == {"presence_covers_offer"}


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_vector_that_is_not_finite_is_found(tmp_path: Path, bad: float) -> None:
    vectors = [vector() for _ in range(6)]
    vectors[3][7] = bad
    directory = built(tmp_path, [pin(n, vector=v) for n, v in enumerate(vectors)])
    assert failing(PINS, directory) == {"embedding_is_finite"}


def test_vectors_need_one_model_and_its_parameters(tmp_path: Path) -> None:
    pins = [pin(1, vector=vector())]
    assert failing(PINS, built(tmp_path, pins, "v1", models={}, parameters={})) == {"has_one_model"}
    other = {"als": {"model_id": "m/2"}}
    assert failing(PINS, built(tmp_path, pins, "v2", parameters=other)) == {"has_one_model"}
    assert failing(PINS, built(tmp_path, [pin(1)], "v3", models={}, parameters={})) == set()


def test_a_cut_that_goes_back_fails(tmp_path: Path) -> None:
    pins = [pin(n) for n in range(3)]
    ahead = Position({"t": {0: 5}}, frozenset({"load"}))
    served = read_manifest(built(tmp_path, pins, "v1", cut=ahead, models={}, parameters={}))
    behind = built(
        tmp_path, pins, "v2", cut=Position({"t": {0: 4}}, frozenset({"load"})), models={}, parameters={}
    )
    assert failing(PINS, behind, served) == {"cut_goes_forward"}


def test_another_lineage_is_named(whole: Path) -> None:
    value = json.loads((whole / MANIFEST).read_text())
    (whole / MANIFEST).write_text(json.dumps(value | {"lineage": "0" * 12}))
    assert failing(PINS, whole) == {"has_our_lineage"}


def test_repeated_identities_are_counted_also_when_hashes_collide() -> None:
    def hashes(lookup: list[int], check: list[int]) -> facts.Hashes:
        return facts.Hashes(np.array(lookup, np.uint64), np.array(check, np.uint64))

    assert gates._doubled(hashes([], [])) == 0
    assert gates._doubled(hashes([1, 2, 2, 3], [9, 1, 2, 1])) == 0
    assert gates._doubled(hashes([1, 2, 2, 2, 3], [9, 1, 2, 1, 1])) == 1
    assert gates._doubled(hashes([4, 4, 4, 5, 5], [1, 1, 1, 2, 2])) == 3
