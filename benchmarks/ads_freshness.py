"""How long until a change of an ads account is served: changes committed in PostgreSQL, watched over HTTP.

Everything runs: PostgreSQL, Debezium, broker, the process `ads`, the streams, serving. An account is loaded, captured
and served. Then changes are committed at a steady rate, in transactions of one to three rows, 5 % of them again; beside
them others come by the topic, 10 % of these out of order and 5 % again, and a backfill of a million documents goes on.
Some changes are watched: of a name (control), of a pin's title (content), of a budget (the bypass); each is timed from
PostgreSQL's commit to the answer that has it. At the end every document is compared with one that is made of
PostgreSQL's own rows, joined by SQL, and of what was sent to the topic.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import http.client
import itertools
import random
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import orjson
import pyarrow as pa
from psycopg import sql
from psycopg.rows import dict_row
from sqlalchemy.engine import Connection

from benchmarks import harness
from benchmarks.harness import BenchmarkError, say
from jobs import client
from pipelines.ads import consumer, database, generator, handlers, joined, publisher, repository, updater
from pipelines.ads.repository import Update
from pipelines.ads.schema import TABLES, TIME
from pipelines.contracts import ADS_CHANGES
from pipelines.indexing.versions import Versions
from pipelines.ingest import broker
from pipelines.ingest.producer import Producer
from pipelines.settings import Settings

WATCHED_EACH = 20
"""One in so many transactions is a watched change of each kind."""
WATCHED = 4
REPLAYED, DISORDERED = 0.05, 0.10
TOPIC_RATE = 20
TOPIC_SHARE = 0.1
"""The last tenth of the ads and pins is changed by the topic alone: two sources of one row would be one too many."""
AT_ONCE = 500
SENT_FILE = "sent-by-topic.jsonl"
"""In the home: what was ever sent to the topic alone, for a later run on the same home to know."""
MINUTE_S, FRESH_WITHIN_S = 60.0, 60.0
Values = dict[str, Any]


class Kind(NamedTuple):
    """A kind of change that is watched: the row's table and key prefix, its column, and where an answer shows it.

    Its documents are asked for each ``poll_s``. A change counts as served when it is seen, so up to this is added to
    each time; asking takes from what is measured, too.
    """

    name: str
    table: str
    column: str
    family: str
    field: str
    value: Callable[[int], Any]
    poll_s: float


KINDS = (
    Kind("control", "ads", "name", "control", "ad_name", lambda number: f"bench {number}", 0.25),
    Kind("content", "pins", "title", "content", "title", lambda number: f"bench {number}", 0.25),
    Kind(
        "bypass",
        "campaigns",
        "daily_budget_usd_micros",
        "control",
        "campaign_daily_budget_usd_micros",
        lambda number: 10**9 + number,
        0.1,
    ),
)


def main(given: Sequence[str]) -> int:
    """Run it."""
    options = harness.arguments(
        __doc__,
        given,
        ads=(100_000, "ads of the account"),
        rate=(200, "changes a second in PostgreSQL"),
        seconds=(120, "for how long"),
        backfill=(1_000_000, "documents of the backfill; 0: none"),
        seed=(1, "of the account and its changes"),
        warm_up=(30, "seconds of the same traffic before, which are not timed"),
        patience=(1_800, "seconds until all must be served"),
    )
    set_for_it = dict(
        zip(("ADS__DATABASE_PORT", "ADS__CONNECT_PORT"), map(str, harness.free_ports(2)), strict=True)
    )
    set_for_it["STREAMS__NICE"] = "5"  # what is timed is the streams' way: by default they come last
    with harness.place("ads-freshness", options.home, **set_for_it) as settings:
        served = prepare(settings, options)
        machine = harness.machine()
        traffic = Traffic(settings, options)
        say(f"{options.rate} changes a second for {options.warm_up} s, not timed")
        traffic.run(options.warm_up, is_timed=False)
        await_quiet(settings, options.patience)
        say(f"{options.rate} changes a second for {options.seconds} s")
        watches = [Watch(settings, kind, traffic) for kind in KINDS]
        for watch in watches:
            watch.start()
        backfill = Backfill(settings, options)
        backfill.start()
        traffic.run(options.seconds, is_timed=True)
        for watch in watches:
            watch.finish(120)
        drained_s = backfill.await_drained(options.patience)
        await_quiet(settings, options.patience)
        say("comparing every document")
        wrong, missing, compared = compare(settings, options.ads)
        dropped = refused(settings)
    result = {
        "benchmark": "ads-freshness",
        **measured(watches),
        "backfill_drain_s": drained_s,
        "wrong": wrong,
        "missing": missing,
        "dropped": dropped,
        "compared": compared,
        "ads": options.ads,
        "backfill_documents": backfill.documents,
        "changes": traffic.changes,
        "changes_per_s": round(traffic.changes / traffic.took_s, 1),
        "by_topic": traffic.by_topic,
        "replayed": traffic.replayed,
        "out_of_order": traffic.out_of_order,
        "served_after_load_s": served,
        "beside": [
            "PostgreSQL",
            "Debezium",
            "broker",
            "ads",
            "archive and 4 hot streams",
            "serving",
            "backfill",
        ],
    }
    harness.publish(result | machine)
    return 0 if wrong == missing == dropped == 0 else 1


def measured(watches: Sequence[Watch]) -> Values:
    """What the watches saw, by kind; the worst of all, and how many minutes were fresh."""
    found: Values = {}
    everything: list[tuple[float, float]] = []
    for watch in watches:
        p50, p90, p99, worst = harness.percentiles([s for _, s in watch.seen], (50, 90, 99, 100))
        name = watch.kind.name
        found[name] = {"p50_s": p50, "p90_s": p90, "p99_s": p99, "max_s": worst}
        found[name] |= {"timed": len(watch.seen), "unseen": watch.unseen}
        everything += watch.seen if name != "bypass" else []
    minutes: dict[int, list[float]] = collections.defaultdict(list)
    for at, seconds in everything:
        minutes[int(at // MINUTE_S)].append(seconds)
    fresh = [harness.percentiles(of, (90,))[0] <= FRESH_WITHIN_S for of in minutes.values()]
    found["minutes_within_60s_pct"] = round(100 * sum(fresh) / len(fresh), 2) if fresh else 0.0
    found["max_s"] = max((seconds for _, seconds in everything), default=float("nan"))
    return found


# ------------------------------------------------------------------------------------------------ the account


def prepare(settings: Settings, options: argparse.Namespace) -> float:
    """Start everything, load an account into PostgreSQL, and build a base of it; the seconds until all was served."""
    harness.start(settings, ["broker", "ads-db", "ads"])
    began = time.perf_counter()
    with database.connected(settings) as connection:
        has_account = connection.execute("SELECT 1 FROM ads LIMIT 1").fetchone() is not None
    if not has_account:
        say(f"loading {options.ads:,} ads into PostgreSQL")
        database.load(settings, options.ads, options.seed)
    await_captured(settings, options.patience)
    if Versions(settings.paths.indices, "ads").pointer() is None:
        say("building a base of them")
        harness.tidemark(settings, "build", "--index", "ads")
    harness.start(settings, ["streams", "serving"])
    harness.await_ready(settings)
    await_quiet(settings, options.patience)
    return round(time.perf_counter() - began, 1)


def await_captured(settings: Settings, patience_s: float) -> None:
    """Wait until the repository has every row of the database, and the keys of all changes are sent."""
    with database.connected(settings) as connection:
        wanted = sum(count(connection, table) for table in TABLES)
    deadline = time.monotonic() + patience_s
    while (found := rows_held(settings)) < wanted or unpublished(settings):
        if time.monotonic() > deadline:
            raise BenchmarkError(f"{found} of {wanted} rows were captured in {patience_s:.0f} s")
        time.sleep(1.0)


def count(connection: Any, table: str) -> int:
    """How many rows a table of the database has."""
    query = sql.SQL("SELECT count(*) FROM {}").format(sql.Identifier(table))
    return int(connection.execute(query).fetchone()[0])


@contextlib.contextmanager
def looking(settings: Settings) -> Iterator[Connection]:
    """One point of the repository."""
    store = repository.opened(settings)
    try:
        with store.reading() as connection:
            yield connection
    finally:
        store.close()


def rows_held(settings: Settings) -> int:
    """How many rows the repository has."""
    with looking(settings) as connection:
        return sum(repository.count(connection, table) for table in TABLES)


def unpublished(settings: Settings) -> int:
    """How many changes of the repository have not been published yet."""
    with looking(settings) as connection:
        return repository.last_change(connection) - repository.seen(connection, publisher.SUBSCRIBER)


def unread(settings: Settings) -> int:
    """How many records of the topic the repository has not taken yet."""
    store = repository.opened(settings)
    try:
        (reached,) = consumer.position(store).topics.values() or ({},)
    finally:
        store.close()
    ends = broker.offsets(settings, ADS_CHANGES.topic)
    return sum(end - reached.get(partition, 0) for partition, (_, end) in ends.items())


def await_quiet(settings: Settings, patience_s: float) -> None:
    """Wait until serving stands on every key that was sent, and nothing is on its way any more.

    Raises:
        BenchmarkError: It does not in time.
    """
    deadline = time.monotonic() + patience_s
    quiet_since = time.monotonic()
    while time.monotonic() - quiet_since < 3.0:
        if unread(settings) or unpublished(settings) or behind(settings):
            quiet_since = time.monotonic()
        if time.monotonic() > deadline:
            raise BenchmarkError(f"after {patience_s:.0f} s {behind(settings)} keys were not served")
        time.sleep(0.5)


def behind(settings: Settings, topics: Sequence[str] = publisher.TOPICS) -> int:
    """How many keys of these topics are not served yet."""
    (status,) = (
        one
        for one in client.request(harness.serving_url(settings), "/v1/indices").body["indices"]
        if one["index"] == "ads"
    )
    reached = status["position"]["topics"]
    ids = broker.topic_ids(settings, topics)
    return sum(
        max(0, end - reached.get(ids[topic], {}).get(str(partition), 0))
        for topic in topics
        for partition, (_, end) in broker.offsets(settings, topic).items()
    )


# ------------------------------------------------------------------------------------------------ the traffic


class Watched(NamedTuple):
    """A watched change: its number, which grows, and when PostgreSQL had committed it."""

    number: int
    at: float


class Traffic:
    """Changes at a steady rate: transactions in PostgreSQL, and records to the topic beside them."""

    def __init__(self, settings: Settings, options: argparse.Namespace) -> None:
        self.settings, self.options = settings, options
        self.changes = self.by_topic = self.replayed = self.out_of_order = 0
        self.took_s = 0.0
        self.watched: dict[tuple[str, str], list[Watched]] = collections.defaultdict(list)
        self.rows = {kind.name: watched_rows(settings, kind.table) for kind in KINDS}
        """The rows that are watched, by kind: nothing else changes them."""
        self.own = {key for rows in self.rows.values() for key in rows}
        self._versions = itertools.count(time.time_ns() // 1_000)
        self._made = iter(list(self._transactions()))  # before: making them is not part of what is timed

    def run(self, seconds: float, *, is_timed: bool) -> None:
        """Commit and send until the time is over; what is not timed is neither counted nor watched."""
        is_over = threading.Event()
        topic = threading.Thread(target=self._send, args=(is_over,), daemon=True)
        self.changes = self.by_topic = self.replayed = self.out_of_order = 0
        topic.start()
        began = time.perf_counter()
        with database.connected(self.settings) as connection:
            for number, (transaction, is_again) in enumerate(self._made):
                late = began + self.changes / self.options.rate - time.perf_counter()
                if late > 0:
                    time.sleep(late)
                if time.perf_counter() - began > seconds:
                    break
                self._commit(connection, number, transaction, is_timed)
                self.replayed += is_again
        self.took_s = time.perf_counter() - began
        is_over.set()
        topic.join()

    def _commit(self, connection: Any, number: int, transaction: list[Update], is_timed: bool) -> None:
        is_watched = is_timed and number % WATCHED_EACH < len(KINDS)
        kind = KINDS[number % WATCHED_EACH] if is_watched else None
        if kind is not None:
            rows = list(self.rows[kind.name])
            key = rows[number // WATCHED_EACH % len(rows)]
            transaction = [*transaction, Update(kind.table, key, 1, {kind.column: kind.value(number)})]
        database.write(connection, transaction)
        at = time.perf_counter()
        self.changes += len(transaction)
        if kind is not None:
            self.watched[kind.name, key].append(Watched(number, at))

    def _transactions(self) -> Iterator[tuple[list[Update], bool]]:
        """Those of the generator whose rows are PostgreSQL's, and whether each was there before: some come again."""
        options, choose = self.options, random.Random(self.options.seed)
        wanted = options.rate * (options.warm_up + options.seconds)  # each has a row at least, nearly
        earlier: collections.deque[list[Update]] = collections.deque(maxlen=50)
        for given in generator.transactions(options.ads, options.seed + 1, wanted, 1):
            kept = [one for one in given if not is_of_topic(one, options.ads) and one.key not in self.own]
            if not kept:
                continue
            yield kept, False
            earlier.append(kept)
            if choose.random() < REPLAYED:
                yield choose.choice(earlier), True

    def _send(self, is_over: threading.Event) -> None:
        """Records of the rows that are the topic's, some out of order, some again."""
        options, choose = self.options, random.Random(self.options.seed + 2)
        held: list[Update] = []
        made_now: list[Update] = []
        with Producer(self.settings) as producer:
            while not is_over.wait(1.0 / TOPIC_RATE):
                made = topic_change(choose, options.ads, next(self._versions))
                if made.key in self.own:
                    continue
                made_now.append(made)
                self.by_topic += 1
                if choose.random() < DISORDERED:
                    self.out_of_order += 1
                    held.append(made)
                    continue
                again = [choose.choice(made_now)] if choose.random() < REPLAYED else []
                self.replayed += len(again)
                send(producer, [made, *again, *(held if len(held) > 5 else [])])
                held = [] if len(held) > 5 else held
            send(producer, held)
        with (self.settings.home / SENT_FILE).open("ab") as file:
            file.writelines(orjson.dumps(list(one), option=orjson.OPT_APPEND_NEWLINE) for one in made_now)


def is_of_topic(update: Update, ads: int) -> bool:
    """Whether a row is changed by the topic alone."""
    number = int(update.key[1:])
    return update.table in ("ads", "pins") and number >= generator.size(update.table, ads) * (1 - TOPIC_SHARE)


def topic_change(choose: random.Random, ads: int, version: int) -> Update:
    """What was measured of an ad, or a pin's new price, as a job of its own would send it."""
    table = choose.choice(("ads", "pins"))
    size = generator.size(table, ads)
    number = size - 1 - int(choose.random() ** 3 * (size * TOPIC_SHARE - 1))
    key = generator.keys(table, pa.array([number]).to_numpy())[0]
    if table == "ads":
        values = {"impressions_7d": choose.randrange(10**6), "clicks_7d": choose.randrange(10**4)}
    else:
        values = {"price_usd_micros": choose.randrange(10**8), "saves": choose.randrange(10**4)}
    return Update(table, key, version, values)


def send(producer: Producer, updates: Sequence[Update]) -> None:
    """Change records of updates, each alone."""
    records = [
        (
            one.key.encode(),
            orjson.dumps({"table": one.table, "key": one.key, "version": one.version, "values": one.values}),
        )
        for one in updates
    ]
    if records:
        producer.send(ADS_CHANGES.topic, records)


class Backfill:
    """Every document again, until there were enough; through the call of the process `ads`."""

    def __init__(self, settings: Settings, options: argparse.Namespace) -> None:
        self.settings, self.options = settings, options
        self.documents = 0
        self._began = time.perf_counter()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        """Begin."""
        self._began = time.perf_counter()
        self._thread.start()

    def await_drained(self, patience_s: float) -> float:
        """Wait until all of it is served; the seconds since it began."""
        self._thread.join()
        topics = [route.backfill_topic for route in publisher.ROUTES]
        deadline = time.monotonic() + patience_s
        while left := behind(self.settings, topics):
            if time.monotonic() > deadline:
                raise BenchmarkError(f"the backfill has {left} keys left after {patience_s:.0f} s")
            time.sleep(0.5)
        return round(time.perf_counter() - self._began, 1)

    def _run(self) -> None:
        url = f"http://{self.settings.ads.host}:{self.settings.ads.port}"
        while self.documents < self.options.backfill:
            sent = client.request(url, "/v1/ads:backfill", body={"all": True}, timeout_s=600).body
            self.documents += max(sent["sent"].values())  # each ad's key goes to the topic of either stream


# ------------------------------------------------------------------------------------------------ watching


class Watch:
    """Asks for the documents of a kind's watched rows, and notes when each change is in one."""

    def __init__(self, settings: Settings, kind: Kind, traffic: Traffic) -> None:
        self.settings, self.kind, self.traffic = settings, kind, traffic
        self.seen: list[tuple[float, float]] = []
        self._left: dict[str, int] = collections.Counter()
        self._ending = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        """Begin to ask."""
        self._thread.start()

    @property
    def unseen(self) -> int:
        """How many changes were not seen."""
        return sum(len(self.traffic.watched[self.kind.name, key]) for key in self.rows) - len(self.seen)

    @property
    def rows(self) -> list[str]:
        """The watched rows."""
        return list(self.traffic.rows[self.kind.name])

    def finish(self, patience_s: float) -> None:
        """Ask until all were seen, or the patience is over.

        Raises:
            BenchmarkError: Watching failed; its times would be too good.
        """
        deadline = time.monotonic() + patience_s
        while self.unseen and self._failure is None and time.monotonic() < deadline:
            time.sleep(0.05)
        self._ending.set()
        self._thread.join()
        if self._failure is not None:
            raise BenchmarkError(f"watching failed: {self._failure!r}")

    def _run(self) -> None:
        serving = self.settings.serving
        connection = http.client.HTTPConnection(serving.host, serving.port, timeout=30)
        try:
            while not self._ending.is_set():
                self._ask(connection)
                self._ending.wait(self.kind.poll_s)
        except BaseException as error:
            self._failure = error
        finally:
            connection.close()

    def _ask(self, connection: http.client.HTTPConnection) -> None:
        rows = self.traffic.rows[self.kind.name]
        body = orjson.dumps({"ad_ids": list(rows.values())})
        connection.request("POST", "/v1/ads:batchGet", body, {"content-type": "application/json"})
        answer = connection.getresponse()
        said = answer.read()
        at = time.perf_counter()
        if answer.status != 200:
            raise BenchmarkError(f"ads answer {answer.status}: {said[:200]!r}")
        for row, document in zip(rows, orjson.loads(said)["documents"], strict=True):
            self._note(row, document[self.kind.family][self.kind.field], at)

    def _note(self, row: str, value: Any, at: float) -> None:
        """A row's watched value as it was answered: it shows the newest change that wrote it, and those before."""
        changes = self.traffic.watched[self.kind.name, row]
        done = self._left[row]
        shown = next(
            (
                place
                for place in range(len(changes) - 1, done - 1, -1)
                if self.kind.value(changes[place].number) == value
            ),
            None,
        )
        if shown is not None:
            self.seen += [(one.at, at - one.at) for one in changes[done : shown + 1]]
            self._left[row] = shown + 1


WATCHABLE = {
    "ads": "SELECT ad_id, ad_id FROM ads ORDER BY md5(ad_id) LIMIT %s",
    "pins": """
        SELECT pin_id, min(ad_id) FROM ads GROUP BY pin_id HAVING count(*) <= 5 ORDER BY md5(pin_id) LIMIT %s
    """,
    "campaigns": """
        SELECT campaign_id, min(ad_id) FROM ads JOIN ad_groups USING (ad_group_id)
        GROUP BY campaign_id HAVING count(*) <= 50 ORDER BY md5(campaign_id) LIMIT %s
    """,
}
"""Table → rows that few ads are joined of, and one of these ads."""


def watched_rows(settings: Settings, table: str) -> dict[str, str]:
    """Row → an ad that is joined of it, of those that are watched."""
    with database.connected(settings) as connection:
        return dict(connection.execute(WATCHABLE[table], [WATCHED]).fetchall())


# ------------------------------------------------------------------------------------------------ the oracle


def compare(settings: Settings, ads: int) -> tuple[int, int, int]:
    """How many served documents are wrong, how many are missing, of how many: against PostgreSQL's own rows."""
    rows = source_rows(settings)
    keys = generator.keys("ads", pa.array(range(ads)).to_numpy())
    wrong = missing = 0
    for part in (keys[start : start + AT_ONCE] for start in range(0, len(keys), AT_ONCE)):
        answer = client.request(
            harness.serving_url(settings), "/v1/ads:batchGet", body={"ad_ids": list(part)}
        ).body["documents"]
        wanted = {family: oracle(family, rows, part) for family in joined.INPUTS}
        for place, (key, found) in enumerate(zip(part, answer, strict=True)):
            if key not in rows["ads"]:
                wrong += not found.get("is_missing", False)
            elif found.get("is_missing"):
                missing += 1
            else:
                wrong += any(found[family] != wanted[family][place] for family in joined.INPUTS)
    return wrong, missing, len(keys)


def source_rows(settings: Settings) -> dict[str, dict[str, Values]]:
    """Every row of the database, and over it what was ever sent to the topic, in the order of its versions."""
    rows: dict[str, dict[str, Values]] = {}
    with database.connected(settings) as connection:
        for table in TABLES.values():
            with connection.cursor(row_factory=dict_row) as cursor:
                cursor.execute(sql.SQL("SELECT * FROM {}").format(sql.Identifier(table.name)))
                rows[table.name] = {row[table.key]: row for row in cursor}
    sent = (settings.home / SENT_FILE).read_bytes().splitlines()
    by_topic = [Update(*orjson.loads(line)) for line in sent]
    for update in sorted(by_topic, key=lambda one: one.version):
        rows[update.table][update.key] |= update.values or {}
    for table in TABLES.values():
        times = [column.name for column in table.columns if column.type == TIME]
        for row in rows[table.name].values():
            row |= {name: row.get(name) and round(row[name].timestamp() * 1000) for name in times}
    return rows


def oracle(family: str, rows: Mapping[str, Mapping[str, Values]], ads: Sequence[str]) -> list[Values]:
    """The documents of a family, joined here by following references."""
    whole = []
    for ad in ads:
        parts: dict[str, Values] = {}
        for given in joined.INPUTS[family]:
            key = ad if given.by is None else parts.get(given.by[0], {}).get(given.by[1])
            if key is not None and (row := rows[given.table].get(key)) is not None:
                names = {column.name for table, column in joined.columns(family) if table.name == given.table}
                parts[given.table] = {name: row[name] for name in names} | {"is_there": True, "stand": 1}
        whole.append({joined.KEY: ad, **parts})
    made = handlers.run(family, joined.joined(family, whole)).to_pylist()
    return [orjson.loads(orjson.dumps(document)) for document in made]


def refused(settings: Settings) -> int:
    """How many change records the updater refused, and how many transactions still wait."""
    url = f"http://{settings.ads.host}:{settings.ads.port}/metrics"
    with urllib.request.urlopen(url, timeout=30) as answer:
        lines = answer.read().decode().splitlines()
    counted = [
        line for line in lines if line.startswith("tidemark_ads_records_total{") and '"refused"' in line
    ]
    with looking(settings) as connection:
        held = len(updater.held(connection))
    return held + sum(int(float(line.rpartition(" ")[2])) for line in counted)
