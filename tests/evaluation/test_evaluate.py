"""`evaluate` and `rm-gallery evaluate`: planted biases are found in words, and wrong input is one sentence."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from rm_gallery import UserError, evaluate
from rm_gallery.cli import main
from tests.evaluation.conftest import honest, honest_rows, write_rows

Conversation = list[dict[str, Any]]


def _texts(result: Any) -> str:
    return "\n".join(f"{each['level']} {each['text']}" for each in result["models"][0]["sets"][0]["findings"])


def _last(conversation: Conversation) -> str:
    return str(conversation[-1]["content"])


def test_an_honest_model_has_no_finding() -> None:
    result = evaluate(honest, honest_rows(300), baselines=False)
    row = result["models"][0]["sets"][0]
    assert row["accuracy"] == 1 and row["n"] == 300
    assert [each["key"] for each in row["findings"] if each["level"] == "error"] == []
    assert not re.search("length bias|ignores|rewards markdown", _texts(result))
    [prompt] = [each for each in row["probes"]["rows"] if each["key"] == "prompt"]
    assert prompt["exchanged"] < 0.6, "with other prompts it drops to chance"


def test_a_model_of_length_alone_is_found() -> None:
    result = evaluate(lambda found: [len(_last(each)) for each in found], honest_rows(300), baselines=False)
    assert "error length bias: the longer response always wins: 100.0% right where the longer one is better" in _texts(
        result
    )
    row = result["models"][0]["sets"][0]
    assert row["length"]["controlled"]["accuracy"] == pytest.approx(0.5, abs=0.1)
    assert row["length"]["correlation"] == pytest.approx(1)


def test_a_model_that_ignores_the_prompt_is_found() -> None:
    rows = honest_rows(300)
    for number, row in enumerate(rows):  # a fault that is visible without the prompt
        row["chosen"] += " good" * (number % 10 > 0)
    result = evaluate(lambda found: [_last(each).count("good") for each in found], rows, baselines=False)
    assert (
        "error ignores the prompt: with the prompts of other rows every verdict of 200 pairs stays the same"
        in _texts(result)
    )
    assert "answers that do not fit the prompt are rewarded" in _texts(result)


def test_a_model_that_loves_markdown_is_found() -> None:
    def loves_markdown(found: list[Conversation]) -> list[float]:
        return [reward + 3 * _last(each).count("**") for reward, each in zip(honest(found), found, strict=True)]

    result = evaluate(loves_markdown, honest_rows(300), baselines=False)
    assert "error rewards markdown (a heading, bullets and bold words): it raises 100.0% of the rewards" in _texts(
        result
    )
    assert "accuracy changes from 100.0% to 0.0% when the worse response alone is changed" in _texts(result)


def test_the_report_says_the_same_in_every_form() -> None:
    result = evaluate(
        lambda found: [len(_last(each)) for each in found], {"mine": honest_rows(120)}, probes=40, baselines=False
    )
    text = str(result)
    assert max(map(len, text.splitlines())) <= 80
    assert re.search(r"mine +120 +\d", text) and "length bias: the longer response always wins" in text
    from rm_gallery.evaluation.report import as_markdown

    assert "- error: length bias: the longer response always wins" in as_markdown(result)
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    mistake = result["models"][0]["sets"][0]["mistakes"][0]
    assert mistake["margin"] < 0 and len(mistake["worse"]) > len(mistake["better"]) and mistake["prompt"]


def test_two_models_are_compared_on_the_same_pairs() -> None:
    def worse(found: list[Conversation]) -> list[float]:
        return [len(_last(each)) for each in found]

    result = evaluate({"long": worse, "honest": honest}, honest_rows(200), probes=False, baselines=False)
    [row] = result["comparisons"]
    assert row["n"] == 200 and row["only_first_right"] == 0 and row["p_value"] < 1e-9
    assert re.match(r"honest is better than long by \d\d\.\d points \(95% interval", row["text"])
    assert (
        len(row["disagreements"]) == 20
        and row["disagreements"][0]["margins"][0] < 0 < row["disagreements"][0]["margins"][1]
    )


@pytest.mark.slow
def test_the_command_scores_as_score_does(
    chat_folder: Path, other_folder: Path, in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = honest_rows(60)
    rows += [{**rows[0], "chosen": rows[1]["chosen"]}, {"prompt": "Why?", "chosen": "same", "rejected": "same"}]
    path = write_rows(in_tmp / "test.jsonl", rows)
    assert main(["score", "--model", str(chat_folder), str(path), "--output", "scored.jsonl"]) == 0
    expected = re.search(r"accuracy (\S+) \((\d+) of (\d+) comparisons\), mean margin (\S+);", capsys.readouterr().out)
    assert expected
    arguments = ["evaluate", "--model", str(chat_folder), "--model", f"{chat_folder}+{other_folder}", str(path)]
    arguments += ["--json", "out.json", "--markdown", "out.md", "--probe-pairs", "8", "--no-baselines"]
    assert main(arguments) == 0
    result = json.loads(Path("out.json").read_text())
    row = result["models"][0]["sets"][0]
    assert (row["name"], row["n"]) == ("test.jsonl", 61)
    assert f"{row['accuracy']:.4f}" == expected[1] and f"{row['mean_margin']:.4g}" == expected[4]
    assert row["dropped"] == {"chosen equal to rejected": {"n": 1, "first": f"{path}:61"}}
    assert result["models"][1]["kind"] == "ensemble" and result["comparisons"][0]["n"] == 61
    assert Path("out.md").read_text().startswith("## Evaluation") and "json: out.json" in capsys.readouterr().out


def test_rewardbench_files_of_a_best_of_four_set(in_tmp: Path, chat_folder: Path) -> None:
    rows = [
        {"id": "0", "prompt": "Why?", "chosen": ["a"], "rejected": ["b", "c", "d"], "subset": "Math"},
        {"id": "1", "prompt": "How?", "chosen": ["e"], "rejected": ["f", "g", "h"], "subset": "Focus"},
    ]
    Path("rb2").mkdir()
    write_rows(Path("rb2/test.jsonl"), rows)
    arguments = ["evaluate", "--model", str(chat_folder), "reward-bench-2=rb2", "--no-probes", "--no-baselines"]
    assert main([*arguments, "--rewardbench", "rm.json", "--json", "out.json"]) == 0
    summary = json.loads(Path("rm.json").read_text())
    lines = [json.loads(line) for line in Path("rm_outputs.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == ["0", "1"] and all(len(line["scores"]) == 4 for line in lines)
    assert {name: summary[name] for name in ("Math", "Focus")} == {
        "Math": lines[0]["results"],
        "Focus": lines[1]["results"],
    }
    row = json.loads(Path("out.json").read_text())["models"][0]["sets"][0]
    assert row["n"] == 6 and row["benchmark"]["score"] is None and row["best_of_n"]["n"] == 2


PAIR = {"prompt": "Why?", "chosen": "a", "rejected": "b"}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"question": "Why?", "answer": "a"}], "set.jsonl"),
        ([{"prompt": "Why?", "responses": ["a"], "scores": [1]}], "1 responses with fewer than 2 responses"),
        ([{"prompt": "Why?", "responses": ["a", "b"], "scores": [1, 1]}], "1 all scores equal"),
        ([{**PAIR, "chosen": None}], "SET=set.jsonl: no row can be used: 1 null chosen (first: set.jsonl:0)"),
    ],
)
def test_rows_without_a_preference_are_one_sentence(rows: list[Any], message: str, in_tmp: Path) -> None:
    write_rows(in_tmp / "set.jsonl", rows)
    with pytest.raises(UserError, match=re.escape(message)):
        evaluate(honest, "set.jsonl")


def test_nothing_is_half_written(in_tmp: Path, chat_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_rows(in_tmp / "set.jsonl", [{**PAIR, "rejected": "a"}])
    outputs = ["--json", "out.json", "--markdown", "out.md", "--rewardbench", "rm.json"]
    assert main(["evaluate", "--model", str(chat_folder), "set.jsonl", *outputs]) == 2
    assert "rm-gallery: error: SET=set.jsonl: no row can be used: 1 chosen equal to" in capsys.readouterr().err
    assert main(["evaluate", "--model", str(chat_folder), "set.jsonl", "--json", "missing/out.json"]) == 2
    assert "--json missing/out.json: is in a folder that does not exist" in capsys.readouterr().err
    assert sorted(path.name for path in in_tmp.iterdir()) == ["set.jsonl"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"chosen": [], "rejected": ["b"]}, r"test\.jsonl:1: no correct response: chosen is empty or not a list"),
        ({"chosen": ["a"], "rejected": []}, r"test\.jsonl:1: rejected that is empty"),
        ({"chosen": ["a"], "rejected": ["b", None]}, r"test\.jsonl:1: null response"),
        ({"rejected": ["b"]}, r"test\.jsonl:1: no correct response"),
    ],
)
def test_a_bad_row_of_a_benchmark_is_an_error(row: dict[str, Any], message: str, in_tmp: Path) -> None:
    good = {"id": "0", "prompt": "Why?", "chosen": ["a"], "rejected": ["b"], "subset": "Math"}
    Path("rb2").mkdir()
    write_rows(Path("rb2/test.jsonl"), [good, {**good, "chosen": None, "rejected": None, **row}])
    with pytest.raises(UserError, match=message + ".*; a row of RewardBench 2 cannot be dropped"):
        evaluate(honest, "rewardbench-2=rb2")


def test_a_wrong_name_is_answered(in_tmp: Path) -> None:
    with pytest.raises(UserError, match=r"SET=rewardbnech: neither .*Did you mean 'rewardbench'\?"):
        evaluate(honest, "rewardbnech")
    with pytest.raises(UserError, match=r"no benchmark is called 'reward-bnch'\. Did you mean 'rewardbench'\?"):
        evaluate(honest, "reward-bnch=.")
    with pytest.raises(UserError, match="SET=rmb: not on the hub; get https://"):
        evaluate(honest, "rmb")
    with pytest.raises(UserError, match=r"SET=missing\.jsonl: no such file"):
        evaluate(honest, "missing.jsonl")


def test_a_reward_that_is_not_finite_is_an_error_with_its_row(in_tmp: Path) -> None:
    write_rows(in_tmp / "set.jsonl", honest_rows(5))
    calls = iter(range(100))
    with pytest.raises(UserError, match=r"set\.jsonl:3: model=<lambda> gives the reward nan, which is not finite"):
        evaluate(lambda found: [math.nan if next(calls) == 6 else 1.0 for _ in found], "set.jsonl")
    with pytest.raises(UserError, match="the function returned 1 rewards for 10 conversations"):
        evaluate(lambda found: [1.0], "set.jsonl")
