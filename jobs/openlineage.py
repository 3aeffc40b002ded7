"""OpenLineage events of builds: START, and COMPLETE or FAIL, of each step, to a configured endpoint.

Here: Dagster's event log told in the words of OpenLineage, and the sensor that sends it. A build neither waits for the
endpoint nor knows of it: the sensor reads what the log has, sends what is new, and keeps its place. While the endpoint
is down nothing is lost: the events go out, in their order, when it is back. An event that it refuses is logged and left
out. Not here: what a lineage is (`pipelines.column_lineage`).
"""

from __future__ import annotations

import json
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, NamedTuple

import dagster as dg
from openlineage.client.event_v2 import (
    InputDataset,
    Job,
    OutputDataset,
    Run,
    RunEvent,
    RunState,
    set_producer,
)
from openlineage.client.facet_v2 import (
    column_lineage_dataset,
    dataset_version_dataset,
    documentation_dataset,
    error_message_run,
    job_type_job,
    output_statistics_output_dataset,
    ownership_dataset,
    parent_run,
    schema_dataset,
)
from openlineage.client.transport.http import ApiKeyTokenProvider, HttpConfig, HttpTransport, TokenProvider
from requests.exceptions import RequestException

from assets import maintenance, streams
from assets.columns import LINEAGE
from jobs.build import cause
from pipelines import column_lineage, derived
from pipelines.column_lineage import OPAQUE, TRANSFORMATION, Dependency, Lineage
from pipelines.contracts import CONTRACTS
from pipelines.indices import STREAMS
from pipelines.settings import CATALOG, Settings

if TYPE_CHECKING:
    from dagster._core.definitions.assets.graph.base_asset_graph import BaseAssetGraph

PRODUCER = "tidemark:jobs/openlineage"
EVERY_S = 30
TICK_S = 20.0
"""So long a tick may send; the next one goes on."""
OVERLAP_S = 60.0
"""Runs are asked for from so long before the newest one on: clocks and commits may differ."""
_TRY_AGAIN = (408, 425, 429)
_TOLD = {
    dg.DagsterEventType.ASSET_MATERIALIZATION_PLANNED,
    dg.DagsterEventType.ASSET_MATERIALIZATION,
    dg.DagsterEventType.STEP_START,
    dg.DagsterEventType.STEP_SUCCESS,
    dg.DagsterEventType.STEP_FAILURE,
}


set_producer(PRODUCER)


class Down(Exception):
    """The endpoint does not take events at the moment."""


# ------------------------------------------------------------------------------------------------ events of a run


def events(
    settings: Settings, run: dg.DagsterRun, entries: Iterable[dg.EventLogEntry], graph: BaseAssetGraph
) -> list[RunEvent]:
    """What a run's log says of its steps so far; more of the log gives the same events, and more behind them.

    Args:
        settings: Say how datasets are named.
        run: A run of Dagster's, the parent of its steps' runs.
        entries: Its log, from the beginning.
        graph: Knows what an asset depends on.
    """
    planned: dict[str, list[dg.AssetKey]] = defaultdict(list)
    made: dict[str, list[dg.AssetMaterialization]] = defaultdict(list)
    found: list[RunEvent] = []
    names = _Names(settings)
    for entry in entries:
        event = entry.dagster_event
        if event is None or event.step_key is None:
            continue
        if event.event_type == dg.DagsterEventType.ASSET_MATERIALIZATION_PLANNED:
            if event.asset_key is not None:
                planned[event.step_key].append(event.asset_key)
        elif event.event_type == dg.DagsterEventType.ASSET_MATERIALIZATION:
            made[event.step_key].append(event.step_materialization_data.materialization)
        elif (state := _STATES.get(event.event_type)) is not None:
            keys = [key for key in planned[event.step_key] if key.path[0] != maintenance.GROUP]
            if keys:
                is_failure = event.event_type == dg.DagsterEventType.STEP_FAILURE
                error = cause(event) if is_failure else None
                step = _Step(run, event.step_key, keys, made[event.step_key], error)
                found.append(_event(names, step, state, entry.timestamp, graph))
    return found


_STATES = {
    dg.DagsterEventType.STEP_START: RunState.START,
    dg.DagsterEventType.STEP_SUCCESS: RunState.COMPLETE,
    dg.DagsterEventType.STEP_FAILURE: RunState.FAIL,
}


class _Step(NamedTuple):
    """A step that began or ended: its assets, and what it has reported of them."""

    run: dg.DagsterRun
    key: str
    assets: list[dg.AssetKey]
    made: list[dg.AssetMaterialization]
    error: str | None


def _event(names: _Names, step: _Step, state: RunState, at: float, graph: BaseAssetGraph) -> RunEvent:
    namespace = names.settings.openlineage.namespace
    parents = sorted({p for key in step.assets for p in graph.get(key).parent_keys} - set(step.assets))
    facets: dict[str, Any] = {
        "parent": parent_run.ParentRunFacet(
            run=parent_run.Run(step.run.run_id),
            job=parent_run.Job(names.settings.openlineage.namespace, step.run.job_name),
        )
    }
    if state == RunState.FAIL and step.error is not None:
        facets["errorMessage"] = error_message_run.ErrorMessageRunFacet(step.error, "PYTHON")
    reported = {made.asset_key: made for made in step.made}
    outputs = [
        names.output(key, reported.get(key) if state == RunState.COMPLETE else None) for key in step.assets
    ]
    return RunEvent(
        eventType=state,
        eventTime=datetime.fromtimestamp(at, UTC).isoformat(),
        run=Run(str(uuid.uuid5(uuid.UUID(step.run.run_id), step.key)), facets),
        job=Job(
            namespace,
            f"{step.run.job_name}.{step.key}",
            {"jobType": job_type_job.JobTypeJobFacet("BATCH", "DAGSTER", "STEP")},
        ),
        inputs=[InputDataset(*name) for parent in parents for name in names.of(parent)],
        outputs=outputs,
        producer=PRODUCER,
    )


# ------------------------------------------------------------------------------------------------ datasets


class _Names:
    """What OpenLineage calls an asset: a table by the warehouse, a topic by the broker, all else by our namespace."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._tables = derived.specs()

    def of(self, key: dg.AssetKey) -> list[tuple[str, str]]:
        """(namespace, name) of what an asset is; of a stream the topics that it reads."""
        if key.path[0] == streams.GROUP:
            server = self.settings.kafka.bootstrap_servers.split(",")[0]
            return [(f"kafka://{server}", topic) for topic in self._topics(key.path[1])]
        return [self.table(".".join(key.path))]

    def table(self, name: str) -> tuple[str, str]:
        """(namespace, name) of a table, or of what is named as one."""
        if name in self._tables and name != derived.PIN_ALS.name:
            return self.settings.lake.warehouse, f"{CATALOG}.{name}"
        return self.settings.openlineage.namespace, name

    def _topics(self, stream: str) -> Sequence[str]:
        return STREAMS[stream].topics if stream in STREAMS else tuple(CONTRACTS)

    def output(self, key: dg.AssetKey, made: dg.AssetMaterialization | None) -> OutputDataset:
        """What an asset is, with what it said of itself once it was made."""
        ((namespace, name),) = self.of(key)
        said = {} if made is None else {name: value.value for name, value in made.metadata.items()}
        facets: dict[str, Any] = {}
        if (table := self._tables.get(".".join(key.path))) is not None:
            facets["documentation"] = documentation_dataset.DocumentationDatasetFacet(table.doc)
            owner = ownership_dataset.Owner(f"team:{table.owner}", "OWNER")
            facets["ownership"] = ownership_dataset.OwnershipDatasetFacet([owner])
        if isinstance(schema := said.get("dagster/column_schema"), dg.TableSchema):
            fields = [
                schema_dataset.SchemaDatasetFacetFields(c.name, c.type, c.description, place)
                for place, c in enumerate(schema.columns, start=1)
            ]
            facets["schema"] = schema_dataset.SchemaDatasetFacet(fields)
            if isinstance(lineage := said.get(LINEAGE), Mapping):
                facets["columnLineage"] = self._lineage(column_lineage.from_json(lineage), schema)
        if version := said.get("snapshot_id") or said.get("version"):
            facets["version"] = dataset_version_dataset.DatasetVersionDatasetFacet(str(version))
        counted = output_statistics_output_dataset.OutputStatisticsOutputDatasetFacet(
            _count(said.get("rows")), _count(said.get("bytes"))
        )
        return OutputDataset(
            namespace, name, {} if made is None else {"outputStatistics": counted}, facets=facets
        )

    def _lineage(
        self, found: Lineage, schema: dg.TableSchema
    ) -> column_lineage_dataset.ColumnLineageDatasetFacet:
        fields = {
            column.name: column_lineage_dataset.Fields([self._field(d) for d in found.of(column.name)])
            for column in schema.columns
        }
        rows = [self._field(dependency) for dependency in found.rows]
        return column_lineage_dataset.ColumnLineageDatasetFacet(fields, rows)

    def _field(self, on: Dependency) -> column_lineage_dataset.InputField:
        kind = TRANSFORMATION if on.kind == OPAQUE else {"condition": "conditional"}.get(on.kind, on.kind)
        how = column_lineage_dataset.Transformation(
            "DIRECT" if on.is_direct else "INDIRECT",
            kind.upper(),
            "by code that cannot be looked into" if on.kind == OPAQUE else None,
            False,
        )
        return column_lineage_dataset.InputField(*self.table(on.table), on.column, [how])


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) else None


# ------------------------------------------------------------------------------------------------ sending


class Place(NamedTuple):
    """How far the log has been told: since when runs are looked at, and how many events of each were sent.

    Attributes:
        since: Runs that changed after this time (s) are looked at.
        sent: Run → how many of its events.
        ended: Run → when it ended (s): all of its events were sent. Kept for a while after it.
    """

    since: float
    sent: dict[str, int]
    ended: dict[str, float]

    def to_text(self) -> str:
        """For a sensor's cursor."""
        return json.dumps(self._asdict())


def tell(
    settings: Settings,
    instance: dg.DagsterInstance,
    graph: BaseAssetGraph,
    place: Place,
    send: Callable[[RunEvent], None],
) -> tuple[Place, int, str | None]:
    """Send what runs have logged since a place.

    Returns:
        The place after it, how many events were sent, and why it stopped where it did not get to the end.
    """
    deadline = time.monotonic() + TICK_S
    sent, ended, since, count = dict(place.sent), dict(place.ended), place.since, 0
    stopped: str | None = None
    for record in _runs(instance, place):
        run, updated_at = record.dagster_run, record.update_timestamp.timestamp()
        sent.setdefault(run.run_id, 0)
        since = max(since, updated_at)
        if stopped:
            continue  # only noted, for the next time
        told = events(settings, run, instance.all_logs(run.run_id, of_type=_TOLD), graph)
        try:
            for event in told[sent[run.run_id] :]:
                if time.monotonic() > deadline:
                    raise Down(f"{TICK_S:.0f} s were not enough; the rest comes next time")
                send(event)
                sent[run.run_id] += 1
                count += 1
        except Down as down:
            stopped = str(down)
            continue
        if run.is_finished:
            del sent[run.run_id]
            ended[run.run_id] = updated_at
    kept = {run_id: at for run_id, at in ended.items() if at > since - 2 * OVERLAP_S}
    return Place(since, sent, kept), count, stopped


def _runs(instance: dg.DagsterInstance, place: Place) -> list[dg.RunRecord]:
    """The runs that may have logged something new, oldest first."""
    after = datetime.fromtimestamp(place.since - OVERLAP_S, UTC)
    changed = instance.get_run_records(dg.RunsFilter(updated_after=after), ascending=True)
    left = sorted(place.sent.keys() - {record.dagster_run.run_id for record in changed})
    going_on = instance.get_run_records(dg.RunsFilter(run_ids=left), ascending=True) if left else []
    return [record for record in [*going_on, *changed] if record.dagster_run.run_id not in place.ended]


def sender(settings: Settings, refused: Callable[[str], None]) -> Callable[[RunEvent], None]:
    """Sends an event within the configured time.

    Args:
        settings: Say where to.
        refused: Is told of an event that the endpoint does not want; it is not sent again.

    Returns:
        A function that raises `Down` where the endpoint does not answer.
    """
    to = settings.openlineage
    auth = ApiKeyTokenProvider({"apiKey": to.api_key}) if to.api_key else TokenProvider({})
    transport = HttpTransport(HttpConfig(to.url, timeout=to.timeout_ms / 1000, auth=auth, retry={"total": 0}))

    def send(event: RunEvent) -> None:
        try:
            transport.emit(event)
        except RequestException as error:
            status = getattr(error.response, "status_code", None)
            if status is not None and 400 <= status < 500 and status not in _TRY_AGAIN:
                refused(f"{event.job.name}: {status}")
                return
            raise Down(f"{to.url} takes no events: {error}") from error

    return send


def lineage_sensor(settings: Settings) -> dg.SensorDefinition:
    """The sensor that sends events; it belongs to the definitions where an endpoint is configured."""

    @dg.sensor(
        name="openlineage",
        minimum_interval_seconds=EVERY_S,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description=f"steps of runs as OpenLineage events, to {settings.openlineage.url}",
    )
    def openlineage(context: dg.SensorEvaluationContext) -> dg.SkipReason:
        if context.cursor is None:  # from now on: what was built before is nobody's business
            context.update_cursor(Place(time.time() + OVERLAP_S, {}, {}).to_text())
            return dg.SkipReason("begins here")
        graph = context.repository_def.asset_graph if context.repository_def else None
        assert graph is not None
        send = sender(settings, lambda what: context.log.error(f"refused, and left out: {what}"))
        place, count, stopped = tell(
            settings, context.instance, graph, Place(**json.loads(context.cursor)), send
        )
        context.update_cursor(place.to_text())
        if stopped:
            context.log.warning(stopped)
        return dg.SkipReason(f"{count} events sent" + (f"; {stopped}" if stopped else ""))

    return openlineage
