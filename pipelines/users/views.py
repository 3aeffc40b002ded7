"""Views about what users do."""

from __future__ import annotations

from pipelines.contracts import ACTIONS
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

_OF_ACTIONS = ",\n               ".join(
    f"count(CASE WHEN action = '{action}' THEN 1 END) AS {action}_events" for action in ACTIONS
)

TIMELINES = View(
    name="timelines",
    doc="the timeline of each user as of the last build: how long it is, and what is in it",
    sql=f"""
        SELECT user_id, count(*) AS events,
               {_OF_ACTIONS},
               count(DISTINCT pin_id) AS pins,
               count(DISTINCT CAST(event_time AS date)) AS active_days,
               min(event_time) AS first_event_time, max(event_time) AS last_event_time,
               date_diff('day', CAST(min(event_time) AS date), CAST(max(event_time) AS date)) AS span_days,
               count(payload) AS payloads
        FROM curated.user_interactions WHERE NOT is_deleted GROUP BY user_id
    """,
    columns={
        "user_id": "whose",
        "events": "how many stand; deleted ones do not",
        **{f"{action}_events": f"how many of them are of the action {action}" for action in ACTIONS},
        "pins": "different pins among them",
        "active_days": "days (UTC) with at least one event",
        "first_event_time": "of the oldest, UTC",
        "last_event_time": "of the newest, UTC",
        "span_days": "from the day (UTC) of the oldest to that of the newest; 0 if both are of one day",
        "payloads": "events that have a payload",
    },
    examples=(
        "SELECT user_id, events, active_days, pins, span_days FROM explore.timelines"
        " ORDER BY events DESC, user_id LIMIT 10",
        "SELECT CASE WHEN events < 10 THEN 1 WHEN events < 100 THEN 10 WHEN events < 1000 THEN 100 ELSE 1000 END"
        " AS least_events, count(*) AS users, sum(events) AS events FROM explore.timelines GROUP BY 1 ORDER BY 1",
    ),
)

REPURCHASE_GAPS = View(
    name="repurchase_gaps",
    doc="how long until a category is bought again by the same user: what a model of the next basket can hope to know",
    sql="""
        WITH bought AS (
            SELECT DISTINCT i.user_id, coalesce(c.catalogue.category, i.category) AS category,
                   CAST(i.event_time AS date) AS bought_on
            FROM curated.user_interactions AS i
            LEFT JOIN curated.pins_catalogue AS c ON c.pin_id = i.pin_id AND NOT c.is_deleted
            WHERE NOT i.is_deleted AND i.action = 'purchase'
        ), gaps AS (
            SELECT user_id, category, date_diff('day', bought_on, lead(bought_on)
                   OVER (PARTITION BY user_id, category ORDER BY bought_on)) AS gap_days
            FROM bought WHERE category IS NOT NULL
        ), placed AS (
            SELECT category, gap_days, row_number() OVER (PARTITION BY category ORDER BY gap_days) AS place,
                   count(*) OVER (PARTITION BY category) AS of_gaps
            FROM gaps WHERE gap_days IS NOT NULL
        ), spread AS (
            SELECT category, count(*) AS gaps,
                   min(CASE WHEN 10 * place >= of_gaps THEN gap_days END) AS p10_gap_days,
                   min(CASE WHEN 2 * place >= of_gaps THEN gap_days END) AS p50_gap_days,
                   min(CASE WHEN 10 * place >= 9 * of_gaps THEN gap_days END) AS p90_gap_days
            FROM placed GROUP BY category
        ), buyers AS (
            SELECT category, count(DISTINCT user_id) AS users,
                   count(DISTINCT CASE WHEN gap_days IS NOT NULL THEN user_id END) AS users_again,
                   count(*) AS purchase_days
            FROM gaps GROUP BY category
        )
        SELECT b.category, users, users_again, purchase_days, coalesce(gaps, 0) AS gaps,
               p10_gap_days, p50_gap_days, p90_gap_days
        FROM buyers AS b LEFT JOIN spread AS s ON s.category = b.category
    """,
    columns={
        "category": "of the pin; of the event, where the pin has none",
        "users": "who bought it",
        "users_again": "who bought it on two days or more",
        "purchase_days": "days (UTC) on which a user bought of it, over all users; one basket counts once",
        "gaps": "between two such days of one user that follow each other",
        "p10_gap_days": "a tenth of the gaps are no longer; null if there are none",
        "p50_gap_days": "half of the gaps are no longer; what nobody bought again counts in none",
        "p90_gap_days": "nine tenths of the gaps are no longer",
    },
    examples=(
        "SELECT category, users, users_again, p10_gap_days, p50_gap_days, p90_gap_days FROM explore.repurchase_gaps"
        " ORDER BY users_again DESC, category LIMIT 20",
        "SELECT category, p50_gap_days, gaps FROM explore.repurchase_gaps WHERE p50_gap_days IS NOT NULL"
        " ORDER BY p50_gap_days, category LIMIT 10",
    ),
)

EVENT_FEATURES = View(
    name="event_features",
    doc="each live event with its payload and what was found out of it later, both as JSON, and when it was known",
    sql="""
        SELECT i.user_id, i.event_id, i.event_time, i.action, i.pin_id, i.payload, f.features,
               i.broker_time AS known_at, f.broker_time AS features_known_at, f.version AS features_version,
               date_diff('second', i.broker_time, f.broker_time) AS features_lag_s
        FROM curated.user_interactions AS i
        LEFT JOIN curated.event_features AS f
             ON f.user_id = i.user_id AND f.event_id = i.event_id AND NOT f.is_deleted
        WHERE NOT i.is_deleted
    """,
    columns={
        "user_id": "whose event",
        "event_id": "its own id, unique for a user",
        "event_time": "when it happened, UTC",
        "action": "what the user did",
        "pin_id": "with which pin; null if it is about something else",
        "payload": "what the event says of itself, as JSON; null if nothing",
        "features": "what was found out later, as JSON; null if nothing yet",
        "known_at": "when the broker, or a load, took the event that stands, UTC",
        "features_known_at": "when it took the features that stand, UTC",
        "features_version": "version of the features",
        "features_lag_s": "from known_at to features_known_at; less than 0 where the features came first",
    },
    examples=(
        "SELECT action, count(*) AS events, count(payload) AS payloads, count(features) AS features"
        " FROM explore.event_features GROUP BY action ORDER BY action",
        "SELECT json_extract_scalar(features, '$.is_converted') AS is_converted, count(*) AS events,"
        " max(features_lag_s) AS max_features_lag_s FROM explore.event_features WHERE features IS NOT NULL"
        " GROUP BY 1 ORDER BY 2 DESC, 1",
    ),
)

TIMELINE_CORRECTIONS = View(
    name="timeline_corrections",
    doc="what each new base of the timelines corrected in what was served before it, by cause",
    sql="""
        WITH bases AS (
            SELECT "index" AS index_name, version, max("rows") AS base_facts
            FROM ops.index_versions WHERE event = 'built' GROUP BY "index", version
        ), corrected AS (
            SELECT "index" AS index_name, version, max("before") AS previous_version, family, cause,
                   CAST(date_trunc('day', max(at)) AS date) AS corrected_on, max(at) AS corrected_at,
                   max(facts) AS facts
            FROM ops.timeline_corrections GROUP BY "index", version, family, cause
        )
        SELECT c.index_name, corrected_on, corrected_at, c.version, previous_version, family, cause, facts, base_facts,
               CASE WHEN base_facts > 0 THEN 1e6 * facts / base_facts END AS facts_per_million
        FROM corrected AS c LEFT JOIN bases AS b ON b.index_name = c.index_name AND b.version = c.version
    """,
    columns={
        "index_name": "which index",
        "corrected_on": "day (UTC) on which the base was compared",
        "corrected_at": "when it was, UTC",
        "version": "the base that corrected",
        "previous_version": "the base that was served until then",
        "family": "column family: interactions or features",
        "cause": "load, not_streamed, joined_anew, decided_otherwise or withdrawn",
        "facts": "so many; 0 is there, too",
        "base_facts": "in the base that corrected; null if its build is forgotten",
        "facts_per_million": "of those of the base",
    },
    examples=(
        "SELECT corrected_on, cause, sum(facts) AS facts FROM explore.timeline_corrections"
        " GROUP BY corrected_on, cause ORDER BY corrected_on DESC, cause",
        "SELECT version, previous_version, family, cause, facts FROM explore.timeline_corrections"
        " WHERE cause <> 'load' ORDER BY version DESC, family, cause LIMIT 20",
    ),
)

VIEWS = (
    WEEKLY_SALES,
    REJECTED_ROWS,
    TIMELINES,
    REPURCHASE_GAPS,
    EVENT_FEATURES,
    TIMELINE_CORRECTIONS,
    MOST_FOLLOWED,
)
