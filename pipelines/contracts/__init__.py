"""The schema of every topic, one module each; what a record must be, and the pure function that decides it.

Belongs here: contracts and the machinery that they share. Imports are light, because Spark's Python workers, the
collector and the loader all use them. Does not belong here: how records travel (`pipelines.ingest`), and what becomes
of them (`pipelines.indexing` and the domains).
"""

from __future__ import annotations

from pipelines.contracts.ads_budgets import ADS_BUDGETS
from pipelines.contracts.ads_changes import ADS_CHANGES
from pipelines.contracts.ads_keys import ADS_KEYS
from pipelines.contracts.contract import (
    PROVENANCE,
    REASONS,
    RECORD,
    Contract,
    Decoded,
    Refusal,
    accepted_schema,
    decode,
    decode_table,
    extended,
)
from pipelines.contracts.fields import Field
from pipelines.contracts.pin_updates import PIN_UPDATES
from pipelines.contracts.user_follows import FOLLOWED, USER_FOLLOWS
from pipelines.contracts.user_interactions import ACTIONS, OBJECTS, USER_INTERACTIONS
from pipelines.errors import TidemarkError

CONTRACTS: dict[str, Contract] = {
    contract.topic: contract for contract in (USER_INTERACTIONS, PIN_UPDATES, USER_FOLLOWS, ADS_CHANGES)
}
"""Every contract whose topic is archived, by its topic."""

INTERNAL: dict[str, Contract] = {contract.topic: contract for contract in (*ADS_KEYS, ADS_BUDGETS)}
"""The topics that Tidemark writes for itself, from what it has already: their records are not archived."""


class UnknownTopic(TidemarkError):
    """A topic that no contract is declared for."""


def contract_of(topic: str) -> Contract:
    """The contract of a topic, given as the topic's name (`pin-updates`) or the table's (`pin_updates`).

    Raises:
        UnknownTopic: there is none; the message lists those that are.
    """
    name = topic.replace("_", "-")
    found = CONTRACTS.get(name) or INTERNAL.get(name)
    if found is None:
        raise UnknownTopic(
            f"no contract is declared for the topic {topic!r}", remedy=f"use one of {', '.join(CONTRACTS)}"
        )
    return found


__all__ = [
    "ACTIONS",
    "ADS_BUDGETS",
    "ADS_CHANGES",
    "CONTRACTS",
    "FOLLOWED",
    "INTERNAL",
    "OBJECTS",
    "PIN_UPDATES",
    "PROVENANCE",
    "REASONS",
    "RECORD",
    "USER_FOLLOWS",
    "USER_INTERACTIONS",
    "Contract",
    "Decoded",
    "Field",
    "Refusal",
    "UnknownTopic",
    "accepted_schema",
    "contract_of",
    "decode",
    "decode_table",
    "extended",
]
