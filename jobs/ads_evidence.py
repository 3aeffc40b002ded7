"""The evidence of `tidemark ads explain` in a home: what lies there, and how processes and streams are doing.

Belongs here: which of the evidence can be had, and what holds up what. Does not belong here: reading each
(`pipelines.ads.evidence`), and what follows from it (`pipelines.ads.explain`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jobs import client, trace
from jobs.controls import RUNNING, Controls
from pipelines.ads import evidence, publisher, repository
from pipelines.ads.evidence import Origin
from pipelines.ads.explain import Evidence, Lag, iso
from pipelines.ads.index import ADS
from pipelines.ads.overrides import Entries
from pipelines.errors import TidemarkError
from pipelines.indexing.documents import DocumentsView
from pipelines.indices import overlay
from pipelines.ingest import broker
from pipelines.settings import Settings

_TIMEOUT_S = 5.0


def look(settings: Settings, ad_id: str) -> Evidence:
    """All that is known of an ad. What cannot be reached is left out, and named in the notes.

    Raises:
        RepositoryError: The repository cannot be reached.
        BrokerError: The broker went away meanwhile.
        BadBase: The published base cannot be opened.
    """
    notes: list[str] = []
    folded = overlay(settings, ADS.name)
    view = folded.view
    assert isinstance(view, DocumentsView)
    origin = evidence.origin(settings, view)
    store = repository.opened(settings)
    try:
        with store.reading() as connection:
            parts = evidence.of_repository(connection, ad_id).parts
            paused = repository.paused(connection)
        rows = [(part.table, part.key) for part in parts.values() if part.key is not None]
        entries = _entries(settings, rows, notes) if origin.delta is not None else Entries()
        lag = Lag(0, 0, _publisher(settings, paused), _streams(settings), _serving(settings, origin, notes))
        found = evidence.gather(store, view, ad_id, lag, entries, origin)
    finally:
        store.close()
    return _with_sources(settings, found._replace(notes=tuple(notes)))


def _entries(settings: Settings, rows: list[tuple[str, str]], notes: list[str]) -> Entries:
    if not broker.is_ready(settings):
        notes.append("the broker does not answer: what goes ahead of documents was not looked at")
        return Entries()
    return evidence.of_bypass(settings, rows)


def _with_sources(settings: Settings, found: Evidence) -> Evidence:
    """The same with what the archive and the source database have, as far as they can be asked."""
    notes, parts = list(found.notes), found.parts
    said = evidence.of_archive(settings, parts.values())
    try:
        source = evidence.of_database(settings, parts.values())
    except TidemarkError as error:
        source = {}
        notes.append(f"the source database was not looked at: {error.what}")
    whole = {
        table: part._replace(source=source.get(table), said=said.get((table, part.key or ""), ()))
        for table, part in parts.items()
    }
    return found._replace(parts=whole, notes=tuple(notes))


def _publisher(settings: Settings, paused: Mapping[str, int]) -> str | None:
    """What holds up the sending of keys."""
    if (since_ms := paused.get(publisher.SUBSCRIBER)) is not None:
        return f"it is stopped since {iso(since_ms)} (`tidemark ads resume`)"
    base = f"http://{settings.ads.host}:{settings.ads.port}"
    try:
        client.request(base, "/healthz", timeout_s=_TIMEOUT_S, service="ads", is_error_an_answer=True)
    except client.ServiceError:
        return "the process ads does not run (`tidemark up ads`)"
    return None


def _streams(settings: Settings) -> dict[str, str | None]:
    """By family, what holds up the stream that makes it."""
    board = Controls(settings.paths.run)
    status = board.status()
    found: dict[str, str | None] = {}
    for family in ADS.families:
        if family.stream is not None:
            is_wanted = board.should_run(family.stream)
            runs = is_wanted and status.get(family.stream, {}).get("state") == RUNNING
            found[family.name] = None if runs else trace.stream_state(family.stream, is_wanted, status)
    return found


def _serving(settings: Settings, origin: Origin, notes: list[str]) -> str | None:
    """Why what is served does not follow the delta."""
    if origin.delta is None:
        return "the base is served without its delta (`tidemark ads resume`)"
    base = f"http://{settings.serving.host}:{settings.serving.port}"
    try:
        answer = client.request(base, "/v1/indices", timeout_s=_TIMEOUT_S)
    except client.ServiceError:
        notes.append("serving does not answer: what is served is what it would serve now")
        return None
    said: dict[str, Any] = next((said for said in answer.body["indices"] if said["index"] == ADS.name), {})
    if said.get("is_overlay_full"):
        return "the overlay is full (`tidemark build` makes a base that empties it)"
    return said.get("error")
