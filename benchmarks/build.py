"""How long a build takes, from raw to published, and how that grows: at 0, 25, 50 and 100 % of the real input.

Each share is loaded into a home of its own, which is not timed; then `tidemark build` runs there alone, and is timed
from the command's start to its end, with the memory of all its processes. The growth exponent is the slope of log(time)
over log(share) by least squares, after the time of the build with no rows (`startup_s`) is taken off.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks import harness
from benchmarks.harness import BenchmarkError, Memory, say
from pipelines.settings import Settings


def main(given: Sequence[str]) -> int:
    """Run it."""
    options = harness.arguments(
        __doc__, given, shares=("25,50,100", "percents of the households, beside 0, with commas between")
    )
    shares = [int(share) for share in options.shares.split(",")]
    machine = harness.machine()
    runs = {share: measure(share) for share in [0, *shares]}
    startup_s = runs[0]["seconds"]
    result = {
        "benchmark": "build",
        "seconds": {str(share): runs[share]["seconds"] for share in shares},
        "peak_rss_mb": {str(share): runs[share]["peak_rss_mb"] for share in shares},
        "growth_exponent": growth({share: runs[share]["seconds"] - startup_s for share in shares}),
        "startup_s": startup_s,
        "rows": {str(share): runs[share]["rows"] for share in shares},
        "slowest_steps": {str(share): runs[share]["slowest_steps"] for share in shares},
        "beside": [],
    }
    harness.publish(result | machine)
    return 0


def measure(share: int) -> dict[str, Any]:
    """Load a share, then build from it, alone."""
    with harness.place("build") as settings:
        say(f"{share} %: loading (not timed)")
        loaded = harness.tidemark(settings, "load", "complete-journey", "--fraction", f"{share / 100:g}")
        say(f"{share} %: building")
        memory = Memory()
        began = time.perf_counter()
        report = harness.tidemark(settings, "build", on_start=memory.watch)
        seconds = round(time.perf_counter() - began, 1)
        peak = memory.stop()
        check(settings, share, loaded, report)
        steps = sorted(report["steps"], key=lambda step: -(step["seconds"] or 0))[:5]
        say(f"{share} %: {seconds} s, {peak} MB")
        return {
            "seconds": seconds,
            "peak_rss_mb": peak,
            "rows": sum(load["rows"] for load in loaded["loads"]),
            "slowest_steps": {step["name"]: step["seconds"] for step in steps},
        }


def check(settings: Settings, share: int, loaded: dict[str, Any], report: dict[str, Any]) -> None:
    """The build published every index, and its account has every row that was loaded.

    Raises:
        BenchmarkError: it does not.
    """
    rows = {load["table"]: load["rows"] for load in loaded["loads"]}
    found = {name: account["rows"] for name, account in report["accounts"].items()}
    if rows != found or not report["passed"]:
        raise BenchmarkError(
            f"at {share} %: loaded {rows}, and the account says {found}", where=str(settings.home)
        )


def growth(seconds: dict[int, float]) -> float | None:
    """The slope of log(seconds) over log(share); None where the startup was all that there was to measure."""
    if len(seconds) < 2 or min(seconds.values()) <= 0:
        return None
    slope, _ = np.polyfit(np.log(list(seconds)), np.log(list(seconds.values())), 1)
    return round(float(slope), 3)
