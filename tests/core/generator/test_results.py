"""Results of a GradingRunner as scores, as it returns them and as it writes them."""

from __future__ import annotations

import asyncio
import json
import logging
from pathlib import Path
from typing import Any

import pytest

from rm_gallery.core.generator import export_data
from rm_gallery.core.graders.base_grader import BaseGrader, GraderError, GraderRank, GraderScore
from rm_gallery.core.runner import GradingRunner, WeightedSumAggregator
from rm_gallery.errors import UserError
from tests.core.generator.exported import export, pairs_of


class LengthGrader(BaseGrader):
    """The number of characters; fails on what has none. Several responses get a rank."""

    async def aevaluate(self, query: str, response: Any) -> GraderScore | GraderRank | GraderError:
        await asyncio.sleep(0)
        if not response:
            raise ValueError("there is nothing to judge")
        if isinstance(response, list):
            sizes = [len(text) for text in response]
            return GraderRank(name=self.name, rank=[1 + sum(other > size for other in sizes) for size in sizes])
        return GraderScore(name=self.name, score=len(response), reason=query)


SAMPLES = [
    {"query": query, "response": response}
    for query, response in [("one", "a"), ("two", "bb"), ("one", "ccc"), ("two", ""), ("two ", "dddd"), ("one", "e")]
]
EXPECTED = {("ccc", "a"), ("ccc", "e"), ("dddd", "bb")}


def run(samples: Any, folder: Path, **options: Any) -> tuple[dict[str, list[Any]], Path]:
    """(what the runner returns, the file that it wrote)."""
    graders = options.pop("graders", {"length": LengthGrader()})
    runner = GradingRunner(graders, show_progress=False, output_path=folder / "results.jsonl", **options)
    return runner.run(samples), folder / "results.jsonl"


def write_samples(samples: Any, folder: Path) -> Path:
    path = folder / "samples.jsonl"
    path.write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    return path


def test_results_as_returned_and_as_written_give_the_same(tmp_path: Path) -> None:
    results, file = run(SAMPLES, tmp_path)
    rows, summary = export(SAMPLES, tmp_path / "a", results=results)
    assert {(row["chosen"], row["rejected"]) for row in rows} == EXPECTED
    assert (summary.ties, summary.failures) == (1, {"an error of the grader instead of a score": 1})
    [example] = summary.examples.values()
    assert example == "cases:3: ValueError: there is nothing to judge"
    again, counted = export(write_samples(SAMPLES, tmp_path), tmp_path / "b", results=str(file))
    assert again == rows
    assert list(counted.examples.values()) == [f"{tmp_path}/samples.jsonl:3: ValueError: there is nothing to judge"]


def test_results_that_went_through_json_are_read_too(tmp_path: Path) -> None:
    results, _ = run(SAMPLES, tmp_path)
    plain = {name: [result.model_dump() for result in given] for name, given in results.items()}
    assert pairs_of(SAMPLES, tmp_path, results=plain) == EXPECTED


def test_one_of_several_graders_or_an_aggregator_is_chosen(tmp_path: Path) -> None:
    class Against(LengthGrader):
        async def aevaluate(self, query: str, response: Any) -> Any:
            return GraderScore(name=self.name, score=-3 * len(response))

    graders = {"length": LengthGrader(), "against": Against()}
    total = WeightedSumAggregator("total", {"length": 1, "against": 1})
    samples = [sample for sample in SAMPLES if sample["response"]]
    results, file = run(samples, tmp_path, graders=graders, aggregators=[total, lambda given: given["length"].score])
    turned = {(rejected, chosen) for chosen, rejected in EXPECTED}
    for name, expected in (("length", EXPECTED), ("against", turned), ("total", turned), ("<lambda>", EXPECTED)):
        assert pairs_of(samples, tmp_path / "out", results=results, grader=name) == expected, name
    assert pairs_of(samples, tmp_path / "out", results=file, grader="against") == turned
    for given in (results, file):
        with pytest.raises(UserError, match=r"results of ('<lambda>', )?'against', 'length'.*; choose a grader"):
            export_data(samples, tmp_path / "none", results=given)
        with pytest.raises(UserError, match=r"no results of 'lenght'.*Did you mean 'length'"):
            export_data(samples, tmp_path / "none", results=given, grader="lenght")


def test_two_graders_judge_the_two_responses_of_a_pair(tmp_path: Path) -> None:
    samples = [{"query": "Q", "response_a": "a" * n, "response_b": "b" * (5 - n)} for n in range(1, 5)]
    samples.append({"query": "Q", "response_a": "", "response_b": "b"})
    graders = {
        name: (LengthGrader(), {"query": "query", "response": f"response_{name[-1]}"})
        for name in ("judge_a", "judge_b")
    }
    results, file = run(samples, tmp_path, graders=graders)
    chosen = {"response_a": "judge_a", "response_b": "judge_b"}
    expected = {("bbbb", "a"), ("bbb", "aa"), ("aaa", "bb"), ("aaaa", "b")}
    for given in (results, file):
        rows, summary = export(samples, tmp_path / "out", results=given, grader=chosen)
        assert {(row["chosen"], row["rejected"]) for row in rows} == expected
        assert summary.num_failures == 1
    with pytest.raises(UserError, match="one for response_a and one for response_b"):
        export_data(samples, tmp_path / "none", results=results, grader={"response_a": "judge_a"})
    with pytest.raises(UserError, match="no response_a and response_b, which the graders were chosen for"):
        export_data(SAMPLES[:5], tmp_path / "none", results=results, grader=chosen)


def test_a_ranking_of_several_responses(tmp_path: Path) -> None:
    samples: list[dict[str, Any]] = [
        {"query": "Q", "response": ["a", "bbb", "cc"]},
        {"query": "R", "response": ["a", "b"]},
        {"query": "S", "response": []},
    ]
    results, file = run(samples, tmp_path)
    for given in (results, file):
        rows, summary = export(samples, tmp_path / "out", results=given)
        assert {(row["chosen"], row["rejected"], row["margin"]) for row in rows} == {
            ("bbb", "cc", None), ("bbb", "a", None), ("cc", "a", None)
        }  # fmt: skip
        assert (summary.ties, summary.num_failures) == (1, 1)


@pytest.mark.parametrize(
    ("metadata", "margin"),
    [
        ({"rewards": [0.5, 2.0]}, 1.5),
        ({"scores": [3, 5]}, 2.0),
        ({"scores": [3]}, None),
        ({"scores": [5, 3]}, None),
        ({"rewards": [float("nan"), 2.0]}, None),
        ({"rewards": "ab"}, None),
        ({}, None),
    ],
)
def test_scores_behind_a_ranking_give_the_margin(
    metadata: dict[str, Any], margin: float | None, tmp_path: Path
) -> None:
    sample = {"query": "Q", "response_a": "b", "response_b": "g"}
    [row], _ = export([sample], tmp_path, results={"judge": [GraderRank(rank=[2, 1], metadata=metadata)]})
    assert (row["chosen"], row["rejected"], row["margin"]) == ("g", "b", margin)


@pytest.mark.parametrize(
    ("result", "sample", "reason"),
    [
        (GraderScore(score=1), {"query": "Q", "responses": ["a", "b"]}, "one score for several responses"),
        (GraderRank(rank=[1, 2, 3]), {"query": "Q", "responses": ["a", "b"]}, "ranks of a different length"),
        (GraderRank(rank=[1]), {"query": "Q", "response": "a"}, "a rank of a single response"),
        (
            GraderError(error="no answer"),
            {"query": "Q", "responses": ["a", "b"]},
            "an error of the grader.*: no answer",
        ),
        (None, {"query": "Q", "responses": ["a", "b"]}, "null score"),
        ("good", {"query": "Q", "response": "a"}, "score that is not a number"),
        (float("nan"), {"query": "Q", "response": "a"}, "score that is not finite"),
    ],
)
def test_a_result_that_gives_no_scores_is_counted(
    result: Any, sample: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=f"1 cases give no pair: 1 dropped: {reason}"):
        export_data([sample], tmp_path, results={"judge": [result]})


def test_results_of_other_samples_are_refused(tmp_path: Path) -> None:
    results, file = run(SAMPLES, tmp_path)
    changed = [*SAMPLES[:4], {"query": "two", "response": "another"}, SAMPLES[5]]
    with pytest.raises(UserError, match=r"results\.jsonl:\d+: this result of grader 'length' is for another sample 4"):
        export_data(changed, tmp_path / "out", results=file)
    for given in (results, file):
        with pytest.raises(UserError, match="'length' has results for 6 samples, but there are 5 cases"):
            export_data(SAMPLES[:5], tmp_path / "out", results=given)
    with pytest.raises(UserError, match="has results for 6 samples, but there are 7 cases"):
        export_data([*SAMPLES, SAMPLES[0]], tmp_path / "out", results=results)
    _, summary = export([*SAMPLES, {"query": "one", "response": "new"}], tmp_path / "out", results=file)
    assert summary.failures["null score"] == 1, "a run that has not come to its end yet"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"all.parquet", "all.jsonl"}


def test_of_two_results_for_a_sample_the_later_holds_and_a_half_one_is_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _, file = run(SAMPLES, tmp_path)
    lines = file.read_text().splitlines(keepends=True)
    first = next(json.loads(line) for line in lines if json.loads(line)["index"] == 0)
    first["result"]["score"] = 9
    file.write_text("".join(lines) + "\n" + json.dumps(first) + "\n" + lines[1][:40])
    caplog.clear()
    caplog.set_level(logging.WARNING)
    assert pairs_of(SAMPLES, tmp_path / "out", results=file) == {("a", "ccc"), ("a", "e"), ("ccc", "e"), ("dddd", "bb")}
    assert [record.message.partition(":")[2] for record in caplog.records] == [
        "9: the last line is incomplete; ignoring it"
    ]


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "the file has no results"),
        (b"\n\n", "the file has no results"),
        (b"{}\n", ":1: not a"),
        (b"[1]\n", ":1: not a"),
        (b"\xff\xfe\n", ":1: not a"),
        (b"[" * 100_000 + b"\n", ":1: not a"),
        (
            b'{"grader": "a", "index": 0, "sample": "x", "kind": "score", "result": {"score": NaN}}\n',
            ":1: not a",
        ),
        (b'{"grader": "a", "index": 0, "sample": "x", "kind": "other", "result": {"score": 1}}\n', ":1: not a"),
        (
            b'{"grader": "a", "index": "x", "sample": "x", "kind": "score", "result": {"score": 1}}\n',
            ":1: not a",
        ),
    ],
)
def test_a_file_that_is_no_results_file_is_refused(content: bytes, what: str, tmp_path: Path) -> None:
    (tmp_path / "results.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=what) as caught:
        export_data(SAMPLES, tmp_path / "out", results=tmp_path / "results.jsonl")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("results", "what"),
    [
        ("nowhere.jsonl", "cannot be read"),
        (".", "cannot be read"),
        ({}, "results is dict"),
        ([GraderScore(score=1)], "results is list"),
        ({"length": "scores"}, "results is dict"),
    ],
)
def test_what_is_no_results_is_refused(results: Any, what: str, in_tmp: Path) -> None:
    with pytest.raises(UserError, match=what):
        export_data(SAMPLES, "out", results=results)


def test_results_given_as_cases_and_a_grader_without_results_are_refused(tmp_path: Path) -> None:
    _, file = run(SAMPLES, tmp_path)
    with pytest.raises(UserError, match="this is a GradingRunner result: pass it as results"):
        export_data(file, tmp_path / "out")
    with pytest.raises(UserError, match="there are no results to choose from"):
        export_data(SAMPLES, tmp_path / "out", grader="length")
