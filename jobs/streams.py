"""The streaming process, `python -m jobs.streams`: one Spark session that hosts the archive and every hot stream.

Here: starting and stopping each stream as the switchboard (`jobs.controls`) asks, trying again when one fails, saying
how each is doing, and copying epochs into the lake. Not here: what a stream computes (`pipelines`).

Each stream has a thread of its own, so that one that fails, or waits for a broker that is away, holds up no other.

A process feeds the lineages of the code that it runs. After the checkout was edited, the process that is started is
still that of the code which feeds what is served, from the copy that was kept of it (`jobs.code`). With `--beside NAME
--index INDEX` it hosts the hot streams of these indices alone: those of another lineage, beside the others.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from jobs.controls import ENDED, RUNNING, STOPPED, Controls

if TYPE_CHECKING:
    from pyspark.sql import SparkSession
    from pyspark.sql.streaming import StreamingQuery

    from jobs.code import Kept
    from pipelines.indexing.streaming import HotStream, HotStreamRun
    from pipelines.settings import Settings

log = logging.getLogger("tidemark.streams")

POLL_S = 0.5
COPY_EVERY_S = 60.0
LONGEST_PAUSE_S = 30.0
HEALTHY_AFTER_S = 60.0
GOODBYE_S = 30.0
FEEDING_EVERY_S = 2.0


class Hosted(NamedTuple):
    """A stream by name, and how its query is begun (each time anew: from its checkpoint, or as a new incarnation).

    `feeds` gives the folders of the deltas that it feeds; when that changes, its query is begun anew, and without
    any it has ended. The archive feeds none: None.
    """

    name: str
    begin: Callable[[], StreamingQuery]
    feeds: Callable[[], tuple[Path, ...] | None] = lambda: None


class Runner(threading.Thread):
    """Keeps one stream as it is wanted, until told to end."""

    def __init__(self, hosted: Hosted, board: Controls, ending: threading.Event) -> None:
        super().__init__(name=f"stream-{hosted.name}", daemon=True)
        self.hosted, self.board, self.ending = hosted, board, ending
        self.query: StreamingQuery | None = None
        self.fed: tuple[Path, ...] | None = None
        self.failures = 0
        self.state: dict[str, Any] = {"state": "starting", "detail": ""}

    def run(self) -> None:
        while not self.ending.is_set():
            pause = POLL_S
            try:
                self._turn()
            except Exception as error:  # whatever it is, this stream alone waits and tries again
                self.failures += 1
                pause = min(2.0 ** (self.failures - 1), LONGEST_PAUSE_S)
                detail = first_line(error)
                log.warning(
                    "%s failed (%d), again in %.0f s: %s", self.hosted.name, self.failures, pause, detail
                )
                log.debug("%s", self.hosted.name, exc_info=error)
                self.state = {"state": "failing", "detail": detail, "failures": self.failures}
                self._forget_query()
            self.ending.wait(pause)
        self._end_query()

    def _turn(self) -> None:
        if not self.board.should_run(self.hosted.name):
            self._end_query()
            self.state = {"state": STOPPED, "detail": "by request"}
            return
        fed = self.hosted.feeds()
        if fed != self.fed:
            self._end_query()
            self.fed = fed
        if fed == ():
            self.state = {"state": ENDED, "detail": "other lineages have taken over"}
            return
        if self.query is None:
            self.state = {**self.state, "state": "starting" if not self.failures else "failing"}
            self.query = self.hosted.begin()
            self.began = time.monotonic()
            log.info("%s runs", self.hosted.name)
        if not self.query.isActive:
            raise self.query.exception() or RuntimeError("the query ended by itself")
        if time.monotonic() - self.began > HEALTHY_AFTER_S:
            self.failures = 0
        self.state = {"state": RUNNING, "detail": "", "failures": self.failures, **progress(self.query)}

    def _end_query(self) -> None:
        if self.query is not None:
            log.info("%s stops", self.hosted.name)
            with contextlib.suppress(Exception):
                self.query.stop()
        self._forget_query()

    def _forget_query(self) -> None:
        self.query = None


def progress(query: StreamingQuery) -> dict[str, Any]:
    """What a glance at the newest epoch shows."""
    last = query.lastProgress
    if last is None:
        return {}
    return {
        "epoch": last["batchId"],
        "rows": last["numInputRows"],
        "duration_ms": dict(last["durationMs"]).get("triggerExecution"),
        "at": last["timestamp"],
    }


def first_line(error: BaseException) -> str:
    """The telling line of an error, without Java's and Python's traces."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    causes = [line for line in lines if line.startswith(("Caused by:", "pipelines."))]
    return f"{type(error).__name__}: {(causes or lines or ['no message'])[-1 if causes else 0][:400]}"


# ------------------------------------------------------------------------------------------------ which streams


def is_running(runner: Runner) -> bool:
    return runner.state["state"] == RUNNING


def stream_names() -> list[str]:
    """The archive, then every hot stream that is declared."""
    from pipelines.indices import STREAMS
    from pipelines.ingest import archive

    return [archive.STREAM, *STREAMS]


def hosted_streams(
    spark: SparkSession, settings: Settings, indices: Collection[str] | None = None
) -> list[Hosted]:
    """The streams of this process. Beginning one asks the broker for its topics, and makes them if they are missing.

    Args:
        indices: Feed these alone, and host no archive; None: everything.
    """
    from pipelines.contracts import CONTRACTS
    from pipelines.indexing import delta, lineages
    from pipelines.indexing.keyed import KeyedRun
    from pipelines.indexing.spec import IndexSpec, lineage
    from pipelines.indexing.streaming import HotStreamRun
    from pipelines.indices import INDICES, KEYED, STREAMS, as_known, as_known_now, state
    from pipelines.ingest import archive, broker
    from pipelines.ingest.evolution import Known

    known = Known(settings)

    def path(spec: IndexSpec) -> Path:
        return delta.table_path(settings.paths.delta, spec.name, lineage(spec))

    def hot(stream: HotStream, specs: Sequence[IndexSpec]) -> Hosted:
        warmed: list[bool] = []
        looked_up = state(settings, stream.name)
        is_archived = all(topic in CONTRACTS for topic in stream.topics)

        def live() -> list[IndexSpec]:
            return [spec for spec in specs if not lineages.order(path(spec)).is_ended]

        def begin() -> StreamingQuery:
            is_keyed = stream.name in KEYED
            decoding, require_same_fields = (
                as_known_now(stream, known) if is_keyed else (as_known(stream, known), lambda: None)
            )
            run = (KeyedRun if is_keyed else HotStreamRun)(
                decoding,
                live(),
                deltas=settings.paths.delta,
                checkpoints=settings.paths.checkpoints,
                state=looked_up,
            )
            topic_ids = broker.ensure_topics(settings, stream.topics)
            require_same_topics = broker.sameness(settings, topic_ids)

            def require_same() -> None:
                require_same_topics()
                require_same_fields()

            if not warmed and not is_keyed:
                warm_up(spark, run)
                warmed.append(True)
            if isinstance(run, KeyedRun):
                run.state_partitions = settings.streams.keyed_partitions
                run.times = functools.partial(broker.times, settings)
                run.retention_ms = settings.kafka.retention_hours * 3_600_000
            return run.start(
                spark,
                servers=settings.kafka.bootstrap_servers,
                topic_ids=topic_ids,
                partitions=settings.kafka.partitions,
                trigger_ms=settings.streams.keyed_trigger_ms if is_keyed else settings.streams.trigger_ms,
                max_rows=settings.streams.max_rows_per_epoch,
                earliest=broker.earliest(settings, topic_ids),
                max_backfill_rows=settings.streams.max_backfill_rows_per_epoch,
                archive=functools.partial(archive.records_in, spark) if is_archived else None,
                require_same_topics=require_same,
            )

        return Hosted(stream.name, begin, lambda: tuple(path(spec) for spec in live()))

    chosen = [spec for spec in INDICES.values() if indices is None or spec.name in indices]
    fed = [(stream, [spec for spec in chosen if stream.name in spec.streams]) for stream in STREAMS.values()]
    hosted = [hot(stream, specs) for stream, specs in fed if specs or indices is None]
    archived = [Hosted(archive.STREAM, lambda: archive.start(spark, settings))]
    return hosted if indices is not None else archived + hosted


def warm_up(spark: SparkSession, run: HotStreamRun) -> None:
    """Takes the contract's own examples through decoding and transforms, and keeps nothing.

    The first time costs seconds (plans are compiled, Python workers started): better before a stream says that it runs
    than in its first epoch.
    """
    import pyarrow as pa

    from pipelines.contracts import RECORD, contract_of

    for topic in run.stream.topics:
        values = [json.dumps(example).encode() for example in contract_of(topic).examples]
        records = {
            field.name: pa.array(values if field.name == "value" else [None] * len(values), field.type)
            for field in RECORD
        }
        records["broker_time"] = pa.array(
            [4_000_000_000_000_000] * len(values), RECORD.field("broker_time").type
        )
        rows = run.stream.decode(pa.table(records, schema=RECORD))
        for spec in run.specs:
            run.facts(spec, rows, spark)


# ------------------------------------------------------------------------------------------------ the process


def main() -> int:
    """Runs until SIGTERM or SIGINT; 1 when Spark itself is gone, so that a supervisor starts the process again."""
    from jobs import code, lineages
    from pipelines import interpreter, logs
    from pipelines import settings as settings_module
    from pipelines.contracts import payload_files
    from pipelines.spark import session

    options = _options()
    name = options.beside or "streams"
    logs.configure(name)
    ending = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ending.set())
    settings = settings_module.load()
    payload_files.declared()  # a schema that cannot hold is told now, and not by the first epoch
    # Also before there are threads: CPython 3.11 cannot build two syntax trees at a time.
    if options.beside is None and (kept := lineages.code_of_served(settings)) is not None:
        log.info("what is served is fed by other code: handing over to %s", kept.folder)
        hand_over(kept)
    held = code.hold()
    log.info("the code of this process is kept as %s", code.keep(settings).name)
    stand_back(settings.streams.nice)
    board = Controls(settings.paths.run, name)
    spark = session(settings, f"tidemark {name}", has_small_jobs=True)
    chosen = options.index if options.beside else None
    runners = [Runner(hosted, board, ending) for hosted in hosted_streams(spark, settings, chosen)]
    interpreter.take_turns()  # while the archive decides a large epoch, hot streams must go on
    interpreter.collect_rarely()
    for runner in runners:
        runner.start()
    if options.beside is None:
        threading.Thread(target=_copy_epochs, args=(spark, settings, ending), daemon=True).start()
    threading.Thread(target=_say_feeding, args=(runners, name, ending), daemon=True).start()
    exit_status = 0
    while not ending.wait(POLL_S):
        board.report({runner.hosted.name: runner.state for runner in runners})
        if not is_spark_alive(spark):
            log.error("Spark is gone; this process ends")
            exit_status = 1
            ending.set()
    _say_goodbye(runners, board)
    if held:
        held.close()
    return exit_status


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m jobs.streams", description=__doc__.split("\n")[0])
    parser.add_argument("--beside", metavar="NAME", help="a process of this name, beside the main one")
    parser.add_argument("--index", action="append", default=[], help="with --beside: an index to feed")
    return parser.parse_args()


def hand_over(kept: Kept) -> None:
    """Become the streaming process of other code; this process stays what it is to whoever supervises it."""
    os.chdir(kept.folder)
    os.environ.update(kept.environment())
    os.execv(sys.executable, [sys.executable, "-m", "jobs.streams"])


def _say_feeding(runners: list[Runner], name: str, ending: threading.Event) -> None:
    """Whoever serves a lineage, or waits for one to catch up, sees by this that somebody feeds it."""
    from pipelines.indexing import lineages
    from pipelines.settings import ROOT

    while not ending.wait(FEEDING_EVERY_S):
        for path in {path for runner in runners if is_running(runner) for path in runner.fed or ()}:
            try:
                lineages.say_feeding(path, name, ROOT)
            except OSError as error:  # a full disk says so elsewhere; what is stale is said to be so
                log.warning("could not say that %s is fed: %s", path, error)


def stand_back(nice: int) -> None:
    """Let serving go first, with whatever this process starts; 0: as everybody.

    Linux weighs sessions against each other before the processes within them (autogroups), and every process of
    Tidemark has a session of its own: its group is lowered too, where there are groups. And a process that wakes up
    takes a core at once from a thread of the idle class, where it would wait for the end of another's slice.
    """
    if nice <= 0:
        return
    os.setpriority(os.PRIO_PROCESS, 0, max(nice, os.getpriority(os.PRIO_PROCESS, 0)))
    with contextlib.suppress(OSError, AttributeError):  # Linux alone has classes and groups
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        Path("/proc/self/autogroup").write_text(str(nice), encoding="ascii")


def is_spark_alive(spark: SparkSession) -> bool:
    """Whether the JVM answers, and its context was not stopped."""
    try:
        return not spark.sparkContext._jsc.sc().isStopped()
    except Exception:  # the JVM is another process: it may be gone in any way
        return False


def _say_goodbye(runners: list[Runner], board: Controls) -> None:
    """Queries end between epochs where they can; after a while the process ends all the same: epochs are made once."""
    deadline = time.monotonic() + GOODBYE_S
    for runner in runners:
        runner.join(max(0.1, deadline - time.monotonic()))
    board.forget_status()
    log.info("ended")


def _copy_epochs(spark: SparkSession, settings: Settings, ending: threading.Event) -> None:
    from jobs.epochs import FactCopy, MarkerCopy
    from jobs.minutes import MinuteCopy

    copies = {
        "epochs": MarkerCopy(spark, settings).run,
        "facts of epochs": FactCopy(spark, settings).run,
        "minutes of freshness": MinuteCopy(spark, settings).run,
    }
    while not ending.wait(COPY_EVERY_S):
        for what, copy in copies.items():
            try:
                log.debug("copied %d %s", copy(), what)
            except Exception as error:  # the next minute tries again
                log.warning("%s were not copied: %s", what, first_line(error))


if __name__ == "__main__":
    exit_code = main()
    logging.shutdown()
    # The JVM ends with its parent's pipe; waiting for Python's own threads could take as long as their last call.
    os._exit(exit_code)
