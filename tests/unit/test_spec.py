"""What a lineage is a fingerprint of."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

FILES = {
    "__init__.py": "",
    "index.py": '''
import pyarrow as pa

from domain.helpers import doubled
from pipelines.indexing.spec import Documents, Family, IndexSpec, lineage


def transform(rows, state):
    """What it does."""
    return doubled(rows)  # and why


print(lineage(IndexSpec("i", (Family("f", pa.schema([]), "s", transform),), Documents("f"))))
''',
    "helpers.py": "from domain import deeper\n\n\ndef doubled(rows):\n    return rows * deeper.BY\n",
    "deeper.py": "BY = 2\n",
    "other.py": "BY = 2\n",
}


def fingerprint(folder: Path, **changed: str) -> str:
    package = folder / "domain"
    package.mkdir(parents=True)
    for name, text in FILES.items():
        (package / name).write_text(changed.get(name.removesuffix(".py"), text))
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(folder)!r}); import domain.index"],
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def test_a_lineage_is_of_the_code_that_a_transform_is_made_of(tmp_path: Path) -> None:
    numbers = map(str, itertools.count())
    sound = fingerprint(tmp_path / next(numbers))
    assert len(sound) == 12

    same = {
        "index": FILES["index.py"].replace("What it does.", "What it is for.").replace("and why", "so"),
        "other": "BY = 3\n",
    }
    for name, text in same.items():
        assert fingerprint(tmp_path / next(numbers), **{name: text}) == sound, name

    different = {
        "index": FILES["index.py"].replace("return doubled(rows)", "return rows"),
        "helpers": FILES["helpers.py"].replace("*", "+"),
        "deeper": "BY = 3\n",
    }
    for name, text in different.items():
        assert fingerprint(tmp_path / next(numbers), **{name: text}) != sound, name
