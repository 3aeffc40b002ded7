"""What property tests share: a repository on SQLite, and on PostgreSQL where it is installed."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines import postgres
from pipelines.ads.repository import Repository
from pipelines.preflight import PreflightError
from tests.conftest import free_ports


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def store(request: pytest.FixtureRequest) -> Iterator[Repository]:
    """One for all examples, for most of the time would be its making; a test empties it first."""
    with tempfile.TemporaryDirectory() as made, contextlib.ExitStack() as stack:
        folder = Path(made)
        uri = f"sqlite:{folder / 'repository.db'}"
        if request.param == "postgresql":
            folder.chmod(0o755)  # where this process is root, PostgreSQL is another user
            try:
                uri = stack.enter_context(
                    postgres.running(folder / "postgres", free_ports(1)[0], {"fsync": "off"})
                )
            except PreflightError as error:
                pytest.skip(str(error))
        store = Repository(uri)
        stack.callback(store.close)
        yield store
