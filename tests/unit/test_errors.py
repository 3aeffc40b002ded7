import pickle

from pipelines.errors import TidemarkError


class ChildError(TidemarkError):
    pass


def test_reads_as_one_sentence() -> None:
    error = TidemarkError("port 9092 is in use.", where="kafka.port", remedy="stop what listens there.")
    assert str(error) == "port 9092 is in use (kafka.port): stop what listens there."


def test_parts_may_be_missing() -> None:
    assert str(TidemarkError("it broke")) == "it broke."
    assert str(TidemarkError("it broke", where=3)) == "it broke (3)."
    assert str(TidemarkError("it broke", remedy="did you mean `port`?")) == "it broke: did you mean `port`?"


def test_json_names_the_kind() -> None:
    error = ChildError("it broke", where="here", remedy="mend it")
    assert error.as_json() == {
        "error": "ChildError",
        "what": "it broke",
        "where": "here",
        "remedy": "mend it",
    }


def test_survives_the_way_back_from_a_worker() -> None:
    error = pickle.loads(pickle.dumps(ChildError("it broke", where="here", remedy="mend it")))
    assert isinstance(error, ChildError)
    assert str(error) == "it broke (here): mend it."
