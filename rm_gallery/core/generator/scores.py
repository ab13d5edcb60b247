"""Scores: a number, or the reason why there is none, from whatever a case or a grader's result holds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from decimal import Decimal
from numbers import Real
from typing import Any, NamedTuple, TypeAlias

from rm_gallery.core.graders.reward import places
from rm_gallery.core.graders.schema import GraderError, GraderRank, GraderScore
from rm_gallery.errors import BadRow

MAX_SCORE = 1e38  # so that a difference of two still is a number in the 32 bits that a trainer computes with
MISSING = "no score"
TOO_LARGE = f"a score beyond {MAX_SCORE:.0e}"
GRADER_ERROR = "an error of the grader instead of a score"


class Fault(BadRow):
    """Why something cannot be used; `detail` is what is to be said of this one alone."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.detail = " ".join(detail.split())[:200]


Given: TypeAlias = float | Fault
"""The score of one response, or why it has none."""


class Scores(NamedTuple):
    """One entry per response of a case."""

    values: list[Given]
    is_rank: bool = False
    """The values are places, negated: they have an order, and no scale."""


def read_score(value: Any) -> Given:
    """A finite number. Truth values and texts are none, so that "4/5" or a label is never taken for a score.

    value: a number, a grader's result, or that as a dictionary, as files hold it.
    """
    if isinstance(value, Mapping):
        if value.get("score") is None and value.get("error"):
            return Fault(GRADER_ERROR, str(value["error"]))
        value = value.get("score")
    if isinstance(value, GraderError):
        return Fault(GRADER_ERROR, value.error)
    if isinstance(value, GraderScore):
        value = value.score
    if value is None or type(value).__name__ == "NAType":  # of pandas
        return Fault(MISSING)
    if isinstance(value, bool) or type(value).__name__ in ("bool_", "bool"):  # numpy's, too
        return Fault("a truth value instead of a score")
    if isinstance(value, str):
        return Fault("a text instead of a score")
    if not isinstance(value, Real | Decimal):
        return Fault(f"a {type(value).__name__} instead of a score")
    try:
        score = float(value) + 0.0  # no -0.0, which is the same score and another text
    except OverflowError:
        return Fault(TOO_LARGE)
    except ValueError:  # a signalling NaN
        score = math.nan
    if math.isnan(score):
        return Fault("a score that is NaN")
    if math.isinf(score):
        return Fault("a score that is infinite")
    return score if abs(score) <= MAX_SCORE else Fault(TOO_LARGE)


def read_scores(values: Any, num_responses: int) -> Scores:
    """Scores of the responses of one case. Raises BadRow for anything but one value for each."""
    return Scores([read_score(value) for value in _one_each(values, num_responses, "scores")])


def read_ranks(values: Any, num_responses: int) -> Scores:
    """Places of the responses of one case, 1 for the best; ties are allowed. Raises BadRow as `read_scores`."""
    given = [read_score(value) for value in _one_each(values, num_responses, "ranks")]
    return Scores([value if isinstance(value, Fault) else 0.0 - value for value in given], is_rank=True)


def read_result(result: Any, num_responses: int) -> Scores:
    """Scores from what a grader or an aggregator gave for one sample.

    A ranking whose metadata holds the scores or rewards that it was made of gives these. Raises BadRow for one score
    where there are several responses, for a ranking of another number of responses, and for what holds no score.
    """
    if isinstance(result, Mapping):
        found = next((kind for kind in ("rank", "error", "score") if result.get(kind) is not None), None)
        if found == "rank":
            return _read_rank(result["rank"], result.get("metadata"), num_responses)
    elif isinstance(result, GraderRank):
        return _read_rank(result.rank, result.metadata, num_responses)
    score = read_score(result)
    if isinstance(score, Fault):
        raise score
    if num_responses != 1:
        raise BadRow("one score for several responses")
    return Scores([score])


def _read_rank(rank: Any, metadata: Any, num_responses: int) -> Scores:
    ranks = read_ranks(rank, num_responses)
    for name in ("scores", "rewards"):
        made_of = metadata.get(name) if isinstance(metadata, Mapping) else None
        if not isinstance(made_of, Sequence) or len(made_of) != num_responses:
            continue
        scores = [read_score(value) for value in made_of]
        numbers = [score for score in scores if not isinstance(score, Fault)]
        if len(numbers) == num_responses and places(numbers) == list(rank):
            return Scores(scores)
    return ranks


def _one_each(values: Any, num_responses: int, name: str) -> Sequence[Any]:
    if hasattr(values, "tolist"):
        values = values.tolist()  # an array
    if values is None:
        values = [None] * num_responses
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise BadRow(f"{name} that are no list")
    if len(values) != num_responses:
        raise BadRow(f"another number of {name} than of responses")
    return values
