"""The command line: help, exit codes, errors in words, JSON, and what it prints of answers."""

from __future__ import annotations

import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from jobs import cli, controls
from jobs.cli import data, shared
from pipelines.ads import repository, updater
from pipelines.ads.repository import Update
from pipelines.ads.updater import Event
from pipelines.contracts import payload_files
from pipelines.settings import ROOT, Settings
from pipelines.users import sequence_files

COMMANDS = [
    "up",
    "down",
    "start",
    "stop",
    "status",
    "load",
    "loads",
    "send",
    "build",
    "versions",
    "publish",
    "rollback",
    "resume",
    "query",
    "sequences",
    "patterns",
    "dead-letters",
    "lineage",
    "account",
    "ads",
    "trace",
    "logs",
    "quality",
    "undo",
    "doctor",
    "bench",
    "demo",
]
run = CliRunner()


def tidemark(settings: Settings, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """The command line as a process, as a user runs it."""
    environment = {**os.environ, **settings.environment}
    return subprocess.run(
        [sys.executable, "-m", "jobs.cli", *arguments],
        cwd=ROOT,
        env=environment,
        input=stdin,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )


def test_help_is_quick_because_it_imports_nothing_heavy() -> None:
    heavy = [
        *("pyspark", "pyarrow", "numpy", "pandas", "dagster", "mlflow", "fastapi"),
        *("confluent_kafka", "pyiceberg", "deltalake"),
    ]
    script = f"""
import sys
sys.argv = ["tidemark", "--help"]
from jobs.cli import main
try:
    main()
except SystemExit:
    pass
print("heavy:", [name for name in {heavy} if name in sys.modules])
"""
    out = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert "heavy: []" in out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str) -> None:
    found = run.invoke(cli.app, [command, "--help"])
    assert found.exit_code == 0
    assert len(found.stdout) > 200


def test_a_benchmark_says_its_own_options() -> None:
    found = run.invoke(cli.app, ["bench", "ads-freshness", "--help"])
    assert found.exit_code == 0
    assert "--backfill" in found.stdout and "--warm-up" in found.stdout


def test_every_command_that_answers_has_json() -> None:
    group = typer.main.get_command(cli.app)
    commands = dict(group.commands)  # type: ignore[attr-defined]
    for name in [name for name, found in commands.items() if hasattr(found, "commands")]:
        commands |= {f"{name} {inner}": found for inner, found in commands.pop(name).commands.items()}
    lacking = [
        name for name, found in commands.items() if "--json" not in str([p.opts for p in found.params])
    ]
    assert lacking == ["demo"]


@pytest.mark.parametrize(
    "arguments", [["nonsense"], ["query", "recommendations"], ["query", "events", "u", "--limit", "0"]]
)
def test_wrong_usage_is_exit_code_2(settings: Settings, arguments: list[str]) -> None:
    assert tidemark(settings, *arguments).returncode == 2


def test_an_error_is_one_text_and_exit_code_1(settings: Settings) -> None:
    found = tidemark(settings, "query", "recommendations", "7")
    assert found.returncode == 1
    assert found.stdout == ""
    assert found.stderr.startswith("error: serving does not answer")
    assert "tidemark up" in found.stderr
    assert len(found.stderr.strip().splitlines()) == 1


def test_an_error_with_json_is_json(settings: Settings) -> None:
    found = tidemark(settings, "versions", "no-such-index", "--json")
    assert found.returncode == 1
    error = json.loads(found.stdout)
    assert error["error"] == "VersionError"
    assert "pins" in error["remedy"]


def test_where_nothing_was_audited_quality_says_what_audits(settings: Settings) -> None:
    found = tidemark(settings, "quality", "raw.pin_updates", "--json")
    assert found.returncode == 1
    assert "`tidemark build` audits" in json.loads(found.stdout)["remedy"]


def test_what_nobody_foresaw_is_a_sentence_and_its_trace_is_in_a_log(settings: Settings) -> None:
    settings.paths.run.mkdir(parents=True)
    controls.Controls(settings.paths.run).wanted_file.mkdir()
    found = tidemark(settings, "stop", "archive")
    assert found.returncode == 1
    assert "Traceback" not in found.stderr + found.stdout
    assert "IsADirectoryError" in found.stderr
    assert "Traceback" in (settings.paths.logs / "cli.log").read_text()


def test_a_bad_setting_is_told_by_its_name(settings: Settings) -> None:
    settings.environment["TIDEMARK__SERVING__PROT"] = "1"
    found = tidemark(settings, "status")
    assert found.returncode == 1
    assert "did you mean `port`" in found.stderr


def test_status_of_nothing_is_exit_code_1_and_names_every_process(settings: Settings) -> None:
    found = tidemark(settings, "status", "--json")
    assert found.returncode == 1
    said = json.loads(found.stdout)
    names = ("broker", "collector", "ads", "streams", "serving", "dagster", "trino", "ads-db", "ads-connect")
    assert {p["name"]: p["state"] for p in said["processes"]} == dict.fromkeys(names, "stopped")


def test_down_of_nothing_is_fine(settings: Settings) -> None:
    found = tidemark(settings, "down", "--json")
    assert (found.returncode, json.loads(found.stdout)) == (0, {"stopped": []})


def test_a_stream_is_stopped_by_name_before_its_process_runs(settings: Settings) -> None:
    assert tidemark(settings, "stop", "archive").returncode == 0
    assert not controls.Controls(settings.paths.run).should_run("archive")
    unknown = tidemark(settings, "stop", "archvie")
    assert unknown.returncode == 1
    assert "user_interactions" in unknown.stderr


def test_records_are_read_from_arguments_files_and_standard_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines, array = tmp_path / "lines", tmp_path / "array"
    lines.write_text('{"a": 1}\n\n{"a": 2}\n')
    array.write_text(' [{"a": 3}, {"a": 4}]')
    assert data.read_records(['{"a": 0}'], lines) == ['{"a": 0}', '{"a": 1}', '{"a": 2}']
    assert [json.loads(text) for text in data.read_records([], array)] == [{"a": 3}, {"a": 4}]
    monkeypatch.setattr(sys, "stdin", iter(['{"a": 5}\n', "\n"]))
    assert data.read_records(["-"], None) == ['{"a": 5}']
    monkeypatch.setattr(sys, "stdin", iter([]))
    with pytest.raises(shared.InputError, match="nothing to send"):
        data.read_records([], None)
    with pytest.raises(shared.InputError, match="cannot read"):
        data.read_records([], tmp_path / "absent")


@pytest.mark.parametrize("line", ["nope", "[1]", '"text"'])
def test_a_record_that_is_no_object_is_named_and_nothing_is_sent(settings: Settings, line: str) -> None:
    found = tidemark(settings, "send", '{"user_id": "1"}', line)
    assert found.returncode == 1
    assert "record 2 is not" in found.stderr


def test_events_are_filled_only_where_something_is_missing() -> None:
    event = data.filled({"user_id": "1", "event_id": "mine"})
    assert event["event_id"] == "mine"
    assert event["event_time"].endswith("Z")


# ------------------------------------------------------------------------------------------------ answers

ITEM = {
    "pin_id": "12",
    "score": 0.5,
    "catalogue": {"title": "[b]milk[/b]", "category": "MILK"},
    "offer": {"price_usd_micros": 1_990_000, "is_available": False},
}
BASIS = {"kind": "folded", "events_used": 3, "model_id": "als/1", "window_days": None}
ANSWERS: dict[str, tuple[int, Any]] = {
    "/v1/users/a%2Fb/recommendations?k=2": (200, {"recommendations": [ITEM], "basis": BASIS}),
    "/v1/users/u/recommendations?k=10": (
        409,
        {"error": {"field": "min_position", "message": "too late", "allowed": "an earlier one"}},
    ),
    "/v1/pins/12": (200, ITEM),
    "/v1/pins/none": (
        404,
        {"error": {"field": "pin_id", "message": "there is no such pin", "allowed": None}},
    ),
    "/v1/pins/12/counts": (
        200,
        {"totals": {"purchase": 2}, "hours": [{"start_time": "2017-01-01T11:00:00.000Z", "purchase": 2}]},
    ),
}


TOLD: dict[str, dict[str, Any]] = {
    "/v1/counters:query": {"counts": [{"action": "view", "n": 7}], "basis": {"now_ms": 5}},
    "/v1/frequency:check": {
        "candidates": [{"is_allowed": False, "broken": [{"rule": "daily", "ad_id": "a1", "measured": 3}]}],
        "basis": {"incomplete_rules": ["daily"]},
    },
}
"""The answers to posts; each has what was posted, too."""


class Answering(http.server.BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(TOLD[self.path] | {"asked": asked}).encode())

    def do_GET(self) -> None:
        status, body = ANSWERS.get(self.path, (500, {"path": self.path}))
        self.send_response(status)
        self.send_header("Tidemark-Base-Version", "pins=v1")
        self.send_header("Tidemark-Position", "token")
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def served(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answering)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name, value in settings.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TIDEMARK__SERVING__PORT", str(server.server_port))
    yield
    server.shutdown()


@pytest.mark.usefixtures("served")
def test_recommendations_are_a_table_with_what_they_stand_on() -> None:
    found = run.invoke(cli.app, ["query", "recommendations", "a/b", "-k", "2"], catch_exceptions=False)
    assert found.exit_code == 0
    for part in ("[b]milk[/b]", "MILK", "sold out", "from 3 events", "pins=v1"):
        assert part in found.stdout


@pytest.mark.usefixtures("served")
def test_json_has_the_body_and_what_it_stands_on() -> None:
    found = run.invoke(
        cli.app, ["query", "recommendations", "a/b", "-k", "2", "--json"], catch_exceptions=False
    )
    body = json.loads(found.stdout)
    assert body["recommendations"] == [ITEM]
    assert body["stands_on"] == {"base_version": "pins=v1", "position": "token", "stale": None}


@pytest.mark.usefixtures("served")
def test_pins_and_counts_are_tables() -> None:
    assert "$1.99" in run.invoke(cli.app, ["query", "pin", "12"], catch_exceptions=False).stdout
    assert "2017-01-01T11" in run.invoke(cli.app, ["query", "counts", "12"], catch_exceptions=False).stdout


@pytest.mark.usefixtures("served")
def test_counters_are_asked_in_sql() -> None:
    asked = ["query", "counters", "SELECT …", "--now-ms", "5"]
    found = run.invoke(cli.app, asked, catch_exceptions=False)
    assert all(part in found.stdout for part in ("action", "view", "7"))
    body = json.loads(run.invoke(cli.app, [*asked, "--json"], catch_exceptions=False).stdout)
    assert body["asked"] == {"sql": "SELECT …", "now_ms": 5}


@pytest.mark.usefixtures("served")
def test_a_candidate_is_judged_by_the_rules() -> None:
    asked = ["query", "frequency", "u1", "ad_id=a=1", "pin_id=p1"]
    found = run.invoke(cli.app, asked, catch_exceptions=False)
    assert "rule daily, ad_id a1, measured 3" in found.stdout + found.stderr
    assert "it may not be shown" in found.stdout + found.stderr
    assert "may have measured too little: daily" in found.stdout + found.stderr
    body = json.loads(run.invoke(cli.app, [*asked, "--json"], catch_exceptions=False).stdout)
    assert body["asked"] == {"user_id": "u1", "candidates": [{"ad_id": "a=1", "pin_id": "p1"}]}


@pytest.mark.usefixtures("served")
def test_a_refusal_names_the_field() -> None:
    found = run.invoke(cli.app, ["query", "pin", "none"])
    assert "pin_id: there is no such pin" in str(found.exception)


def test_a_transaction_that_waits_is_listed_and_released(settings: Settings) -> None:
    store = repository.opened(settings)
    half = Update("campaigns", "c1", 5, {"status": "paused"})
    updater.apply(store, [Event(half, transaction_id="t1", transaction_count=2)])
    store.close()
    (held,) = json.loads(tidemark(settings, "ads", "held", "--json").stdout)["held"]
    assert (held["id"], held["arrived"], held["expected"]) == ("t1", 1, 2)
    unknown = tidemark(settings, "ads", "release", "t2")
    assert (unknown.returncode, "ads held" in unknown.stderr) == (1, True)
    assert json.loads(tidemark(settings, "ads", "release", "t1", "--json").stdout)["changed_rows"] == 1
    assert "no transaction waits" in tidemark(settings, "ads", "held").stderr


def test_what_no_ads_are_chosen_by_is_told(settings: Settings) -> None:
    for arguments in ((), ("a1", "--all"), ("--where", "campaign_id"), ("--where", "campaign_id=c", "--all")):
        found = tidemark(settings, "ads", "refresh", *arguments)
        assert (found.returncode, "error: " in found.stderr) == (1, True), arguments
    assert "does not answer" in tidemark(settings, "ads", "enrich", "a1").stderr


def test_sequences_are_listed_checked_and_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sequence_files, "FOLDER", tmp_path)
    declared = tmp_path / "seen.yaml"
    declared.write_text(
        "{name: seen, version: 1, description: What was seen., owner: ads, max_length: 9, fields: [pin_id]}"
    )

    def told(*arguments: str) -> Any:
        return json.loads(run.invoke(cli.app, ["sequences", *arguments, "--json"]).stdout)

    (before,) = told()["sequences"]
    assert (before["name"], before["max_length"], before["is_published"]) == ("seen", 9, False)
    assert told("publish", "seen")["is_published"]
    assert told()["sequences"] == [{**before, "is_published": True}]
    assert run.invoke(cli.app, ["sequences", "check"]).exit_code == 0
    declared.write_text(declared.read_text().replace("9", "8"))
    found = run.invoke(cli.app, ["sequences", "check"])
    assert found.exit_code == 1
    assert "max_length was 9 and is 8" in found.stdout and "seen.v2.yaml" in found.stdout
    (problem,) = told("check")["problems"]
    assert problem["where"] == str(declared)
    assert told() == {"sequences": [], "problems": [problem]}


def test_the_schemas_of_payloads_are_listed() -> None:
    shown = run.invoke(shared.app, ["contracts", "payloads", "--json"])
    assert shown.exit_code == 0
    schemas = {one["about"]: one for one in json.loads(shown.stdout)["schemas"]}
    assert {"name": "dwell_ms", "type": "integer"}.items() <= schemas["view"]["fields"][0].items()
    listed = run.invoke(shared.app, ["contracts", "payloads"])
    assert "dwell_ms" in listed.stdout


def test_schemas_of_payloads_are_checked_and_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(payload_files, "FOLDER", tmp_path)
    path = tmp_path / "view.yaml"

    def told(*arguments: str, exit_code: int = 0) -> Any:
        found = run.invoke(shared.app, ["contracts", "payloads", *arguments, "--json"])
        assert found.exit_code == exit_code
        return json.loads(found.stdout)

    path.write_text("about: view")
    (problem,) = told(exit_code=1)["problems"]
    assert problem["where"] == str(path) and "it has other fields" in problem["what"]
    path.write_text(
        "{about: view, owner: home, since: 2100-01-01T00:00:00Z, fields: {rank: {type: number, most: 9}}}"
    )
    (problem,) = told(exit_code=1)["problems"]
    assert "contracts payloads publish view" in problem["remedy"]
    assert told("publish", "view")["about"] == "view"
    assert told()["problems"] == []
    path.write_text(path.read_text().replace("9", "8"))
    found = run.invoke(shared.app, ["contracts", "payloads"])
    assert found.exit_code == 1
    assert "rank.most was 9 and is 8" in " ".join(found.output.split())
