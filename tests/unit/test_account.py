"""The account of a raw table: it adds up, or says with every number that it does not."""

from __future__ import annotations

import pytest

from pipelines.curate import Account, AccountError, account_row


def account(**changes: object) -> Account:
    known = {
        "table": "raw.pin_updates",
        "snapshot_id": 7,
        "rows": 18,
        "refused": {"wrong_type": 3, "empty_value": 1},
        "tombstones": 2,
        "repeated": 3,
        "superseded": 4,
        "current": 5,
    }
    return Account(**{**known, **changes})  # type: ignore[arg-type]


def test_an_account_that_adds_up_is_passed_on() -> None:
    balanced = account().balanced()
    assert balanced.accepted == 14
    assert balanced.to_json()["accepted"] == 14
    assert balanced.to_json()["refused"] == {"empty_value": 1, "wrong_type": 3}


@pytest.mark.parametrize("changes", [{"rows": 19}, {"current": 4}, {"repeated": 4}, {"refused": {}}])
def test_one_that_does_not_names_all_its_numbers(changes: dict[str, object]) -> None:
    wrong = account(**changes)
    with pytest.raises(AccountError) as raised:
        wrong.balanced()
    for number in (wrong.rows, wrong.tombstones, wrong.repeated, wrong.superseded, wrong.current):
        assert str(number) in str(raised.value)
    assert "raw.pin_updates at snapshot 7" in str(raised.value)


def test_its_row_has_the_columns_of_the_table() -> None:
    from pipelines.lake import OPS_ACCOUNT

    assert list(account_row(account())) == [column.name for column in OPS_ACCOUNT.columns]
