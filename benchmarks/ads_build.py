"""How long the base of an ads account takes, from its repository to what serving answers, and how that grows.

For each size an account is generated and put into a repository, whose own writes are not what is measured (`repository`
measures them): the rows go to its tables as they are. Then `tidemark build` runs there alone: the dump, the audits,
documents of more than a hundred fields, the base. It is timed from the command's start to its end, with the memory and
the CPU time of all its processes; what a build of an empty home takes (`startup_s`) is taken off for rates and for the
growth exponent, the slope of log(time) over log(ads). On the greatest size serving is started, and asked.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from benchmarks import build, harness
from benchmarks.harness import BenchmarkError, Memory, say
from pipelines.ads import enrichment, generator, handlers, repository
from pipelines.ads.index import ADS
from pipelines.ads.rows import Row
from pipelines.indexing.base import open_base, read_manifest
from pipelines.indexing.documents import DocumentsView
from pipelines.indexing.versions import Versions
from pipelines.indexing.view import view
from pipelines.settings import Settings

SAMPLE = 500
AT_ONCE = 20_000
STEPS = ("ads_repository", "index/ads", "base/ads", "published/ads")


def main(given: Sequence[str]) -> int:
    """Run it."""
    options = harness.arguments(
        __doc__,
        given,
        ads=("100000,1000000", "sizes of accounts, ascending, with commas between"),
        seed=(1, "of the accounts"),
        seconds=(20, "for how long serving is asked"),
    )
    sizes = [int(size) for size in options.ads.split(",")]
    machine = harness.machine()
    runs = {size: measure(size, options.seed, 0) for size in [0, *sizes[:-1]]}
    runs[sizes[-1]] = largest = measure(sizes[-1], options.seed, options.seconds)
    startup_s = runs[0]["seconds"]
    net_s = {size: runs[size]["seconds"] - startup_s for size in sizes}
    result = {
        "benchmark": "ads-build",
        "docs_per_s": round(sizes[-1] / net_s[sizes[-1]]),
        "cpu_s_per_million": round((largest["cpu_s"] - runs[0]["cpu_s"]) * 1e6 / sizes[-1]),
        "bytes_per_million": round(largest["bytes"] * 1e6 / sizes[-1]),
        "peak_rss_mb": largest["peak_rss_mb"],
        "growth_exponent": build.growth(net_s),
        "load_s": largest["load_s"],
        "candidates_p99_ms": largest["candidates_p99_ms"],
        "startup_s": startup_s,
        "fields": sum(len(family.schema) for family in ADS.families),
        "sizes": {str(size): runs[size] for size in sizes},
        "beside": [],
    }
    harness.publish(result | machine)
    return 0


def measure(ads: int, seed: int, seconds: int) -> dict[str, Any]:
    """Build an account's base alone; then, if asked for so many seconds, serve it."""
    with harness.place("ads-build") as settings:
        if ads:
            say(f"{ads:,} ads: filling the repository (not timed)")
            fill(settings, ads, seed)
        say(f"{ads:,} ads: building")
        usage = Memory()
        began = time.perf_counter()
        report = harness.tidemark(settings, "build", on_start=usage.watch)
        took_s = round(time.perf_counter() - began, 1)
        peak_mb = usage.stop()
        if not report["passed"]:
            raise BenchmarkError(f"the build of {ads:,} ads failed: {report['failed_checks']}")
        steps = {step["name"]: step["seconds"] for step in report["steps"] if step["name"] in STEPS}
        found = {"seconds": took_s, "cpu_s": usage.cpu_s, "peak_rss_mb": peak_mb, "steps": steps}
        say(f"{ads:,} ads: {took_s} s, {usage.cpu_s} CPU seconds, {peak_mb} MB, {steps}")
        if ads:
            found |= {"bytes": check(settings, ads, seed), "checked": min(SAMPLE, ads)}
        return found | (served(settings, seconds) if seconds else {})


def fill(settings: Settings, ads: int, seed: int) -> None:
    """The rows of an account into an empty repository: all columns of a row at one version."""
    store = repository.opened(settings)
    version = generator.FIRST_VERSION
    for table, rows in generator.account(ads, seed):
        names = [column.name for column in table.columns]
        for start in range(0, rows.num_rows, AT_ONCE):
            found = {}
            for values in rows.slice(start, AT_ONCE).to_pylist():
                version += 1
                key = values.pop(table.key)
                found[key] = Row(dict.fromkeys(names, version), values, 0)
            with store.writing() as connection:
                repository.put_rows(connection, table.name, found)
    store.close()


def check(settings: Settings, ads: int, seed: int) -> int:
    """A sample of documents is what the handlers make of the repository; gives the base's bytes.

    Raises:
        BenchmarkError: It is not.
    """
    versions = Versions(settings.paths.indices, ADS.name)
    pointer = versions.pointer()
    assert pointer is not None
    path = versions.path(pointer.version)
    held = view(open_base(ADS, path))
    assert isinstance(held, DocumentsView)
    numbers = np.random.default_rng(seed).choice(ads, min(SAMPLE, ads), replace=False)
    keys = generator.keys("ads", numbers)
    documents = held.get([key.encode() for key in keys])
    store = repository.opened(settings)
    with store.reading() as connection:
        for family in ADS.families:
            made = handlers.run(family.name, enrichment.look_up(connection, family.name, keys)).to_pylist()
            wrong = [
                key
                for key, document, wanted in zip(keys, documents, made, strict=True)
                if document is None or document[family.name] != wanted
            ]
            if wrong:
                raise BenchmarkError(f"{len(wrong)} of {len(keys)} documents are wrong: {wrong[:5]}")
    store.close()
    return sum(file.size_bytes for shard in read_manifest(path).shards for file in shard.files)


def served(settings: Settings, seconds: int) -> dict[str, Any]:
    """How long serving takes to be ready, and how long its answers then take, one request after the other."""
    began = time.perf_counter()
    harness.start(settings, ["serving"])
    harness.await_ready(settings)
    load_s = round(time.perf_counter() - began, 2)
    asked = contexts()
    answers = harness.drive(settings.serving.host, settings.serving.port, [asked], seconds)
    refused = [answer for answer in answers if answer.status != 200]
    if refused or not any(json.loads(answer.body)["ads"] for answer in answers):
        raise BenchmarkError(f"candidates were not answered: {(refused or answers)[0].body[:500]!r}")
    p50, p99 = harness.percentiles([answer.seconds for answer in answers], [50, 99], 1000, 2)
    return {"load_s": load_s, "candidates_p50_ms": p50, "candidates_p99_ms": p99, "asked": len(answers)}


def contexts() -> Iterator[bytes]:
    """Requests for candidates, each of a user who is somewhere, somebody, and interested in something."""
    rng = np.random.default_rng(7)

    def one(*choices: str) -> str:
        return str(rng.choice(choices))

    while True:
        context = {
            "country": one("US", "GB", "DE", "FR", "BR"),
            "language": one("en", "de", "fr"),
            "age": one("18-24", "25-34", "35-44"),
            "gender": one("female", "male"),
            "device": one("web", "ios_phone", "android_phone"),
            "placement": one("browse", "search"),
            "interests": [one("garden", "shoe", "coffee", "bike"), one("chair", "lamp", "cake")],
            "keywords": [one("red", "blue", "oak")],
            "time_ms": generator.START_MS + 350 * generator.DAY_MS,
        }
        yield harness.post("/v1/ads:candidates", {"context": context, "k": 50})
