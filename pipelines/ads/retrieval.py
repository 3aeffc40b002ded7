"""From a request's context to the ads that may be shown in it, the best first by a light score or by their looks.

Belongs here: what eligible means (`_filter` for terms, `_condition` for numbers; nowhere else), and the score. Does not
belong here: finding documents (`pipelines.indexing`), and the documents' fields (`handlers`).

An ad is eligible in a context if
- in each of `handlers.DIMENSIONS`, and by its placement, it takes any (`country=*`) or a value that the context has;
  what the context does not say only an ad has that takes any;
- none of the context's terms is among those that it excludes, nor the context's category among those that its
  advertiser has blocked;
- it is servable: ad, ad group, campaign and advertiser are there and active, and its review approved;
- it runs: `starts_at_ms` ≤ the context's time < `ends_at_ms`, a missing one being open;
- it has a bid, and money: the advertiser's balance, the tightest budget of a day and the campaign's budget are not 0
  (missing: no limit is known);
- there is something to show: its pin and the pin's image are there, and the product is not said to be unavailable;
- its advertiser, and its pin's category, are none of those that the context leaves out.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from pipelines.ads import handlers
from pipelines.ads.schema import CONTENT, CONTROL, DIMENSIONS, PERFORMANCE
from pipelines.indexing.access import Filter
from pipelines.indexing.documents import Condition, DocumentsView, Numbers, Ranking

_BID = (CONTROL, "effective_bid_usd_micros")
_STARTS, _ENDS = (CONTROL, "starts_at_ms"), (CONTROL, "ends_at_ms")
_MONEY = (
    (CONTROL, "balance_usd_micros"),
    (CONTROL, "effective_daily_budget_usd_micros"),
    (CONTROL, "lifetime_budget_usd_micros"),
)
_HAS_PIN, _HAS_IMAGE, _IS_AVAILABLE = ((CONTENT, name) for name in ("has_pin", "has_image", "is_available"))
_QUALITY = (CONTENT, "quality_score")
_CLICK_RATE, _HIDE_RATE = (PERFORMANCE, "click_rate_7d"), (PERFORMANCE, "hide_rate_7d")
VISUAL = "visual"
_PRIOR_CLICK_RATE = handlers.PRIOR_CLICKS / handlers.PRIOR_IMPRESSIONS


class Context(NamedTuple):
    """What is known of a request for ads; None or nothing where it is not.

    Attributes:
        country: ISO 3166-1 alpha-2.
        language: ISO 639-1.
        age: One of `schema.AGE_BUCKETS`.
        gender: One of `schema.GENDERS`.
        device: One of `schema.DEVICES`.
        placement: One of `schema.PLACEMENTS`.
        interests: The user's.
        keywords: Of the search.
        category: What the ad is to be shown beside.
        excluded_advertisers: Ids of those whose ads are left out.
        excluded_categories: Of the ads' pins, as their documents spell them.
        visual_embedding: Of what the ads shall look like, `schema.DIMENSIONS` numbers: they are ranked by it alone.
    """

    country: str | None = None
    language: str | None = None
    age: str | None = None
    gender: str | None = None
    device: str | None = None
    placement: str | None = None
    interests: tuple[str, ...] = ()
    keywords: tuple[str, ...] = ()
    category: str | None = None
    excluded_advertisers: tuple[str, ...] = ()
    excluded_categories: tuple[str, ...] = ()
    visual_embedding: tuple[float, ...] | None = None

    def said(self, dimension: str) -> tuple[str, ...]:
        """What it says in a dimension of the targeting."""
        if dimension == "interest":
            return self.interests
        if dimension == "keyword":
            return self.keywords
        value = getattr(self, dimension)
        return () if value is None else (value,)


def candidates(view: DocumentsView, context: Context, time_ms: int, k: int) -> list[tuple[bytes, float]]:
    """The ``k`` eligible ads of greatest score: (ad id, score), best first, ties by id.

    The score is the light one; where the context has an embedding, its inner product with that of the ad's image, and
    an ad without one is not found.

    Args:
        view: Of the index `ads`.
        context: What is known of the request.
        time_ms: When they are to be shown, in ms since 1970.
        k: How many.
    """
    if context.visual_embedding is None:
        return view.ranked(_filter(context), LIGHT_SCORE, k, _condition(time_ms))
    query = np.array(context.visual_embedding, np.float32)
    return view.search(VISUAL, query, k, _filter(context), condition=_condition(time_ms))


def warm(view: DocumentsView) -> None:
    """Read what asking for ads reads of every document, before the first does."""
    for embedding in (None, (0.0,) * DIMENSIONS):
        candidates(view, Context(visual_embedding=embedding), 0, 1)


def _filter(context: Context) -> Filter:
    """The part of being eligible that terms tell."""
    dimensions = (*handlers.DIMENSIONS, handlers.PLACEMENT)
    said = {dimension: _terms(dimension, context.said(dimension)) for dimension in dimensions}
    clauses = [("targeting", terms | {f"{dimension}={handlers.ANY}"}) for dimension, terms in said.items()]
    beside = _terms(handlers.CATEGORY, context.said(handlers.CATEGORY))
    refused = {
        "excluded": beside.union(*said.values()),
        "advertiser": frozenset(context.excluded_advertisers),
        "category": frozenset(context.excluded_categories),
    }
    return Filter(
        (("servable", frozenset([True])), *clauses),
        tuple((field, terms) for field, terms in refused.items() if terms),
    )


def _terms(dimension: str, values: Iterable[str]) -> frozenset[str]:
    return frozenset(handlers.term(dimension, value) for value in values)


def _condition(time_ms: int) -> Condition:
    """The part of being eligible that numbers tell."""

    def holds(numbers: Numbers) -> np.ndarray:
        is_over, is_early = numbers[_ENDS] <= time_ms, numbers[_STARTS] > time_ms
        is_shown = (numbers[_HAS_PIN] == 1) & (numbers[_HAS_IMAGE] == 1) & (numbers[_IS_AVAILABLE] != 0)
        has_bid = ~np.isnan(numbers[_BID])
        passing: np.ndarray = is_shown & has_bid & ~is_over & ~is_early  # a comparison with NaN is false
        for name in _MONEY:
            passing &= numbers[name] != 0
        return passing

    return Condition((_STARTS, _ENDS, _BID, *_MONEY, _HAS_PIN, _HAS_IMAGE, _IS_AVAILABLE), holds)


def _light_score(numbers: Numbers) -> np.ndarray:
    """What an impression is worth: effective bid in USD micros × smoothed click rate × (½ + quality) × (1 - hide rate).

    An ad whose performance is not known has the click rate of the prior, and no hides.
    """
    click_rate = np.nan_to_num(numbers[_CLICK_RATE], nan=_PRIOR_CLICK_RATE)
    hide_rate = np.nan_to_num(numbers[_HIDE_RATE], nan=0.0)
    quality = np.nan_to_num(numbers[_QUALITY], nan=0.0)
    score: np.ndarray = numbers[_BID] * click_rate * (0.5 + quality) * (1.0 - hide_rate)
    return score


LIGHT_SCORE = Ranking((_BID, _CLICK_RATE, _HIDE_RATE, _QUALITY), _light_score)
"""An ad without a bid has none."""
