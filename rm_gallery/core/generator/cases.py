"""Cases: rows of files, Python objects and graded samples become prompts with scored responses.

What cannot be used is counted by reason; a response without a usable text or score leaves the others of its case.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from rm_gallery.core.generator.summary import ExportSummary
from rm_gallery.core.graders.llm_grader import is_messages
from rm_gallery.core.graders.reward import places
from rm_gallery.core.runner.grader_config import Mapper, check_mapper, get_value_by_path
from rm_gallery.core.runner.results_file import PAIR, GradingResults
from rm_gallery.data.formats import as_messages, hash_prompt, prompt_key, read_cell, without_repeats
from rm_gallery.data.formats.cells import Cell, own_values, plain_json, read_list, read_name, read_number
from rm_gallery.data.formats.conversations import check_answer, shared_turns
from rm_gallery.data.sources import Row
from rm_gallery.errors import BadRow, Dropped, UserError, nearest, one_line
from rm_gallery.schema import PreferenceGroup

PROMPTS = ("prompt", "query", "messages")
PAIR_SCORES = ("score_a", "score_b")
LIST_SCORES = ("scores", "rewards", "ranks")
SINGLE_SCORE = ("score", "reward")
# Layouts of a case, in order of precedence: (fields of the responses, fields of their scores).
LAYOUTS = ((PAIR, PAIR_SCORES), (("responses",), LIST_SCORES), (("response",), SINGLE_SCORE))
FIELDS = ("prompt", *PAIR, *PAIR_SCORES, "responses", "scores", "ranks", "response", "score", "source")
"""Fields that a mapper may give."""
_RESULTS_LINE = {"index", "grader", "sample", "kind", "result"}
_MAX_SHOWN = 12
_MAX_DEPTH = 100


class ScoredResponse(NamedTuple):
    text: Cell
    key: int
    """Hash of the content, 64 bits; surrounding white space does not count."""
    score: float
    source: str | None
    """Name of the data set."""


class ScoredGroup(NamedTuple):
    """A prompt with scored responses: a case, or a row of an export."""

    prompt: Cell
    """'' for none."""
    prompt_key: int | None
    """Hash of the prompt, 64 bits, as training computes it; None for none."""
    responses: list[ScoredResponse]
    """One when the case is a response that is compared with those of other cases."""
    is_rank: bool
    """The scores are negated ranks: an order without a scale."""
    where: str = ""
    """`file:row`"""
    case_key: int = 0
    """Hash of the responses and scores of the case; set when pairs are made."""

    @property
    def source(self) -> str | None:
        """The data set that all responses are from; None when they are from several."""
        return self.responses[0].source if len({each.source for each in self.responses}) == 1 else None

    @property
    def margin(self) -> float | None:
        """Of a pair: the difference of the scores; None for ranks."""
        return None if self.is_rank else self.responses[0].score - self.responses[1].score


class Fault(BadRow):
    """A reason with a detail that differs from row to row."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason)
        self.detail = one_line(detail)


def content_key(value: Cell, role: str) -> int:
    """Hash of a text or conversation, 64 bits, as training computes it for prompts; a text is one turn of `role`."""
    return hash_prompt(prompt_key(PreferenceGroup(as_messages(value, role), (), style="chat")))


def group_key(group: ScoredGroup) -> int:
    """Of a group without a prompt: hash of its substitute, as training computes it.

    For texts that is their common beginning up to a line break, else the first text in sorted order.
    """
    texts = [response.text for response in group.responses]
    if all(isinstance(text, str) for text in texts):
        return hash_prompt(prompt_key(PreferenceGroup("", texts)))
    return min(response.key for response in group.responses)


def check_case_mapper(mapper: Any) -> None:
    """Raise UserError for a mapper of cases that is not valid."""
    check_mapper(mapper, "the cases")
    for name in mapper if isinstance(mapper, Mapping) else ():
        if name not in FIELDS:
            hint = nearest(str(name), FIELDS)
            raise UserError(f"the mapper gives {name!r}, but a case has {', '.join(FIELDS)}.{hint}")


def rows_of(cases: Any) -> Iterator[Row]:
    """Cases of a list, an iterator or a DataFrame as rows. Raises UserError for anything else."""
    if hasattr(cases, "to_dict") and hasattr(cases, "columns"):
        cases = cases.to_dict("records")
    if isinstance(cases, Mapping):
        raise UserError(
            "the cases are one dictionary: give a list of dictionaries, one per case (what a GradingRunner returned "
            "goes to results=..., with the graded samples as cases)"
        )
    if isinstance(cases, bytes) or not isinstance(cases, Iterable):
        raise UserError(f"the cases are of type {type(cases).__name__}: give a list of dictionaries, or paths of files")
    for index, values in enumerate(cases):
        if isinstance(values, Mapping):
            yield Row(dict(values), "cases", index)
        else:
            yield Row({}, "cases", index, f"a case that is {type(values).__name__}, not a dictionary")


def read_cases(
    rows: Iterable[Row],
    summary: ExportSummary,
    *,
    mapper: Mapper | None = None,
    results: GradingResults | None = None,
    source: str | None = None,
) -> list[ScoredGroup]:
    """The usable cases in order; counts the cases and what is dropped in `summary`.

    source: name of the data set for cases without one.
    Raises UserError when results do not belong to the cases, and when the cases are results.
    """
    dropped = Dropped(summary.failures, summary.examples)
    groups = []
    for index, row in enumerate(rows):
        summary.num_cases += 1
        try:
            if row.fault:
                raise BadRow(row.fault)
            if row.values.keys() >= _RESULTS_LINE:
                raise UserError(f"{row.where}: this is a GradingRunner result: pass it as results, not as a case")
            judged = results.take(index, row.values) if results else None
            fields = plain(_fields(own_values(row, None), mapper))
            group = _CaseReader(fields, row.where, dropped, judged).read(source)
        except BadRow as error:
            _count(dropped, error, row.where)
            continue
        if group is not None:
            groups.append(group)
    if results:
        results.check_length(summary.num_cases)
    bare = [not group.prompt and any(isinstance(each.text, str) for each in group.responses) for group in groups]
    if all(bare):
        return groups
    for group, is_bare in zip(groups, bare, strict=True):
        if is_bare:  # a file of both would not say whether a text is a whole input or an assistant turn
            dropped.add("texts without a prompt, among cases that have one", group.where)
    return [group for group, is_bare in zip(groups, bare, strict=True) if not is_bare]


def _count(dropped: Dropped, error: BadRow, where: str) -> None:
    dropped.add(str(error), f"{where}: {error.detail}" if isinstance(error, Fault) and error.detail else where)


def plain(value: Any, depth: int = 0) -> Any:
    """Lists and dictionaries for tuples, arrays and pydantic objects, None for pandas' NA."""
    if isinstance(value, str):
        return value
    if depth > _MAX_DEPTH:
        raise BadRow(f"values nested more than {_MAX_DEPTH} deep")
    for method in ("model_dump", "tolist"):
        if callable(getattr(value, method, None)) and not isinstance(value, type):
            value = getattr(value, method)()
    if isinstance(value, Mapping):
        return {key: plain(item, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, depth + 1) for item in value]
    return None if type(value).__name__ in ("NAType", "NaTType") else value


def is_empty(value: Any) -> bool:
    """None, an empty cell of a table (NaN), white space, or an empty list."""
    return _is_null(value) or (isinstance(value, list) and not value) or (isinstance(value, str) and not value.strip())


def _fields(values: Mapping[str, Any], mapper: Mapper | None) -> Mapping[str, Any]:
    """The fields of a case: those of the mapper, and the case's own that these do not replace."""
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
    for name, path in mapper.items():
        try:
            mapped[name] = get_value_by_path(values, path)
        except UserError:
            raise BadRow(f"nothing at {path!r}, the mapper's path of {name}") from None
    # A mapper that gives `responses` hides the case's own `response`, one that gives `ranks` its `scores`, and so on.
    layouts = [responses + scores for responses, scores in LAYOUTS]
    has_layout = any(name in layout for layout in layouts for name in mapped)
    hidden = {name for layout in layouts if has_layout and mapped.keys().isdisjoint(layout) for name in layout}
    for names in (PROMPTS, LIST_SCORES, SINGLE_SCORE):
        hidden.update(names if not mapped.keys().isdisjoint(names) else ())
    return {**{name: value for name, value in values.items() if name not in hidden}, **mapped}


class _CaseReader:
    """Reads one case."""

    def __init__(self, fields: dict[str, Any], where: str, dropped: Dropped, judged: tuple[Any, ...] | None) -> None:
        """judged: results of the graders; None when the scores are in the case."""
        self.fields, self.where, self.dropped, self.judged = fields, where, dropped, judged

    def read(self, default_source: str | None) -> ScoredGroup | None:
        """None when too few responses are left; those that cannot be used are counted. Raises BadRow."""
        layout, given = self._find_responses()
        prompt = next((self.fields[name] for name in PROMPTS if not is_empty(self.fields.get(name))), None)
        if not layout:  # a conversation with a score for its last turn
            if is_empty(self.fields.get("messages")):
                names = ", ".join(map(str, list(self.fields)[:_MAX_SHOWN])) or "none"
                raise Fault("no response_a and response_b, responses or response", f"the fields are {names}")
            prompt, given = None, [self.fields["messages"]]
        scores, is_rank = self._find_scores(layout, given)
        turns = "" if prompt is None else read_text(prompt, "prompt")
        source = read_name(self.fields, "source").strip() or default_source
        texts, kept = [], []
        for item, score in zip(given, scores, strict=True):
            try:
                if isinstance(score, BadRow):
                    raise score
                text = read_text(item["response"] if _is_scored(item) else item, "response")
                if isinstance(text, list):
                    check_answer(text, "response")
            except BadRow as error:
                _count(self.dropped, error, self.where)
                continue
            texts.append(text)
            kept.append(score)
        if len(texts) < min(2, len(given)):
            return None
        turns, texts = split_turns(turns, texts)
        if len(given) == 1 and not turns:
            raise BadRow("a single response without a prompt, which has nothing to be compared with")
        if len(given) == 1 and is_rank:
            raise BadRow("a rank of a single response")
        responses = [
            ScoredResponse(text, content_key(text, "assistant"), score, source)
            for text, score in zip(texts, kept, strict=True)
        ]
        key = content_key(turns, "user") if turns else None
        return ScoredGroup(turns, key, responses, is_rank, self.where)

    def _find_responses(self) -> tuple[tuple[str, ...], list[Any]]:
        """(fields that hold the responses, the responses as given); empty for a case in none of LAYOUTS."""
        names: list[tuple[str, ...]] = [responses for responses, _ in LAYOUTS]
        layout = next((each for each in names if any(not _is_null(self.fields.get(name)) for name in each)), ())
        layout = layout or next((each for each in names if any(name in self.fields for name in each)), ())
        if layout in ((), PAIR):
            return layout, [self.fields.get(name) for name in layout]
        value = self.fields.get(layout[0])
        if layout == ("response",) and (not isinstance(value, list) or is_messages(value)):
            return layout, [value]
        responses = read_list(None if _is_null(value) else value, layout[0])
        if not responses:
            raise BadRow(f"empty {layout[0]}")
        return layout, list(responses)

    def _find_scores(self, layout: tuple[str, ...], given: list[Any]) -> tuple[list[float | BadRow], bool]:
        """(a score or the reason why there is none for each response, whether these are negated ranks)."""
        if self.judged is not None:
            if len(self.judged) == 1:
                return read_result(self.judged[0], len(given))
            if layout != PAIR:
                raise BadRow("no response_a and response_b, which the graders were chosen for")
            return [read_score(result) for result in self.judged], False
        if layout == PAIR:
            return [read_score(self.fields.get(name)) for name in PAIR_SCORES], False
        if layout != ("responses",) and len(given) == 1:
            return [read_score(_own_score(self.fields))], False
        for name in LIST_SCORES:
            if not _is_null(self.fields.get(name)):
                scores = _one_each(self.fields[name], len(given), name)
                return (_negated(scores), True) if name == "ranks" else (scores, False)
        return [read_score(_own_score(item)) for item in given], False


def _is_null(value: Any) -> bool:
    return value is None or (isinstance(value, float) and value != value)


def _is_scored(item: Any) -> bool:
    return isinstance(item, Mapping) and "response" in item


def _own_score(fields: Any) -> Any:
    """The score of a single response: a field of its case, or of its item in a list."""
    if not isinstance(fields, Mapping):
        return None
    return next((fields[name] for name in SINGLE_SCORE if name in fields), None)


def read_text(value: Any, name: str) -> Cell:
    """Text or messages as training reads them, messages as plain JSON. Raises BadRow for anything else."""
    text = read_cell(None if _is_null(value) else value, name)
    if isinstance(text, str):
        return text
    messages: Cell = plain_json(text, name)
    return messages


def split_turns(prompt: Cell, responses: list[Cell]) -> tuple[Cell, list[Cell]]:
    """Prompt and responses; turns that all responses begin with move to the prompt. Texts stay as they are."""
    if all(isinstance(response, str) for response in responses):
        return prompt, responses
    turns = as_messages(prompt, "user")
    before, answers = without_repeats(turns, [as_messages(text, "assistant") for text in responses])
    shared = list(shared_turns(answers))
    if not shared and before == turns:
        return prompt, responses
    return [*before, *shared], [answer[len(shared) :] for answer in answers]


def read_score(value: Any) -> float | BadRow:
    """A finite number, or the reason why there is none.

    value: a number, its text as CSV has it, a grader's result, or a dictionary with `score`.
    """
    try:
        value = plain(value)
        if isinstance(value, Mapping):
            if value.get("score") is None and value.get("error"):
                return Fault("an error of the grader instead of a score", str(value["error"]))
            value = value.get("score")
        return read_number(value, "score") + 0.0  # -0.0 becomes 0.0: equal scores are written the same
    except BadRow as error:
        return error


def read_result(result: Any, num_responses: int) -> tuple[list[float | BadRow], bool]:
    """(scores, whether these are negated ranks) of a result of a grader or an aggregator for one sample.

    A ranking whose metadata holds the scores or rewards that it was made of gives these.
    Raises BadRow for one score for several responses and for a result without a score.
    """
    result = plain(result)
    if not isinstance(result, Mapping) or result.get("rank") is None:
        score = read_score(result)
        if isinstance(score, BadRow):
            raise score
        if num_responses != 1:
            raise BadRow("one score for several responses")
        return [score], False
    ranks = _one_each(result["rank"], num_responses, "ranks")
    metadata = result.get("metadata")
    for name in ("scores", "rewards"):
        origin = metadata.get(name) if isinstance(metadata, Mapping) else None
        scores = [read_score(value) for value in origin] if isinstance(origin, list) else []
        numbers = [score for score in scores if isinstance(score, float)]
        if len(numbers) == len(scores) == num_responses and places(numbers) == result["rank"]:
            return scores, False
    return _negated(ranks), True


def _negated(ranks: Sequence[float | BadRow]) -> list[float | BadRow]:
    return [0.0 - rank if isinstance(rank, float) else rank for rank in ranks]


def _one_each(values: Any, num_responses: int, name: str) -> list[float | BadRow]:
    scores = read_list(values, name)
    if len(scores) != num_responses:
        raise BadRow(f"{name} of a different length than the responses")
    return [read_score(value) for value in scores]
