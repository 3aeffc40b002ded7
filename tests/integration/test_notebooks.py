"""Notebooks run and rendered: what fails is told, what is away is told, and the pages load nothing."""

from __future__ import annotations

import json
import re
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from typer.testing import CliRunner

from jobs import notebooks
from jobs.cli import exploring
from jobs.cli.shared import app
from pipelines.settings import ROOT, Settings
from tests.conftest import small_settings

RETAIL = ROOT.parent / "shared" / "data" / "online_retail" / "by-day.tar.gz"


@pytest.fixture
def two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A notebook that fails in its second cell, and one that draws, tabulates and asks a Trino that is away."""
    folder = tmp_path / "notebooks"
    folder.mkdir()
    breaks = [
        new_markdown_cell("# It <breaks>\n\nAlas."),
        new_code_cell("half = 2"),
        new_code_cell("half / 0"),
        new_code_cell("1"),
    ]
    draws = [
        new_markdown_cell("# It draws\n\nAnd *more*,\nas it were.\n\n- a list"),
        new_code_cell(
            "import pandas as pd\n"
            "from pipelines import settings\n"
            "from pipelines.notebook import asking, drawing\n"
            "with drawing('At 3 $ a <piece>, *all* are sold', alt='a \"line\"') as axes:\n"
            "    axes.plot([1, 2])"
        ),
        new_code_cell("pd.DataFrame({'<b>': ['<script>']})"),
        new_code_cell("with asking(settings.load()) as ask:\n    ask('SELECT 1')\n    print('not here')"),
        new_code_cell("'done'"),
    ]
    for name, cells in (("breaks", breaks), ("draws", draws)):
        nbformat.write(new_notebook(cells=cells), folder / f"{name}.ipynb")
    monkeypatch.setattr(notebooks, "NOTEBOOKS", folder)


@pytest.mark.usefixtures("two")
def test_one_that_fails_is_named_with_its_cell_and_the_others_are_rendered(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exploring, "load_settings", lambda: settings)
    done = CliRunner().invoke(app, ["notebooks", "--json"])
    assert done.exit_code == 1
    said = {one["name"]: one for one in json.loads(done.stdout)}
    error = "ZeroDivisionError: division by zero"
    assert said["breaks"]["failure"] == {"cell": 2, "begins": "half / 0", "error": error}
    assert said["draws"]["failure"] is None

    folder = settings.paths.reports / "notebooks"
    index = (folder / "index.html").read_text(encoding="utf-8")
    assert '<a href="breaks.html">It &lt;breaks&gt;</a><br>Alas.' in index
    assert f"Failed at code cell 2 (half / 0): {error}" in index
    assert "And *more*, as it were." in index
    broken = (folder / "breaks.html").read_text(encoding="utf-8")
    assert f"This cell failed: {error}" in broken
    assert "most recent call last" not in broken

    page = (folder / "draws.html").read_text(encoding="utf-8")
    assert "At 3 $ a &lt;piece&gt;, *all* are sold" in page
    assert "alt='a \"line\"'" in page
    assert "&lt;script&gt;" in page and "<script" not in page
    origin = f"http://127.0.0.1:{settings.trino.port}"
    assert f"which does not answer at {origin}: `tidemark up trino` starts it." in page
    assert "not here" not in page.split("</details>")[-1]
    assert "done" in page
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", page)


@pytest.mark.usefixtures("two")
def test_only_those_that_are_named(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exploring, "load_settings", lambda: settings)
    assert [path.stem for path in notebooks.find(["draws"])] == ["draws"]
    unknown = CliRunner().invoke(app, ["notebooks", "drawing"])
    assert "choose of breaks, draws" in str(unknown.exception)


@pytest.mark.slow
@pytest.mark.skipif(not RETAIL.exists(), reason=f"no {RETAIL}")
def test_the_dirty_source_is_loaded_and_what_is_refused_is_what_there_is(tmp_path: Path) -> None:
    settings = small_settings(tmp_path / "home")
    (found,) = notebooks.render(settings, notebooks.find(["dirty_source"]))
    assert found.failure is None
    page = found.page.read_text(encoding="utf-8")
    assert "exactly those that plain counting finds" in page
    assert "Nothing was audited in this home yet" in page
