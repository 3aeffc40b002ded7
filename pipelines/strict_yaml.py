"""YAML as files of ours may say it: what PyYAML reads safely, less what it takes without a word.

Belongs here: reading a text, and refusing what can only be a slip whatever the file is about. Does not belong here:
what a file may say, and which error of the project it becomes; each reader of a file knows that.

PyYAML keeps the last of two equal keys and says nothing of it, so that half of a definition may be gone.
"""

from __future__ import annotations

from typing import Any

import yaml

_MERGE = "tag:yaml.org,2002:merge"


class RepeatedKey(yaml.constructor.ConstructorError):
    """A mapping has a key twice."""


def load(text: str) -> Any:
    """What a text says; None where it says nothing.

    Raises:
        yaml.YAMLError: It is not YAML; a mapping has a key twice (`RepeatedKey`); a text has half of a UTF-16 surrogate
            pair, which nothing can write; or a value is not what it looks like, as the date 2026-13-01. The error names
            what it was, line and column.
    """
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    except RecursionError:
        raise yaml.YAMLError("it is nested too deep") from None
    finally:
        loader.dispose()


class _Loader(yaml.SafeLoader):
    # Keys are compared when a mapping is composed: later, merges (`<<`) have put keys of others beside its own.
    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        first: dict[Any, yaml.Mark] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            said = key.value if key.tag == _MERGE else self.construct_object(key)
            if said in first:
                raise RepeatedKey(
                    None,
                    None,
                    f"the key {key.value} is there twice: first in line {first[said].line + 1}, and again",
                    key.start_mark,
                )
            first[said] = key.start_mark
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            if isinstance(node, yaml.ScalarNode):
                node.value.encode()
            return super().construct_object(node, deep)
        except UnicodeEncodeError:
            what = f"{node.value!a} holds half of a UTF-16 surrogate pair"
        except (ValueError, OverflowError) as error:
            what = f"{getattr(node, 'value', '')} cannot be read: {error}"
        raise yaml.constructor.ConstructorError(None, None, what, node.start_mark)
