"""Models in MLflow: a run with parameters, metrics and vectors; a registered version; the alias of the live one.

Belongs here: every call to MLflow, which is imported only when it is needed (it takes seconds). Does not belong here:
what a model is (`als`), and which one a base was built with: the base's manifest says that.

A model's id is `<registered name>/<version>`.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.errors import TidemarkError
from pipelines.recommend import als, fold_in

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from pipelines.settings import Settings

EXPERIMENT = "recommend"
LIVE = "live"
VECTORS, PARAMETERS = "vectors.parquet", "parameters.json"


class RegistryError(TidemarkError):
    """The registry of models has not what was asked for, or cannot be reached."""


def log(settings: Settings, model: als.Model, sources: Mapping[str, str] | None = None) -> fold_in.Parameters:
    """Record a fit and register its model.

    Args:
        settings: Says where models are tracked.
        model: What `als.fit` gave.
        sources: Where its input came from (table → snapshot, cut), kept as tags.

    Returns:
        The parameters to pin with a base, with the model's id.
    """
    name = settings.mlflow.model_name
    with _client(settings) as client:
        run = client.create_run(_experiment(client, settings), run_name=name, tags=dict(sources or {}))
        run_id = run.info.run_id
        try:
            for key, value in _flat(model.hyperparameters.as_json()).items():
                client.log_param(run_id, key, value)
            for key, number in model.metrics.items():
                client.log_metric(run_id, key, number)
            version = _create_version(client, name, f"{run.info.artifact_uri}/model", run_id)
            parameters = model.parameters._replace(model_id=f"{name}/{version}")
            with tempfile.TemporaryDirectory() as folder:
                _write(Path(folder), model.table, parameters)
                client.log_artifacts(run_id, folder, "model")
        except BaseException:
            client.set_terminated(run_id, "FAILED")
            raise
        client.set_terminated(run_id)
    return parameters


def set_live(settings: Settings, model_id: str) -> None:
    """Move the alias `live` to a model, once a base with it is published.

    Raises:
        RegistryError: There is no such model.
    """
    name, version = _parts(model_id)
    with _client(settings) as client, _translated(f"cannot make the model {model_id} live", settings):
        client.set_registered_model_alias(name, LIVE, version)


def live(settings: Settings) -> str | None:
    """The id of the live model; None before the first."""
    from mlflow.exceptions import MlflowException

    name = settings.mlflow.model_name
    with _client(settings) as client:
        try:
            return f"{name}/{client.get_model_version_by_alias(name, LIVE).version}"
        except MlflowException:
            return None


def load(settings: Settings, model_id: str) -> tuple[pa.Table, fold_in.Parameters]:
    """The vectors (pin_id, vector) and parameters of a registered model.

    Raises:
        RegistryError: There is no such model, or its files are gone.
    """
    import mlflow

    name, version = _parts(model_id)
    with _client(settings) as client, _translated(f"cannot read the model {model_id}", settings):
        source = client.get_model_version_download_uri(name, version)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(mlflow.artifacts.download_artifacts(source, dst_path=folder))
            parameters = fold_in.from_json(json.loads((path / PARAMETERS).read_text()))
            return pq.read_table(path / VECTORS), parameters


@contextmanager
def _client(settings: Settings) -> Iterator[MlflowClient]:
    import logging
    import os

    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    from mlflow import MlflowClient

    for noisy in ("mlflow", "alembic"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    settings.paths.mlflow.mkdir(parents=True, exist_ok=True)
    yield MlflowClient(settings.mlflow.tracking_uri, settings.mlflow.tracking_uri)


@contextmanager
def _translated(what: str, settings: Settings) -> Iterator[None]:
    from mlflow.exceptions import MlflowException

    try:
        yield
    except (MlflowException, OSError) as error:
        raise RegistryError(
            what, where=settings.mlflow.tracking_uri, remedy=f"see which models there are ({error})"
        ) from error


def _experiment(client: MlflowClient, settings: Settings) -> str:
    found = client.get_experiment_by_name(EXPERIMENT)
    if found is not None:
        return str(found.experiment_id)
    return str(client.create_experiment(EXPERIMENT, artifact_location=settings.mlflow.artifacts_uri))


def _create_version(client: MlflowClient, name: str, source: str, run_id: str) -> str:
    from mlflow.exceptions import MlflowException

    try:
        client.get_registered_model(name)
    except MlflowException:
        client.create_registered_model(name, description="Item vectors by implicit ALS; users are folded in.")
    return str(client.create_model_version(name, source, run_id).version)


def _write(folder: Path, table: pa.Table, parameters: fold_in.Parameters) -> None:
    pq.write_table(table, folder / VECTORS)
    (folder / PARAMETERS).write_text(json.dumps(parameters.to_json()))


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        f"{key}.{inner}" if inner else key: item
        for key, value in values.items()
        for inner, item in (value.items() if isinstance(value, dict) else [("", value)])
    }


def _parts(model_id: str) -> tuple[str, str]:
    name, _, version = model_id.rpartition("/")
    if not name or not version.isdigit():
        raise RegistryError(
            f"{model_id!r} is not the id of a model", remedy="an id is `<registered name>/<version>`"
        )
    return name, version
