"""How a process that runs for long uses Python's interpreter: what its threads take from each other.

Belongs here: the collector of cycles, and how threads take turns.
"""

from __future__ import annotations

import gc
import sys

_TURN_S = 0.0005


def collect_rarely() -> None:
    """Leave what is there now out of collections, and begin them less often than Python does by default.

    A batch of thousands of rows makes thousands of objects at once, and nearly none in a cycle: with the default
    thresholds a third of a look-up's time went into collections.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


def take_turns() -> None:
    """Give a waiting thread its turn after half a millisecond: the default is five.

    For processes in which one thread works through much while others have answers, or small changes, to give.
    """
    sys.setswitchinterval(_TURN_S)
