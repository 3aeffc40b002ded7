"""What the benchmarks share: a temporary home on free ports, the machine's description, clients that measure, results.

Here: nothing that knows what is measured. A benchmark starts the shipped processes by the shipped supervisor, and asks
them over HTTP and Kafka as anybody would.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil

from jobs import client, processes
from pipelines import settings as settings_module
from pipelines.errors import TidemarkError
from pipelines.indexing.versions import Versions
from pipelines.indices import INDICES
from pipelines.settings import ROOT, Settings


class BenchmarkError(TidemarkError):
    """A benchmark cannot be run, or an answer that it timed was wrong."""


def say(text: str) -> None:
    """Progress, on standard error: standard output is for the result."""
    print(text, file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------------------------ a place to run in


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens at now."""
    with contextlib.ExitStack() as stack:
        found = []
        for _ in range(count):
            probe = stack.enter_context(socket.socket())
            probe.bind(("127.0.0.1", 0))
            found.append(probe.getsockname()[1])
        return found


@contextlib.contextmanager
def place(name: str, home: Path | None = None, **overrides: str) -> Iterator[Settings]:
    """A home of its own on free ports; afterwards nothing of it runs, and unless it was given, nothing of it is left.

    Args:
        name: Of the benchmark.
        home: A home to use and to keep, instead of a temporary one.
        overrides: Settings, as `SECTION__KEY="value"`.
    """
    with _terminated_by_exception():
        folder = home or Path(tempfile.mkdtemp(prefix=f"tidemark-{name}-"))
        if home is None:
            folder.chmod(0o755)  # where this process is root, PostgreSQL is another user
        settings = settings_at(folder, **overrides)
        try:
            yield settings
        finally:
            with processes.uninterrupted():
                processes.down(processes.supervisor(settings), processes.local(settings), say)
                if home is None:
                    shutil.rmtree(folder, ignore_errors=True)


def settings_at(folder: Path, **overrides: str) -> Settings:
    """Settings of a home with free ports."""
    names = ("KAFKA", "SERVING", "COLLECTOR", "ADS", "DAGSTER", "TRINO")
    keys = [*(f"{name}__PORT" for name in names), "KAFKA__CONTROLLER_PORT"]
    ports = dict(zip(keys, map(str, free_ports(len(keys))), strict=True))
    kept = {name: value for name, value in os.environ.items() if name.startswith("TIDEMARK__")}
    chosen = {f"TIDEMARK__{key}": value for key, value in {**ports, **overrides}.items()}
    return settings_module.load(env={**chosen, **kept, **_kept_ports(chosen), "TIDEMARK_HOME": str(folder)})


def _kept_ports(chosen: dict[str, str]) -> dict[str, str]:
    """The benchmark's own ports win over those of the environment: these may be in use."""
    return {name: value for name, value in chosen.items() if name.endswith("PORT")}


@contextlib.contextmanager
def _terminated_by_exception() -> Iterator[None]:
    """SIGTERM ends a benchmark as Ctrl-C does, with everything that it started, even in the background of a shell."""

    def interrupt(signum: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def start(settings: Settings, names: Sequence[str]) -> None:
    """Starts the named processes, as `tidemark up` does."""
    chosen = processes.choose(processes.local(settings), names)
    processes.up(processes.supervisor(settings), chosen, say)


def tidemark(settings: Settings, *arguments: str, on_start: Callable[[int], None] | None = None) -> Any:
    """Runs a command of the shipped command line with `--json`; gives its answer.

    Raises:
        BenchmarkError: it failed; with what it said.
    """
    command = [sys.executable, "-m", "jobs.cli", *arguments, "--json"]
    environment = {**os.environ, **settings.environment}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as run:
        if on_start is not None:
            on_start(run.pid)
        out, err = run.communicate()
    if run.returncode != 0:
        raise BenchmarkError(
            f"`tidemark {' '.join(arguments)}` failed: {(out.strip() or err.strip())[-2000:]}",
            where=str(settings.home),
            remedy="run it by hand on that home",
        )
    return json.loads(out.strip().splitlines()[-1])


def serving_url(settings: Settings) -> str:
    return f"http://{settings.serving.host}:{settings.serving.port}"


def await_ready(settings: Settings, timeout_s: float = 120.0) -> None:
    """Waits until serving says that it is ready.

    Raises:
        BenchmarkError: it does not in time.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        answer = client.request(serving_url(settings), "/readyz", is_error_an_answer=True)
        if answer.status == 200:
            return
        if time.monotonic() > deadline:
            raise BenchmarkError(f"serving was not ready after {timeout_s:.0f} s: {answer.body}")
        time.sleep(0.2)


def prepare_base(settings: Settings, fraction: float) -> None:
    """A published base of the real input (or a share of its households), unless the home serves one already."""
    served = [Versions(settings.paths.indices, name).pointer() for name in INDICES]
    if all(pointer is not None for pointer in served):
        say("the home serves a base already")
        return
    say(f"loading {fraction:.0%} of the real input, and building its base (minutes; not part of the result)")
    tidemark(settings, "load", "complete-journey", "--fraction", f"{fraction:g}")
    tidemark(settings, "build")


def arguments(doc: str | None, given: Sequence[str], **options: tuple[Any, str]) -> argparse.Namespace:
    """The options of a benchmark: name = (default, help). All have `--home` too."""
    parser = argparse.ArgumentParser(prog="tidemark bench", description=doc, formatter_class=_Help)
    parser.add_argument("--home", type=Path, help="a home to use and to keep, instead of a temporary one")
    for name, (default, text) in options.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default, help=text)
    return parser.parse_args(list(given))


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass


# ------------------------------------------------------------------------------------------------ the machine


def machine() -> dict[str, Any]:
    """What it ran on, and how busy that was before."""
    return {
        "machine": {
            "cpu": _cpu(),
            "cores": os.cpu_count(),
            "memory_gb": round(psutil.virtual_memory().total / 2**30, 1),
            "system": platform.platform(),
            "python": platform.python_version(),
            "load_before": round(os.getloadavg()[0], 2),
        }
    }


def _cpu() -> str:
    with contextlib.suppress(OSError, IndexError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return platform.processor() or platform.machine()


class Memory:
    """The greatest resident memory of a process with all its children, sampled; shared pages are counted once each.
    Beside it the CPU time of them all: of one that has ended, as it was last seen."""

    def __init__(self, every_s: float = 0.5) -> None:
        self.peak_mb = 0.0
        self._cpu_s: dict[int, float] = {}
        self._every_s = every_s
        self._ending = threading.Event()
        self._thread: threading.Thread | None = None

    def watch(self, pid: int) -> None:
        """Begins to sample."""
        self._thread = threading.Thread(target=self._run, args=(pid,), daemon=True)
        self._thread.start()

    def _run(self, pid: int) -> None:
        while not self._ending.is_set():
            self.peak_mb = max(self.peak_mb, _tree_mb(pid))
            self._cpu_s |= _tree_cpu_s(pid)
            self._ending.wait(self._every_s)

    @property
    def cpu_s(self) -> float:
        """CPU seconds of all these processes, in user and in system mode."""
        return round(sum(self._cpu_s.values()), 1)

    def stop(self) -> float:
        """Ends sampling; gives the peak in MB."""
        self._ending.set()
        if self._thread is not None:
            self._thread.join()
        return round(self.peak_mb)


def _tree_mb(pid: int) -> float:
    total = 0
    with contextlib.suppress(psutil.Error):
        parent = psutil.Process(pid)
        for process in (parent, *parent.children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                total += _proportional_bytes(process)
    return total / 2**20


def _tree_cpu_s(pid: int) -> dict[int, float]:
    """CPU seconds of a process and of each of its children, by their ids."""
    found: dict[int, float] = {}
    with contextlib.suppress(psutil.Error):
        parent = psutil.Process(pid)
        for process in (parent, *parent.children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                times = process.cpu_times()
                found[process.pid] = times.user + times.system
    return found


def _proportional_bytes(process: psutil.Process) -> int:
    """Resident bytes; a page that n processes share counts 1/n, where the system tells."""
    with contextlib.suppress(OSError, StopIteration, IndexError):
        lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("Pss:")).split()[1]) * 1024
    return int(process.memory_info().rss)


# ------------------------------------------------------------------------------------------------ HTTP under load


GRACE_S = 5.0
"""How far requests that have their times may lag behind at the end; a service that lags more was too slow."""


class Timed(NamedTuple):
    """One request of a load: when it was sent, how long the answer took, its status and body (status 0: no answer)."""

    at: float
    seconds: float
    status: int
    body: bytes


async def _ask(
    host: str,
    port: int,
    requests: Iterator[bytes],
    until: float,
    every_s: float,
    out: list[Timed],
    bodies: dict[bytes, bytes],
) -> None:
    """One connection: asks, reads the whole answer, asks again: at once, or every so often.

    Where requests have their times, an answer's time counts from when its request was due, so that one slow answer
    does not hide the requests that had to wait behind it. Equal bodies are kept once: large answers to the same
    requests, again and again, would not fit.
    """
    reader, writer = None, None
    due = time.perf_counter()
    for raw in requests:
        if every_s:
            due += every_s
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
        sent = due if every_s else time.perf_counter()
        if sent > until or time.perf_counter() > until + GRACE_S:
            break
        try:
            if writer is None or reader is None:
                reader, writer = await asyncio.open_connection(host, port)
            writer.write(raw)
            status, body = await asyncio.wait_for(_read(reader), 30)
        except (OSError, asyncio.IncompleteReadError, TimeoutError, ValueError) as error:
            out.append(Timed(sent, time.perf_counter() - sent, 0, str(error).encode()))
            if writer is not None:
                writer.close()
            reader, writer = None, None
            await asyncio.sleep(0.05)
            continue
        took = time.perf_counter() - sent
        out.append(Timed(sent, took, status, bodies.setdefault(body, body)))
    if writer is not None:
        writer.close()


async def _read(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    head = await reader.readuntil(b"\r\n\r\n")
    status = int(head[9:12])
    length = 0
    for line in head.split(b"\r\n")[1:]:
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            length = int(value)
    return status, await reader.readexactly(length)


def get(path: str) -> bytes:
    """The bytes of a GET."""
    return f"GET {path} HTTP/1.1\r\nhost: bench\r\n\r\n".encode()


def post(path: str, body: Any, accept: str = "application/json") -> bytes:
    """The bytes of a POST of JSON."""
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\naccept: {accept}\r\n"
    return f"{head}content-length: {len(data)}\r\n\r\n".encode() + data


def drive(
    host: str, port: int, connections: Sequence[Iterator[bytes]], seconds: float, per_s: float = 0.0
) -> list[Timed]:
    """Each connection asks what its iterator gives for so long.

    Args:
        host: Of the service.
        port: Of the service.
        connections: The requests of each.
        seconds: How long.
        per_s: Requests a second of all connections together, evenly spread; 0: each asks again once it is answered.
    """

    async def all_of_them() -> list[Timed]:
        out: list[Timed] = []
        bodies: dict[bytes, bytes] = {}
        until = time.perf_counter() + seconds
        every_s = len(connections) / per_s if per_s else 0.0
        tasks = []
        for requests in connections:
            tasks.append(asyncio.create_task(_ask(host, port, requests, until, every_s, out, bodies)))
            await asyncio.sleep(every_s / len(connections))
        await asyncio.gather(*tasks)
        return out

    return asyncio.run(all_of_them())


# ------------------------------------------------------------------------------------------------ results


def percentiles(
    values: Sequence[float], wanted: Sequence[float], scale: float = 1.0, digits: int = 3
) -> list[float]:
    """The percentiles of measured values (nearest rank, so that each is a value that was measured)."""
    if not values:
        return [float("nan")] * len(wanted)
    found = np.percentile(np.asarray(values), wanted, method="inverted_cdf")
    return [round(float(value) * scale, digits) for value in found]


def publish(result: dict[str, Any]) -> None:
    """The result as one line of JSON, last."""
    sys.stderr.flush()
    print(json.dumps(result), flush=True)
