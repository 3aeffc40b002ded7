"""The ledger beside files that teams declare: what each published version means, by name and version, as YAML.

Belongs here: its form on disk. Does not belong here: what a version means, and which changes it may undergo; whoever
reads the files knows that (`contracts.payload_files`, `users.sequence_files`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

FILE = "published.yaml"


def is_ledger(said: Any) -> bool:
    """Whether something that was read is names with versions."""
    return isinstance(said, dict) and all(map(_is_entry, said.values()))


def _is_entry(said: Any) -> bool:
    return isinstance(said, dict) and all(
        type(version) is int and isinstance(meant, dict) for version, meant in said.items()
    )


def write(folder: Path, head: str, said: Mapping[str, Mapping[int, Any]]) -> None:
    """Write it whole or not at all: names and versions in order, below a comment."""
    from pipelines.indexing.files import (
        replace_text,
    )  # only here: Spark's workers read, and need no numpy for it

    plain = {name: dict(sorted(said[name].items())) for name in sorted(said)}
    text = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, default_flow_style=None, width=110)
    replace_text(folder / FILE, head + text)
