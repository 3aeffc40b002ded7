"""A view: the immutable pair of base and overlay behind one read interface, by the kind of read.

Belongs here: choosing the view for a base. What each view answers is in ``documents``, ``timelines`` and ``sums``.
"""

from __future__ import annotations

from pipelines.indexing.base import Base
from pipelines.indexing.documents import DocumentsView
from pipelines.indexing.spec import Documents, Sums
from pipelines.indexing.sums import SumsView
from pipelines.indexing.timelines import TimelineView

View = DocumentsView | TimelineView | SumsView


def view(base: Base) -> View:
    """The view of a base before any of the delta is folded in."""
    if isinstance(base.spec.read, Documents):
        return DocumentsView(base)
    return SumsView(base) if isinstance(base.spec.read, Sums) else TimelineView(base)
