"""Great Expectations: holds what was measured of a table against what is expected of it.

Belongs here: a suite of Great Expectations from measures and their bounds, and running it in a context that leaves
nothing behind. It validates the measures (one row of numbers, which Spark computed in a few passes), not the rows: the
reason and the times are in docs/adr/0011. Great Expectations takes seconds to import: it is imported when a suite
runs, never when a code location loads.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from quality.judgement import Expected, plain

_NO_SUCH_FIELD = "(no such field)"


class Finding(NamedTuple):
    """What was expected, and whether it holds; None where there was nothing to hold it against yet."""

    expected: Expected
    passed: bool | None

    @property
    def words(self) -> str:
        """For a person: what was measured, and what is allowed by what."""
        one = self.expected
        if one.kind == "types":
            return one.detail
        said = f"{one.name} is {plain(one.value)}"
        if one.basis is not None:
            said += f" ({_allowed(one)}, {one.basis})"
        return f"{said}: {one.detail}" if one.detail else said


class Report(NamedTuple):
    """What a suite found of a table."""

    table: str
    findings: tuple[Finding, ...]

    @property
    def broken(self) -> tuple[Finding, ...]:
        """What does not hold, what blocks first."""
        broken = [finding for finding in self.findings if finding.passed is False]
        return tuple(sorted(broken, key=lambda finding: not finding.expected.is_blocking))

    @property
    def blocking(self) -> tuple[Finding, ...]:
        """What does not hold, and what is built of the table waits for."""
        return tuple(finding for finding in self.broken if finding.expected.is_blocking)


def hold(table: str, expected: Sequence[Expected]) -> Report:
    """Hold measures against what is expected of them.

    Args:
        table: Names the suite.
        expected: Measures with their bounds; those without are passed on.
    """
    judged = {number: one for number, one in enumerate(expected) if one.basis is not None}
    passed = _validated(table, judged) if judged else {}
    return Report(table, tuple(Finding(one, passed.get(number)) for number, one in enumerate(expected)))


def _validated(table: str, judged: dict[int, Expected]) -> dict[int, bool]:
    os.environ.setdefault("GX_ANALYTICS_ENABLED", "false")
    logging.getLogger("great_expectations").setLevel(logging.ERROR)
    import great_expectations as gx
    import pandas as pd

    context: Any = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = {"globally": False}
    measures = pd.DataFrame({one.name: [_shown(one)] for one in judged.values()})
    batch = (
        context.data_sources.add_pandas(table)
        .add_dataframe_asset(table)
        .add_batch_definition_whole_dataframe("all")
        .get_batch({"dataframe": measures})
    )
    suite = gx.ExpectationSuite(
        name=table, expectations=[_expectation(number, one) for number, one in judged.items()]
    )
    result = batch.validate(suite, result_format="BOOLEAN_ONLY")
    # Results come in an order of their own.
    return {one.expectation_config.meta["number"]: bool(one.success) for one in result.results}


def _expectation(number: int, one: Expected) -> Any:
    import great_expectations.expectations as gxe

    said: dict[str, Any] = {
        "column": one.name,
        "severity": "critical" if one.is_blocking else "warning",
        "meta": {"number": number},
    }
    if one.kind == "types":
        return gxe.ExpectColumnValuesToBeInSet(value_set=[one.type], **said)
    return gxe.ExpectColumnValuesToBeBetween(min_value=one.least, max_value=one.most, **said)


def _shown(one: Expected) -> float | str | None:
    if one.kind != "types":
        return one.value
    return _NO_SUCH_FIELD if one.value is None else one.value


def _allowed(one: Expected) -> str:
    if one.least is None:
        return f"at most {plain(one.most)}"
    if one.most is None:
        return f"at least {plain(one.least)}"
    if one.least == one.most:
        return f"must be {plain(one.least)}"
    return f"from {plain(one.least)} to {plain(one.most)}"


def told(findings: Iterable[Finding]) -> str:
    """Findings in a line."""
    return "; ".join(finding.words for finding in findings)
