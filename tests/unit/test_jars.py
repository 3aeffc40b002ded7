import hashlib
import re
import stat
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest

from pipelines import jars
from pipelines.jars import JarError
from pipelines.settings import ROOT, Settings

CONTENT = {"a_a-1.0.jar": b"first", "b_b-2.0.jar": b"second"}


@pytest.fixture
def cached(
    make_settings: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Settings:
    """A cache with two archives, a lock that names them, and an Ivy that fetches them from a folder."""
    source = tmp_path / "source"
    source.mkdir()
    for name, content in CONTENT.items():
        (source / name).write_bytes(content)
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in CONTENT.items()}
    monkeypatch.setattr(jars, "locked", lambda group: digests)

    def run_ivy(
        group: str, scratch: Path, fetched: Path, settings: Settings, report: jars.Report
    ) -> list[str]:
        fetched.mkdir()
        for file in source.iterdir():
            (fetched / file.name).write_bytes(file.read_bytes())
        return ["some words", "server refused: 404", "the end"]

    monkeypatch.setattr(jars, "_run_ivy", run_ivy)
    return make_settings(PATHS__JARS=tmp_path / "cache")


def test_fetches_once(cached: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    found = jars.resolve("spark", cached, said.append)
    assert [path.read_bytes() for path in found] == list(CONTENT.values())
    assert len(said) == 1
    monkeypatch.setattr(jars, "_run_ivy", None)
    assert jars.resolve("spark", cached, said.append) == found
    assert len(said) == 1


def test_good_files_that_are_there_are_not_fetched(cached: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = cached.paths.jars / "spark"
    folder.mkdir(parents=True)
    for name, content in CONTENT.items():
        (folder / name).write_bytes(content)
    monkeypatch.setattr(jars, "_run_ivy", None)
    assert len(jars.resolve("spark", cached)) == 2


def test_a_changed_file_is_fetched_again(cached: Settings) -> None:
    damaged = jars.resolve("spark", cached)[0]
    damaged.write_bytes(b"damaged")
    assert jars.resolve("spark", cached)[0].read_bytes() == b"first"


def test_a_file_that_differs_from_the_lock_is_refused(cached: Settings, tmp_path: Path) -> None:
    (tmp_path / "source" / "b_b-2.0.jar").write_bytes(b"other")
    with pytest.raises(JarError, match=r"b_b-2\.0\.jar is not the file that the lock names"):
        jars.resolve("spark", cached)
    assert not (cached.paths.jars / "spark").exists()


def test_a_missing_file_is_named_with_what_ivy_said(cached: Settings, tmp_path: Path) -> None:
    (tmp_path / "source" / "b_b-2.0.jar").unlink()
    with pytest.raises(JarError, match=r"b_b-2\.0\.jar could not be fetched.*refused: 404.*mirror"):
        jars.resolve("spark", cached)


@pytest.mark.parametrize("group", jars.GROUPS)
def test_the_lock_names_what_is_asked_for(group: str) -> None:
    asked = {
        f"{one.get('org')}_{one.get('name')}-{one.get('rev')}.jar"
        for one in ElementTree.parse(ROOT / "conf" / "ivy" / f"{group}.xml").iter("dependency")
    }
    assert asked == set(jars.locked(group))
    assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in jars.locked(group).values())


def test_ivy_is_inside_pyspark() -> None:
    assert stat.S_ISREG(jars.ivy_jar().stat().st_mode)
