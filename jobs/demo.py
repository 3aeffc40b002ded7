"""The demo: real purchases become tables, a model, a base and an answer; then one live purchase changes the answer, and
one live change of an ads account (`demo_ads`) another one. Timelines are held against the source (`demo_timelines`).

Here: the story and its checks. The check of the scores solves for the user's vector by itself, from the base's mapped
files and the events as served, and shares no code with `pipelines.recommend`. Whatever the demo starts, it stops.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs import client, console, demo_ads, demo_timelines, log_files, processes
from jobs.story import Check, DemoError, headline, say
from pipelines import preflight
from pipelines.errors import TidemarkError
from pipelines.settings import ROOT, Settings

if TYPE_CHECKING:
    from pipelines.indexing.delta import Marker

USERS = ("1", "7", "8", "13", "18")
K = 10
LEAST_CHANGED = 3
PINS_TRIED = 5
NEEDED_BYTES = 3 * 2**30
TOLERANCE = 1e-6


def run(settings: Settings, once: bool, fraction: float = 1.0) -> int:
    """The whole demo; the exit code."""
    with _interruptible(), contextlib.ExitStack() as started:
        try:
            preflight.check(settings, needed_bytes=NEEDED_BYTES)
            _require_ports(settings)
            prepare(settings, fraction)
            usual = processes.usual(processes.local(settings))
            names = processes.up(processes.supervisor(settings), usual, say)
            started.callback(_stop, settings, names)
            checks = show(settings, fraction)
        except KeyboardInterrupt:
            say("interrupted: stopping what the demo started")
            return 130
        holds = all(check.holds for check in checks)
        if once:
            return 0 if holds else 1
        _print_addresses(settings)
        _await_interrupt(settings, names)
    return 0 if holds else 1


# ------------------------------------------------------------------------------------------ starting and stopping


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """SIGTERM ends the demo as Ctrl-C does; and Ctrl-C does so even where a shell began it in the background."""

    def interrupt(signum: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop(settings: Settings, names: list[str]) -> None:
    """Stops what this demo started, and lets no second Ctrl-C leave half of it running."""
    if names:
        with contextlib.suppress(KeyboardInterrupt), processes.uninterrupted():
            headline("Stopping")
            chosen = processes.choose(processes.local(settings), names)
            processes.down(processes.supervisor(settings), chosen, say)


def _require_ports(settings: Settings) -> None:
    """Before minutes of work: the ports that the processes will need."""
    keeper = processes.supervisor(settings)
    for process in processes.usual(processes.local(settings)):
        if keeper.status(process).state in ("stopped", "crashed"):
            processes.require_free_ports(process)


def _await_interrupt(settings: Settings, names: list[str]) -> None:
    """Stays until Ctrl-C, and says so once if a process ends."""
    keeper, known = processes.supervisor(settings), processes.local(settings)
    missed: set[str] = set()
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            time.sleep(2)
            for process in known:
                record = processes.Record.read(keeper.pid_file(process.name))
                if (
                    process.name in names
                    and process.name not in missed
                    and (record is None or not processes.is_alive(record))
                ):
                    missed.add(process.name)
                    say(
                        f"{process.name} ended; see {keeper.log_file(process.name)}; `tidemark up` starts it again"
                    )


def _print_addresses(settings: Settings) -> None:
    from jobs.cli.processes import urls

    serving = f"http://{settings.serving.host}:{settings.serving.port}"
    rows = [(name, url) for name, url in urls(settings).items()]
    console.table("Open", ("", ""), [*rows, ("an answer", f"{serving}/v1/users/{USERS[0]}/recommendations")])
    console.say("Try `tidemark status`, `tidemark query recommendations 8`, `tidemark send --help`.")
    console.say("Ctrl-C stops everything that the demo started.")


# ------------------------------------------------------------------------------------------ history to a base


def prepare(settings: Settings, fraction: float) -> None:
    """The load and the build, in a process of their own, unless they are done."""
    if is_prepared(settings, fraction):
        headline("History is loaded and its bases are published: nothing to build")
        return
    headline("From history to a served base (a few minutes)")
    log = settings.paths.logs / "demo.log"
    token = f"prepare:{uuid.uuid4().hex}"
    environment = {**os.environ, **settings.environment, processes.TOKEN: token}
    record = None
    try:
        with processes.uninterrupted(), log_files.kept("demo", log) as errors:
            child = subprocess.Popen(
                [sys.executable, "-m", "jobs.demo", str(fraction)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=environment,
                cwd=ROOT,
                text=True,
                start_new_session=True,
            )
            began = processes.start_time(child.pid) or ""
            record = processes.Record(
                "prepare", child.pid, began, processes.boot_id(), token, (), time.time()
            )
        said = _follow(child)
        code = child.wait()
    finally:
        if record is not None:
            with processes.uninterrupted():
                processes.supervisor(settings).sweep(record)
    if code != 0 or said is not None:
        raise DemoError(
            said or "the load or the build ended",
            where=str(log),
            remedy="the log says why; then run the demo again",
        )


def _follow(child: subprocess.Popen[str]) -> str | None:
    """Shows the child's progress; gives what it says went wrong."""
    assert child.stdout is not None
    began = time.monotonic()
    for line in child.stdout:
        try:
            said = json.loads(line)
        except ValueError:
            continue
        if "error" in said:
            return str(said["error"])
        console.say(f"  {time.monotonic() - began:4.0f} s  {said['say']}")
    return None


def is_prepared(settings: Settings, fraction: float) -> bool:
    """Whether every index serves a base of this code, and it has the real input where the index is made of that."""
    from pipelines.contracts import PIN_UPDATES, USER_INTERACTIONS
    from pipelines.indexing.spec import lineage
    from pipelines.indexing.versions import Versions
    from pipelines.indices import INDICES, topics
    from pipelines.ingest.load import qualified

    loads = {c.topic: qualified(c, load_name(fraction)) for c in (PIN_UPDATES, USER_INTERACTIONS)}
    for spec in INDICES.values():
        versions = Versions(settings.paths.indices, spec.name)
        pointer = versions.pointer()
        manifest = next((m for m in versions.manifests() if pointer and m.version == pointer.version), None)
        needed = {loads[topic] for topic in topics(spec) & loads.keys()}
        if manifest is None or manifest.lineage != lineage(spec) or not needed <= manifest.cut.loads:
            return False
    return True


def load_name(fraction: float) -> str:
    """The name of the load, as `complete_journey` gives it."""
    from pipelines.ingest import complete_journey

    return complete_journey.NAME if fraction == 1 else f"{complete_journey.NAME}-{fraction:g}"


def _prepare_here(settings: Settings, fraction: float, say: Callable[[str], None]) -> None:
    """Load and build in this process, with one Spark session for both."""
    from jobs import build as builder
    from pipelines import jars
    from pipelines.ingest import complete_journey
    from pipelines.spark import session

    for group in jars.NEEDED:
        jars.resolve(group, settings, say)
    say("starting Spark")
    spark = session(settings, "tidemark demo")
    say("loading purchases, products and households into Iceberg tables")
    loaded = complete_journey.load_all(spark, settings, fraction)
    for result in (loaded.interactions, loaded.pins):
        state = "was there already" if result.is_repeat else "loaded"
        say(f"{result.table}: {result.rows:,} rows {state}")
        for warning in result.warnings:
            say(f"note: {warning}")

    def show(step: builder.Step) -> None:
        if step.state == "running":
            say(f"{step.name} …")
        else:
            say(
                f"{step.name}: {step.state}"
                + (f" in {step.seconds:.0f} s" if step.seconds is not None else "")
            )

    report = builder.build(settings, report=show)
    if (problem := report.problem()) is not None:
        raise problem


# ------------------------------------------------------------------------------------------ the answer, and its change


def show(settings: Settings, fraction: float) -> list[Check]:
    """Asks, sends one purchase, asks again; prints both answers and what must hold."""
    headline("What became of every row")
    checks = account(settings, fraction)
    base = f"http://{settings.serving.host}:{settings.serving.port}"
    _await_ready(base)
    user, pin = choose(settings, base)
    before = _recommend(base, user)
    headline(f"What user {user} is recommended before")
    _print_answer(before)

    event = {
        "user_id": user,
        "event_id": f"demo-{uuid.uuid4().hex[:12]}",
        "pin_id": pin["pin_id"],
        "action": "purchase",
        "event_time": datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "quantity": 1,
        "value_usd_micros": (pin.get("offer") or {}).get("price_usd_micros") or 1_000_000,
    }
    title = pin["catalogue"]["title"]
    headline(f"User {user} buys pin {pin['pin_id']}, {title} ({pin['catalogue']['category']}), through Kafka")
    sent_at = time.time()
    token, offsets = _send(settings, event)
    after = _recommend(base, user, token)
    freshness_s = time.time() - sent_at
    events = all_events(base, user, token)

    headline(f"What user {user} is recommended {freshness_s:.1f} s later")
    _print_answer(after, {item["pin_id"] for item in before.body["recommendations"]})
    epoch = find_epoch(settings, offsets)
    say(f"it stands on {after.headers['tidemark-base-version']}")
    say(f"epoch {epoch}" if epoch else "the epoch was not found")
    checks += compare(settings, before, after, events, event, freshness_s, epoch)
    checks += demo_ads.show(settings, base)
    checks += demo_timelines.show(settings, base, fraction)

    headline("What must hold")
    for check in checks:
        say(f"{'✓' if check.holds else '✗'} {check.what}: {check.found}")
    return checks


def _await_ready(base: str, timeout_s: float = 120.0) -> None:
    deadline = time.monotonic() + timeout_s
    while (answer := client.request(base, "/readyz", is_error_an_answer=True)).status != 200:
        if time.monotonic() > deadline:
            raise DemoError(
                f"serving is not ready: {answer.body}", remedy="see `tidemark status` and its log"
            )
        time.sleep(0.2)


def choose(settings: Settings, base: str) -> tuple[str, dict[str, Any]]:
    """A user with a history, and a popular pin of another category whose purchase should change the answer visibly.

    Which one does is worked out beforehand by the demo's own solve, for a few users and pins; the first that should
    change more than is asked for is taken, else the one that should change most.

    Raises:
        DemoError: there is none.
    """
    popular = client.request(base, f"/v1/users/{uuid.uuid4().hex}/recommendations", {"k": 100}).body[
        "recommendations"
    ]
    best: tuple[int, str, dict[str, Any]] | None = None
    items: Items | None = None
    for user in USERS:
        answer = _recommend(base, user)
        if answer.body["basis"]["kind"] != "folded":
            continue
        items = items or Items(_pins_base(settings, answer))
        events = all_events(base, user)
        first = {item["pin_id"] for item in answer.body["recommendations"]}
        known = first | {event["pin_id"] for event in events}
        categories = {item["catalogue"]["category"] for item in answer.body["recommendations"]}
        others = [
            p for p in popular if p["pin_id"] not in known and p["catalogue"]["category"] not in categories
        ]
        for pin in others[:PINS_TRIED]:
            bought = {
                "pin_id": pin["pin_id"],
                "action": "purchase",
                "event_time": datetime.now(UTC).isoformat(),
            }
            changed = len(set(items.first(K, [bought, *events])) - first)
            if best is None or changed > best[0]:
                best = (changed, user, pin)
            if changed > LEAST_CHANGED:
                return user, pin
    if best is None:
        raise DemoError(
            "no user has a history in what is served", remedy="run `tidemark build`, then the demo again"
        )
    return best[1:]


def _pins_base(settings: Settings, answer: client.Answer) -> Path:
    """The folder of the base of pins that an answer stands on."""
    versions = dict(part.split("=") for part in answer.headers["tidemark-base-version"].split(", "))
    return settings.paths.indices / "pins" / versions["pins"]


def _recommend(base: str, user: str, min_position: str | None = None) -> client.Answer:
    path = f"/v1/users/{client.quote(user)}/recommendations"
    return client.request_at(base, path, {"k": K, "min_position": min_position})


def all_events(base: str, user: str, min_position: str | None = None) -> list[dict[str, Any]]:
    """Every event of a user over HTTP, the newest first."""
    found: list[dict[str, Any]] = []
    cursor = None
    while True:
        params = {"limit": 1000, "cursor": cursor, "min_position": min_position}
        body = client.request_at(base, f"/v1/users/{client.quote(user)}/events", params).body
        found += body["events"]
        cursor = body["next_cursor"]
        if cursor is None:
            return found


def _send(settings: Settings, event: dict[str, Any]) -> tuple[str, dict[str, dict[int, int]]]:
    """Sends the event; its position as a token, and as offsets by topic and partition."""
    from pipelines.contracts import USER_INTERACTIONS
    from pipelines.ingest.producer import Producer

    with Producer(settings) as producer:
        position = producer.send_objects(USER_INTERACTIONS, [event])
    return position.token(), {topic: dict(offsets) for topic, offsets in position.topics.items()}


def _print_answer(answer: client.Answer, before: set[str] | None = None) -> None:
    items = answer.body["recommendations"]
    rows = []
    for place, item in enumerate(items, 1):
        is_new = "" if before is None or item["pin_id"] in before else "new"
        title, category = item["catalogue"]["title"], item["catalogue"]["category"]
        rows.append((place, item["pin_id"], f"{item['score']:.4f}", title, category, is_new))
    columns = ("", "pin", "score", "title", "category", "")
    console.table(
        "",
        columns if before is not None else columns[:-1],
        rows if before is not None else [r[:-1] for r in rows],
    )


def find_epoch(settings: Settings, offsets: dict[str, dict[int, int]]) -> str | None:
    """The epoch of the hot stream that holds the record just before these offsets, and how long its stages took."""
    from pipelines.indexing import delta
    from pipelines.indexing.spec import lineage
    from pipelines.indices import INDICES

    spec = INDICES["user_events"]
    wanted = [(topic, p, offset - 1) for topic, parts in offsets.items() for p, offset in parts.items()]
    for marker in reversed(delta.markers(delta.table_path(settings.paths.delta, spec.name, lineage(spec)))):
        for topic, partition, offset in wanted:
            begin = marker.start.topics.get(topic, {}).get(partition)
            end = marker.end.topics.get(topic, {}).get(partition)
            if begin is not None and end is not None and begin <= offset < end:
                return f"{marker.name}: {marker.records} record(s); {_stages(marker)}"
    return None


def _stages(marker: Marker) -> str:
    """How long each stage of an epoch took, from the broker's time of its first record on."""
    names = ("waited for its trigger", "decoded", "transformed")
    times = (marker.broker_time_min_ms, marker.started_at_ms, marker.decoded_at_ms, marker.transformed_at_ms)
    known = [time_ms for time_ms in times if time_ms is not None]
    spans = [later - earlier for earlier, later in itertools.pairwise(known)]
    return ", ".join(f"{name} {span} ms" for name, span in zip(names, spans, strict=False))


# ------------------------------------------------------------------------------------------ what must hold


def compare(
    settings: Settings,
    before: client.Answer,
    after: client.Answer,
    events: list[dict[str, Any]],
    event: dict[str, Any],
    freshness_s: float,
    epoch: str | None,
) -> list[Check]:
    """The checks of the answer that the purchase changed."""
    versions = before.headers["tidemark-base-version"], after.headers["tidemark-base-version"]
    first = [item["pin_id"] for item in before.body["recommendations"]]
    now = [item["pin_id"] for item in after.body["recommendations"]]
    found = [e for e in events if e["event_id"] == event["event_id"]]
    changed = set(now) - set(first) - {event["pin_id"]}
    return [
        Check("the base is the same", versions[0] == versions[1], versions[1]),
        Check(
            "the bought pin was not among the first ten, and is in the user's events",
            event["pin_id"] not in first and [e["pin_id"] for e in found] == [event["pin_id"]],
            f"{len(found)} event, {freshness_s:.1f} s after the producer's call",
        ),
        Check(
            f"at least {LEAST_CHANGED} others of the first ten changed",
            len(changed) >= LEAST_CHANGED,
            f"{len(changed)} are new",
        ),
        _scores(settings, after, events),
        Check("the epoch that did it is known", epoch is not None, (epoch or "none").partition(":")[0]),
    ]


def _scores(settings: Settings, after: client.Answer, events: list[dict[str, Any]]) -> Check:
    what = "the served scores equal an independent solve in numpy"
    items = Items(_pins_base(settings, after))
    exact = items.scores(events)
    served = [(item["pin_id"], item["score"]) for item in after.body["recommendations"]]
    off = [
        abs(score - exact[pin]) / max(1e-9, abs(exact[pin])) if pin in exact else 1.0 for pin, score in served
    ]
    best = sorted(exact, key=lambda pin: (-exact[pin], pin.encode()))[: len(served)]
    same = len(set(best) & {pin for pin, _ in served})
    holds = (
        len(served) == K
        and max(off) <= TOLERANCE
        and after.body["basis"]["model_id"] == items.als["model_id"]
    )
    return Check(
        what,
        holds,
        f"greatest difference {max(off):.1e}; {same} of {K} are the exact first {K} of {len(exact):,}",
    )


class Items:
    """The item vectors and what may be recommended, read from the mapped files of a base of pins."""

    def __init__(self, base: Path) -> None:
        import numpy as np

        self.base = base
        self.manifest = json.loads((base / "manifest.json").read_text())
        self.als = self.manifest["parameters"]["als"]
        vectors = self._columns("embedding", "payload.vector")
        self.place = {key.decode(): row for row, (key, _) in enumerate(vectors)}
        self.vectors = np.array([vector for _, vector in vectors], np.float64)
        self.gram = self.vectors.T @ self.vectors
        known = {key.decode() for (key,) in self._columns("catalogue")}
        offers = self._columns("offer", "payload.is_available")
        self.allowed = known - {key.decode() for key, is_available in offers if is_available is False}

    def _columns(self, family: str, *names: str) -> list[tuple[Any, ...]]:
        import pyarrow as pa

        found: list[tuple[Any, ...]] = []
        for shard in self.manifest["shards"]:
            with pa.memory_map(str(self.base / shard["name"] / f"rows-{family}.arrow")) as file:
                rows = pa.ipc.open_file(file).read_all()
                found += zip(*(rows.column(name).to_pylist() for name in ("key", *names)), strict=True)
        return found

    def scores(self, events: list[dict[str, Any]]) -> dict[str, float]:
        """The score of each pin that may be recommended: implicit ALS, solved for one user; events newest first.

        With item vectors Y and strengths s (an action's weight times its recency relative to the newest event that has
        one, summed by pin): (Y'Y + Y' diag(a|s|) Y + l I) x = Y' diag(1 + a|s|) p, where p is 1 where s > 0; scores are
        Y x.
        """
        import numpy as np

        als, y = self.als, self.vectors
        taken = [event for event in events if als["actions"].get(event["action"])][: als["max_events"]]
        times = [datetime.fromisoformat(e["event_time"]).timestamp() * 1000 for e in taken]
        strengths: dict[str, float] = {}
        for event, at in zip(taken, times, strict=True):
            recency = als["floor"] + (1 - als["floor"]) * 2 ** (-(times[0] - at) / als["half_life_ms"])
            weight = als["actions"].get(event["action"], 0.0)
            strengths[event["pin_id"]] = strengths.get(event["pin_id"], 0.0) + weight * recency
        left = self.gram + als["lambda"] * np.eye(y.shape[1])
        right = np.zeros(y.shape[1])
        for pin, strength in strengths.items():
            if pin in self.place:
                vector, extra = y[self.place[pin]], als["alpha"] * abs(strength)
                left += extra * np.outer(vector, vector)
                right += (1 + extra) * (strength > 0) * vector
        scores = (y @ np.linalg.solve(left, right)).tolist()
        done = {
            e["pin_id"] for e in events if e["action"] == "purchase" or als["actions"].get(e["action"], 0) < 0
        }
        allowed = self.allowed - done
        return {pin: scores[row] for pin, row in self.place.items() if pin in allowed}

    def first(self, k: int, events: list[dict[str, Any]]) -> list[str]:
        """The ``k`` pins of greatest score."""
        scores = self.scores(events)
        return sorted(scores, key=lambda pin: (-scores[pin], pin.encode()))[:k]


def account(settings: Settings, fraction: float) -> list[Check]:
    """Prints the account, and holds it against the source's own row counts."""
    import pyarrow.parquet as pq

    from jobs.cli.data import print_accounts, read_accounts
    from pipelines.ingest import complete_journey

    accounts = read_accounts(settings)
    print_accounts(accounts)
    checks = []
    for source, name in (("transactions", "raw.user_interactions"), ("products", "raw.pin_updates")):
        loaded = _rows_of_load(settings, name, load_name(fraction))
        whole = pq.read_metadata(complete_journey.folder() / f"{source}.parquet").num_rows
        rows = whole if fraction == 1 else loaded  # of a share, the source does not tell the count
        of = accounts.get(name)
        refused = sum(of["refused"].values()) if of else 0
        holds = (
            of is not None
            and rows == loaded
            and of["rows"] == of["accepted"] + refused
            and of["rows"] >= rows
        )
        found = (
            "no account"
            if of is None
            else f"{rows:,} = {loaded:,}; {of['rows']:,} = {of['accepted']:,} + {refused:,}"
        )
        if of is not None and of["rows"] > rows:
            found += f" (with {of['rows'] - rows:,} live ones)"
        checks.append(Check(f"{source}: rows in the source = in raw; raw = accepted + refused", holds, found))
    return checks


def _rows_of_load(settings: Settings, name: str, load: str) -> int:
    """The rows of a load in a raw table. Its commit counted them, but commits expire."""
    from pyiceberg.expressions import EqualTo

    from pipelines import lake

    table = lake.open_table(settings, name)
    full_id = f"{name.partition('.')[2]}:{load}"
    is_of_load = EqualTo("load_id", full_id)  # type: ignore[call-arg,arg-type]  # its stubs know only JSON
    return table.scan(row_filter=is_of_load).count() if table is not None else 0


def _child() -> int:
    """The load and the build, telling on standard output how they go."""
    from pipelines import settings as settings_module

    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def tell(key: str, text: str) -> None:
        print(json.dumps({key: text}), file=out, flush=True)

    try:
        _prepare_here(settings_module.load(), float(sys.argv[1]), lambda text: tell("say", text))
    except TidemarkError as error:
        tell("error", str(error))
        return 1
    except Exception as error:  # its trace goes to the log
        tell("error", console.first_line(error))
        raise
    return 0


if __name__ == "__main__":
    sys.exit(_child())
