"""Notebooks run and rendered: a page each, and one over all, that any file server can serve.

Belongs here: running a notebook's cells on a home, and HTML of what they showed. Does not belong here: what the
notebooks say (`notebooks/`), and what they share (`pipelines.notebook`). The pages load nothing from elsewhere, for
which reason nbconvert's own templates are not used: theirs take scripts and mathematics from other hosts.
"""

from __future__ import annotations

import html
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import nbclient
import nbformat
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbconvert import HTMLExporter
from nbformat import NotebookNode
from pygments.formatters import HtmlFormatter

from pipelines.errors import TidemarkError
from pipelines.indexing.files import replace_text
from pipelines.settings import ROOT, Settings

NOTEBOOKS = ROOT / "notebooks"
FOLDER, INDEX = "notebooks", "index.html"
CELL_TIMEOUT_S = 600
_HERE = Path(__file__).parent


class NotebookError(TidemarkError):
    """There is no such notebook, or it cannot be read."""


class Failure(NamedTuple):
    """What went wrong in a notebook: in which of its code cells, from 1, how that begins, and the error in one line."""

    cell: int
    begins: str
    error: str

    def __str__(self) -> str:
        return f"code cell {self.cell} ({self.begins}): {self.error}"


class Rendered(NamedTuple):
    """A notebook as it was run and rendered."""

    name: str
    page: Path
    seconds: float
    failure: Failure | None

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        failure = self.failure._asdict() if self.failure else None
        return {
            "name": self.name,
            "page": str(self.page),
            "seconds": round(self.seconds, 1),
            "failure": failure,
        }


def find(names: Sequence[str] = ()) -> list[Path]:
    """The notebooks of these names, or all.

    Raises:
        NotebookError: There is none of that name; the message says which there are.
    """
    known = {path.stem: path for path in sorted(NOTEBOOKS.glob("*.ipynb"))}
    for name in names:
        if name not in known:
            raise NotebookError(
                f"there is no notebook {name!r}", where=str(NOTEBOOKS), remedy=f"choose of {', '.join(known)}"
            )
    return [known[name] for name in names] or list(known.values())


def render(
    settings: Settings, paths: Iterable[Path], report: Callable[[str], None] = lambda said: None
) -> list[Rendered]:
    """Run notebooks on the home of these settings and write their pages; one that fails has a page that says so.

    Args:
        settings: Which home; the pages lie in its folder of reports.
        paths: The notebooks, as `find` gives them.
        report: Is told what is done now.
    """
    folder = settings.paths.reports / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for path in paths:
        report(path.stem)
        began = time.monotonic()
        notebook = read(path)
        failure = execute(notebook, settings)
        seconds = time.monotonic() - began
        page = folder / f"{path.stem}.html"
        replace_text(page, page_of(notebook))
        found.append(Rendered(path.stem, page, seconds, failure))
    replace_text(folder / INDEX, index_page(folder, {one.name: one.failure for one in found}))
    return found


def read(path: Path) -> NotebookNode:
    """A notebook as it is in the repository.

    Raises:
        NotebookError: It is not one.
    """
    try:
        return nbformat.read(path, as_version=4)
    except (OSError, ValueError) as error:
        raise NotebookError(f"this is no notebook: {error}", where=str(path)) from error


def execute(notebook: NotebookNode, settings: Settings) -> Failure | None:
    """Run all cells, in a process of their own; what they show is in the notebook then. Gives what failed, if any."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        **os.environ,
        **settings.environment,
        "PYTHONPATH": os.pathsep.join(paths),
        "IPYTHONDIR": str(settings.paths.run / "ipython"),
    }
    client = nbclient.NotebookClient(
        notebook,
        timeout=CELL_TIMEOUT_S,
        kernel_name="python3",
        resources={"metadata": {"path": str(NOTEBOOKS)}},
    )
    try:
        client.execute(env=environment)
    except CellExecutionError as error:
        return _failure(notebook, f"{error.ename}: {error.evalue}")
    except CellTimeoutError:
        return _failure(notebook, f"it took more than {CELL_TIMEOUT_S} s")
    except DeadKernelError:
        return _failure(notebook, "its process died")
    return None


def _failure(notebook: NotebookNode, error: str) -> Failure:
    """Of the last cell that began."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    number = max((n for n, cell in enumerate(cells, 1) if cell.execution_count or cell.outputs), default=1)
    begins = cells[number - 1].source.strip().partition("\n")[0]
    return Failure(number, begins[:80], " ".join(error.split()))


def heading(notebook: NotebookNode) -> tuple[str, str]:
    """A notebook's title, and the paragraph under it."""
    text = next((cell.source for cell in notebook.cells if cell.cell_type == "markdown"), "")
    title, _, rest = text.lstrip("# ").partition("\n")
    return title.strip() or "a notebook", " ".join(rest.strip().partition("\n\n")[0].split())


def page_of(notebook: NotebookNode) -> str:
    """A notebook as HTML, with what its cells showed."""
    style = (_HERE / "notebook.css").read_text(encoding="utf-8")
    colours = HtmlFormatter(style="default", nobackground=True).get_style_defs(".highlight")
    notebook.metadata["title"], _ = heading(notebook)
    notebook.metadata["rendered"] = f"Run {datetime.now(UTC):%Y-%m-%d %H:%M} UTC."
    exporter = HTMLExporter(
        template_name="base",
        template_file="notebook.html.j2",
        extra_template_paths=[str(_HERE)],
        exclude_anchor_links=True,
    )
    resources: dict[str, Any] = {"tidemark": {"style": style + str(colours)}}
    body, _ = exporter.from_notebook_node(notebook, resources)
    return str(body)


def index_page(folder: Path, failures: Mapping[str, Failure | None]) -> str:
    """The page over all that have a page; those that were run now say how it went."""
    items = []
    for path in find():
        if (folder / f"{path.stem}.html").exists():
            title, summary = map(html.escape, heading(read(path)))
            failure = failures.get(path.stem)
            state = (
                f'<br><span class="failed">Failed at {html.escape(str(failure))}</span>' if failure else ""
            )
            items.append(f'<li><a href="{path.stem}.html">{title}</a><br>{summary}{state}</li>')
    style = (_HERE / "notebook.css").read_text(encoding="utf-8")
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Notebooks – Tidemark</title>
<link rel="icon" href="data:,">
<style>{style}</style>
</head>
<body>
<main>
<h1>Notebooks</h1>
<p>Each was run on this lake and says when at its end; <code>tidemark notebooks</code> runs them again.</p>
<ul class="pages">
{"".join(items)}
</ul>
</main>
</body>
</html>
"""
