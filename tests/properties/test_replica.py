"""A follower's threads beside readers: nobody sees half an epoch, a step back, or a gap while bases are swapped."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines.indexing.position import Position
from pipelines.indexing.versions import Pointer
from tests.oracle import Statement
from tests.properties import specs
from tests.properties.harness import Batch, Candidate, Home
from tests.properties.strategies import KEYS, MINUTE_MS, START_MS

EPOCHS = 60
SWAPS_AFTER = (15, 30, 45)
EVENTS_AN_EPOCH = 3


def said_in(epoch: int) -> tuple[Statement, ...]:
    """An epoch that changes two families of each of two documents at once."""
    return tuple(
        Statement(family, key, b"", (epoch + 1,), False, 0, payload={"text": str(epoch), "number": epoch})
        for key in KEYS[:2]
        for family in ("control", "content")
    )


def counted_in(epoch: int) -> tuple[Statement, ...]:
    """An epoch that moves one event from the first key to the second, or back, and adds others to both."""
    at_ms = START_MS + epoch % 5 * MINUTE_MS
    moved = Statement("views", KEYS[epoch % 2], b"", (epoch + 1,), False, 0, at_ms, (100, 0), None, b"moved")
    added = [
        Statement("views", KEYS[0], b"", (1,), False, 0, at_ms, (1, 1), None, b"%d-%d" % (epoch, n))
        for n in range(EVENTS_AN_EPOCH)
    ]
    return (moved, *added)


def batch(epoch: int, statements: tuple[Statement, ...]) -> Batch:
    """One epoch of one partition."""
    return Batch("fast", 0, epoch, {0: epoch}, {0: epoch + 1}, statements)


def run_beside_readers(
    home: Home, said: Callable[[int], tuple[Statement, ...]], read: Callable[[], None]
) -> None:
    """Epochs are committed and bases swapped while two threads read all the time."""
    failures: list[BaseException] = []
    is_over = threading.Event()
    home.follower.start()

    def reader() -> None:
        try:
            # Without a rest the readers would keep the interpreter from what they look at.
            while not is_over.wait(0.0005):
                read()
        except BaseException as error:
            failures.append(error)

    readers = [threading.Thread(target=reader) for _ in range(2)]
    try:
        home.commit(batch(0, said(0)))
        assert home.follower.wait(Position({"topic-fast": {0: 1}}), 30)
        for thread in readers:
            thread.start()
        for epoch in range(1, EPOCHS):
            home.commit(batch(epoch, said(epoch)))
            if epoch in SWAPS_AFTER:
                cut = epoch - 5  # epochs after the cut have to be folded again, beside the old view
                everything = tuple(s for e in range(cut) for s in said(e))
                candidate = Candidate(epoch, {"fast": {0: cut}}, (), everything, everything, None, 2, 0)
                home.build(candidate)
                home.publish(candidate)
            time.sleep(0.005)
        assert home.follower.wait(Position({"topic-fast": {0: EPOCHS}}), 60)
        wait_until(lambda: home.view().base.version == home.versions.names()[-1])
    finally:
        is_over.set()
        for thread in readers:
            thread.join()
        home.follower.stop()
    assert not failures, failures[0]


def wait_until(is_so: Callable[[], bool]) -> None:
    """Wait at most two minutes."""
    deadline = time.monotonic() + 120
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_readers_see_whole_epochs_of_documents_that_never_go_back(tmp_path: Path) -> None:
    home = Home(specs.documents(), tmp_path, ("topic-fast",))
    newest = threading.local()

    def read() -> None:
        view = home.view()
        numbers = {d[f]["number"] for d in view.get(KEYS[:2]) if d for f in ("control", "content")}
        assert len(numbers) == 1, f"half an epoch: {numbers}"
        assert max(numbers) >= getattr(newest, "seen", 0), "an answer went back"
        newest.seen = max(numbers)

    run_beside_readers(home, said_in, read)
    assert home.view().get([KEYS[0]])[0]["control"]["number"] == EPOCHS - 1


def test_readers_see_whole_epochs_of_sums(tmp_path: Path) -> None:
    home = Home(specs.sums(None), tmp_path, ("topic-fast",))

    def read() -> None:
        view = home.view()
        epochs = view.position.topics["topic-fast"][0]
        sums = [view.sums(key) for key in KEYS[:2]]
        first, second = (sum(amounts[0] for amounts in buckets.values()) for buckets in sums)
        assert first + second == 100 + EVENTS_AN_EPOCH * epochs, "a torn or doubled sum"
        assert second == (100 if epochs % 2 == 0 else 0), "the moved event is not where it was moved to"

    run_beside_readers(home, counted_in, read)
    totals = [sum(a[1] for a in home.view().sums(key).values()) for key in KEYS[:2]]
    assert totals == [EVENTS_AN_EPOCH * EPOCHS, 0]


def test_a_base_that_cannot_be_opened_leaves_the_old_view(tmp_path: Path) -> None:
    home = Home(specs.documents(), tmp_path, ("topic-fast",))
    home.commit(batch(0, said_in(0)))
    home.follower.start()
    try:
        broken = Candidate(0, {"fast": {0: 1}}, (), said_in(0), said_in(0), None, 1, 0)
        home.build(broken)
        name = home.versions.names()[-1]
        file = next((home.indices / "documents" / name).rglob("identities.arrow"))
        file.write_bytes(file.read_bytes()[:-1] + b"?")
        with pytest.raises(Exception, match="identities.arrow"):
            home.publish(broken)
        (home.indices / "documents" / "pointer.json").write_text(
            json.dumps(Pointer(name, True, 1, "", "publish")._asdict())
        )
        wait_until(lambda: home.follower.status()["error"] is not None)
        assert "identities.arrow" in home.follower.status()["error"]
        home.commit(batch(1, said_in(1)))
        assert home.follower.wait(Position({"topic-fast": {0: 2}}), 30)
        assert home.view().base.version is None
        assert home.view().get([KEYS[0]])[0]["control"]["number"] == 1
    finally:
        home.follower.stop()
