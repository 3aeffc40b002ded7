"""Routes about ads: documents, and those that may be shown in a context."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pipelines.ads import joined, overrides, retrieval
from pipelines.ads.retrieval import Context
from pipelines.ads.schema import AGE_BUCKETS, CONTROL, DEVICES, DIMENSIONS, GENDERS, PLACEMENTS
from pipelines.serving import documents, operations
from pipelines.serving.inputs import (
    MAX_K,
    MAX_TEXTS,
    MAX_TIME_MS,
    Problem,
    natural_of,
    numbers_of,
    object_of,
    read_batch,
    read_object,
    text_of,
    texts_of,
)
from pipelines.serving.routing import Answer, Call, add, json_answer
from pipelines.serving.standing import ADS

if TYPE_CHECKING:
    from fastapi import FastAPI

    from pipelines.indexing.documents import DocumentsView
    from pipelines.serving.standing import Ground

_ONE = {
    "country": (),
    "language": (),
    "age": AGE_BUCKETS,
    "gender": GENDERS,
    "device": DEVICES,
    "placement": PLACEMENTS,
    "category": (),
}
"""What a context says with one text → the texts that it may be; none: any."""
_SEVERAL = ("interests", "keywords", "excluded_advertisers", "excluded_categories")
_TIME, _EMBEDDING = "time_ms", "visual_embedding"
_CONTEXT = {
    **{name: list(choices) or "a text" for name, choices in _ONE.items()},
    **dict.fromkeys(_SEVERAL, f"a list of at most {MAX_TEXTS} texts"),
    _EMBEDDING: f"a list of {DIMENSIONS} numbers",
    _TIME: "ms since 1970; now, if it is absent",
}
_BODY = {"context": _CONTEXT, "k": f"a whole number from 1 to {MAX_K}"}
_SHOWN = ("campaign_id", "pin_id", "effective_bid_usd_micros")


def register(app: FastAPI, ground: Ground) -> None:
    """Add the routes."""

    async def ad(call: Call) -> Answer:
        standing = await ground.at(call.query("min_position").min_position(), ADS)
        found = _documents(standing.views[ADS], [call.ids["ad_id"]])[0]
        if found is None:
            raise Problem(404, "ad_id", "there is no such ad", "the id of an ad", standing.headers)
        return json_answer(found, standing.headers)

    async def batch_get(call: Call) -> Answer:
        position = call.query("min_position").min_position()
        batch = read_batch(await call.body(), call.header(b"content-type"), "ad_ids")
        standing = await ground.at(position, ADS)
        found = _documents(standing.views[ADS], batch.keys)
        written = [
            documents.missing_ad(asked) if one is None else one
            for asked, one in zip(batch.ids, found, strict=True)
        ]
        return json_answer({"documents": written}, standing.headers)

    async def candidates(call: Call) -> Answer:
        position = call.query("min_position").min_position()
        said = read_object(await call.body(), call.header(b"content-type"), _BODY)
        k = natural_of(said, "k", "k", 1, MAX_K)
        context, time_ms = _context(said.get("context"))
        standing = await ground.at(position, ADS)
        view: DocumentsView = standing.views[ADS]
        time_ms = int(time.time() * 1000) if time_ms is None else time_ms
        found = retrieval.candidates(view, context, time_ms, 10 if k is None else k)
        shown = view.values(CONTROL, _SHOWN, [key for key, _ in found])
        ads = [
            {"ad_id": documents.text(key), "score": score, **dict(zip(_SHOWN, values, strict=True))}
            for (key, score), *values in zip(found, *shown, strict=True)
        ]
        kind = "light_score" if context.visual_embedding is None else "visual_similarity"
        basis = {"kind": kind, "time_ms": time_ms}
        return json_answer({"ads": ads, "basis": basis}, standing.headers)

    add(app, "GET", "/v1/ads/{ad_id}", ad, operations.AD_DOCUMENT)
    add(app, "POST", "/v1/ads:batchGet", batch_get, operations.ADS_BATCH_GET)
    add(app, "POST", "/v1/ads:candidates", candidates, operations.ADS_CANDIDATES)


def _context(said: Any) -> tuple[Context, int | None]:
    """The field `context` of a body, and the time that it names."""
    if said is None:
        raise Problem(400, "context", "there is no context", _CONTEXT)
    given = object_of(said, "context", _CONTEXT)
    one: dict[str, Any] = {
        name: text_of(given[name], f"context.{name}", choices)
        for name, choices in _ONE.items()
        if given.get(name) is not None
    }
    several: dict[str, Any] = {name: texts_of(given, name, f"context.{name}") for name in _SEVERAL}
    embedding = numbers_of(given, _EMBEDDING, f"context.{_EMBEDDING}", DIMENSIONS)
    context = Context(**one, **several, visual_embedding=embedding)
    return context, natural_of(given, _TIME, f"context.{_TIME}", 0, MAX_TIME_MS)


def _documents(view: DocumentsView, keys: Sequence[bytes]) -> list[dict[str, Any] | None]:
    """The document of each ad as it is answered; None where there is none."""
    stands = {family: view.versions(family, keys).tolist() for family in joined.INPUTS}
    written: list[dict[str, Any] | None] = []
    for place, (key, found) in enumerate(zip(keys, view.get(keys), strict=True)):
        versions = {
            family: {given.table: stands[family][place][at] for at, given in enumerate(inputs)}
            for family, inputs in joined.INPUTS.items()
        }
        newer = overrides.newer_than(view, key)
        written.append(None if found is None else documents.ad(key, found, versions, newer))
    return written
