"""Sets: every layout that training reads, samples, and the rows of each benchmark as they are published."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rm_gallery import UserError, evaluate
from rm_gallery.data.benchmarks.published import BENCHMARKS, find_benchmark
from tests.evaluation.benchmark_rows import ROWS, SUBSETS, write_copy
from tests.evaluation.conftest import honest, honest_rows, write_rows


def _row(source: Any, **options: Any) -> dict[str, Any]:
    result = evaluate(_by_number, source, probes=False, baselines=False, **options)
    row: dict[str, Any] = result["models"][0]["sets"][0]
    return row


def _by_number(found: list[list[dict[str, Any]]]) -> list[float]:
    """The number that a response ends with is its reward."""
    return [float(str(each[-1]["content"]).split()[-1]) for each in found]


def test_rankings_give_best_of_n_and_strengths(in_tmp: Path) -> None:
    rows = [
        {"prompt": "Why?", "responses": ["a 3", "b 2", "c 1"], "scores": [5, 1, 3]},
        {"prompt": "How?", "responses": ["a 1", "b 2", "c 2"], "scores": [1, 4, 2]},
    ]
    row = _row(str(write_rows(in_tmp / "scored.jsonl", rows)))
    # First: 3 > 2, 3 > 1 right and 1 > 2 wrong. Second: 2 > 1 twice right, 2 > 2 a tie.
    assert (row["n"], row["accuracy"], row["ties"], row["groups"]) == (6, pytest.approx(4 / 6), 1, 2)
    best = row["best_of_n"]
    assert best["accuracy"] == pytest.approx((1 + 0.5) / 2) and best["regret"] == pytest.approx((0 + 1) / 2)
    strengths = [(each["from"], each["n"], each["accuracy"]) for each in row["strength"]]
    assert strengths == [(1, 1, 1.0), (2, 3, pytest.approx(1 / 3)), (3, 1, 1.0), (4, 1, 1.0)]


def test_rows_of_several_layouts_and_sources(in_tmp: Path) -> None:
    import pandas as pd

    frame = pd.DataFrame(
        {"question": ["Why?", "How?"], "better": ["a 2", "b 1"], "worse": ["c 1", "d 2"], "topic": ["x", "y"]}
    )
    columns = {"chosen_key": "better", "rejected_key": "worse", "source_key": "topic"}
    row = _row({"frame": frame}, data=columns)
    assert row["name"] == "frame" and [(each["name"], each["accuracy"]) for each in row["subsets"]] == [
        ("x", 1),
        ("y", 0),
    ]
    assert row["mistakes"][0]["where"] == "frame:1"
    ranked = [{"prompt": "Why?", "responses": ["a 1", "b 3"], "ranks": [2, 1]}]
    assert _row(ranked)["accuracy"] == 1
    joined = [{"prompt": "Why?", "response": f"a {number}", "helpfulness": number} for number in range(4)]
    assert _row(joined)["n"] == 6 and _row(joined)["best_of_n"]["regret"] == 0


def test_a_sample_is_reported_and_does_not_depend_on_the_order_of_sets(in_tmp: Path) -> None:
    path = write_rows(in_tmp / "rows.jsonl", honest_rows(50))
    sampled = evaluate(honest, {"a": path, "b": path}, max_pairs=10, probes=False, baselines=False)
    first, second = sampled["models"][0]["sets"]
    assert (first["n"], first["sample_of"]) == (10, 50) and "A random sample of 10 of 50 rows" in str(sampled)
    assert first["rewards"] == second["rewards"]
    with pytest.raises(UserError, match="--max-pairs=0: must be at least 1"):
        evaluate(honest, path, max_pairs=0)


def test_names_of_sets_and_benchmarks(in_tmp: Path) -> None:
    for name in ("a", "b"):
        Path(name).mkdir()
        write_rows(Path(name) / "test.jsonl", honest_rows(3))
    result = evaluate(honest, ["a/test.jsonl", "b/test.jsonl", "mine=a/test.jsonl"], probes=False, baselines=False)
    assert [each["name"] for each in result["models"][0]["sets"]] == ["a/test.jsonl", "b/test.jsonl", "mine"]
    [own] = evaluate(honest, {"rm": "a"}, probes=False, baselines=False)["models"][0]["sets"]
    assert own["name"] == "rm", "a short name is no misspelled benchmark"
    with pytest.raises(UserError, match=r"a/test\.jsonl is named twice"):
        evaluate(honest, ["a/test.jsonl", "a/test.jsonl"])
    assert find_benchmark("RewardBench_2") is BENCHMARKS["rewardbench-2"] and find_benchmark("other") is None


@pytest.mark.parametrize("name", BENCHMARKS)
def test_each_benchmark_is_read_from_a_local_copy(name: str, in_tmp: Path) -> None:
    write_copy(name, [ROWS[name][1]])
    found = _row(f"{name}=copy")
    assert found["accuracy"] == 1 and found["benchmark"]["name"] == name
    part = "Reasoning" if name == "rewardbench" else SUBSETS[name]
    assert found["benchmark"]["parts"][part] == 1


def test_a_score_over_some_rows_of_a_benchmark_says_so(in_tmp: Path) -> None:
    _, row = ROWS["rewardbench"]
    Path("copy").mkdir()
    write_rows(Path("copy/filtered.jsonl"), [row] * 5)
    notes = _row("rewardbench=copy", max_pairs=2)["benchmark"]["notes"]
    assert notes[-1] == "not comparable with published scores: of a sample of 5 rows"


def test_a_tie_of_helpsteer3_is_skipped_as_published(in_tmp: Path) -> None:
    _, row = ROWS["helpsteer3"]
    Path("copy").mkdir()
    write_rows(Path("copy/validation.jsonl"), [row, {**row, "overall_preference": 0}])
    found = _row("helpsteer3=copy")
    assert found["n"] == 1
    assert found["dropped"] == {"overall_preference that is a tie": {"n": 1, "first": "copy/validation.jsonl:1"}}
