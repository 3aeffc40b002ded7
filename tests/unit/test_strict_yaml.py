"""YAML: what PyYAML reads, and what it takes without a word is refused by line."""

import pytest
import yaml

from pipelines import strict_yaml


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a: 1\nb: [x, {c: 2026-12-01T00:00:00Z}]\n",
        "a: {k: 1}\nb: {k: 2}\n",
        "base: &base {k: 1, m: 2}\nother: {<<: *base, k: 3}\n",
        "c: &c {k: 1}\na: {x: &b {<<: *c, k: 2}}\nd: {<<: *b, k: 3}\n",  # merged before it is read itself
        "1: a\n'1': b\n",
        "list:\n- a\n- a\n",
    ],
)
def test_reads_what_yaml_says(text: str) -> None:
    assert strict_yaml.load(text) == yaml.safe_load(text)


@pytest.mark.parametrize(
    ("text", "key", "first", "again"),
    [
        ("actions: [view]\nlimit: 3\nactions: [purchase]\n", "actions", 1, 3),
        ("a:\n  b:\n    c: 1\n    d: 2\n    c: 1\n", "c", 3, 5),
        ("rules:\n- {name: x, name: y}\n", "name", 2, 2),
        ("true: 1\nyes: 2\n", "yes", 1, 2),
        ("a: &a {k: 1}\nb:\n  <<: *a\n  <<: *a\n", "<<", 3, 4),
    ],
)
def test_a_key_that_is_there_twice_is_refused_by_name_and_line(
    text: str, key: str, first: int, again: int
) -> None:
    with pytest.raises(yaml.YAMLError) as caught:
        strict_yaml.load(text)
    assert f"the key {key} is there twice: first in line {first}" in str(caught.value)
    assert f"line {again}, column" in str(caught.value)


@pytest.mark.parametrize(
    "text",
    ["a: [1", "a: 1\nsince: 2026-13-01\n", "{[1]: 2}", "[" * 5000, "a: \x00", '"\\ud800": 1'],
)
def test_whatever_cannot_be_read_is_an_error_of_yaml(text: str) -> None:
    with pytest.raises(yaml.YAMLError):
        strict_yaml.load(text)


def test_a_value_that_cannot_be_is_named_with_its_line() -> None:
    with pytest.raises(yaml.YAMLError, match=r"(?s)'\\ud800' holds half of a UTF-16 surrogate pair.* line 2"):
        strict_yaml.load('a: 1\nsurfaces: ["\\ud800"]\n')
    with pytest.raises(yaml.YAMLError, match=r"(?s)2026-13-01 cannot be read: .* line 2"):
        strict_yaml.load("a: 1\nsince: 2026-13-01\n")
