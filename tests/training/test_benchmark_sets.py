"""Benchmarks in `trainer.eval_sets`: their scores while training are those of `evaluate` on the checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rm_gallery import evaluate
from rm_gallery.cli import main
from rm_gallery.data.benchmarks.published import BENCHMARKS
from tests.evaluation.benchmark_rows import ROWS, varied, write_copy
from tests.training.rank_runs import Run, run_all
from tests.training.short_runs import rows, settings, train, write_data

WHILE_TRAINING = [name for name in BENCHMARKS if name != "ppe-correctness"]


def slow(*case: str) -> Any:
    return pytest.param(*case, marks=pytest.mark.slow)


@pytest.fixture(autouse=True)
def data(in_tmp: Path) -> None:
    write_data()


def check_scores(run: Path, sets: dict[str, str]) -> None:
    """The last validation has the figures of `evaluate`. sets: name -> benchmark=folder."""
    last = [row for row in rows(run) if "val/loss" in row][-1]
    [model] = evaluate(run, list(sets.values()), probes=False, baselines=False, dtype="fp32")["models"]
    for name, row in zip(sets, model["sets"], strict=True):
        about = row["benchmark"]
        assert last[f"val/{name}/n"] == row["n"]
        assert last[f"val/{name}/accuracy"] == pytest.approx(row["accuracy"], abs=1e-9)
        expected = {f"val/{name}/score/{part}": value for part, value in about["parts"].items()}
        if about["score"] is not None:
            expected[f"val/{name}/score"] = about["score"]
        scores = {key: value for key, value in last.items() if key.startswith(f"val/{name}/score")}
        assert scores == pytest.approx(expected, abs=1e-9)
        for subset in row["subsets"]:
            assert last[f"val/{name}/accuracy/{subset['name']}"] == pytest.approx(subset["accuracy"], abs=1e-9)


@pytest.mark.slow
def test_a_score_while_training_is_that_of_evaluate(qwen2_folder: Path, capsys: Any) -> None:
    copied = [{**row, "subset": subset} for subset in ("Focus", "Math") for row in varied("rewardbench-2", 9)]
    write_copy("rewardbench-2", copied)
    run = train(qwen2_folder, "run", "trainer.eval_sets={mine: {path: copy, format: rewardbench-2}}",
                "data.input_style=chat", "data.max_length=512")  # fmt: skip
    check_scores(run, {"mine": "rewardbench-2=copy"})
    facts = json.loads((run / "run.json").read_text())["data"]["eval_sets"]["mine"]
    assert facts["formats"] == ["benchmark rewardbench-2"] and facts["rows"] == 18
    assert "no overall score: rows of subset Factuality, Precise IF, Safety, Ties" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("style", ["chat", "text"])
def test_scores_of_all_benchmarks_are_those_of_evaluate(style: str, qwen2_folder: Path) -> None:
    """For models of chats, and of raw text; prompts are shared and groups above the budget are split."""
    sets = {name: f"{name}=copies/{name}" for name in WHILE_TRAINING}
    for name in WHILE_TRAINING:
        write_copy(name, varied(name, 16), f"copies/{name}")
    some = ["alpacaeval-easy", "mt-bench-hard", "donotanswer", "hep-go"]  # one of each section
    every = [{**row, "subset": some[number % 4]} for number, row in enumerate(varied("rewardbench", 16))]
    write_copy("rewardbench", every, "copies/whole")
    named = ", ".join(f"{name}: copies/{name}" for name in WHILE_TRAINING)
    given = f"trainer.eval_sets={{{named}, whole: {{path: copies/whole, format: rewardbench}}}}"
    run = train(qwen2_folder, "run", given, f"data.input_style={style}", "data.max_length=512",
                "data.max_tokens_per_micro_batch=60", "trainer.save_best=true",
                "trainer.save_best_metric=val/whole/score")  # fmt: skip
    check_scores(run, sets)
    check_scores(run, {"whole": "rewardbench=copies/whole"})
    card = next(run.glob("global_step_*/README.md")).read_text()
    assert "| val/whole/score |" in card and "| val/rm-bench/score |" not in card, "one of the four domains has rows"
    assert json.loads((run / "best.json").read_text())["val/whole/score"] == rows(run)[-1]["val/whole/score"]


@pytest.mark.slow
def test_two_ranks_have_the_scores_of_one(qwen2_folder: Path, in_tmp: Path) -> None:
    write_copy("rewardbench-2", varied("rewardbench-2", 31))
    given = ("trainer.eval_sets={rewardbench-2: copy}", "data.input_style=chat", "optim.lr=1e-5")
    train(qwen2_folder, "ranks1", *given)
    [done] = run_all([Run(settings(qwen2_folder, "ranks2", *given), ranks=2)], in_tmp)
    assert done.status == [0, 0], done.log
    one, two = ([row for row in rows(Path(f"runs/ranks{number}")) if "val/loss" in row][-1] for number in (1, 2))
    assert one["val/rewardbench-2/score/Focus"] == two["val/rewardbench-2/score/Focus"]


@pytest.mark.slow
def test_with_attributes_the_score_is_of_the_weighted_reward(qwen2_folder: Path) -> None:
    write_copy("judgebench", varied("judgebench", 20))
    rated = [{"prompt": f"why {number}", "response": f"because {number}", "helpfulness": number % 5,
              "verbosity": number % 3} for number in range(24)]  # fmt: skip
    Path("rated.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rated))
    run = train(qwen2_folder, "run", "trainer.eval_sets={judgebench: copy}", "data.train_files=rated.jsonl",
                "data.val_files=rated.jsonl", "objective.name=attributes", "model.attributes=[helpfulness, verbosity]",
                "model.attribute_weights={helpfulness: 1, verbosity: -0.5}", "data.input_style=chat",
                "data.max_length=512")  # fmt: skip
    check_scores(run, {"judgebench": "judgebench=copy"})


@pytest.mark.parametrize(
    ("sets", "sentence"),
    [
        (
            "{a: rewardbench-3}",
            "trainer.eval_sets.a=rewardbench-3: no benchmark is called 'rewardbench-3'. Did you mean",
        ),
        slow(
            "{rewardbenhc: copy}", "no benchmark is called 'rewardbenhc'. Did you mean 'rewardbench'? Or give the set"
        ),
        slow("{rewardbench: no-such-folder}", "trainer.eval_sets.rewardbench=no-such-folder: no such file or folder"),
        slow("{rewardbench: empty}", "the folder has no parquet, JSON lines or JSON file of RewardBench"),
        slow(
            "{a: rmb}",
            "trainer.eval_sets.a=rmb: not on the hub; get https://github.com/Zhou-Zoey/RMB-Reward-Model-Benchmark",
        ),
        ("{rm-bench: copy}", "copy/filtered.jsonl:0: chosen that is not a list; a row of RM-Bench cannot be dropped"),
        slow("{rewardbench: copy}", "objective.name=sft trains no rewards, which RewardBench compares"),
        slow("{ppe-correctness: ppe}", "responses in no comparison, whose rewards the score of ppe-correctness needs"),
    ],
)
@pytest.mark.slow
def test_a_wrong_name_or_folder_is_a_sentence(sets: str, sentence: str, qwen2_folder: Path, capsys: Any) -> None:
    write_copy("rewardbench", varied("rewardbench", 2))
    Path("empty").mkdir()
    ppe = {**ROWS["ppe-correctness"][1], "response_3": "c", "scores": [False, True, False]}
    write_copy("ppe-correctness", [ppe], "ppe")
    objective = "sft" if "objective.name=sft" in sentence else "bradley_terry"
    arguments = settings(
        qwen2_folder, "run", f"trainer.eval_sets={sets}", "data.input_style=chat", f"objective.name={objective}"
    )
    if "ppe" not in sets:
        assert main(["validate-config", *arguments]) == 2
        assert sentence in capsys.readouterr().err
    assert main(["train", *arguments]) == 2
    assert sentence in capsys.readouterr().err and not Path("runs").exists()


@pytest.mark.parametrize(
    ("metric", "sentence"),
    [
        slow("val/rewardbench/score", "The scores of this set are val/rewardbench/score/Reasoning"),
        ("val/rewardbench/mse", "val/rewardbench/loss, val/rewardbench/margin, val/rewardbench/score\n"),
    ],
)
def test_the_metric_of_the_best_checkpoint_must_exist(
    metric: str, sentence: str, qwen2_folder: Path, capsys: Any
) -> None:
    write_copy("rewardbench", varied("rewardbench", 2))
    train(qwen2_folder, "run", "trainer.eval_sets={rewardbench: copy}", "data.input_style=chat",
          f"trainer.save_best_metric={metric}", status=2)  # fmt: skip
    assert sentence in capsys.readouterr().err


@pytest.mark.slow
def test_dropped_rows_make_a_score_incomparable_and_ties_do_not(qwen2_folder: Path, capsys: Any) -> None:
    some = varied("helpsteer3", 4)
    write_copy("helpsteer3", [{**some[0], "overall_preference": 0}, *some[1:]])
    train(qwen2_folder, "run", "trainer.eval_sets={helpsteer3: copy}", "data.input_style=chat")
    text = capsys.readouterr().err
    assert "dropped 1 of 4 rows: 1 not scored by the benchmark: overall_preference that is a tie" in text
    assert "not comparable" not in text
    long = {**some[1], "response1": "so " * 500}
    write_copy("helpsteer3", [*some, long], "longer")
    train(qwen2_folder, "longer", "trainer.eval_sets={helpsteer3: longer}", "data.input_style=chat")
    assert "HelpSteer3: not comparable with published scores: 1 rows are dropped" in capsys.readouterr().err
