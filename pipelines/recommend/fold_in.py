"""A user's vector, solved at query time from the user's merged events and the vectors of the pins in them.

Belongs here: the weight of an event, the normal equations, the order of a ranking, and the parameters of these, which
a base pins. Plain numpy and Arrow: no Spark, no index, no HTTP. How item vectors are learnt is `als`'.

The model is implicit feedback (Hu, Koren, Volinsky 2008). With the item vectors Y held fixed, a user's vector is

    x = (YᵀY + Σ (cᵢ - 1) yᵢ yᵢᵀ + λ I)⁻¹ Σ cᵢ pᵢ yᵢ          cᵢ = 1 + α |sᵢ|     pᵢ = 1 if sᵢ > 0 else 0

where the sum runs over the pins of the user's events and sᵢ adds, over the events with the pin, the action's weight
times the event's recency. Recency is relative to the user's *newest* event and not to a clock, so that the same events
give the same answer at any time:

    recency(event) = floor + (1 - floor) · 2^(-(newest - time) / half-life)

The half-life is about as long as a visit: what the user is doing now leads, and the floor lets the history speak.
An action of negative weight says "not this": the pin has no preference, with confidence, and is not recommended.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import compress
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.errors import TidemarkError

ACTION_WEIGHTS: Mapping[str, float] = {
    "purchase": 1.0,
    "save": 0.6,
    "add_to_basket": 0.5,
    "click": 0.3,
    "view": 0.1,
    "hide": -1.0,
}
"""What an event of each action says, next to a purchase. An action that is not named here says nothing."""
PURCHASE = "purchase"
Float64s = np.ndarray[Any, np.dtype[np.float64]]


class BadParameters(TidemarkError):
    """The parameters that a base pins for its model are not what this code reads."""


class Parameters(NamedTuple):
    """What a base pins, so that every answer from it uses the same numbers.

    Attributes:
        model_id: Whose vectors these are: `<registered name>/<version>`.
        gram: YᵀY over all item vectors, float64[d, d].
        regularization: λ.
        alpha: α.
        half_life_ms: Of an event's weight.
        floor: The least recency, between 0 and 1.
        max_events: Only so many of the newest events count in the vector.
        actions: The weight of each action.
    """

    model_id: str
    gram: Float64s
    regularization: float = 0.1
    alpha: float = 200.0
    half_life_ms: int = 3_600_000
    floor: float = 0.005
    max_events: int = 500
    actions: Mapping[str, float] = ACTION_WEIGHTS

    @property
    def dimensions(self) -> int:
        """The length of a vector."""
        return int(self.gram.shape[0])

    def to_json(self) -> dict[str, Any]:
        """For a manifest's `parameters["als"]`; `from_json` reads it."""
        return {
            "model_id": self.model_id,
            "gram": self.gram.tolist(),
            "lambda": self.regularization,
            "alpha": self.alpha,
            "half_life_ms": self.half_life_ms,
            "floor": self.floor,
            "max_events": self.max_events,
            "actions": dict(self.actions),
        }


def from_json(value: Mapping[str, Any]) -> Parameters:
    """Read `Parameters.to_json`.

    Raises:
        BadParameters: A part is missing, has another type or is not finite.
    """
    try:
        gram = np.asarray(value["gram"], np.float64)
        read = Parameters(
            model_id=str(value["model_id"]),
            gram=gram,
            regularization=float(value["lambda"]),
            alpha=float(value["alpha"]),
            half_life_ms=int(value["half_life_ms"]),
            floor=float(value["floor"]),
            max_events=int(value["max_events"]),
            actions={str(action): float(weight) for action, weight in value["actions"].items()},
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadParameters(
            f"the parameters of the model cannot be read: {type(error).__name__} {error}",
            where='parameters["als"]',
            remedy="build the base again",
        ) from error
    numbers = [read.regularization, read.alpha, read.half_life_ms, read.floor]
    if (
        gram.ndim != 2
        or gram.shape[0] != gram.shape[1]
        or not np.isfinite(gram).all()
        or not np.isfinite(numbers).all()
    ):
        raise BadParameters(
            "the parameters of the model are not a square matrix and finite numbers",
            where='parameters["als"]',
            remedy="build the base again",
        )
    if read.half_life_ms <= 0 or read.max_events <= 0 or read.regularization <= 0:
        raise BadParameters("lambda, half_life_ms and max_events must be positive", where='parameters["als"]')
    return read


def gram_of(vectors: np.ndarray) -> Float64s:
    """YᵀY in float64, over vectors in rows."""
    wide = np.ascontiguousarray(vectors, np.float64)
    return wide.T @ wide


class History(NamedTuple):
    """A user's events as the model weighs them, newest first. A pin is meant by its place in ``pins``.

    Attributes:
        pins: Of all events, each once, in UTF-8, the most recent first.
        is_settled: Whether a pin is not to be recommended: bought, or hidden; bool[pins].
        codes: The pin of each of the newest `max_events` events, int64[n].
        weights: What the action of each says, float64[n].
        times_ms: When each was, int64[n].
    """

    pins: list[bytes]
    is_settled: np.ndarray
    codes: np.ndarray
    weights: Float64s
    times_ms: np.ndarray


def history(pins: pa.Array, actions: pa.Array, times_ms: np.ndarray, parameters: Parameters) -> History:
    """Read a user's events; those that say nothing about a pin are left out, so that impressions crowd nothing out.

    Args:
        pins: The pin of each event, newest event first; text or UTF-8 bytes; null where it is about something else.
        actions: The action of each.
        times_ms: The time of each, int64.
        parameters: Of the base.
    """
    tells = _tells(pins, actions, parameters)
    encoded, named = _encoded(pins.filter(tells)), _encoded(actions.filter(tells))
    times_ms = times_ms[tells.to_numpy(zero_copy_only=False)]
    names = encoded.dictionary.cast(pa.binary()).to_pylist()  # in order of appearance
    codes, kinds = encoded.indices.to_numpy().astype(np.int64), named.indices.to_numpy()
    known = [action.decode() for action in named.dictionary.cast(pa.binary()).to_pylist()]
    weights = np.array([parameters.actions.get(action, 0.0) for action in known], np.float64)
    settles = np.array(
        [action == PURCHASE or parameters.actions.get(action, 0.0) < 0 for action in known], bool
    )
    is_settled = np.zeros(len(names), bool)
    is_settled[codes[settles[kinds]]] = True
    most = parameters.max_events
    return History(names, is_settled, codes[:most], weights[kinds[:most]], times_ms[:most])


def _tells(pins: pa.Array, actions: pa.Array, parameters: Parameters) -> pa.BooleanArray:
    """Which events say something about a pin."""
    telling = [PURCHASE, *(action for action, weight in parameters.actions.items() if weight)]
    is_telling = pc.is_in(actions, pa.array(telling).cast(_plain(actions.type)))
    both = pc.and_(pc.is_valid(pins), is_telling)
    return both.combine_chunks() if isinstance(both, pa.ChunkedArray) else both


def _plain(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def joined(newer: History, older: History, parameters: Parameters) -> tuple[History, np.ndarray]:
    """The history of the events of two, where each event of the one is newer than every event of the other.

    Returns:
        The history, and which of the older's pins follow the newer's in it, bool[pins of older].
    """
    place = {pin: code for code, pin in enumerate(newer.pins)}
    code_of = np.array([place.get(pin, -1) for pin in older.pins], np.int64)
    is_left = code_of < 0
    code_of[is_left] = len(newer.pins) + np.arange(np.count_nonzero(is_left))
    is_settled = np.concatenate([newer.is_settled, older.is_settled[is_left]])
    is_settled[code_of[older.is_settled]] = True
    most = parameters.max_events
    both = History(
        newer.pins + list(compress(older.pins, is_left.tolist())),
        is_settled,
        np.concatenate([newer.codes, code_of[older.codes]])[:most],
        np.concatenate([newer.weights, older.weights])[:most],
        np.concatenate([newer.times_ms, older.times_ms])[:most],
    )
    return both, is_left


def strengths(told: History, parameters: Parameters) -> Float64s:
    """sᵢ of the pins that the counted events are about, float64[n]: the first of ``told.pins``, in their order."""
    if not len(told.codes):
        return np.empty(0)
    age_ms = told.times_ms[0] - told.times_ms
    floor = parameters.floor
    recency = floor + (1.0 - floor) * np.exp2(age_ms * (-1.0 / parameters.half_life_ms))
    return np.bincount(told.codes, told.weights * recency).astype(np.float64)


class Interests(NamedTuple):
    """What a user's events say about pins.

    Attributes:
        pins: The pins of the newest `max_events` events, each once, in UTF-8, the most recent first.
        strengths: sᵢ of each of them.
        settled: Pins that are not to be recommended: bought, or hidden. Over *all* events.
        event_count: How many events are in `strengths`.
    """

    pins: list[bytes]
    strengths: Float64s
    settled: set[bytes]
    event_count: int


def interests(pins: pa.Array, actions: pa.Array, times_ms: np.ndarray, parameters: Parameters) -> Interests:
    """Weigh a user's events; takes what `history` takes."""
    told = history(pins, actions, times_ms, parameters)
    weighed = strengths(told, parameters)
    settled = set(compress(told.pins, told.is_settled.tolist()))
    return Interests(told.pins[: len(weighed)], weighed, settled, len(told.codes))


def _encoded(values: pa.Array | pa.ChunkedArray) -> pa.DictionaryArray:
    if isinstance(values, pa.ChunkedArray):
        values = values.combine_chunks()
    if not pa.types.is_dictionary(values.type):
        values = pc.dictionary_encode(values)
        return values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values
    return pc.dictionary_encode(values.dictionary_decode())


def solve(vectors: np.ndarray, strengths: Float64s, parameters: Parameters) -> Float64s | None:
    """The user's vector, float64[d]; None if no pin with a vector is preferred.

    Args:
        vectors: yᵢ of each pin in a row; pins without one are left out by the caller.
        strengths: sᵢ of each.
        parameters: Of the base.
    """
    if not (strengths > 0).any():
        return None
    wide = vectors.astype(np.float64)
    left, confidence = _normal(wide, strengths, parameters)
    try:
        solved: Float64s = np.linalg.solve(left, confidence @ wide).astype(np.float64, copy=False)
    except np.linalg.LinAlgError:
        return None
    return solved if np.isfinite(solved).all() else None


def contributions(
    vectors: np.ndarray, strengths: Float64s, parameters: Parameters, of: np.ndarray
) -> Float64s:
    """How much each pin of a user's events adds to the scores of other pins, float64[m, n]: why they are recommended.

    A user's vector is a sum over those pins, hence so is a score: yᵀx = Σ yᵀ(YᵀY + …)⁻¹ cᵢ pᵢ yᵢ (Hu, Koren, Volinsky
    2008, section 5, "Explaining recommendations").

    Args:
        vectors: As `solve` takes them, float32[n, d].
        strengths: As `solve` takes them.
        parameters: Of the base.
        of: y of each pin that was scored in a row, float32[m, d]; a row of the answer adds up to its score.
    """
    wide = vectors.astype(np.float64)
    left, confidence = _normal(wide, strengths, parameters)
    found: Float64s = (of.astype(np.float64) @ np.linalg.solve(left, wide.T)) * confidence
    return found


def _normal(wide: Float64s, strengths: Float64s, parameters: Parameters) -> tuple[Float64s, Float64s]:
    """YᵀY + Σ (cᵢ - 1) yᵢ yᵢᵀ + λ I, and cᵢ pᵢ."""
    extra = parameters.alpha * np.abs(strengths)
    left: Float64s = wide.T @ (wide * extra[:, None])
    left += parameters.gram
    left.flat[:: len(left) + 1] += parameters.regularization
    return left, (1.0 + extra) * (strengths > 0)


def ranked(keys: Sequence[bytes], scores: Float64s, k: int) -> list[tuple[bytes, float]]:
    """The first ``k`` by score, the greatest first; equal scores by the pin's id in bytes, ascending."""
    order = sorted(range(len(keys)), key=lambda i: (-scores[i], keys[i]))
    return [(keys[i], float(scores[i])) for i in order[:k]]
