"""Bad rows: every fault at every place of every format costs at most the row that has it, and the reason is counted.

Good rows around it come out as they would without it.
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


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", SAMPLES)
def test_a_fault_costs_its_row_and_nothing_else(name: str, fault: str) -> None:
    sample = SAMPLES[name]
    (before, _, after), _ = read([sample.row] * 3)
    for place, kind in sample.kinds.items():
        row = damaged(sample.row, place, FAULTS[fault])
        groups, dropped = read([sample.row, row, sample.row])
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
@pytest.mark.parametrize("name", SAMPLES)
def test_a_fault_in_all_rows_is_counted_or_one_sentence_about_the_file(name: str, fault: str) -> None:
    sample = SAMPLES[name]
    for column in sample.row:
        rows = [damaged(sample.row, (column,), FAULTS[fault])] * 3
        try:
            groups, dropped = read(rows, format=sample.format)
        except UserError as error:
            check_sentence(str(error), column)
            continue
        if fault in HARMLESS[sample.kinds[column,]]:
            assert len(groups) == 3
        else:
            assert not groups
            assert list(dropped.counts.values()) == [3]
            check_reason(next(iter(dropped.counts)), FAULTS[fault])


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


@pytest.mark.parametrize("fault", _IN_PARQUET)
def test_a_fault_in_a_column_of_a_parquet_file_ends_in_words(fault: str, tmp_path: Path) -> None:
    """As above, read from files: good rows first where the type of the column allows it, else the fault alone."""
    file = tmp_path / "a.parquet"
    for name, sample in SAMPLES.items():
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
                assert str(error).startswith(str(file)), (name, column)
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
