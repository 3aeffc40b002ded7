"""Views about what the model makes of users and pins."""

from __future__ import annotations

from pipelines.views import View

INTERACTIONS_SCORED = View(
    name="interactions_scored",
    doc="each live interaction with its pin's features, and what the model thinks of the pair",
    sql="""
        SELECT i.user_id, i.event_id, i.event_time, i.action, i.quantity, i.value_usd_micros, i.surface, i.pin_id,
               c.catalogue.title AS title, c.catalogue.category AS category,
               c.catalogue.department AS department, c.catalogue.brand AS brand,
               o.offer.price_usd_micros AS price_usd_micros, o.offer.is_available AS is_available,
               p.model_id,
               CASE WHEN u.model_id = p.model_id THEN
                   reduce(
                       zip_with(u.vector, p.vector, (x, y) -> CAST(x AS double) * CAST(y AS double)),
                       CAST(0 AS double), (total, product) -> total + product, total -> total
                   )
               END AS score
        FROM curated.user_interactions AS i
        LEFT JOIN curated.pins_catalogue AS c ON c.pin_id = i.pin_id AND NOT c.is_deleted
        LEFT JOIN curated.pins_offer AS o ON o.pin_id = i.pin_id AND NOT o.is_deleted
        LEFT JOIN features.pin_vectors AS p ON p.pin_id = i.pin_id
        LEFT JOIN features.user_vectors AS u ON u.user_id = i.user_id
        WHERE NOT i.is_deleted
    """,
    columns={
        "user_id": "whose interaction",
        "event_id": "the event's own id, unique for a user",
        "event_time": "when, UTC",
        "action": "what the user did",
        "quantity": "how many; null if not said",
        "value_usd_micros": "for how much, in micro-dollars; null if not said",
        "surface": "where in the product; null if not said",
        "pin_id": "with which pin",
        "title": "of the pin; null if it has no catalogue",
        "category": "of the pin",
        "department": "of the pin",
        "brand": "of the pin",
        "price_usd_micros": "of the pin now, in micro-dollars",
        "is_available": "whether the pin is to be had now",
        "model_id": "whose vector the pin has; null if it has none",
        "score": "product of the user's vector and the pin's; null if either has none of the same model",
    },
    examples=(
        "SELECT action, count(*) AS interactions, avg(score) AS mean_score FROM explore.interactions_scored"
        " GROUP BY action ORDER BY count(*) DESC, action",
        "SELECT department, count(*) AS interactions, CAST(sum(value_usd_micros) AS double) / 1000000 AS usd"
        " FROM explore.interactions_scored GROUP BY department ORDER BY count(*) DESC, department LIMIT 10",
    ),
)

VIEWS = (INTERACTIONS_SCORED,)
