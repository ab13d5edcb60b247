"""Cases: a row of any accepted form becomes a prompt with scored responses, or a counted reason why it cannot.

A score is a number, or the reason why there is none, from whatever a case or a grader's result holds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from numbers import Real
from typing import Any, NamedTuple, TypeAlias

from rm_gallery.core.generator.case_files import RawCase
from rm_gallery.core.generator.results import PAIR, RunnerResults
from rm_gallery.core.generator.texts import Text, content_key, is_nothing, read_answer, read_text, split_turns, to_utf8
from rm_gallery.core.graders.prompt import is_messages
from rm_gallery.core.graders.reward import places
from rm_gallery.core.graders.schema import GraderError, GraderRank, GraderScore
from rm_gallery.core.utils.mapping import Mapper, check_mapper, get_value_by_path
from rm_gallery.errors import BadRow, Dropped, UserError, nearest, one_line

PROMPTS = ("prompt", "query", "messages")
PAIR_SCORES = ("score_a", "score_b")
LIST_SCORES = ("scores", "rewards", "ranks")
SINGLE_SCORE = ("score", "reward")
# What a case may hold, the first that it has something of: where its responses are, where their scores.
FORMS = ((PAIR, PAIR_SCORES), (("responses",), LIST_SCORES), (("response",), SINGLE_SCORE))
FIELDS = ("prompt", *PAIR, *PAIR_SCORES, "responses", "scores", "ranks", "response", "score", "source")
"""What a mapper may give."""
_RESULTS_LINE = {"index", "grader", "sample", "kind", "result"}
_MAX_SHOWN = 12


class Answer(NamedTuple):
    """A response with its score."""

    text: Text
    key: bytes
    """The same for the same content, whatever white space is around it."""
    score: float
    source: str | None
    """Name of the data set that it is from."""


@dataclass(frozen=True, slots=True)
class Case:
    """What a row offers for comparison."""

    where: str
    prompt: Text
    """Empty for none."""
    prompt_key: bytes
    """The same for the same prompt, whatever white space is around it; empty for none."""
    answers: list[Answer]
    """Two or more; one when the case is a response that is compared with those of other cases."""
    is_rank: bool
    """The scores are places, negated."""


def check_case_mapper(mapper: Any) -> None:
    """Raise UserError for what can be no mapper of cases."""
    check_mapper(mapper, "the cases")
    for field in mapper if isinstance(mapper, Mapping) else ():
        if field not in FIELDS:
            hint = nearest(str(field), FIELDS)
            raise UserError(f"the mapper gives {field!r}, but a case has {', '.join(FIELDS)}.{hint}")


def read_cases(
    raw: Iterable[RawCase],
    dropped: Dropped,
    *,
    mapper: Mapper | None = None,
    results: RunnerResults | None = None,
    source: str | None = None,
) -> tuple[list[Case], int]:
    """The usable cases in order, and how many there were; what cannot be used of one is added to `dropped`.

    source: name of the data set for cases that do not name theirs.
    Raises UserError when results do not belong to the cases, and when the cases are results.
    """
    cases, num_cases = [], 0
    for index, (where, values) in enumerate(raw):
        num_cases += 1
        try:
            if isinstance(values, BadRow):
                raise values
            if not isinstance(values, Mapping):
                raise BadRow(f"a case that is {type(values).__name__}, not a dictionary")
            if values.keys() >= _RESULTS_LINE:
                raise UserError(f"{where}: this is a result of a GradingRunner: give it as results, not as a case")
            judged = (results.take(index, values),) if results else ()
            case = _read_case(_fields(values, mapper), where, judged, source, dropped)
        except BadRow as error:
            _count(dropped, error, where)
            continue
        if case is not None:
            cases.append(case)
    if results:
        results.check_length(num_cases)
    return _of_one_style(cases, dropped), num_cases


def _of_one_style(cases: list[Case], dropped: Dropped) -> list[Case]:
    """Without bare texts where other cases are chats: nothing would say to a trainer that they are to be read so."""
    bare = [not case.prompt and any(isinstance(answer.text, str) for answer in case.answers) for case in cases]
    if all(bare):
        return cases
    for case, is_bare in zip(cases, bare, strict=True):
        if is_bare:
            dropped.add("texts without a prompt, among cases that have one", case.where)
    return [case for case, is_bare in zip(cases, bare, strict=True) if not is_bare]


def _count(dropped: Dropped, error: BadRow, where: str) -> None:
    detail = error.detail if isinstance(error, Fault) else ""
    dropped.add(str(error), f"{where}: {detail}" if detail else where)


def _fields(values: Mapping[str, Any], mapper: Mapper | None) -> Mapping[str, Any]:
    """The fields of a case: those that the mapper gives, and of the others what they do not stand in for."""
    if mapper is None:
        return values
    if not isinstance(mapper, Mapping):
        try:
            made = mapper(values)
        except Exception as error:
            raise Fault(f"the mapper failed with {type(error).__name__}", str(error)) from None
        if not isinstance(made, Mapping):
            raise BadRow(f"the mapper gave {type(made).__name__}, not a dictionary")
        return made
    mapped = {}
    for field, path in mapper.items():
        try:
            mapped[field] = get_value_by_path(values, path)
        except UserError:
            raise BadRow(f"nothing at {path!r}, where the mapper looks for {field}") from None
    whole = [responses + scores for responses, scores in FORMS]
    is_form_mapped = any(field in form for form in whole for field in mapped)
    hidden = {name for form in whole if is_form_mapped and mapped.keys().isdisjoint(form) for name in form}
    for names in (PROMPTS, LIST_SCORES, SINGLE_SCORE):
        hidden.update(names if not mapped.keys().isdisjoint(names) else ())
    return {**{name: value for name, value in values.items() if name not in hidden}, **mapped}


def _read_case(
    fields: Mapping[str, Any], where: str, judged: tuple[Any, ...], source: str | None, dropped: Dropped
) -> Case | None:
    """None when too little is left of the case after its faults, which are counted.

    judged: what the grader said of the case, or () when the scores are in the case itself.
    """
    prompt = _first(fields, PROMPTS)
    form, responses = _find_responses(fields)
    if not form:  # a conversation, whose last turn is judged
        if is_nothing(fields.get("messages")):
            there = ", ".join(map(str, list(fields)[:_MAX_SHOWN])) or "none"
            raise Fault("no response_a and response_b, responses or response", f"the fields are {there}")
        prompt, responses = None, [fields["messages"]]
    scores = _find_scores(fields, form, len(responses), judged)
    before = "" if prompt is None else read_text(prompt, "prompt")
    own = _first(fields, ("source",))
    if not isinstance(own, str | int | float | None):
        raise BadRow(f"a source that is {type(own).__name__}, not text")
    name = source if own is None else str(own)
    to_utf8(name or "")
    answers = []
    for response, score in zip(responses, scores.values, strict=True):
        try:
            if isinstance(score, Fault):
                raise score
            is_scored = isinstance(response, Mapping) and "response" in response
            text = read_answer(response["response"] if is_scored else response)
            answers.append(Answer(text, content_key(text, "assistant"), score, name))
        except BadRow as error:
            _count(dropped, error, where)
    if len(answers) < min(2, len(responses)):
        return None
    before, texts = split_turns(before, [answer.text for answer in answers])
    if len(responses) == 1 and not before:
        raise BadRow("a single response without a prompt, which nothing can be compared with")
    if len(responses) == 1 and scores.is_rank:
        raise BadRow("the place of a single response, which says nothing beside others")
    key = content_key(before, "user") if before else b""
    for place, text in enumerate(texts):
        if text is not answers[place].text:
            answers[place] = answers[place]._replace(text=text, key=content_key(text, "assistant"))
    return Case(where, before, key, answers, scores.is_rank)


def _first(fields: Mapping[str, Any], names: Iterable[str]) -> Any:
    """The first of these fields that holds something; white space, an empty list and an empty cell are nothing."""
    for name in names:
        value = _plain(fields.get(name))
        if is_nothing(value) or (isinstance(value, list | tuple) and not value):
            continue
        if not isinstance(value, str) or value.strip():
            return value
    return None


def _plain(value: Any) -> Any:
    """Lists for arrays, as pandas reads lists from parquet."""
    return value.tolist() if hasattr(value, "tolist") else value


def _find_responses(fields: Mapping[str, Any]) -> tuple[tuple[str, ...], list[Any]]:
    """(fields that hold the responses, the responses as they are given); nothing where the case has none of FORMS."""
    names: list[tuple[str, ...]] = [responses for responses, _ in FORMS]
    form = next((form for form in names if any(not is_nothing(fields.get(name)) for name in form)), ())
    form = form or next((form for form in names if any(name in fields for name in form)), ())
    if form in ((), PAIR):
        return form, [fields.get(name) for name in form]
    value = _plain(fields.get(form[0]))
    is_list = isinstance(value, list | tuple)
    if form == ("response",) and (not is_list or is_messages(value)):
        return form, [value]
    if not is_list or not value:
        raise BadRow("null responses" if is_nothing(value) else f"{'empty' if is_list else 'no list of'} responses")
    return form, list(value)


def _find_scores(fields: Mapping[str, Any], form: tuple[str, ...], count: int, judged: tuple[Any, ...]) -> Scores:
    """The scores of the `count` responses. Raises BadRow when they do not fit these."""
    if judged and isinstance(judged[0], Mapping) and set(judged[0]) == set(PAIR):
        if form != PAIR:
            raise BadRow("no response_a and response_b, which the graders were chosen for")
        return Scores([read_score(judged[0][name]) for name in PAIR])
    if judged:
        return read_result(judged[0], count)
    if form == PAIR:
        return Scores([read_score(fields.get(name)) for name in PAIR_SCORES])
    if form != ("responses",) and count == 1:
        return Scores([read_score(_own_score(fields))])
    for name in LIST_SCORES:
        if not is_nothing(fields.get(name)):
            return (read_ranks if name == "ranks" else read_scores)(fields[name], count)
    return Scores([read_score(_own_score(item)) for item in _plain(fields[form[0]])])


def _own_score(fields: Any) -> Any:
    """The score that stands beside a response, in a case or in an item of a list."""
    return (
        next((fields[name] for name in SINGLE_SCORE if name in fields), None) if isinstance(fields, Mapping) else None
    )


MAX_SCORE = 1e38  # so that a difference of two still is a number in the 32 bits that a trainer computes with
MISSING = "no score"
TOO_LARGE = f"a score beyond {MAX_SCORE:.0e}"
GRADER_ERROR = "an error of the grader instead of a score"


class Fault(BadRow):
    """Why something cannot be used; `detail` is what is to be said of this one alone."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.detail = one_line(detail)


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
