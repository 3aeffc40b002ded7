"""Documents found by term and by vector: the same as looking at every document that the oracle has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.indexing import access, build, documents
from pipelines.indexing import facts as fact
from pipelines.indexing.access import Filter
from pipelines.indexing.base import open_base
from pipelines.indexing.documents import Condition, DocumentsView, Ranking
from pipelines.indexing.position import Position
from tests import oracle
from tests.oracle import Statement
from tests.properties import specs
from tests.properties.harness import Home, Ledger, cases, drive, rows_of
from tests.properties.strategies import KEYS, TEXTS, History, histories

pytestmark = pytest.mark.timeout(1800)  # about two minutes where nothing else runs

HISTORIES = histories(about="documents", feeds=specs.DOCUMENT_FEEDS)
COLUMNS = {"by_text": ("content", "text"), "by_number": ("control", "number")}
WANTED: list[dict[str, Any]] = [
    {},
    *({"by_text": text} for text in TEXTS if text is not None),
    {"by_number": -1},
    {"by_number": 999},
    {"by_text": "red", "by_number": -1},
    {"by_text": "nowhere"},
]
QUERIES = st.lists(st.integers(-2, 2), min_size=specs.DIMENSIONS, max_size=specs.DIMENSIONS)


def brute_force(
    ledger: Ledger, query: np.ndarray, where: dict[str, Any], excluded: set[bytes]
) -> list[tuple[bytes, float]]:
    """Every document that passes and has a vector in the base, best first, ties by key."""
    found = oracle.documents(ledger.visible(), specs.PRESENCE)
    passing = oracle.matching(found, {COLUMNS[name]: term for name, term in where.items()})
    scored = [
        (key, sum(float(a) * b for a, b in zip(query, found[key]["vector"]["vector"], strict=True)))
        for key in passing - excluded
        if "vector" in found[key]
    ]
    return sorted(scored, key=lambda pair: (-pair[1], pair[0]))


FILTERS: list[Filter] = [
    Filter((("by_word", frozenset("ab")),)),
    Filter((("by_word", frozenset("a")), ("by_word", frozenset("bc")))),
    Filter((("by_word", frozenset(["a", "nowhere"])), ("by_text", frozenset(["red", "grün"])))),
    Filter((), (("by_word", frozenset("b")),)),
    Filter(
        (("by_text", frozenset(["red", "blue", ""])),),
        (("by_number", frozenset([-1])), ("by_word", frozenset("c"))),
    ),
    Filter((("by_word", frozenset()),)),
]
SCORED = [("content", "number"), ("control", "number")]


def terms_of(document: dict[str, Any], field: str) -> set[Any]:
    """What a document is found by in a field; lists by each of their items."""
    family, column = {**COLUMNS, "by_word": ("control", "words")}[field]
    value = document.get(family, {}).get(column)
    return set(value) if isinstance(value, list) else {value} - {None}


def passes(document: dict[str, Any], wanted: Filter) -> bool:
    """Every clause has a term of the document's, and no refused one is among them."""
    return all(terms_of(document, field) & terms for field, terms in wanted.clauses) and not any(
        terms_of(document, field) & terms for field, terms in wanted.refused
    )


def check_filters(home: Home, ledger: Ledger, k: int) -> None:
    """Clauses of several terms, refused terms, and the best by their numbers."""
    found = oracle.documents(ledger.visible(), specs.PRESENCE)
    for wanted in FILTERS:
        passing = {key: document for key, document in found.items() if passes(document, wanted)}
        assert home.view().match(wanted) == sorted(passing), wanted
        scored = []
        for key, document in passing.items():
            numbers = [document.get(family, {}).get(column) for family, column in SCORED]
            if numbers[0] is not None:
                scored.append((key, float(numbers[0] * 2 - (numbers[1] or 0))))
        best = sorted(scored, key=lambda pair: (-pair[1], pair[0]))
        assert home.view().ranked(wanted, RANKING, k) == best[:k], wanted
        odd = [pair for pair in best if (found[pair[0]].get("control", {}).get("number") or 0) % 2]
        assert home.view().ranked(wanted, RANKING, k, ODD) == odd[:k], wanted


def score(columns: Mapping[tuple[str, str], np.ndarray]) -> np.ndarray:
    """Twice the content's number less the control's, where the content has one."""
    return columns[SCORED[0]] * 2 - np.nan_to_num(columns[SCORED[1]])


RANKING = Ranking(tuple(SCORED), score)
ODD = Condition((SCORED[1],), lambda columns: columns[SCORED[1]] % 2 == 1)


def check_terms(home: Home, ledger: Ledger) -> None:
    """Posting lists, corrected by the overlay."""
    found = oracle.documents(ledger.visible(), specs.PRESENCE)
    for where in WANTED:
        expected = oracle.matching(found, {COLUMNS[name]: term for name, term in where.items()})
        assert home.view().match(where) == sorted(expected), where
    assert home.view().match({}, 1) == sorted(found)[:1]


def check_vectors(home: Home, ledger: Ledger) -> None:
    """The vectors of the base that is served, and none of another model's."""
    modelled = {
        s.key: s.payload for s in (ledger.served.statements if ledger.served else ()) if s.family == "vector"
    }
    matrix, has = home.view().vectors("near", KEYS)
    assert has.tolist() == [key in modelled for key in KEYS]
    for key, row in zip(KEYS, matrix.tolist(), strict=True):
        assert row == (modelled[key]["vector"] if key in modelled else [0.0] * specs.DIMENSIONS)


def check_streamed_vectors(home: Home, ledger: Ledger, query: np.ndarray, k: int) -> None:
    """The vectors of a family that a stream feeds, and what is nearest by them: as the documents are now."""
    found = oracle.documents(ledger.visible(), specs.PRESENCE)
    said = {key: document.get("content", {}).get("shape") or [] for key, document in found.items()}
    shapes = {key: shape for key, shape in said.items() if len(shape) == specs.DIMENSIONS}
    matrix, has = home.view().vectors("alike", list(found))
    assert has.tolist() == [key in shapes for key in found]
    assert matrix.tolist() == [shapes.get(key, [0.0] * specs.DIMENSIONS) for key in found]
    scores = {key: sum(float(a) * b for a, b in zip(query, shapes[key], strict=True)) for key in shapes}
    for where in WANTED:
        passing = oracle.matching(found, {COLUMNS[name]: term for name, term in where.items()})
        scored = [(key, score) for key, score in scores.items() if key in passing]
        expected = sorted(scored, key=lambda pair: (-pair[1], pair[0]))[:k]
        assert home.view().search("alike", query, k, where) == expected, where


def run(history: History) -> None:
    """What is found by terms, by numbers and by vectors that a stream brings, at every step of a history."""

    def check(home: Home, ledger: Ledger) -> None:
        check_terms(home, ledger)
        check_filters(home, ledger, 3)
        check_streamed_vectors(home, ledger, np.array([1, -2, 1, 2], np.float32), 3)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "FEW_ROWS", 1)  # or the best would never be tried first
        drive(specs.searchable(), history, check)


@cases(300)
@given(HISTORIES, QUERIES, st.integers(1, 6), st.sets(st.sampled_from(KEYS)))
def test_found_by_term_and_by_vector_equals_brute_force(
    history: History, numbers: list[int], k: int, excluded: set[bytes]
) -> None:
    query = np.array(numbers, np.float32)

    def check(home: Home, ledger: Ledger) -> None:
        check_terms(home, ledger)
        check_vectors(home, ledger)
        check_streamed_vectors(home, ledger, query, k)
        check_filters(home, ledger, k)
        for number, where in enumerate(WANTED):
            left_out = excluded if number % 2 else set()
            expected = brute_force(ledger, query, where, left_out)[:k]
            assert home.view().search("near", query, k, where, left_out) == expected, where

    drive(specs.searchable(), history, check)


@cases(100)
@given(HISTORIES)
def test_the_best_are_tried_first(history: History) -> None:
    run(history)


@cases(20)
@given(
    numbers=st.lists(st.integers(0, 3), min_size=30, max_size=80),
    k=st.integers(1, 9),
    shard_count=st.integers(1, 2),
)
def test_of_many_that_tie_the_least_keys_are_answered(
    tmp_path_factory: pytest.TempPathFactory, numbers: list[int], k: int, shard_count: int
) -> None:
    rows = [
        Statement(
            "content", b"%d" % place, payload={"text": None, "number": number, "words": [], "shape": None}
        )
        for place, number in enumerate(numbers)
    ]
    there = [
        Statement(specs.PRESENCE, row.key, payload={"text": None, "number": 1, "words": [], "shape": None})
        for row in rows
    ]
    table = fact.table(specs.searchable(), rows_of([*rows, *there]))
    folder = tmp_path_factory.mktemp("ties") / "base"
    build.build_local(specs.searchable(), table, folder, build.Meta("v", Position()), shard_count=shard_count)
    view = DocumentsView(open_base(specs.searchable(), folder))
    best = sorted(
        ((row.key, numbers[place] * 2 - 1.0) for place, row in enumerate(rows)), key=lambda p: (-p[1], p[0])
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "FEW_ROWS", 1)
        assert view.ranked(Filter(), RANKING, k) == best[:k]


@cases(100)
@given(HISTORIES, QUERIES, st.integers(1, 3))
def test_through_the_graph_the_scores_equal_brute_force(history: History, numbers: list[int], k: int) -> None:
    query = np.array(numbers, np.float32)

    def check(home: Home, ledger: Ledger) -> None:
        best = brute_force(ledger, query, {}, set())
        found = home.view().search("near", query, k)
        assert [score for _, score in found] == [score for _, score in best[:k]]
        assert set(found) <= set(best)  # of a tie at the end the graph may give any

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(access, "EXACT_ROWS", 1)
        patch.setattr(access, "GRAPH_SHARE", 1)
        drive(specs.searchable(), history, check)
