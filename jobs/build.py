"""A build, in this process: every asset from what the archive has to the published bases, with its progress.

Belongs here: running the asset job on Dagster's instance and telling what came of it, for the command line, the demo
and benchmarks. What a step does is in `assets`. A build needs no stream; only `wait` looks at what the archive commits.
"""

from __future__ import annotations

import fcntl
import os
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from jobs.processes import prepare_dagster_home
from pipelines import lake
from pipelines.backfill import Changes, Days
from pipelines.contracts import CONTRACTS
from pipelines.errors import TidemarkError
from pipelines.indexing.position import Position, merge_all
from pipelines.settings import Settings

if TYPE_CHECKING:
    import dagster as dg

POLL_S = 0.5
_QUIET = {"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}}


class BuildError(TidemarkError):
    """A build cannot begin, or waits in vain."""


class Step(NamedTuple):
    """A step of a build: an asset or a check, by its key; `state` is running, done, failed or skipped."""

    name: str
    state: str
    seconds: float | None = None
    detail: str | None = None


class BuildReport(NamedTuple):
    """What came of a build.

    Attributes:
        passed: Whether every index was published (built, where nothing was to be published).
        run_id: The run, in Dagster's pages.
        seconds: How long it took, waiting apart.
        steps: In the order in which they ended.
        built: Index → base version, of the candidates that were built.
        published: Index → base version, of the indices that were.
        failed_checks: What a check that failed says, by `<asset>:<check>`.
        failed_steps: Why a step failed, by its name.
        accounts: Raw table → what became of its rows.
    """

    passed: bool
    run_id: str
    seconds: float
    steps: tuple[Step, ...]
    built: dict[str, str]
    published: dict[str, str]
    failed_checks: dict[str, str]
    failed_steps: dict[str, str]
    accounts: dict[str, dict[str, Any]]

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        return {**self._asdict(), "steps": [step._asdict() for step in self.steps]}

    def problem(self) -> BuildError | None:
        """What went wrong as an error, None where nothing did."""
        if self.passed:
            return None
        said = [f"{name}: {why}" for name, why in {**self.failed_checks, **self.failed_steps}.items()]
        return BuildError(
            "the build failed; what was served before is still served",
            where=f"run {self.run_id}",
            remedy="; ".join(said) or "see the run in Dagster's pages",
        )


Report = Callable[[Step], None]


def build(
    settings: Settings,
    wait: Position | None = None,
    indices: Sequence[str] | None = None,
    *,
    after_curated: bool = False,
    is_published: bool = True,
    report: Report = lambda step: None,
    wait_timeout_s: float = 300.0,
) -> BuildReport:
    """Build and publish.

    Args:
        settings: Where everything is.
        wait: Wait first until the archive has passed this position.
        indices: Only these, with what they need; by default all.
        after_curated: Take the curated tables as they are, as after a backfill.
        is_published: False: build candidates and take them through their gate, and no further.
        report: Is told of every step as it begins and ends.
        wait_timeout_s: How long to wait for the archive.

    Raises:
        BuildError: The archive did not get there in time, another build runs, or there is no such index.
    """
    chosen = _chosen(indices)
    if wait is not None:
        await_archive(settings, wait, wait_timeout_s, report)
    _use_dagster_home(settings)
    with _alone(settings):
        return _run(settings, _selected(chosen, is_published, after_curated), chosen, is_published, report)


def dump(settings: Settings, report: Report = lambda step: None) -> BuildReport:
    """Dump the ads repository, and let readers see the tables that pass their audit; nothing is built of them.

    Raises:
        BuildError: Another build runs.
    """
    import dagster as dg

    from assets.repo import GROUP

    _use_dagster_home(settings)
    with _alone(settings):
        return _run(settings, dg.AssetSelection.groups(GROUP), [], True, report)


def backfill(settings: Settings, days: Days) -> list[Changes]:
    """Compute some days again, and replace them; Dagster's pages have the run and the days.

    Raises:
        BuildError: A step failed, another build runs, or the days begin before those that Dagster knows.
    """
    import dagster as dg

    from jobs.schedules import BACKFILL

    if days.first < settings.build.first_day:
        raise BuildError(
            f"{days.first} is before the first day that can be computed again",
            where=f"build.first_day is {settings.build.first_day}",
            remedy="set build.first_day to an earlier one",
        )
    _use_dagster_home(settings)
    tags = {
        "dagster/asset_partition_range_start": str(days.first),
        "dagster/asset_partition_range_end": str(days.last),
    }
    with _alone(settings), dg.DagsterInstance.get() as instance:
        watch = _Watch(lambda step: None)
        run_id = str(uuid.uuid4())
        instance.add_event_listener(run_id, watch)
        result = _job(settings, BACKFILL).execute_in_process(
            instance=instance, run_id=run_id, raise_on_error=False, tags=tags, run_config=_QUIET
        )
        failed = [f"{step.name}: {step.detail}" for step in watch.steps if step.state == "failed"]
        if not result.success:
            raise BuildError("the days were not replaced", where=f"run {run_id}", remedy="; ".join(failed))
        return _changes(result)


def _changes(result: dg.ExecuteInProcessResult) -> list[Changes]:
    found = {}
    for event in result.get_asset_materialization_events():
        said = {name: value.value for name, value in event.materialization.metadata.items()}
        if "changes" in said:
            assert isinstance(said["changes"], dict)
            found[event.asset_key] = Changes.from_json(said["changes"])
    return list(found.values())


def await_archive(
    settings: Settings, wait: Position, timeout_s: float, report: Report = lambda step: None
) -> None:
    """Return when the archive's committed tables cover a position.

    Raises:
        BuildError: They did not in time; it says what is missing.
    """
    started = time.monotonic()
    report(Step("archive", "running"))
    while True:
        held = merge_all(lake.position(settings, contract.raw_table) for contract in CONTRACTS.values())
        waited = time.monotonic() - started
        if held.covers(wait):
            report(Step("archive", "done", waited))
            return
        if waited > timeout_s:
            raise BuildError(
                f"the archive has not passed the position in {timeout_s:.0f} s",
                where=f"it has {held.to_text()}, wanted {wait.to_text()}",
                remedy="see with `tidemark status` whether the stream `archive` runs",
            )
        time.sleep(POLL_S)


def _chosen(indices: Sequence[str] | None) -> list[str]:
    from pipelines.indices import INDICES

    for name in indices or ():
        if name not in INDICES:
            raise BuildError(f"there is no index {name!r}", remedy=f"choose of {', '.join(INDICES)}")
    return list(indices or INDICES)


def _use_dagster_home(settings: Settings) -> None:
    prepare_dagster_home(settings)
    os.environ["DAGSTER_HOME"] = str(settings.paths.dagster)


def _job(settings: Settings, name: str) -> dg.JobDefinition:
    from assets.platform import Platform
    from jobs.definitions import build_defs
    from quality import gates

    return build_defs({"platform": Platform(lambda: settings, gates.examine)}).resolve_job_def(name)


def _selected(indices: list[str], is_published: bool, after_curated: bool) -> dg.AssetSelection | None:
    """What a build makes; None: all that there is."""
    import dagster as dg

    from assets.users import CORRECTED
    from pipelines.indices import INDICES

    if set(indices) == set(INDICES) and is_published and not after_curated:
        return None
    chosen: dg.AssetSelection = dg.AssetSelection.assets(*[[_last(is_published), name] for name in indices])
    if is_published:
        chosen |= chosen.downstream(depth=1) & dg.AssetSelection.groups(CORRECTED)
    needed = chosen.upstream().required_multi_asset_neighbors()  # the tables of a topic are made together
    before = ("raw", "curated") if after_curated else ()
    return needed - dg.AssetSelection.groups(*before)


def _last(is_published: bool) -> str:
    """The layer at which a build ends."""
    return "published" if is_published else "base"


def _run(
    settings: Settings,
    wanted: dg.AssetSelection | None,
    indices: list[str],
    is_published: bool,
    report: Report,
) -> BuildReport:
    import dagster as dg

    from jobs.schedules import BUILD

    job = _job(settings, BUILD)
    selection = sorted(wanted.resolve(job.asset_layer.asset_graph)) if wanted is not None else None
    run_id = str(uuid.uuid4())
    started = time.monotonic()
    with dg.DagsterInstance.get() as instance:
        watch = _Watch(report)
        instance.add_event_listener(run_id, watch)
        result = job.execute_in_process(
            instance=instance,
            run_id=run_id,
            raise_on_error=False,
            asset_selection=selection,
            run_config=_QUIET,
        )
    return _reported(result, run_id, time.monotonic() - started, watch, indices, _last(is_published))


class _Watch:
    """Follows a run's events, and tells of its steps."""

    def __init__(self, report: Report) -> None:
        self.steps: list[Step] = []
        self._report = report
        self._began: dict[str, float] = {}

    def __call__(self, entry: dg.EventLogEntry) -> None:
        import dagster as dg

        event = entry.dagster_event
        if event is None or event.step_key is None:
            return
        name = _name(event.step_key)
        if event.event_type == dg.DagsterEventType.STEP_START:
            self._began[name] = entry.timestamp
            self._report(Step(name, "running"))
        ends = {
            dg.DagsterEventType.STEP_SUCCESS: "done",
            dg.DagsterEventType.STEP_FAILURE: "failed",
            dg.DagsterEventType.STEP_SKIPPED: "skipped",
        }
        if state := ends.get(event.event_type):
            began = self._began.get(name)
            why = cause(event) if state == "failed" else None
            step = Step(name, state, None if began is None else round(entry.timestamp - began, 2), why)
            self.steps.append(step)
            self._report(step)


def _reported(
    result: dg.ExecuteInProcessResult,
    run_id: str,
    seconds: float,
    watch: _Watch,
    indices: list[str],
    last: str,
) -> BuildReport:
    made: dict[str, dict[str, str]] = {"base": {}, "published": {}}
    accounts = {}
    for event in result.get_asset_materialization_events():
        key = event.asset_key
        assert key is not None
        metadata = event.materialization.metadata
        if key.path[0] in made:
            made[key.path[0]][key.path[1]] = str(metadata["version"].value)
        if "account" in metadata:
            account = metadata["account"].value
            assert isinstance(account, dict)
            accounts[str(account["table"])] = account
    failed_checks = {
        f"{check.asset_key.to_user_string()}:{check.check_name}": check.description or "failed"
        for check in result.get_asset_check_evaluations()
        if not check.passed
    }
    of_checks = {
        name.replace(":", "_") for name in failed_checks
    }  # a blocking check that fails is a failed step too
    failed_steps = {
        step.name: step.detail or "failed"
        for step in watch.steps
        if step.state == "failed" and step.name not in of_checks
    }
    return BuildReport(
        passed=result.success and set(indices) <= set(made[last]),
        run_id=run_id,
        seconds=round(seconds, 2),
        steps=tuple(watch.steps),
        built=made["base"],
        published=made["published"],
        failed_checks=failed_checks,
        failed_steps=failed_steps,
        accounts=accounts,
    )


def _name(step_key: str) -> str:
    return step_key.replace("__", "/")


def cause(event: dg.DagsterEvent) -> str:
    """What a step that failed says: what it raised for a person, else the first cause."""
    data = event.step_failure_data
    if data.user_failure_data is not None and data.user_failure_data.description:
        return str(data.user_failure_data.description)
    error = data.error
    while error is not None and error.cause is not None:
        error = error.cause
    return error.message.strip() if error is not None else "failed"


@contextmanager
def _alone(settings: Settings) -> Iterator[None]:
    """One build at a time in a home."""
    settings.paths.run.mkdir(parents=True, exist_ok=True)
    with (settings.paths.run / "build.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise BuildError(
                "another build runs", where=settings.home, remedy="wait until it has ended, then try again"
            ) from None
        yield
