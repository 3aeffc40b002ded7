"""Declared sequences: what they may say, what is said when they may not, versions, and publishing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.contracts import ACTIONS, OBJECTS, payload_files
from pipelines.pins.index import PINS
from pipelines.users import sequence_files, sequences
from pipelines.users.index import USER_EVENTS
from pipelines.users.sequences import BadDefinition, Definition

SMALL = {"max_length": 10, "fields": ["pin_id"]}
WHOLE = {
    "name": "bought",
    "version": 1,
    "description": "What was bought.",
    "owner": "ads",
    "actions": ["purchase", "save"],
    "surfaces": ["home"],
    "categories": ["fruit"],
    "age": "36h",
    "max_length": 5,
    "deduplicate_by": "pin_id",
    "order": "oldest_first",
    "fields": ["event_id", "time_ms", "pin_id"],
    "enrich": ["catalogue.title", "offer.price_usd_micros"],
}


def refused(**said: Any) -> BadDefinition:
    with pytest.raises(BadDefinition) as caught:
        sequences.parse({**SMALL, **said})
    return caught.value


# ---------------------------------------------------------------------------------------------------- what it may say


def test_what_an_event_keeps_of_its_pin_is_a_field_like_its_own() -> None:
    kept = ["indexed_category", "indexed_price_usd_micros"]
    found = sequences.parse({**SMALL, "fields": ["pin_id", *kept]})
    assert found.columns == ("pin_id", *kept)
    assert "indexed_category" in sequence_files.meaning(found)["fields"]
    assert "did you mean `indexed_brand`" in refused(fields=["indexed_brnd"]).message
    assert refused(enrich=["indexed_brand"]).field == "enrich[0]"


def test_all_that_can_be_said() -> None:
    assert sequences.parse(WHOLE) == Definition(
        name="bought",
        version=1,
        description="What was bought.",
        owner="ads",
        actions=("purchase", "save"),
        surfaces=("home",),
        categories=("fruit",),
        age_ms=36 * 3_600_000,
        max_length=5,
        deduplicate_by="pin_id",
        order="oldest_first",
        fields=("event_id", "time_ms", "pin_id"),
        enrich=("catalogue.title", "offer.price_usd_micros"),
    )


def test_what_is_left_out_or_null_limits_nothing() -> None:
    least = sequences.parse(SMALL)
    assert least == Definition(max_length=10, fields=("pin_id",))
    assert sequences.parse({**SMALL, "age": None, "actions": None, "enrich": None}) == least


def test_choices_are_the_columns_that_the_indices_declare() -> None:
    declared = USER_EVENTS.families[0].schema.names
    said = [
        f"{'' if about == 'features' else 'payload.'}{about}.{field}"
        for about, of in payload_files.declared().items()
        for field in of[-1].fields
    ]
    assert list(sequences.EVENT_FIELDS) == ["event_id", "time_ms", *declared, *said]
    assert {"payload.view.dwell_ms", "features.quality"} <= set(said)
    assert set(sequences.ENRICHMENTS) == {
        f"{family.name}.{column}" for family in PINS.families for column in family.schema.names
    }
    assert set(OBJECTS) <= set(declared)


@pytest.mark.parametrize(
    ("text", "ms"),
    [
        ("90d", 7_776_000_000),
        ("36h", 129_600_000),
        ("30m", 1_800_000),
        ("2160h", 7_776_000_000),
        ("2w", 1_209_600_000),
    ],
)
def test_durations(text: str, ms: int) -> None:
    assert sequences.parse({**SMALL, "age": text}).age_ms == ms


@pytest.mark.parametrize(
    "age", ["91d", "2161h", "0d", "d", "1.5h", "-1d", "90", "13w", "٣d", "1 d d", 90, True, ["1d"]]
)
def test_other_durations_are_refused(age: Any) -> None:
    error = refused(age=age)
    assert error.field == "age"
    assert "to 90d" in error.allowed


@pytest.mark.parametrize(
    ("said", "field"),
    [
        ({"max_length": 0}, "max_length"),
        ({"max_length": 1001}, "max_length"),
        ({"max_length": True}, "max_length"),
        ({"max_length": "5"}, "max_length"),
        ({"max_length": None}, "max_length"),
        ({"version": 0}, "version"),
        ({"name": "Bought"}, "name"),
        ({"name": "a/b"}, "name"),
        ({"owner": " "}, "owner"),
        ({"description": 1}, "description"),
        ({"actions": "purchase"}, "actions"),
        ({"actions": []}, "actions"),
        ({"actions": ["purchase", "sing"]}, "actions[1]"),
        ({"actions": [["view"]]}, "actions[0]"),
        ({"surfaces": [""]}, "surfaces[0]"),
        ({"surfaces": ["home", "\ud800"]}, "surfaces[1]"),
        ({"owner": "\udfff"}, "owner"),
        ({"fields": ["\ud800"]}, "fields[0]"),
        ({"\ud800": 1}, "\\ud800"),
        ({"categories": ["x" * 513]}, "categories[0]"),
        ({"categories": [False]}, "categories[0]"),  # what YAML makes of NO
        ({"categories": [str(n) for n in range(201)]}, "categories"),
        ({"deduplicate_by": "action"}, "deduplicate_by"),
        ({"order": "oldest"}, "order"),
        ({"fields": []}, "fields"),
        ({"fields": ["pin_id", "pin_id"]}, "fields[1]"),
        ({"fields": ["user_id"]}, "fields[0]"),
        ({"enrich": ["catalogue"]}, "enrich[0]"),
        ({"enrich": [{"catalogue": "title"}]}, "enrich[0]"),
        ({"limit": 5}, "limit"),
        ({1: 5}, "1"),
    ],
)
def test_what_is_wrong_is_named_with_what_is_allowed(said: dict[Any, Any], field: str) -> None:
    with pytest.raises(BadDefinition) as caught:
        sequences.parse({**SMALL, **said})
    assert caught.value.field == field
    assert caught.value.message and caught.value.allowed
    assert str(caught.value).encode()


def test_the_nearest_name_is_offered() -> None:
    assert "did you mean `pin_id`?" in refused(fields=["pinid"]).message
    assert "did you mean `catalogue.title`?" in refused(enrich=["catalog.title"]).message
    assert "did you mean `max_length`?" in refused(max_lenght=5).message
    assert str(refused(max_length=5000)) == (
        "max_length: 5000 is not allowed: use a whole number from 1 to 1000."
    )
    assert str(refused(actions=["by"])).endswith(f"use one of {', '.join(ACTIONS)}.")


@pytest.mark.parametrize("said", [None, [], "x", 3])
def test_a_definition_is_a_mapping(said: Any) -> None:
    with pytest.raises(BadDefinition, match="not a mapping"):
        sequences.parse(said)


# -------------------------------------------------------------------------------------------------- files and versions


def declare(folder: Path, **said: Any) -> Path:
    """A file that says what `WHOLE` says, but for this."""
    whole = {**WHOLE, **said}
    path = folder / sequence_files.file_name(whole["name"], whole["version"])
    path.write_text(yaml.safe_dump({name: value for name, value in whole.items() if value is not None}))
    return path


def problem(folder: Path) -> BadDefinition:
    (found,) = sequence_files.load(folder).problems
    return found


def test_those_of_this_checkout_are_sound_and_published() -> None:
    library = sequence_files.load()
    assert not library.problems
    assert library.definitions and all(map(library.is_published, library.definitions.values()))


def test_a_file_is_named_after_what_it_declares(tmp_path: Path) -> None:
    declare(tmp_path)
    declare(tmp_path, version=2, max_length=7)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bought.v2.yaml", "bought.yaml"]
    assert sorted(sequence_files.load(tmp_path).definitions) == [("bought", 1), ("bought", 2)]
    (tmp_path / "bought.v2.yaml").rename(tmp_path / "bought.v3.yaml")
    assert problem(tmp_path).where == str(tmp_path / "bought.v3.yaml")
    assert problem(tmp_path).allowed == "bought.v2.yaml"


@pytest.mark.parametrize("missing", ["name", "version", "description", "owner", "fields", "max_length"])
def test_a_file_says_whose_it_is_and_what_for(tmp_path: Path, missing: str) -> None:
    path = tmp_path / "bought.yaml"
    path.write_text(yaml.safe_dump({name: value for name, value in WHOLE.items() if name != missing}))
    assert (problem(tmp_path).field, problem(tmp_path).message) == (missing, "it is missing")


@pytest.mark.parametrize(
    "text", ["", "{", "- 1", "name: \x00", "version: 2017-13-45", "!!python/object:os.system {}"]
)
def test_a_file_that_is_no_mapping(tmp_path: Path, text: str) -> None:
    declare(tmp_path, name="sound")
    (tmp_path / "bought.yaml").write_text(text)
    assert problem(tmp_path).where == str(tmp_path / "bought.yaml")
    assert list(sequence_files.load(tmp_path).definitions) == [("sound", 1)]  # one bad file hurts no other


def test_what_is_said_twice_is_named_with_its_line(tmp_path: Path) -> None:
    path = declare(tmp_path)
    path.write_text("actions: [view]\n" + path.read_text())
    assert "the key actions is there twice: first in line 1" in problem(tmp_path).message


@pytest.mark.parametrize("name", ["a.yml", "bought.yaml.bak", "bought.YAML", "bought", "more/bought.yaml"])
def test_what_is_not_read_is_told(tmp_path: Path, name: str) -> None:
    sound = declare(tmp_path, name="sound")
    other = tmp_path / name
    other.parent.mkdir(exist_ok=True)
    other.write_text(sound.read_text())
    assert problem(tmp_path).where == str(tmp_path / name.split("/")[0])
    assert "it is not read" in problem(tmp_path).message
    assert list(sequence_files.load(tmp_path).definitions) == [("sound", 1)]
    (tmp_path / ".sound.yaml.swp").write_text("of an editor")
    assert problem(tmp_path)


def test_the_name_of_the_ledger_is_taken(tmp_path: Path) -> None:
    path = declare(tmp_path, name="elsewhere")
    path.write_text(path.read_text().replace("elsewhere", "published"))
    assert problem(tmp_path).field == "name"


def test_no_folder_is_no_sequence(tmp_path: Path) -> None:
    assert sequence_files.load(tmp_path / "none") == sequence_files.Library({}, {}, ())


def test_without_a_version_the_newest_published_one_is_found(tmp_path: Path) -> None:
    declare(tmp_path)
    with pytest.raises(BadDefinition, match="none is published"):
        sequence_files.load(tmp_path).find("bought")
    assert sequence_files.load(tmp_path).find("bought", 1).version == 1
    sequence_files.publish(tmp_path, "bought")
    declare(tmp_path, version=2, max_length=7)
    assert sequence_files.load(tmp_path).find("bought").version == 1
    sequence_files.publish(tmp_path, "bought")
    assert sequence_files.load(tmp_path).find("bought").version == 2
    assert sequence_files.load(tmp_path).find("bought", 1).max_length == 5
    with pytest.raises(BadDefinition) as caught:
        sequence_files.load(tmp_path).find("bought", 3)
    assert (caught.value.field, caught.value.allowed) == ("version", [1, 2])
    with pytest.raises(BadDefinition, match="did you mean `bought`"):
        sequence_files.load(tmp_path).find("bougth")


# --------------------------------------------------------------------------------------------------------- publishing


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"actions": ["purchase"]}, "actions was purchase, save and is purchase"),
        ({"surfaces": None}, "surfaces was home and is not limited"),
        ({"categories": ["fruit", "bread"]}, "categories was fruit and is bread, fruit"),
        ({"age": "2d"}, "age_ms was 129600000 and is 172800000"),
        ({"age": None}, "age_ms was 129600000 and is not limited"),
        ({"max_length": 6}, "max_length was 5 and is 6"),
        ({"deduplicate_by": None}, "deduplicate_by was pin_id and is not limited"),
        ({"order": "newest_first"}, "order was oldest_first and is newest_first"),
        ({"fields": ["event_id", "quantity"]}, "fields had time_ms, pin_id"),
        ({"enrich": ["catalogue.title"]}, "enrich had offer.price_usd_micros"),
        ({"enrich": None}, "enrich had catalogue.title, offer.price_usd_micros"),
    ],
)
def test_a_published_version_keeps_its_meaning(tmp_path: Path, changed: dict[str, Any], told: str) -> None:
    declare(tmp_path)
    sequence_files.publish(tmp_path, "bought")
    declare(tmp_path, **changed)
    error = problem(tmp_path)
    assert told in error.message
    assert "version 2 in bought.v2.yaml" in str(error)
    assert not sequence_files.load(tmp_path).definitions
    with pytest.raises(BadDefinition, match="another meaning"):
        sequence_files.publish(tmp_path, "bought")
    declare(tmp_path)
    declare(tmp_path, version=2, **changed)
    assert not sequence_files.load(tmp_path).problems


@pytest.mark.parametrize(
    "changed",
    [
        {"description": "Other words.", "owner": "growth"},
        {"actions": ["save", "purchase"], "age": "2160m"},
        {"fields": ["quantity", "pin_id", "time_ms", "event_id"]},
        {"enrich": ["catalogue.title", "offer.price_usd_micros", "catalogue.brand"]},
    ],
)
def test_what_breaks_nobody_may_change(tmp_path: Path, changed: dict[str, Any]) -> None:
    declare(tmp_path)
    sequence_files.publish(tmp_path, "bought")
    declare(tmp_path, **changed)
    assert not sequence_files.load(tmp_path).problems


def test_an_added_field_is_kept_once_it_is_published(tmp_path: Path) -> None:
    declare(tmp_path)
    sequence_files.publish(tmp_path, "bought")
    declare(tmp_path, fields=[*WHOLE["fields"], "quantity"])
    sequence_files.publish(tmp_path, "bought")
    declare(tmp_path)
    assert "fields had quantity" in problem(tmp_path).message


def test_a_number_is_never_given_another_meaning(tmp_path: Path) -> None:
    declare(tmp_path)
    sequence_files.publish(tmp_path, "bought")
    (tmp_path / "bought.yaml").unlink()
    assert sequence_files.load(tmp_path) == sequence_files.Library(
        {}, sequence_files.read_ledger(tmp_path), ()
    )
    declare(tmp_path, max_length=6)
    assert problem(tmp_path).field == "version"


def test_a_column_that_a_definition_can_say_later_breaks_no_ledger(tmp_path: Path) -> None:
    declare(tmp_path, surfaces=None)
    sequence_files.publish(tmp_path, "bought")
    ledger = tmp_path / sequence_files.LEDGER
    ledger.write_text(ledger.read_text().replace("    surfaces: []\n", ""))
    assert not sequence_files.load(tmp_path).problems


def test_publishing(tmp_path: Path) -> None:
    declare(tmp_path, name="other")
    declare(tmp_path)
    declare(tmp_path, version=2, max_length=6)
    assert sequence_files.publish(tmp_path, "bought", 1).version == 1
    assert sequence_files.publish(tmp_path, "bought").version == 2
    sequence_files.publish(tmp_path, "other")
    ledger = sequence_files.read_ledger(tmp_path)
    assert {name: sorted(versions) for name, versions in ledger.items()} == {"bought": [1, 2], "other": [1]}
    before = (tmp_path / sequence_files.LEDGER).read_text()
    sequence_files.publish(tmp_path, "bought", 1)
    assert (tmp_path / sequence_files.LEDGER).read_text() == before
    with pytest.raises(BadDefinition, match="no such sequence"):
        sequence_files.publish(tmp_path, "nothing")
    declare(tmp_path, name="broken", max_length=0)
    with pytest.raises(BadDefinition, match="max_length"):
        sequence_files.publish(tmp_path, "bought")


@pytest.mark.parametrize("text", ["[1]", "bought: 3", "bought: {one: {}}", "bought: {1: [purchase]}", "{"])
def test_a_broken_ledger_is_an_error(tmp_path: Path, text: str) -> None:
    (tmp_path / sequence_files.LEDGER).write_text(text)
    with pytest.raises(BadDefinition, match="ledger|cannot be read"):
        sequence_files.load(tmp_path)
