"""Commands that ask the serving process: `query …` and `indices`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from jobs import console
from jobs.cli.shared import ANSWERS, After, Category, Json, K, app, load_settings, query_app


def _ask(path: str, params: dict[str, Any] | None = None, body: Any = None) -> Any:
    from jobs import client

    settings = load_settings()
    return client.request_at(f"http://{settings.serving.host}:{settings.serving.port}", path, params, body)


def _stands_on(answer: Any) -> str:
    headers = answer.headers
    stale = "; it is stale" if "true" in headers.get("tidemark-stale", "") else ""
    return f"stands on {headers.get('tidemark-base-version')}, position {headers.get('tidemark-position')}{stale}"


def _with_headers(answer: Any) -> dict[str, Any]:
    named = {
        name: answer.headers.get(f"tidemark-{name.replace('_', '-')}")
        for name in ("base_version", "position", "stale")
    }
    return {**answer.body, "stands_on": named}


@query_app.command()
def recommendations(
    user: Annotated[str, typer.Argument(help="A user's id.")],
    k: K = 10,
    category: Category = None,
    min_position: After = None,
    as_json: Json = False,
) -> None:
    """What to recommend to a user, by all that is known up to this second."""
    from jobs import client

    path = f"/v1/users/{client.quote(user)}/recommendations"
    answer = _ask(path, {"k": k, "category": category, "min_position": min_position})
    if as_json:
        console.emit_json(_with_headers(answer))
        return
    basis = answer.body["basis"]
    how = {"folded": f"from {basis['events_used']} events", "popular": "no history: what is popular"}
    _print_items(
        f"For user {user} ({how.get(basis['kind'], basis['kind'])})", answer.body["recommendations"], answer
    )


@query_app.command()
def profile(
    user: Annotated[str, typer.Argument(help="A user's id.")],
    k: K = 10,
    now_ms: Annotated[int | None, typer.Option(min=0, help="As of when, in ms since 1970.")] = None,
    min_position: After = None,
    as_json: Json = False,
) -> None:
    """What a user is like now: interests, segments, and which patterns fired."""
    from jobs import client

    params = {"k": k, "now_ms": now_ms, "min_position": min_position}
    answer = _ask(f"/v1/users/{client.quote(user)}/profile", params)
    if as_json:
        console.emit_json(_with_headers(answer))
        return
    said = answer.body
    columns = ("category", "weight", "of_events", "of_firings")
    rows = [[one["category"], *(round(one[name], 3) for name in columns[1:])] for one in said["interests"]]
    console.table(f"Interests of user {user}, last seen {said['last_seen'] or 'never'}", columns, rows)
    for one in said["segments"]:
        console.say(f"in {one['segment']} until {one['until']}")
    for one in said["firings"]:
        console.say(f"{one['rule']} fired at {one['fired_at']}: {one['by']} {one['value']}")
    console.say(_stands_on(answer))


@query_app.command()
def counters(
    sql: Annotated[str, typer.Argument(help="As: SELECT action, count(*) FROM events WHERE user = '900' …")],
    now_ms: Annotated[int | None, typer.Option(min=0, help="As of when, in ms since 1970.")] = None,
    min_position: After = None,
    as_json: Json = False,
) -> None:
    """How often users did something: a sentence of the small SQL that docs/counters.md tells of."""
    body = {"sql": sql} | ({} if now_ms is None else {"now_ms": now_ms})
    answer = _ask("/v1/counters:query", {"min_position": min_position}, body)
    if as_json:
        console.emit_json(_with_headers(answer))
        return
    counts = answer.body["counts"]
    columns = tuple(counts[0]) if counts else ("nothing counted",)
    console.table("Counts", columns, [tuple(one.values()) for one in counts], _stands_on(answer))


@query_app.command()
def frequency(
    user: Annotated[str, typer.Argument(help="A user's id.")],
    named: Annotated[
        list[str], typer.Argument(metavar="COLUMN=ID...", help="What would be shown, as ad_id=a17.")
    ],
    now_ms: Annotated[int | None, typer.Option(min=0, help="As of when, in ms since 1970.")] = None,
    min_position: After = None,
    as_json: Json = False,
) -> None:
    """Whether something may be shown to a user, and which rules of conf/frequency.yaml do not allow it."""
    pairs = [one.partition("=") for one in named]
    candidate = {column: value for column, _, value in pairs}
    body = {"user_id": user, "candidates": [candidate]} | ({} if now_ms is None else {"now_ms": now_ms})
    answer = _ask("/v1/frequency:check", {"min_position": min_position}, body)
    if as_json:
        console.emit_json(_with_headers(answer))
        return
    (judged,) = answer.body["candidates"]
    for broken in judged["broken"]:
        console.say(", ".join(f"{name} {value}" for name, value in broken.items()))
    console.say("it may be shown" if judged["is_allowed"] else "it may not be shown")
    if short := answer.body["basis"]["incomplete_rules"]:
        console.say(
            f"older events may be missing, so that these may have measured too little: {', '.join(short)}"
        )


@query_app.command()
def similar(
    pin: Annotated[str, typer.Argument(help="A pin's id.")],
    k: K = 10,
    category: Category = None,
    min_position: After = None,
    as_json: Json = False,
) -> None:
    """Pins like a pin."""
    from jobs import client

    path = f"/v1/pins/{client.quote(pin)}/similar"
    answer = _ask(path, {"k": k, "category": category, "min_position": min_position})
    if as_json:
        console.emit_json(_with_headers(answer))
    else:
        _print_items(f"Like pin {pin} (by {answer.body['basis']['kind']})", answer.body["similar"], answer)


def _print_items(title: str, items: list[dict[str, Any]], answer: Any) -> None:
    columns = ("", "pin", "score", "title", "category", "price")
    rows = [
        (
            place,
            item["pin_id"],
            round(item["score"], 5),
            item["catalogue"]["title"],
            item["catalogue"]["category"],
            _price(item),
        )
        for place, item in enumerate(items, 1)
    ]
    console.table(title, columns, rows, _stands_on(answer))


def _price(document: dict[str, Any]) -> str:
    offer = document.get("offer")
    if not offer or offer.get("price_usd_micros") is None:
        return ""
    return f"${offer['price_usd_micros'] / 1e6:,.2f}" + ("" if offer.get("is_available") else " (sold out)")


@query_app.command()
def events(
    user: Annotated[str, typer.Argument(help="A user's id.")],
    limit: Annotated[int, typer.Option(min=1, max=1000, help="How many of the newest.")] = 20,
    cursor: Annotated[
        str | None, typer.Option(help="Where a page before said that the next one begins.")
    ] = None,
    min_position: After = None,
    as_json: Json = False,
) -> None:
    """A user's events, the newest first."""
    from jobs import client

    path = f"/v1/users/{client.quote(user)}/events"
    answer = _ask(path, {"limit": limit, "cursor": cursor, "min_position": min_position})
    if as_json:
        console.emit_json(_with_headers(answer))
        return
    rows = [
        (e["event_time"], e["action"], e["pin_id"], e["quantity"], _value(e), e["event_id"])
        for e in answer.body["events"]
    ]
    more = f"\nmore: --cursor {answer.body['next_cursor']}" if answer.body.get("next_cursor") else ""
    columns = ("time (UTC)", "action", "pin", "quantity", "value", "event")
    console.table(f"Events of user {user}", columns, rows, _stands_on(answer) + more)


@query_app.command()
def inbox(
    user: Annotated[str, typer.Argument(help="A user's id.")],
    limit: Annotated[int, typer.Option(min=1, max=1000, help="How many of the newest.")] = 20,
    cursor: Annotated[
        str | None, typer.Option(help="Where a page before said that the next one begins.")
    ] = None,
    min_position: After = None,
    as_json: Json = False,
) -> None:
    """What became of the pins and users that a user follows, the newest first."""
    from jobs import client

    path = f"/v1/users/{client.quote(user)}/inbox"
    answer = _ask(path, {"limit": limit, "cursor": cursor, "min_position": min_position})
    if as_json:
        console.emit_json(_with_headers(answer))
        return
    body = answer.body
    rows = [(e["time"], e.get("user_id") or "", e["what"], e["pin_id"], _changed(e)) for e in body["entries"]]
    note = f"{_stands_on(answer)}\nof {body['follows_read']} follows"
    note += ", and more that were not read" if body["has_more_follows"] else ""
    note += f"\nmore: --cursor {body['next_cursor']}" if body["next_cursor"] else ""
    columns = ("time (UTC)", "user", "what", "pin", "changes")
    console.table(f"Inbox of user {user}", columns, rows, note)


def _changed(entry: dict[str, Any]) -> str:
    """What an entry says beside what it is about, in a line."""
    return ", ".join(
        f"{change['field']}: {change['from']} → {change['to']}" for change in entry.get("changes", ())
    )


@query_app.command()
def follows(
    user: Annotated[str, typer.Argument(help="A user's id.")],
    limit: Annotated[int, typer.Option(min=1, max=1000, help="How many of the newest.")] = 20,
    min_position: After = None,
    as_json: Json = False,
) -> None:
    """Which pins and users a user follows, and since when."""
    from jobs import client

    answer = _ask(f"/v1/users/{client.quote(user)}/follows", {"limit": limit, "min_position": min_position})
    if as_json:
        console.emit_json(_with_headers(answer))
        return
    rows = [(f["since"], f["pin_id"] or "", f["followed_user_id"] or "") for f in answer.body["follows"]]
    console.table(f"User {user} follows", ("since (UTC)", "pin", "user"), rows, _stands_on(answer))


def _value(event: dict[str, Any]) -> str:
    micros = event.get("value_usd_micros")
    return "" if micros is None else f"${micros / 1e6:,.2f}"


@query_app.command()
def pin(
    pin: Annotated[str, typer.Argument(help="A pin's id.")], min_position: After = None, as_json: Json = False
) -> None:
    """What a pin is, and what it costs."""
    from jobs import client

    answer = _ask(f"/v1/pins/{client.quote(pin)}", {"min_position": min_position})
    if as_json:
        console.emit_json(_with_headers(answer))
        return
    shown = {**answer.body["catalogue"], "price": _price(answer.body)}
    console.facts(f"Pin {pin}", shown, _stands_on(answer))


@query_app.command()
def counts(
    pin: Annotated[str, typer.Argument(help="A pin's id.")],
    from_ms: Annotated[
        int | None, typer.Option(min=0, help="Hours from this time on, in ms since 1970.")
    ] = None,
    to_ms: Annotated[int | None, typer.Option(min=0, help="Hours that begin before this time.")] = None,
    min_position: After = None,
    as_json: Json = False,
) -> None:
    """How often a pin was acted on, by action and hour."""
    from jobs import client

    params = {"from_ms": from_ms, "to_ms": to_ms, "min_position": min_position}
    answer = _ask(f"/v1/pins/{client.quote(pin)}/counts", params)
    if as_json:
        console.emit_json(_with_headers(answer))
        return
    totals, hours = answer.body["totals"], answer.body["hours"]
    rows = [
        ("in all", *totals.values()),
        *((h["start_time"], *(h[name] for name in totals)) for h in hours[-24:]),
    ]
    console.table(
        f"Counts of pin {pin} (the last {min(24, len(hours))} of {len(hours)} hours)",
        ("hour (UTC)", *totals),
        rows,
        _stands_on(answer),
    )


@app.command(rich_help_panel=ANSWERS)
def indices(as_json: Json = False) -> None:
    """What the serving process stands on: base, cut, overlay and staleness of each index."""
    answer = _ask("/v1/indices")
    if as_json:
        console.emit_json(answer.body)
        return
    rows = [
        (
            s["index"],
            s["base_version"],
            s["overlay_facts"],
            s["last_epoch"],
            s["is_stale"],
            s["is_ready"],
            s["error"],
        )
        for s in answer.body["indices"]
    ]
    columns = ("index", "base version", "overlay facts", "last epoch", "stale", "ready", "error")
    console.table("Indices", columns, rows)
