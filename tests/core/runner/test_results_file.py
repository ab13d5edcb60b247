"""Results on disk: written as they come, taken over on resume, refused when they belong to something else."""

from __future__ import annotations

import asyncio
import json
import logging
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rm_gallery.core.graders.base_grader import GraderRank, GraderScore
from rm_gallery.core.runner import GradingRunner, WeightedSumAggregator
from rm_gallery.core.runner.fingerprint import of_grader
from rm_gallery.core.runner.results_file import ResultsFile
from rm_gallery.errors import UserError
from tests.core.graders_for_runs import HangingGrader, LengthGrader, RaisingGrader, scores, texts


class GivenGrader(LengthGrader):
    """Gives back the result that a sample holds; sees no content."""

    async def aevaluate(self, result: Any) -> Any:
        self.num_calls += 1
        return result

    def fingerprint(self) -> str:
        return "given"


def run(path: Path, dataset: Any, grader: Any = None, **options: Any) -> tuple[list[Any], int]:
    """(results, calls that were made)."""
    grader = grader or LengthGrader()
    results = GradingRunner({"a": grader}, output_path=path, **options).run(dataset)["a"]
    return results, grader.num_calls


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "results.jsonl"


def test_every_result_is_a_line_and_a_finished_run_asks_nothing_again(path: Path) -> None:
    first, num_first = run(path, texts(10))
    second, num_second = run(path, texts(10))
    assert (num_first, num_second) == (10, 0)
    assert first == second
    assert {(line["grader"], line["index"], line["kind"], line["result"]["score"]) for line in lines_of(path)} == {
        ("a", index, "score", index) for index in range(10)
    }


def test_a_line_is_on_disk_before_the_next_call_is_made(path: Path) -> None:
    class Looking(LengthGrader):
        async def aevaluate(self, text: str) -> Any:
            assert len(lines_of(path)) == self.num_calls
            return await super().aevaluate(text)

    assert scores(run(path, texts(5), Looking(), max_concurrency=1)[0]) == list(range(5))


def test_a_dataset_that_grew_is_continued(path: Path) -> None:
    run(path, texts(5))
    results, num_calls = run(path, texts(8))
    assert (scores(results), num_calls) == (list(range(8)), 3)


def test_a_grader_that_was_added_is_asked_alone_and_aggregators_see_all(path: Path) -> None:
    run(path, texts(4))
    old, new = LengthGrader(), LengthGrader("new")
    runner = GradingRunner({"a": old, "b": new}, output_path=path, aggregators=WeightedSumAggregator("w"))
    assert scores(runner.run(texts(4))["w"]) == [0, 1, 2, 3]
    assert (old.num_calls, new.num_calls) == (0, 4)


def test_every_kind_of_result_comes_back_as_it_was(path: Path) -> None:
    dataset: list[dict[str, Any]] = [
        {"result": GraderScore(name="g", score=0.1, reason="\u4e2d \ud800", metadata={"a": [1, {"b": None}]})},
        {"result": GraderRank(name="g", rank=[2, 1])},
        {"result": None},
    ]
    first, _ = run(path, dataset, GivenGrader())
    second, num_calls = run(path, dataset, GivenGrader())
    assert num_calls == 0
    assert first == second and [type(result).__name__ for result in second] == [
        "GraderScore",
        "GraderRank",
        "GraderError",
    ]


def test_metadata_that_json_does_not_know_is_written_all_the_same(path: Path) -> None:
    class Rich(LengthGrader):
        async def aevaluate(self, text: str) -> GraderScore:
            metadata: dict[Any, Any] = {"array": np.ones(2), "set": {2, 1}, "object": LengthGrader("x")}
            result = GraderScore(score=2)
            result.metadata.update({(1, 2): 3} if text else metadata)
            return result

    run(path, texts(2), Rich(), max_concurrency=1)
    first, second = lines_of(path)
    assert first["result"]["metadata"]["array"] == [1.0, 1.0] and first["result"]["metadata"]["set"] == [1, 2]
    assert second["result"]["metadata"] == {"text": "{(1, 2): 3}"}
    assert scores(run(path, texts(2), Rich())[0]) == [2, 2]


def test_errors_are_kept_and_asked_again_on_request(path: Path) -> None:
    dataset = [{"error": None}, {"error": "x"}]  # a text cannot be raised
    first = GradingRunner({"a": RaisingGrader()}, output_path=path).run(dataset)["a"]
    num_lines = len(lines_of(path))
    kept = GradingRunner({"a": RaisingGrader()}, output_path=path).run(dataset)["a"]
    assert kept == first and len(lines_of(path)) == num_lines == 2
    GradingRunner({"a": RaisingGrader()}, output_path=path, retry_errors=True).run(dataset)
    assert [line["index"] for line in lines_of(path)][2:] == [1]


def test_a_half_written_last_line_is_asked_for_again(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run(path, texts(6), max_concurrency=1)
    path.write_bytes(path.read_bytes()[:-20])
    with caplog.at_level(logging.WARNING):
        results, num_calls = run(path, texts(6))
    assert (scores(results), num_calls) == (list(range(6)), 1)
    assert [line["index"] for line in lines_of(path)] == list(range(6))
    assert "results.jsonl:6: the last line is incomplete" in caplog.text


def test_a_changed_dataset_is_refused_before_its_calls_are_made(path: Path) -> None:
    run(path, texts(6), max_concurrency=1)
    changed = texts(6)
    changed[2]["text"] = "other"
    grader = LengthGrader()
    with pytest.raises(
        UserError, match=r"results.jsonl:3: this result of grader 'a' is for another sample 2 .*changed"
    ):
        run(path, changed, grader)
    assert grader.num_calls == 0 and len(lines_of(path)) == 6


@pytest.mark.parametrize("as_iterator", [False, True])
def test_a_dataset_that_shrank_is_refused(path: Path, as_iterator: bool) -> None:
    run(path, texts(6))
    dataset = iter(texts(4)) if as_iterator else texts(4)
    with pytest.raises(UserError, match="is for sample 5, but the dataset has 4 samples"):
        run(path, dataset)


def test_another_grader_or_mapper_under_a_name_is_refused(path: Path) -> None:
    run(path, texts(2))
    for other in (LengthGrader("other"), (LengthGrader(), {"text": "text"}), (LengthGrader(), lambda s: s)):
        with pytest.raises(UserError, match=r"results.jsonl:1: this result of grader 'a' comes from another class"):
            GradingRunner({"a": other}, output_path=path).run(texts(2))


def test_a_file_of_something_else_is_refused(path: Path) -> None:
    path.parent.mkdir()
    path.write_text('{"prompt": "a"}\n')
    with pytest.raises(UserError, match=r"results.jsonl:1: not a result of a GradingRunner"):
        run(path, texts(2))
    assert path.read_text() == '{"prompt": "a"}\n'


@pytest.mark.parametrize("what", ["folder", "device", "below a file"])
def test_a_path_that_cannot_be_written_is_refused(tmp_path: Path, what: str) -> None:
    (tmp_path / "file").touch()
    path = {"folder": tmp_path, "device": Path("/dev/null"), "below a file": tmp_path / "file" / "results"}[what]
    with pytest.raises(UserError, match=r"output_path .*: (not a regular file|cannot be written .*); (choose|give) "):
        run(path, texts(2))


def test_a_full_disk_stops_the_run_in_words_and_costs_nothing_that_was_had(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def on_full_disk(self: ResultsFile, grader: str, index: int, *more: Any) -> None:
        if index == 3:
            self._file.close()
            self._file = open("/dev/full", "ab")  # noqa: SIM115 - closed by the ResultsFile
        append(self, grader, index, *more)

    append = ResultsFile.append
    monkeypatch.setattr(ResultsFile, "append", on_full_disk)
    with pytest.raises(UserError, match=r"cannot be written \(No space left on device\); earlier results are saved"):
        run(path, texts(9), max_concurrency=1)
    monkeypatch.undo()
    results, num_calls = run(path, texts(9))
    assert (scores(results), num_calls) == (list(range(9)), 6)


def test_two_runs_on_one_file_at_once_are_refused(path: Path) -> None:
    hanging = HangingGrader()

    async def main() -> None:
        first = asyncio.create_task(GradingRunner({"a": hanging}, output_path=path).arun(texts(3)))
        while not hanging.num_waiting:
            await asyncio.sleep(0)
        with pytest.raises(UserError, match="another run is writing to it"):
            await GradingRunner({"a": LengthGrader()}, output_path=path).arun(texts(3))
        first.cancel()
        await asyncio.wait([first])

    asyncio.run(main())


def test_a_sample_without_a_written_form_is_refused_in_words(path: Path) -> None:
    with pytest.raises(UserError, match=r"sample 0 cannot be serialized \(a value of type object\)"):
        run(path, [{"text": "a", "thing": object()}])


def test_a_run_ended_by_ctrl_c_goes_on_where_it_was(path: Path) -> None:
    class Interrupted(LengthGrader):
        async def aevaluate(self, text: str) -> Any:
            if len(text) == 5:
                signal.raise_signal(signal.SIGINT)
                await asyncio.Event().wait()
            return await super().aevaluate(text)

    again, interrupted = LengthGrader(), Interrupted()
    Interrupted.__qualname__ = LengthGrader.__qualname__
    with pytest.raises(KeyboardInterrupt):
        run(path, texts(10), interrupted, max_concurrency=1)
    results, num_calls = run(path, texts(10), again)
    assert (scores(results), num_calls) == (list(range(10)), 5)


def _line(**changes: Any) -> str:
    line = {"index": 0, "grader": "a", "sample": "0" * 16, "setup": "s", "kind": "score", "result": {"score": 1.5}}
    return json.dumps({**line, **changes})


@pytest.mark.parametrize(
    "line",
    [
        '{"index": ' + "[" * 100_000,
        _line(result={"score": 1.5, "metadata": {"a": 0}}).replace("0}", "[" * 5000 + "]" * 5000 + "}"),
        _line(index=-1), _line(index="0"), _line(index=1.0), _line(index=True), _line(index=None),
        _line(index=0).replace("0,", "1" * 5000 + ",", 1), _line(index=0).replace("0,", "1e400,", 1),
        _line(grader=1), _line(sample=None), _line(setup=["s"]), _line(kind="grade"), _line(kind=["score"]),
        _line(result={"score": float("nan")}), _line(result={"score": "1.5"}), _line(result={"score": 10**400}),
        _line(result={"rank": [1]}), _line(result=[]), "[]", "3", "null", "not json", "\ufeff" + "x",
        json.dumps({"prompt": "a", "chosen": "b"}),
    ],
)  # fmt: skip
def test_a_line_that_no_run_wrote_is_refused_and_nothing_is_lost(path: Path, line: str) -> None:
    path.parent.mkdir()
    path.write_text(f"{line}\n", encoding="utf-8")
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"results.jsonl:1: not a result of a GradingRunner.*remove that line"):
        ResultsFile(path, {"a": "s"})
    assert path.read_bytes() == before


@pytest.mark.parametrize("text", ["a note without a line end", '{"prompt": "a", "chosen": "b"', "\x1b[31m", "[1, 2"])
def test_another_file_without_a_line_end_is_not_truncated(path: Path, text: str) -> None:
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(UserError, match=r"results.jsonl:1: not a result"):
        ResultsFile(path, {"a": "s"})
    assert path.read_text() == text


def test_a_last_line_is_kept_if_only_its_line_end_is_missing(path: Path) -> None:
    run(path, texts(3))
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().rstrip(b"\n").replace(b"\n", b"\r\n"))
    results, num_calls = run(path, texts(4))
    assert (scores(results), num_calls) == (list(range(4)), 1)
    assert scores(run(path, texts(4))[0]) == list(range(4))


@pytest.mark.parametrize("name", ["api_key", "judge_api_key", "password", "client-secret", "Authorization"])
def test_a_key_is_not_part_of_a_fingerprint(name: str) -> None:
    graders = [LengthGrader(), LengthGrader()]
    for number, grader in enumerate(graders):
        setattr(grader, name, f"key-{number}")
    assert of_grader(graders[0], None) == of_grader(graders[1], None)
    setattr(graders[1], "max_tokens", 5)  # noqa: B010 - a setting whose name only looks like one
    assert of_grader(graders[0], None) != of_grader(graders[1], None)


def test_a_failing_grader_writes_no_credentials(path: Path) -> None:
    class Failing(LengthGrader):
        async def aevaluate(self, text: str) -> Any:
            raise ConnectionError("https://user:pass@host/v1?token=abc refused")

    [result], _ = run(path, texts(1), Failing())
    assert result.error == "ConnectionError: https://***@host/v1?token=*** refused"
    assert "pass" not in path.read_text() and "abc" not in path.read_text()
