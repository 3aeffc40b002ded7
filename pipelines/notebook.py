"""What notebooks share: an answer of Trino where there is one, and drawings that everybody can read.

Belongs here: what several notebooks would otherwise repeat in their cells. Does not belong here: asking Trino (`sql`),
opening an index (`indices`), running and rendering notebooks (`jobs.notebooks`).
"""

from __future__ import annotations

import functools
import io
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import matplotlib
from matplotlib.figure import Figure

from pipelines import sql
from pipelines.settings import Settings

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

BLUE, ORANGE, GREEN, PURPLE, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9"
GREY = "#767676"
"""Okabe and Ito's colours, which the colour-blind tell apart, and a grey for what stands back."""
WIDTH_INCHES, PIXELS_PER_INCH = 7.6, 96
_MARKUP = re.compile(r"([\\`*_\[\]<>#$])")
_STYLE: Any = {
    "axes.grid": True,
    "axes.grid.axis": "x",
    "axes.axisbelow": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 10,
    "grid.color": "#e4e4e4",
    "legend.frameon": False,
}


@contextmanager
def asking(settings: Settings) -> Iterator[Callable[..., pd.DataFrame]]:
    """For a cell that asks Trino: gives `sql.frame` for these settings; the rest of the block is left where Trino is
    away, with a sentence that says how to start it."""
    try:
        yield functools.partial(sql.frame, settings)
    except sql.TrinoAway as error:
        print(f"This cell asks Trino, which does not answer at {error.where}: {error.remedy}.")


@contextmanager
def drawing(sentence: str, height: float = 3.0, *, alt: str = "") -> Iterator[Axes]:
    """Axes to draw on; the figure is shown when the block ends.

    Args:
        sentence: What one sees, as the title over the picture.
        height: In inches.
        alt: What is drawn, for those who do not see it; by default the sentence.
    """
    from IPython.display import Image, Markdown, display

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(WIDTH_INCHES, height), layout="constrained")
        axes = figure.subplots()
        yield axes
        image = io.BytesIO()
        figure.savefig(image, format="png", dpi=2 * PIXELS_PER_INCH)
    # As text it wraps where the page is narrow, and is not cut off with the picture.
    escaped = _MARKUP.sub(r"\\\1", sentence)
    display(Markdown(f"**{escaped}**"))
    width = round(WIDTH_INCHES * PIXELS_PER_INCH)
    display(Image(image.getvalue(), format="png", width=width, alt=alt or sentence))


def short(text: str, most: int = 28) -> str:
    """A label that fits."""
    return text if len(text) <= most else text[: most - 1] + "…"
