"""The catalogue's page and its drawing: what is written, what is laid out, what cannot break out of its place."""

from __future__ import annotations

import json
import re
from pathlib import Path

import hypothesis.strategies as st
from hypothesis import given, settings

from quality.signals import catalogue, graph, page
from quality.signals.catalogue import Catalogue, Dataset, Field

EVIL = "</script><script>document.title='x'</script>"


def node(name: str, layer: int) -> graph.Node:
    return graph.Node(name, name, layer, name)


@st.composite
def graphs(draw: st.DrawFn) -> tuple[list[graph.Node], list[graph.Edge]]:
    sizes = draw(st.lists(st.integers(1, 6), min_size=2, max_size=6))
    nodes = [node(f"{layer}-{n}", layer) for layer, size in enumerate(sizes) for n in range(size)]
    pairs = [(one.name, other.name) for one in nodes for other in nodes if one.layer < other.layer]
    return nodes, draw(st.lists(st.sampled_from(pairs), unique=True, max_size=25))


@settings(deadline=None, max_examples=60)
@given(graphs())
def test_no_box_lies_on_another_and_every_edge_goes_forward(
    given_graph: tuple[list[graph.Node], list[graph.Edge]],
) -> None:
    nodes, edges = given_graph
    laid = graph.lay_out(nodes, edges)
    for one in nodes:
        at = laid.nodes[one.name]
        assert graph.BOX_WIDTH / 2 <= at.x <= laid.width - graph.BOX_WIDTH / 2
        assert at.y - graph.BOX_HEIGHT / 2 >= graph.HEAD
        assert at.y + graph.BOX_HEIGHT / 2 <= laid.height
        for other in nodes:
            if one.name < other.name and one.layer == other.layer:
                assert abs(at.y - laid.nodes[other.name].y) >= graph.BOX_HEIGHT
    for (start, end), places in laid.edges.items():
        assert (places[0], places[-1]) == (laid.nodes[start], laid.nodes[end])
        assert [place.x for place in places] == sorted({place.x for place in places})


def crossings(nodes: list[graph.Node], edges: list[graph.Edge]) -> int:
    at = graph.lay_out(nodes, edges).nodes
    return sum(
        (at[a].y - at[c].y) * (at[b].y - at[d].y) < 0 for a, b in edges for c, d in edges if (a, b) < (c, d)
    )


def test_what_can_be_drawn_without_crossings_is() -> None:
    nodes = [node(name, layer) for layer, names in enumerate(("abc", "xyz")) for name in names]
    assert crossings(nodes, [("a", "z"), ("b", "y"), ("c", "x")]) == 0


def test_units_follow_from_names_and_types_are_split_at_their_own_commas() -> None:
    assert catalogue.unit_of("offer.price_usd_micros") == "micro-dollars"
    assert catalogue.unit_of("title") is None
    assert catalogue.split("a:string,b:struct<c:int,d:array<int>>,e:decimal(10,2)") == [
        "a:string",
        "b:struct<c:int,d:array<int>>",
        "e:decimal(10,2)",
    ]


def small() -> Catalogue:
    fields = (Field("title", "string", None, EVIL, ("raw.things.value",), (), 99.5),)
    return Catalogue(
        1_700_000_000_000,
        (
            Dataset("raw.things", "raw", "what came", "ingest", (Field("value", "binary", None, "bytes"),)),
            Dataset("curated.things", "curated", f'what "stands" {EVIL}', "curate", fields, ("raw.things",)),
            Dataset("ops.runs", "ops", "by itself", "ops"),
        ),
    )


def test_the_page_holds_all_of_it_and_nothing_breaks_out(tmp_path: Path) -> None:
    path = page.write(small(), tmp_path / "signals")
    text = path.read_text(encoding="utf-8")
    assert EVIL not in text
    (embedded,) = re.findall(r'<script type="application/json" id="signals">(.*?)</script>', text, re.DOTALL)
    said = json.loads(embedded)
    assert said["datasets"] == json.loads((path.parent / "signals.json").read_text())["datasets"]
    assert said["datasets"][1]["fields"][0]["doc"] == EVIL
    assert 'href="#curated.things"' in text
    assert "#ops.runs" not in text, "what has no neighbour is not drawn"
    assert not re.search(r'(src|href)="(https?:)?//', text), "nothing is loaded from elsewhere"
