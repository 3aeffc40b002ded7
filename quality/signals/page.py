"""The catalogue as a folder: `index.html`, which needs nothing else, and `signals.json`, for programs.

Belongs here: filling the page and writing the folder whole. Does not belong here: what it says (`catalogue`), and who
serves it.
"""

from __future__ import annotations

import json
from pathlib import Path

from pipelines.indexing.files import replace_text
from quality.signals import graph
from quality.signals.catalogue import KINDS, Catalogue, Dataset

PAGE, DATA = "index.html", "signals.json"
TEMPLATE = Path(__file__).with_name("page.html")
LAYERS = {
    "topic": "topics",
    "stream": "streams",
    "raw": "raw",
    "repo": "repository",
    "curated": "curated",
    "model": "models",
    "features": "features",
    "index": "index rows",
    "base": "bases, deltas",
    "delta": "bases, deltas",
    "answer": "answers",
}
"""The kinds that are drawn, and what stands above their layer."""


def write(catalogue: Catalogue, folder: Path) -> Path:
    """Write both files; gives the page. A reader sees the old files or the new ones."""
    folder.mkdir(parents=True, exist_ok=True)
    data = json.dumps(catalogue.to_json(), ensure_ascii=False)
    replace_text(folder / DATA, data)
    replace_text(folder / PAGE, page(catalogue))
    return folder / PAGE


def page(catalogue: Catalogue) -> str:
    """The page's HTML; the data is in it."""
    data = {**catalogue.to_json(), "kinds": list(KINDS)}
    embedded = json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")
    template = TEMPLATE.read_text(encoding="utf-8")
    return template.replace("<!-- graph -->", drawing(catalogue), 1).replace('"data"', embedded, 1)


def drawing(catalogue: Catalogue) -> str:
    """The graph of what depends on what; what has no neighbour is not in it."""
    shown = {dataset.name: dataset for dataset in catalogue.datasets if dataset.kind in LAYERS}
    edges = [(one, dataset.name) for dataset in shown.values() for one in dataset.inputs if one in shown]
    drawn = {name for edge in edges for name in edge}
    heads = list(dict.fromkeys(LAYERS.values()))
    nodes = [_node(d, heads.index(LAYERS[d.kind])) for d in shown.values() if d.name in drawn]
    return graph.svg(nodes, edges, heads)


def _node(dataset: Dataset, layer: int) -> graph.Node:
    label = dataset.name.partition(".")[2]
    if dataset.kind in ("base", "delta"):
        label = f"{label} {dataset.kind}"
    return graph.Node(dataset.name, label, layer, f"{dataset.name}: {dataset.doc}")
