"""A set of offsets of one partition, in bits: which are there, which are there twice, which are missing.

Belongs here: the set. Does not belong here: where offsets are read from (`doctor`).

Offsets come in any order and are dense: a block that is full costs nothing more, so that a billion of them take no more
memory than the ragged edges.
"""

from __future__ import annotations

import numpy as np

BLOCK = 65_536
MAX_SHOWN = 20


class Offsets:
    """Offsets that were added."""

    def __init__(self) -> None:
        self._blocks: dict[int, np.ndarray | None] = {}  # None: all of it
        self.rows = 0
        self.repeated: list[int] = []
        self.repeats = 0

    def add(self, offsets: np.ndarray) -> None:
        """Add offsets, int64 in any order; those that are there already are counted as repeats."""
        if not len(offsets):
            return
        self.rows += len(offsets)
        ordered = np.sort(offsets)
        is_first = np.append(True, ordered[1:] != ordered[:-1])[: len(ordered)]
        self._repeat(ordered[~is_first])
        ordered = ordered[is_first]
        numbers, starts = np.unique(ordered // BLOCK, return_index=True)
        for number, part in zip(numbers.tolist(), np.split(ordered, starts[1:]), strict=True):
            places = part - number * BLOCK
            block = self._blocks.setdefault(number, np.zeros(BLOCK, bool))
            if block is None:
                self._repeat(part)
                continue
            self._repeat(part[block[places]])
            block[places] = True
            if block.all():
                self._blocks[number] = None

    def _repeat(self, offsets: np.ndarray) -> None:
        self.repeats += len(offsets)
        self.repeated += offsets[: MAX_SHOWN - len(self.repeated)].tolist()

    @property
    def first(self) -> int:
        """The least offset; 0 of none."""
        if not self._blocks:
            return 0
        number = min(self._blocks)
        block = self._blocks[number]
        return number * BLOCK + (0 if block is None else int(np.argmax(block)))

    @property
    def end(self) -> int:
        """One more than the greatest offset; 0 of none."""
        if not self._blocks:
            return 0
        number = max(self._blocks)
        block = self._blocks[number]
        return number * BLOCK + (BLOCK if block is None else int(np.flatnonzero(block)[-1]) + 1)

    def count(self, start: int, end: int) -> int:
        """How many different offsets of [start, end) are there."""
        found = 0
        for number in range(start // BLOCK, -(-end // BLOCK)):
            if number not in self._blocks:
                continue
            low, high = max(start - number * BLOCK, 0), min(end - number * BLOCK, BLOCK)
            block = self._blocks[number]
            found += high - low if block is None else int(np.count_nonzero(block[low:high]))
        return found

    def has(self, offset: int) -> bool:
        """Whether an offset is there."""
        number, place = divmod(offset, BLOCK)
        if number not in self._blocks:
            return False
        block = self._blocks[number]
        return block is None or bool(block[place])

    def gaps(self) -> list[tuple[int, int]]:
        """The ranges [start, end) that are missing between the first and the last."""
        found: list[tuple[int, int]] = []
        at = self.first
        for number in sorted(self._blocks):
            block, base = self._blocks[number], number * BLOCK
            if block is None:
                runs = [(base, base + BLOCK)]
            else:
                edges = np.flatnonzero(np.diff(np.concatenate([[0], block.view(np.int8), [0]]))) + base
                runs = list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))
            for start, end in runs:
                if start > at:
                    found.append((at, start))
                at = end
        return found
