"""Which pairs are made: ties, limits, duplicates, contradictions; never the order of the cases."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from rm_gallery.core.generator import export_data, pairs
from rm_gallery.errors import UserError
from tests.core.generator.exported import both_sides, export, graded, pairs_of, read_back

FOUR = {"prompt": "Q", "responses": ["a", "b", "c", "d"], "scores": [1, 4, 2, 4]}


def pair(better: str, worse: str, prompt: Any = "Q", scores: tuple[float, float] = (2, 1)) -> dict[str, Any]:
    return {"prompt": prompt, "response_a": better, "response_b": worse, "score_a": scores[0], "score_b": scores[1]}


def test_all_pairs_with_different_scores_are_made(tmp_path: Path) -> None:
    rows, summary = export([FOUR], tmp_path)
    assert {(row["chosen"], row["rejected"]): row["margin"] for row in rows} == {
        ("b", "a"): 3, ("d", "a"): 3, ("b", "c"): 2, ("d", "c"): 2, ("c", "a"): 1
    }  # fmt: skip
    assert summary.ties == 1


def test_best_against_worst(tmp_path: Path) -> None:
    [(better, worse)] = pairs_of([FOUR], tmp_path, pairs="best_worst")
    assert better in "bd" and worse == "a"
    with pytest.raises(UserError, match="1 ties"):
        export_data([{**FOUR, "scores": [2, 2, 2, 2]}], tmp_path / "ties", pairs="best_worst")


def test_responses_of_different_prompts_are_never_compared(tmp_path: Path) -> None:
    cases = graded(60, prompts=12)
    prompt_of = {case["response"]: case["prompt"] for case in cases}
    rows, summary = export(cases, tmp_path)
    assert {(prompt_of[row["chosen"]], prompt_of[row["rejected"]]) for row in rows} == {
        (row["prompt"], row["prompt"]) for row in rows
    }
    sizes = Counter(prompt_of.values())
    assert len(rows) + summary.ties == sum(size * (size - 1) // 2 for size in sizes.values())


def test_a_response_alone_with_its_prompt_is_counted(tmp_path: Path) -> None:
    cases = [*({"prompt": f"P{n}", "response": "x", "score": 1} for n in range(3)), pair("g", "b")]
    _, summary = export(cases, tmp_path)
    assert (summary.num_rows, summary.unpaired) == (1, 3)


def test_least_difference_takes_what_is_equal_to_it(tmp_path: Path) -> None:
    cases = [pair("a", "b", scores=(0.3, 0.1)), pair("c", "d", scores=(0.25, 0.1)), pair("e", "f", scores=(1, 1))]
    rows, summary = export(cases, tmp_path, min_difference=0.2)  # 0.3 - 0.1 is a little less than 0.2
    assert [row["chosen"] for row in rows] == ["a"]
    assert (summary.too_close, summary.ties) == (1, 1)


def test_at_most_so_many_pairs_per_prompt(tmp_path: Path) -> None:
    cases = graded(60, prompts=4)
    every, _ = export(cases, tmp_path)
    rows, summary = export(cases, tmp_path, max_pairs_per_prompt=5)
    assert Counter(row["prompt"] for row in rows) == {f"Question {n}?": 5 for n in range(4)}
    assert summary.over_limit == len(every) - 20
    drawn = [
        {(row["chosen"], row["rejected"]) for row in rows},
        pairs_of(cases, tmp_path, max_pairs_per_prompt=5, seed=1),
    ]
    assert drawn[0] != drawn[1], "the seed draws"


def test_without_prompts_the_limit_is_of_the_case(tmp_path: Path) -> None:
    cases = [{"responses": [f"{n}{letter}" for letter in "abcd"], "scores": [1, 2, 3, 4]} for n in range(5)]
    cases.append({"responses": ["0a", "0b"], "scores": [1, 2]})
    found = pairs_of(cases, tmp_path, max_pairs_per_prompt=2)
    of_case = Counter(chosen[0] for chosen, _ in found)
    assert {number: of_case[number] for number in "1234"} == dict.fromkeys("1234", 2)
    assert of_case["0"] in (2, 3), "a pair that two cases have is one of either"
    assert all(chosen[0] == rejected[0] for chosen, rejected in found)


def test_duplicates_are_removed_and_counted(tmp_path: Path) -> None:
    cases = [
        pair("g", "b"),
        pair(" g", "b\n", prompt=" Q "),
        pair("g", "b", scores=(9, 1)),
        pair("g", "b", prompt="other"),
    ]
    rows, summary = export(cases, tmp_path)
    assert sorted((row["prompt"], row["margin"]) for row in rows) == [("Q", 8.0), ("other", 1.0)]
    assert summary.duplicates == 2
    cases = [{"prompt": "Q", "response": text, "score": 1} for text in "xxxy"] + [
        {"prompt": "Q", "response": "z", "score": 2}
    ]
    rows, summary = export(cases, tmp_path)
    assert {(row["chosen"], row["rejected"]) for row in rows} == {("z", "x"), ("z", "y")}
    assert (summary.duplicates, summary.ties) == (2, 1)


def test_one_response_with_two_scores_is_no_pair(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="1 pairs of one response that has two scores"):
        export_data([pair("same", " same ")], tmp_path)
    rows, summary = export([{**FOUR, "responses": ["a", "b", "b", "c"], "scores": [1, 3, 2, 0]}], tmp_path)
    assert {(row["chosen"], row["rejected"]): row["margin"] for row in rows} == {
        ("b", "a"): 2, ("b", "c"): 3, ("a", "c"): 1
    }  # fmt: skip
    assert (summary.identical, summary.duplicates) == (1, 2)


def test_contradictions_are_counted_and_kept_or_dropped(tmp_path: Path) -> None:
    cases = [
        pair("x", "y"),
        pair("y ", "x", prompt="Q "),
        pair("y", "x"),
        pair("x", "z"),
        pair("y", "x", prompt="other"),
    ]
    rows, summary = export(cases, tmp_path)
    assert (len(rows), summary.contradictions, summary.duplicates) == (4, 1, 1)
    assert "both kept" in str(summary)
    rows, summary = export(cases, tmp_path, contradictions="drop")
    assert {(row["prompt"], row["chosen"]) for row in rows} == {("Q", "x"), ("other", "y")}
    assert [row["rejected"] for row in rows if row["prompt"] == "Q"] == ["z"]
    assert summary.contradictions == 1 and "both dropped" in str(summary)


def test_groups_hold_all_responses_with_scores(tmp_path: Path) -> None:
    cases = [FOUR, pair("x", "y", prompt="P"), {**FOUR, "prompt": "ties", "scores": [1] * 4}]
    cases += [{"prompt": "S", "response": text, "score": score} for text, score in (("l", 1), ("h", 5), ("l", 1))]
    rows, summary = export(cases, tmp_path, layout="groups")
    assert sorted(rows, key=lambda row: row["prompt"]) == [
        {"prompt": "P", "responses": ["x", "y"], "scores": [2, 1]},
        FOUR,
        {"prompt": "S", "responses": ["h", "l"], "scores": [5, 1]},
    ]
    assert (summary.num_rows, summary.ties, summary.duplicates) == (3, 1 + 6, 1)
    assert "3 groups from 6 cases" in str(summary)


def test_a_response_is_in_a_group_once(tmp_path: Path) -> None:
    twice = {"prompt": "Q", "responses": ["a", "a ", "b"], "scores": [3, 1, 2]}
    rows, summary = export([twice], tmp_path, layout="groups")
    assert rows == [{"prompt": "Q", "responses": ["a", "b"], "scores": [3, 2]}] and summary.identical == 1
    with pytest.raises(UserError, match="1 ties"):
        export_data([{**twice, "scores": [2, 1, 2]}], tmp_path / "ties", layout="groups")


def test_groups_of_ranks_and_repeated_groups(tmp_path: Path) -> None:
    ranked = {"prompt": "Q", "responses": ["a", "b", "c"], "ranks": [2, 1, 2]}
    flipped = {"prompt": "Q", "responses": ["a", "b"], "ranks": [1, 2]}
    rows, summary = export([ranked, ranked, flipped], tmp_path, layout="groups")
    assert len(rows) == 2 and ranked in rows
    assert (summary.duplicates, summary.contradictions) == (1, 1)
    with pytest.raises(UserError, match="some cases have scores and others only ranks"):
        export_data([ranked, FOUR], tmp_path / "both", layout="groups")
    assert not (tmp_path / "both").exists()


@pytest.mark.parametrize("options", [{}, {"max_pairs_per_prompt": 3}, {"pairs": "best_worst"}, {"layout": "groups"}])
def test_the_order_of_the_cases_changes_no_byte(options: dict[str, Any], tmp_path: Path) -> None:
    cases = graded(80, prompts=9)
    cases += [{**case, "prompt": f"{case['prompt']} ", "source": "copy"} for case in cases[:30]]
    cases += [
        {"responses": [f"r{n % 7}", f"r{n % 5}", f" r{n % 5}"], "scores": [n % 3, n % 4, n % 4]} for n in range(40)
    ]
    cases += [pair("x", "y", scores=(n, 0.5)) for n in range(4)] + [
        pair("p", "q", "Z", (zero, 1)) for zero in (0.0, -0.0)
    ]
    folders = []
    for turn in range(4):
        random.Random(turn).shuffle(cases)
        folders.append(tmp_path / str(turn))
        export_data(cases, folders[-1], formats=["parquet", "jsonl"], **options)
    for name in ("train.parquet", "train.jsonl", "test.parquet", "test.jsonl"):
        assert len({(folder / name).read_bytes() for folder in folders}) == 1, name
    train, test = both_sides(folders[0])
    assert train and test
    assert read_back(folders[0] / "train.jsonl") != read_back(folders[0] / "test.jsonl")


def test_too_many_pairs_are_refused_before_they_are_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs, "MAX_PAIRS", 100)
    many = [{"prompt": "Q", "response": str(n), "score": n} for n in range(16)]
    with pytest.raises(UserError, match=r"120 pairs of one prompt with 16 responses.*best_worst"):
        export_data(many, tmp_path)
    few = [{**case, "prompt": str(n % 2)} for n, case in enumerate(graded(40))]
    with pytest.raises(UserError, match=r"pairs of one prompt|pairs in all"):
        export_data(few, tmp_path)
    assert len(pairs_of(many, tmp_path, pairs="best_worst")) == 1
    monkeypatch.undo()
    large = {"prompt": "Q", "responses": list(map(str, range(300))), "scores": [*range(300)]}
    with pytest.raises(UserError, match="300 responses"):
        export_data([large], tmp_path / "groups", layout="groups")
