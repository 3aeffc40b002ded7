"""What depends on what, drawn as SVG in layers from left to right.

Belongs here: the layout of a layered graph (layers are given; the order inside them comes from the medians of their
neighbours, as Sugiyama's method has it) and its drawing. Does not belong here: what the nodes mean (`catalogue`).
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from statistics import mean
from typing import NamedTuple

BOX_WIDTH, BOX_HEIGHT = 116, 30
LAYER_WIDTH, ROW_HEIGHT, BEND_HEIGHT = 142, 42, 16
MARGIN, HEAD = 8, 30
SWEEPS = 8

Edge = tuple[str, str]


class Node(NamedTuple):
    """A node: its name, the text in its box, its layer, and what a pointer over it says."""

    name: str
    label: str
    layer: int
    title: str


class Place(NamedTuple):
    """Where the middle of something is."""

    x: float
    y: float


class Layout(NamedTuple):
    """Where each node is, and through which places each edge goes, its ends included."""

    nodes: dict[str, Place]
    edges: dict[Edge, list[Place]]
    width: float
    height: float


def lay_out(nodes: Sequence[Node], edges: Iterable[Edge]) -> Layout:
    """Places for nodes and edges. An edge that skips layers bends in each of them, between the boxes.

    Args:
        nodes: Each with its layer; an edge goes from a lesser layer to a greater one.
        edges: Pairs of names.
    """
    layer_of = {node.name: node.layer for node in nodes}
    chains = {edge: _chain(edge, layer_of) for edge in edges}
    layers: dict[int, list[str]] = defaultdict(list)
    for node in nodes:
        layers[node.layer].append(node.name)
    for edge, chain in chains.items():
        for place, name in enumerate(chain[1:-1], start=1):
            layers[layer_of[edge[0]] + place].append(name)
    ordered = _order([layers[number] for number in sorted(layers)], chains.values())
    height = max(sum(_height(name, layer_of) for name in layer) for layer in ordered)
    places: dict[str, Place] = {}
    for number, layer in enumerate(ordered):
        x = MARGIN + number * LAYER_WIDTH + BOX_WIDTH / 2
        y = HEAD + MARGIN + (height - sum(_height(name, layer_of) for name in layer)) / 2
        for name in layer:
            places[name] = Place(x, y + _height(name, layer_of) / 2)
            y += _height(name, layer_of)
    return Layout(
        {name: places[name] for name in layer_of},
        {edge: [places[name] for name in chain] for edge, chain in chains.items()},
        2 * MARGIN + (len(ordered) - 1) * LAYER_WIDTH + BOX_WIDTH,
        HEAD + 2 * MARGIN + height,
    )


def _chain(edge: Edge, layer_of: Mapping[str, int]) -> list[str]:
    start, end = edge
    bends = [f"{start} → {end} {layer}" for layer in range(layer_of[start] + 1, layer_of[end])]
    return [start, *bends, end]


def _height(name: str, layer_of: Mapping[str, int]) -> int:
    return ROW_HEIGHT if name in layer_of else BEND_HEIGHT


def _order(layers: list[list[str]], chains: Iterable[list[str]]) -> list[list[str]]:
    """Each layer by the mean place of its neighbours in the layer before, then in the one after, and again."""
    before: dict[str, list[str]] = defaultdict(list)
    after: dict[str, list[str]] = defaultdict(list)
    for chain in chains:
        for one, other in itertools.pairwise(chain):
            before[other].append(one)
            after[one].append(other)
    for sweep in range(SWEEPS):
        neighbours = after if sweep % 2 else before
        places = {
            name: place / max(1, len(layer) - 1) for layer in layers for place, name in enumerate(layer)
        }
        ordered = []
        for layer in layers[::-1] if sweep % 2 else layers:
            wanted = {
                name: mean([places[n] for n in neighbours[name]]) if neighbours[name] else places[name]
                for name in layer
            }
            layer = sorted(layer, key=lambda name: wanted[name])
            places |= {name: place / max(1, len(layer) - 1) for place, name in enumerate(layer)}
            ordered.append(layer)
        layers = ordered[::-1] if sweep % 2 else ordered
    return layers


def svg(nodes: Sequence[Node], edges: Sequence[Edge], heads: Sequence[str]) -> str:
    """The graph as an SVG element. Each node is a link to `#<name>`; an edge says its ends in `data-from`, `data-to`.

    Args:
        nodes: In any order.
        edges: Pairs of their names.
        heads: What stands above each layer.
    """
    laid = lay_out(nodes, edges)
    drawn = [
        f'<path class="edge" data-from="{escape(one)}" data-to="{escape(other)}" d="{_path(places)}"/>'
        for (one, other), places in laid.edges.items()
    ]
    texts = [
        f'<text class="head" x="{MARGIN + n * LAYER_WIDTH + BOX_WIDTH / 2:.0f}" y="20">{escape(head)}</text>'
        for n, head in enumerate(heads)
    ]
    boxes = [_box(node, laid.nodes[node.name]) for node in nodes]
    return (
        f'<svg viewBox="0 0 {laid.width:.0f} {laid.height:.0f}" role="group" aria-labelledby="graph-title">'
        f"{''.join(drawn)}{''.join(texts)}{''.join(boxes)}</svg>"
    )


def _box(node: Node, at: Place) -> str:
    left, top = at.x - BOX_WIDTH / 2, at.y - BOX_HEIGHT / 2
    return (
        f'<a class="node" href="#{escape(node.name)}" data-name="{escape(node.name)}">'
        f"<title>{escape(node.title)}</title>"
        f'<rect x="{left:.0f}" y="{top:.0f}" width="{BOX_WIDTH}" height="{BOX_HEIGHT}" rx="5"/>'
        f'<text x="{at.x:.0f}" y="{at.y + 4:.0f}">{escape(node.label)}</text></a>'
    )


def _path(places: Sequence[Place]) -> str:
    """A curve that leaves and reaches each place level; from box to box, not from middle to middle."""
    start = Place(places[0].x + BOX_WIDTH / 2, places[0].y)
    end = Place(places[-1].x - BOX_WIDTH / 2, places[-1].y)
    drawn, at = f"M{start.x:.0f} {start.y:.1f}", start
    for bend in places[1:-1]:
        left = Place(bend.x - BOX_WIDTH / 2, bend.y)
        drawn += f"{_curve(at, left)}H{bend.x + BOX_WIDTH / 2:.0f}"
        at = Place(bend.x + BOX_WIDTH / 2, bend.y)
    return drawn + _curve(at, end)


def _curve(start: Place, end: Place) -> str:
    middle = (start.x + end.x) / 2
    return f"C{middle:.0f} {start.y:.1f} {middle:.0f} {end.y:.1f} {end.x:.0f} {end.y:.1f}"
