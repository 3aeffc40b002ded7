"""Properties of contracts: a decision is total, repeatable, and the same one by one and by table."""

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.contracts import (
    ADS_CHANGES,
    CONTRACTS,
    REASONS,
    RECORD,
    USER_INTERACTIONS,
    Contract,
    Refusal,
    decode,
    decode_table,
)

NOW_MS = 1_700_000_000_000
contracts = st.sampled_from([*CONTRACTS.values(), ADS_CHANGES])
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=True) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
field_values = st.one_of(
    json_values,
    st.sampled_from(
        ["", "a", ":", "delete", "upsert", "view", "2020-01-01T00:00:00Z", "\x00", "é" * 300, "\ud800"]
    ),
    st.sampled_from([0, 1, -1, 2**61 - 1, 2**61, 2**64, 10**15, NOW_MS, NOW_MS + 3_600_001, 1.0, True]),
)


@st.composite
def near_records(draw: st.DrawFn) -> tuple[Contract, bytes]:
    """Records that keep a contract, changed in a few places, so that many are still accepted."""
    contract = draw(contracts)
    record: dict[str, Any] = dict(draw(st.sampled_from(contract.examples)))
    for _ in range(draw(st.integers(0, 3))):
        name = draw(st.sampled_from([*record, "version", "op", "event_time", "x"]))
        if draw(st.booleans()):
            record[name] = draw(field_values)
        else:
            record.pop(name, None)
    text = json.dumps(record, ensure_ascii=draw(st.booleans()))
    value = text.encode("utf-8", "surrogatepass")
    if draw(st.integers(0, 9)) == 0:  # damaged on the way
        at = draw(st.integers(0, len(value)))
        value = value[:at] + draw(st.binary(max_size=3)) + value[at + draw(st.integers(0, 3)) :]
    return contract, value


def check(contract: Contract, value: bytes | None) -> dict[str, Any] | Refusal:
    """What must hold of any decision."""
    result = decode(contract, value, NOW_MS)
    assert result == decode(contract, value, NOW_MS)
    if isinstance(result, Refusal):
        assert result.reason in REASONS
        assert result.detail
        result.detail.encode()  # fit for a table and a terminal
    else:
        assert list(result) == contract.row_schema.names
        assert 0 < len(result[contract.key_field].encode()) <= 512
        assert 1 <= result["version"] < 2**61
        pa.Table.from_pylist([result], contract.row_schema)
    return result


@given(contracts, st.none() | st.binary(max_size=200))
def test_no_bytes_make_it_raise(contract: Contract, value: bytes | None) -> None:
    assert isinstance(check(contract, value), Refusal)


@given(contracts, json_values)
def test_no_json_makes_it_raise(contract: Contract, value: Any) -> None:
    check(contract, json.dumps(value).encode("utf-8", "surrogatepass"))


@settings(max_examples=500, deadline=None)
@given(near_records())
def test_nothing_near_a_record_makes_it_raise(near: tuple[Contract, bytes]) -> None:
    check(*near)


@settings(max_examples=100, deadline=None)
@given(contracts, st.lists(st.tuples(near_records(), st.integers(0, 2 * NOW_MS)), max_size=12))
def test_a_table_is_decided_as_each_record_is(contract: Contract, given_rows: list[Any]) -> None:
    values = [value for (_, value), _ in given_rows]
    times = [time for _, time in given_rows]
    count = len(values)
    raw = pa.table(
        {
            "topic_id": ["T"] * count,
            "partition": pa.array([0] * count, pa.int32()),
            "offset": pa.array(range(count), pa.int64()),
            "load_id": pa.nulls(count, pa.string()),
            "load_row": pa.nulls(count, pa.int64()),
            "broker_time": pa.array([time * 1000 for time in times], pa.timestamp("us", tz="UTC")),
            "key": pa.nulls(count, pa.binary()),
            "value": pa.array(values, pa.binary()),
        },
        schema=RECORD,
    )
    decoded = decode_table(contract, raw)
    rows = dict(zip(decoded.accepted.column("offset").to_pylist(), decoded.accepted.to_pylist(), strict=True))
    refusals = {row["offset"]: row for row in decoded.refused.to_pylist()}
    assert sorted([*rows, *refusals]) == list(range(count))
    for offset, (value, time) in enumerate(zip(values, times, strict=True)):
        result = decode(contract, value, time)
        if isinstance(result, Refusal):
            found = refusals[offset]
            assert (found["reason"], found["detail"], found["value"]) == (result.reason, result.detail, value)
        else:
            assert {name: rows[offset][name] for name in contract.row_schema.names} == result


@given(st.dictionaries(st.text(max_size=4), json_values, max_size=5), st.randoms())
def test_the_content_hash_knows_no_order(extra: dict[str, Any], random: Any) -> None:
    record = {**extra, **USER_INTERACTIONS.examples[0]}
    items = list(record.items())
    random.shuffle(items)
    one = decode(USER_INTERACTIONS, json.dumps(record).encode("utf-8", "surrogatepass"), NOW_MS)
    other = decode(USER_INTERACTIONS, json.dumps(dict(items)).encode("utf-8", "surrogatepass"), NOW_MS)
    if isinstance(one, Refusal) or isinstance(other, Refusal):
        assert isinstance(one, Refusal)
        assert isinstance(other, Refusal)
        assert one.reason == other.reason or {one.reason, other.reason} <= {"not_finite", "lone_surrogate"}
    else:
        assert one["content_hash"] == other["content_hash"]


@given(
    st.dictionaries(st.text(min_size=1, max_size=3), st.text(max_size=3), min_size=1, max_size=4), st.data()
)
def test_a_key_that_is_there_twice_is_always_seen(fields: dict[str, str], data: st.DataObject) -> None:
    parts = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in fields.items()]
    again = data.draw(st.sampled_from(list(fields)))
    parts.insert(
        data.draw(st.integers(0, len(parts))),
        f"{json.dumps(again)}: {json.dumps(data.draw(st.text(max_size=3)))}",
    )
    text = "{" + ", ".join(parts) + "}"
    if data.draw(st.booleans()):
        text = text.replace(":", data.draw(st.sampled_from([": ", " :", ":"])))
    result = decode(USER_INTERACTIONS, text.encode("utf-8", "surrogatepass"), NOW_MS)
    assert isinstance(result, Refusal)
    assert result.reason in ("duplicate_key", "lone_surrogate")
