import base64
import functools
import hashlib
import re
import threading
import time
from collections.abc import Callable, Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from pipelines import jars
from pipelines.jars import JarError
from pipelines.settings import Settings

CONTENT = {"a/x/a/1.0/a-1.0.jar": b"first", "b/b/2.0/b-2.0.jar": b"second"}


class Repository(SimpleHTTPRequestHandler):
    """A Maven repository: a folder, with errors that it makes first, and a note of who asked."""

    failures: ClassVar[list[int]] = []
    logins: ClassVar[list[str | None]] = []

    def do_GET(self) -> None:
        self.logins.append(self.headers["Authorization"])
        if self.failures:
            self.send_error(self.failures.pop())
        else:
            super().do_GET()

    def log_message(self, *about: object) -> None:
        pass


@pytest.fixture
def cached(
    make_settings: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Settings]:
    """A cache, a lock that names two archives, and a repository that has them."""
    for path, content in CONTENT.items():
        file = tmp_path / "source" / path
        file.parent.mkdir(parents=True)
        file.write_bytes(content)
    digests = {path: hashlib.sha256(content).hexdigest() for path, content in CONTENT.items()}
    monkeypatch.setattr(jars, "locked", lambda group: digests)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    monkeypatch.setattr(Repository, "failures", [])
    monkeypatch.setattr(Repository, "logins", [])
    serve = functools.partial(Repository, directory=str(tmp_path / "source"))
    with ThreadingHTTPServer(("127.0.0.1", 0), serve) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        place = f"http://me:secret%21@127.0.0.1:{server.server_port}/"
        yield make_settings(PATHS__JARS=tmp_path / "cache", JARS__REPOSITORY=place)
        server.shutdown()


def test_fetches_once(cached: Settings) -> None:
    said: list[str] = []
    found = jars.resolve("spark", cached, said.append)
    assert [path.name for path in found] == ["a.x_a-1.0.jar", "b_b-2.0.jar"]
    assert [path.read_bytes() for path in found] == list(CONTENT.values())
    assert len(said) == 3
    assert Repository.logins == ["Basic " + base64.b64encode(b"me:secret!").decode()] * 2
    assert jars.resolve("spark", cached, said.append) == found
    assert len(said) == 3


def test_good_files_that_are_there_are_not_fetched(cached: Settings) -> None:
    folder = cached.paths.jars / "spark"
    folder.mkdir(parents=True)
    for path, content in CONTENT.items():
        (folder / jars.file_name(path)).write_bytes(content)
    assert len(jars.resolve("spark", cached)) == 2
    assert Repository.logins == []


def test_a_changed_file_is_fetched_again(cached: Settings) -> None:
    damaged = jars.resolve("spark", cached)[0]
    damaged.write_bytes(b"damaged")
    assert jars.resolve("spark", cached)[0].read_bytes() == b"first"


def test_a_repository_that_is_busy_is_asked_again(cached: Settings) -> None:
    Repository.failures[:] = [503] * 3
    assert len(jars.resolve("spark", cached)) == 2


def test_a_file_that_differs_from_the_lock_is_refused(cached: Settings, tmp_path: Path) -> None:
    (tmp_path / "source/b/b/2.0/b-2.0.jar").write_bytes(b"other")
    with pytest.raises(JarError, match=r"b_b-2\.0\.jar is not the file that the lock names"):
        jars.resolve("spark", cached)
    assert not (cached.paths.jars / "spark").exists()


def test_a_missing_file_is_named_and_no_secret_told(cached: Settings, tmp_path: Path) -> None:
    (tmp_path / "source/b/b/2.0/b-2.0.jar").unlink()
    with pytest.raises(JarError, match=r"b_b-2\.0\.jar could not be fetched.*404.*mirror") as refused:
        jars.resolve("spark", cached)
    assert "secret" not in str(refused.value)
    assert not (cached.paths.jars / "spark").exists()


@pytest.mark.parametrize("group", jars.GROUPS)
def test_the_lock_names_each_file_once(group: str) -> None:
    wanted = jars.locked(group)
    assert len({jars.file_name(path) for path in wanted}) == len(wanted) > 0
    for path, digest in wanted.items():
        *_, name, version, file = path.split("/")
        assert file.startswith(f"{name}-{version}")
        assert re.fullmatch("[0-9a-f]{64}", digest)
