"""Views about what users do."""

from __future__ import annotations

from pipelines.views import View

WEEKLY_SALES = View(
    name="weekly_sales",
    doc="what sold in the last seven days of events, against the seven days before them",
    sql="""
        WITH last AS (
            SELECT max(event_time) AS event_time FROM curated.user_interactions
            WHERE NOT is_deleted AND action = 'purchase'
        ),
        sold AS (
            SELECT i.pin_id,
                   i.event_time > last.event_time - INTERVAL '7' DAY AS is_last_week,
                   coalesce(i.quantity, 1) AS quantity,
                   i.value_usd_micros
            FROM curated.user_interactions AS i CROSS JOIN last
            WHERE NOT i.is_deleted AND i.action = 'purchase'
              AND i.event_time > last.event_time - INTERVAL '14' DAY
        ),
        weeks AS (
            SELECT pin_id,
                   sum(CASE WHEN is_last_week THEN quantity ELSE 0 END) AS quantity,
                   sum(CASE WHEN is_last_week THEN 0 ELSE quantity END) AS quantity_before,
                   sum(CASE WHEN is_last_week THEN value_usd_micros ELSE 0 END) AS value_usd_micros,
                   sum(CASE WHEN is_last_week THEN 0 ELSE value_usd_micros END) AS value_before_usd_micros
            FROM sold GROUP BY pin_id
        )
        SELECT w.pin_id, c.catalogue.title AS title, c.catalogue.category AS category,
               w.quantity, w.quantity_before, w.quantity - w.quantity_before AS quantity_change,
               w.value_usd_micros, w.value_before_usd_micros
        FROM weeks AS w LEFT JOIN curated.pins_catalogue AS c ON c.pin_id = w.pin_id AND NOT c.is_deleted
    """,
    columns={
        "pin_id": "which pin",
        "title": "of the pin; null if it has no catalogue",
        "category": "of the pin",
        "quantity": "sold in the last seven days; a purchase that says no quantity counts 1",
        "quantity_before": "sold in the seven days before them",
        "quantity_change": "the difference",
        "value_usd_micros": "for how much in the last seven days, in micro-dollars",
        "value_before_usd_micros": "and in the seven days before them",
    },
    examples=(
        "SELECT title, category, quantity, quantity_before FROM explore.weekly_sales"
        " ORDER BY quantity_change DESC, pin_id LIMIT 10",
        "SELECT category, sum(quantity) AS quantity, sum(quantity_before) AS quantity_before FROM explore.weekly_sales"
        " GROUP BY category ORDER BY sum(quantity_change) DESC, category LIMIT 10",
    ),
)

REJECTED_ROWS = View(
    name="rejected_rows",
    doc="rows that broke their contract, by topic, reason and day",
    sql="""
        SELECT topic, reason, CAST(date_trunc('day', ingested_at) AS date) AS ingested_on,
               count(*) AS rows, count(load_id) AS rows_of_loads,
               min(detail) AS example, max(ingested_at) AS last_at
        FROM raw.dead_letters GROUP BY 1, 2, 3
    """,
    columns={
        "topic": "whose contract refused them",
        "reason": "why, as a slug",
        "ingested_on": "day (UTC) on which they came",
        "rows": "how many; of attempts that came to nothing too, which `tidemark dead-letters list` leaves out",
        "rows_of_loads": "how many of them came by a load",
        "example": "why, in words, of one of them",
        "last_at": "when the last one came, UTC",
    },
    examples=(
        "SELECT topic, reason, sum(rows) AS rows FROM explore.rejected_rows GROUP BY topic, reason"
        " ORDER BY 3 DESC, topic, reason",
    ),
)

MOST_FOLLOWED = View(
    name="most_followed",
    doc="how many users follow each pin that anybody follows, and what was said of it last",
    sql="""
        WITH followed AS (
            SELECT followed_id AS pin_id, count(*) AS followers
            FROM curated.user_follows WHERE NOT is_deleted AND kind = 'pin' GROUP BY 1
        ),
        said AS (
            SELECT pin_id, version, is_deleted, coalesce(event_time, broker_time) AS said_at,
                   count(*) OVER (PARTITION BY pin_id) AS statements,
                   row_number() OVER (
                       PARTITION BY pin_id ORDER BY version DESC, coalesce(event_time, broker_time) DESC
                   ) AS place
            FROM curated.pin_changes
        )
        SELECT f.pin_id, f.followers, c.catalogue.title AS title,
               o.offer.price_usd_micros AS price_usd_micros, o.offer.is_available AS is_available,
               s.statements, s.version AS newest_version, s.said_at AS newest_at, s.is_deleted AS is_gone
        FROM followed AS f
        LEFT JOIN said AS s ON s.pin_id = f.pin_id AND s.place = 1
        LEFT JOIN curated.pins_catalogue AS c ON c.pin_id = f.pin_id AND NOT c.is_deleted
        LEFT JOIN curated.pins_offer AS o ON o.pin_id = f.pin_id AND NOT o.is_deleted
    """,
    columns={
        "pin_id": "which pin",
        "followers": "users who follow it",
        "title": "of the pin; null if it has no catalogue",
        "price_usd_micros": "of the pin now, in micro-dollars",
        "is_available": "whether the pin is to be had now",
        "statements": "how often something was said of it; null if never",
        "newest_version": "version of the newest of these",
        "newest_at": "when that was said, UTC",
        "is_gone": "whether it deleted the pin",
    },
    examples=(
        "SELECT pin_id, title, followers, newest_at FROM explore.most_followed"
        " ORDER BY followers DESC, pin_id LIMIT 10",
    ),
)

VIEWS = (WEEKLY_SALES, REJECTED_ROWS, MOST_FOLLOWED)
