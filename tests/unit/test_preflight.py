import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines import preflight
from pipelines.preflight import PreflightError
from pipelines.settings import ROOT, Settings


@pytest.fixture
def java(tmp_path: Path) -> Callable[..., Path]:
    """Makes a folder that looks like a Java of some version; with has_release=False it only answers `-version`."""

    def make(version: str, name: str | None = None, has_release: bool = True) -> Path:
        home = tmp_path / (name or f"jdk-{version}")
        (home / "bin").mkdir(parents=True)
        executable = home / "bin" / "java"
        executable.write_text(f"#!/bin/sh\necho 'openjdk version \"{version}\"' >&2\n")
        executable.chmod(0o755)
        if has_release:
            (home / "release").write_text(f'IMPLEMENTOR="x"\nJAVA_VERSION="{version}"\n')
        return home

    return make


def test_java_home_comes_first(java: Callable[..., Path]) -> None:
    named, on_path = java("21.0.2"), java("17.0.1")
    found = preflight.find_java({"JAVA_HOME": str(named), "PATH": str(on_path / "bin")}, [])
    assert found == (named, 21)
    assert found.executable == named / "bin" / "java"


def test_java_on_path_comes_before_the_folders(java: Callable[..., Path], tmp_path: Path) -> None:
    on_path = java("17.0.1")
    java("21.0.1", "folders/jdk-21")
    assert preflight.find_java({"PATH": str(on_path / "bin")}, [tmp_path / "folders"]) == (on_path, 17)


def test_a_right_one_in_the_folders_is_found_behind_a_wrong_one(
    java: Callable[..., Path], tmp_path: Path
) -> None:
    wrong = java("25.0.1")
    java("1.8.0_292", "folders/a")
    right = java("17.0.9", "folders/b", has_release=False)
    assert preflight.find_java({"PATH": str(wrong / "bin")}, [tmp_path / "folders"]) == (right, 17)


@pytest.mark.parametrize("version", ["11.0.2", "25", "1.8.0_292"])
def test_a_wrong_java_home_is_refused(java: Callable[..., Path], version: str) -> None:
    with pytest.raises(PreflightError, match="Spark needs Java 17 or 21.*or unset it"):
        preflight.find_java({"JAVA_HOME": str(java(version))}, [])


def test_an_empty_java_home_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PreflightError, match="JAVA_HOME has no bin/java"):
        preflight.find_java({"JAVA_HOME": str(tmp_path)}, [])


def test_only_wrong_ones_are_named(java: Callable[..., Path]) -> None:
    wrong = java("25.0.1")
    with pytest.raises(PreflightError, match=f"Java 25 in {wrong}.*install"):
        preflight.find_java({"PATH": str(wrong / "bin")}, [])


def test_no_java_says_how_to_get_one() -> None:
    with pytest.raises(PreflightError, match="there is no Java on this machine.*apt-get install openjdk-17"):
        preflight.find_java({"PATH": "/nowhere"}, [])


def test_old_python_is_refused() -> None:
    preflight.check_python((3, 11))
    with pytest.raises(PreflightError, match=r"this is Python 3\.10, and Tidemark needs 3\.11"):
        preflight.check_python((3, 10))


def test_a_port_in_use_is_refused(settings: Settings) -> None:
    preflight.check_ports(settings)
    with socket.socket() as other:
        other.bind(("127.0.0.1", settings.serving.port))
        other.listen()
        with pytest.raises(PreflightError, match=f"port {settings.serving.port} .*TIDEMARK__SERVING__PORT"):
            preflight.check_ports(settings)


def test_a_users_broker_needs_no_port(make_settings: Callable[..., Settings]) -> None:
    settings = make_settings(KAFKA__IS_EMBEDDED="false")
    with socket.socket() as other:
        other.bind(("127.0.0.1", settings.kafka.port))
        other.listen()
        preflight.check_ports(settings, ["kafka"])


def test_too_little_disk_is_refused(tmp_path: Path) -> None:
    preflight.check_disk(tmp_path / "not" / "yet", 1)
    with pytest.raises(PreflightError, match="GiB of disk are free, and .* are needed"):
        preflight.check_disk(tmp_path / "not" / "yet", 2**60)


def test_no_compiler_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PreflightError, match="no C\\+\\+ compiler"):
        preflight.check_compiler({"PATH": str(tmp_path)})


def test_all_is_well_here(settings: Settings) -> None:
    assert preflight.check(settings, ["kafka", "serving"], needed_bytes=1).version in preflight.JAVA_VERSIONS


def test_setup_needs_nothing_but_the_standard_library() -> None:
    """`make setup` asks before anything is installed, hence -I -S: no site-packages at all."""
    program = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import pipelines.preflight"
    subprocess.run([sys.executable, "-I", "-S", "-c", program], check=True)


def test_a_failure_is_one_sentence_and_no_traceback() -> None:
    env = os.environ | {"JAVA_HOME": "/nowhere"}
    done = subprocess.run(
        [sys.executable, "-m", "pipelines.preflight", "setup"],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr == "JAVA_HOME has no bin/java (/nowhere): set it to a Java 17 or 21, or unset it.\n"
