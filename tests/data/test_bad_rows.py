"""Bad rows: a fault costs at most the row that has it, its reason is counted, and good rows around it stay the same.

The cases are a sum: each fault at one place of each kind, each place of each format with a few faults, each kind of
file with one fault. `make test-all` runs the product of faults and formats, marked `slow`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rm_gallery.data.formats import FormatConfig, RowReader, prompt_key
from rm_gallery.data.sources import Row, SourceConfig, read_rows, resolve_files
from rm_gallery.errors import BadRow, Dropped, UserError
from rm_gallery.schema import PreferenceGroup
from tests.data.damage import FAULTS, HARMLESS, MISSING, SAMPLES, Place, Sample, damaged, places
from tests.data.formats.rows import read_all
from tests.data.sources.writing import WRITERS, write

pytestmark = pytest.mark.slow

FILE = "a.jsonl"

KEY = "data.train_files"


def read(rows: Sequence[dict[str, Any]], **options: Any) -> tuple[list[PreferenceGroup], Dropped]:
    return read_all([Row(values, FILE, number) for number, values in enumerate(rows)], FormatConfig(**options))


def check_reason(reason: str, fault: Any) -> None:
    """A reason is one short line of ours, and never says what stands in the row."""
    assert reason.isprintable()
    assert 0 < len(reason) < 100
    if isinstance(fault, str) and len(fault.strip()) > 4:
        assert fault.strip()[:20] not in reason


def check_sentence(sentence: str, column: str) -> None:
    """An error is one line that names the file and the column."""
    assert sentence.isprintable()
    assert sentence.startswith(FILE)
    assert repr(column) in sentence
    assert len(sentence) < 400


def spoken(group: PreferenceGroup) -> list[str]:
    """All texts of a group, each by itself."""
    parts = [group.prompt, *group.responses]
    texts = [part for part in parts if isinstance(part, str)]
    return texts + [turn.get("content", "") for part in parts if not isinstance(part, str) for turn in part]


def test_every_place_of_every_format_has_its_kind() -> None:
    for sample in SAMPLES.values():
        assert set(places(sample.row)) == set(sample.kinds)
    assert sum(len(sample.kinds) for sample in SAMPLES.values()) * len(FAULTS) > 5000


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The product of formats and faults, only if tests marked slow are selected."""
    if {"any_format", "any_fault"} <= set(metafunc.fixturenames):
        expression = metafunc.config.getoption("markexpr")
        faults = _IN_PARQUET if "tmp_path" in metafunc.fixturenames else FAULTS
        cases = [(name, fault) for name in SAMPLES for fault in faults]
        is_selected = "slow" in expression and "not slow" not in expression
        metafunc.parametrize(("any_format", "any_fault"), cases if is_selected else cases[:1])


ONE_OF_EACH_KIND: dict[str, tuple[str, Place]] = {
    kind: (name, place) for name, sample in SAMPLES.items() for place, kind in sample.kinds.items()
}
"""A place of each kind, and the sample that it is in."""
FEW_FAULTS = ("missing", "seven", "lone surrogate", "deep list")


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_costs_its_row_and_nothing_else(fault: str) -> None:
    for name, place in ONE_OF_EACH_KIND.values():
        check_fault_at(name, place, fault)


@pytest.mark.parametrize("name", SAMPLES)
def test_every_place_of_a_format_may_be_faulty(name: str) -> None:
    for place in SAMPLES[name].kinds:
        for fault in FEW_FAULTS:
            check_fault_at(name, place, fault)


def test_every_fault_at_every_place_costs_its_row_and_nothing_else(any_format: str, any_fault: str) -> None:
    for place in SAMPLES[any_format].kinds:
        check_fault_at(any_format, place, any_fault)


def check_fault_at(name: str, place: Place, fault: str) -> None:
    """Of three rows, the second one damaged, the other two are read as they are without it."""
    sample, kind = SAMPLES[name], SAMPLES[name].kinds[place]
    (before, _, after), _ = read([sample.row] * 3)
    groups, dropped = read([sample.row, damaged(sample.row, place, FAULTS[fault]), sample.row])
    assert [groups[0], groups[-1]] == [before, after], place
    if fault in HARMLESS[kind]:
        assert not dropped.counts, (place, dropped.counts)
        assert len(groups) == 3
        check_kept(groups[1], place, kind, fault)
    else:
        assert (len(groups), dropped.total) == (2, 1), place
        assert list(dropped.examples.values()) == [f"{FILE}:1"]
        check_reason(next(iter(dropped.counts)), FAULTS[fault])


def check_kept(group: PreferenceGroup, place: Place, kind: str, fault: str) -> None:
    """What was put into the row is what the group says, letter for letter."""
    assert group.comparisons
    if fault != "ten megabytes":  # which takes its time
        assert prompt_key(group).encode()
    if kind in ("answer", "said", "asked", "prompt") and fault != "missing":
        assert FAULTS[fault] in spoken(group), place
    if place in (("weight",), ("margin",), ("p_chosen",)):
        given = {"weight": 1.0}.get(str(place[0])) if fault in ("missing", "null", "empty", "blank") else FAULTS[fault]
        field = "p_better" if place[0] == "p_chosen" else str(place[0])
        assert {getattr(each, field) for each in group.comparisons} == {None if given is None else float(given)}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_all_rows_is_counted_or_an_error_about_the_file(fault: str) -> None:
    for name, place in ONE_OF_EACH_KIND.values():
        if len(place) == 1:
            check_fault_in_all_rows(name, str(place[0]), fault)


@pytest.mark.parametrize("name", SAMPLES)
def test_every_column_of_a_format_may_be_faulty_in_all_rows(name: str) -> None:
    for column in SAMPLES[name].row:
        for fault in FEW_FAULTS:
            check_fault_in_all_rows(name, column, fault)


def test_every_fault_in_all_rows_of_every_column(any_format: str, any_fault: str) -> None:
    for column in SAMPLES[any_format].row:
        check_fault_in_all_rows(any_format, column, any_fault)


def check_fault_in_all_rows(name: str, column: str, fault: str) -> None:
    sample = SAMPLES[name]
    try:
        groups, dropped = read([damaged(sample.row, (column,), FAULTS[fault])] * 3, format=sample.format)
    except UserError as error:
        check_sentence(str(error), column)
        return
    if fault in HARMLESS[sample.kinds[column,]]:
        assert len(groups) == 3
    else:
        assert not groups
        assert list(dropped.counts.values()) == [3]
        check_reason(next(iter(dropped.counts)), FAULTS[fault])


@pytest.mark.parametrize("kind", WRITERS)
def test_a_fault_in_every_kind_of_file_costs_its_row(kind: str, tmp_path: Path) -> None:
    file = tmp_path / kind
    good = {"chosen": "yes", "rejected": "no"}
    write(file, [good, {"chosen": "", "rejected": "no"}, good], like=kind)
    groups, dropped = read_all(read_rows(resolve_files(SourceConfig(str(file)), key=KEY), key=KEY), FormatConfig())
    assert [group.where for group in groups] == [f"{file}:0", f"{file}:2"]
    assert list(dropped.examples.values()) == [f"{file}:1"]


_IN_PARQUET = [
    "null", "empty", "blank", "seven", "half", "half as text", "true", "not a number", "NUL bytes", "control tokens",
    "right to left and emoji", "deep JSON", "NaN", "infinite", "bytes", "date", "time stamp", "duration",
    "cut JSON messages", "deep JSON messages", "list of text", "list of numbers", "list of lists", "empty list",
    "record without a name we know", "message without content",
]  # fmt: skip


def one_type_for_each_column(rows: list[dict[str, Any]]) -> Any:
    """The rows as a table, or None where good rows and the damaged one need different types."""
    try:
        table = pa.Table.from_pylist(rows)
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        return None
    return table if repr(table.to_pylist()) == repr(rows) else None


@pytest.mark.parametrize("place", range(len(_IN_PARQUET)))
def test_a_fault_in_a_parquet_file_is_counted_or_an_error_about_the_file(place: int, tmp_path: Path) -> None:
    check_parquet(list(SAMPLES)[place % len(SAMPLES)], _IN_PARQUET[place], tmp_path / "a.parquet")


def test_every_fault_in_a_parquet_file(any_format: str, any_fault: str, tmp_path: Path) -> None:
    check_parquet(any_format, any_fault, tmp_path / "a.parquet")


def check_parquet(name: str, fault: str, file: Path) -> None:
    """Good rows first where the type of the column allows it, else the fault alone."""
    sample = SAMPLES[name]
    for column in sample.row:
        rows = [sample.row, sample.row, damaged(sample.row, (column,), FAULTS[fault])]
        if (table := one_type_for_each_column(rows)) is None:
            rows = rows[2:]
            table = pa.Table.from_pylist(rows)
        pq.write_table(table, file)
        read_back = read_rows(resolve_files(SourceConfig(str(file)), key=KEY), key=KEY)
        try:
            groups, dropped = read_all(read_back, FormatConfig(format=sample.format))
        except UserError as error:
            assert str(error).startswith(str(file)), column
            assert str(error).isprintable()
            assert len(rows) == 1
            continue
        if len(rows) == 3:
            kept = fault in HARMLESS[sample.kinds[column,]]
            assert [group.where for group in groups] == [f"{file}:{index}" for index in range(2 + kept)]
        assert len(groups) + dropped.total == len(rows)


_USER, _ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "a"}


@pytest.mark.parametrize(
    "turns",
    [
        [_USER, _USER, _ANSWER],
        [_USER, _ANSWER, _ANSWER],
        [{**_USER, "name": "Bo", "id": 7, "when": "now"}, {**_ANSWER, "logprobs": [0.5], "meta": {"a": [1]}}],
        [_ANSWER],
        [_USER, _ANSWER] * 500,
    ],
    ids=["question twice", "answer twice", "extra keys", "one item", "a thousand turns"],
)
def test_odd_conversations_stay_as_they_are(turns: list[dict[str, Any]]) -> None:
    other = [*turns[:-1], {"role": "assistant", "content": "b"}]
    (group,), dropped = read([{"chosen": turns, "rejected": other}])
    assert [[*group.prompt, *response] for response in group.responses] == [turns, other]
    assert not dropped.counts


def test_reasons_are_the_same_text_for_the_same_fault() -> None:
    rows: list[dict[str, Any]] = [{"chosen": f"text {number}", "rejected": number} for number in range(50)]
    rows += [{"chosen": [{"role": f"role {number}", "content": "x"}], "rejected": "b"} for number in range(50)]
    _, dropped = read([{"chosen": "a", "rejected": "b"}] * 2 + rows)
    assert dropped.counts == {"rejected that is int, not text or messages": 50, "chosen with an unknown role": 50}


def test_a_reader_raises_nothing_but_bad_row() -> None:
    for sample in SAMPLES.values():
        reader = RowReader(FormatConfig(), sample.format, has_chat_template=False)
        for fault in FAULTS.values():
            for column in sample.row:
                values = damaged(sample.row, (column,), fault)
                try:
                    reader.read(Row(values, FILE, 0))
                except BadRow as error:
                    check_reason(str(error), fault)
        with pytest.raises(BadRow, match=r"^null|^empty"):
            reader.read(Row({}, FILE, 0))


def test_every_fault_spelled_in_json_is_read_from_the_text_of_a_cell() -> None:
    """As CSV has it: lists of responses, scores and messages as JSON."""
    sample = SAMPLES["scored"]
    good = {**sample.row, "responses": json.dumps(["a", "b"]), "scores": "[1, 2]"}
    for scores in ("[1, NaN]", "[1, Infinity]", "[1, true]", "[1, null]", "[1]", "[1, 2", "1", "{}", "[1, 1e999]"):
        groups, dropped = read([good, good, {**good, "scores": scores}])
        assert (len(groups), dropped.total) == (2, 1)


def test_the_damage_is_what_it_says() -> None:
    sample = Sample({"a": [{"b": 1}]}, {}, "text")
    assert list(places(sample.row)) == [("a",), ("a", 0), ("a", 0, "b")]
    assert damaged(sample.row, ("a", 0, "b"), 2) == {"a": [{"b": 2}]}
    assert damaged(sample.row, ("a", 0, "b"), MISSING) == {"a": [{}]}
    assert damaged(sample.row, ("a", 0), MISSING) == {"a": []}
    assert sample.row == {"a": [{"b": 1}]}
    assert len(FAULTS["ten megabytes"]) >= 10 * 1024**2
