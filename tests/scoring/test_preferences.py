"""Accuracy and best responses of `rm-gallery score`: the figures of validation, and the highest reward of a list."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from rm_gallery.cli import main
from rm_gallery.data.config import DataConfig, sides_of
from rm_gallery.errors import UserError
from rm_gallery.objectives import bradley_terry
from rm_gallery.scoring import RewardScorer
from rm_gallery.scoring.score_files import ScoreOptions, score_files
from rm_gallery.scoring.tables import ScoreDataConfig
from rm_gallery.training.data_setup import load_side
from rm_gallery.training.validation import validate
from tests.data.damage import SAMPLES
from tests.data.sources.writing import write
from tests.small import text_pairs

PAIRS = text_pairs(12)
LISTS = [
    {"prompt": f"Question {n}?", "responses": [f"good {n}", "bad", f"so {n}", "end"], "scores": [n % 3, 1, 2, n % 2]}
    for n in range(8)
]
RANKED = [{"prompt": row["prompt"], "responses": row["responses"], "ranks": row["scores"]} for row in LISTS]
JOINED = [
    {"prompt": row["prompt"], "response": response, "helpfulness": score}
    for row in LISTS
    for response, score in zip(row["responses"], row["scores"], strict=True)
]
SIDES = [
    {"prompt": "Why?", "response_a": f"good {n}", "response_b": "bad", "winner": winner}
    for n, winner in enumerate(["a", "b", "tie", "model_b", "a"])
]
DATA: dict[str, list[dict[str, Any]]] = {
    "text": [*PAIRS, {"chosen": "same", "rejected": "same"}, {"chosen": "", "rejected": "a"}],
    "prompt": [{"prompt": "Why?", **row} for row in PAIRS],
    "scored": [*LISTS, {"prompt": "All equal?", "responses": ["a", "b"], "scores": [1, 1]}],
    "ranked": RANKED,
    "helpsteer2": JOINED,
    "arena": SIDES,
}


@pytest.mark.parametrize("name", DATA)
@pytest.mark.slow
def test_figures_are_those_of_validation(name: str, in_tmp: Path, chat_folder: Path, text_folder: Path) -> None:
    folder = str(text_folder if name == "text" else chat_folder)
    scorer = RewardScorer.from_folder(folder, device="cpu")
    (in_tmp / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in DATA[name]))
    config = DataConfig(train_files="a.jsonl", cache_dir="cache", num_workers=0)
    [side] = sides_of(config)
    store = load_side(side, config, scorer.engine.tokenizer)
    expected = validate(scorer.engine.model, store.data, bradley_terry, token_budget=4096)  # type: ignore[arg-type]
    [scored] = score_files(ScoreOptions((folder,), ("a.jsonl",), "out", device="cpu"))
    found = scored.agreement["global_step_1"]
    assert found.comparisons == store.data.num_comparisons
    assert found.correct / found.comparisons == expected["val/accuracy"]
    assert found.margin / found.comparisons == pytest.approx(expected["val/margin"], abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLES)
def test_every_layout_of_training_gives_comparisons(name: str, in_tmp: Path, chat_folder: Path) -> None:
    (in_tmp / "a.jsonl").write_text(json.dumps(SAMPLES[name].row) + "\n")
    [scored] = score_files(ScoreOptions((str(chat_folder),), ("a.jsonl",), "out", device="cpu"))
    assert scored.agreement["global_step_1"].comparisons


def test_a_format_of_training_that_is_named_is_scored(in_tmp: Path, chat_folder: Path) -> None:
    (in_tmp / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in LISTS))
    options = ScoreOptions((str(chat_folder),), ("a.jsonl",), "a", device="cpu")
    named = replace(options, output="b", data=ScoreDataConfig(format="scored"))
    assert score_files(options)[0].agreement == score_files(named)[0].agreement


def test_the_command_prints_accuracy_ties_and_the_total(
    in_tmp: Path, text_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rewards = {"win": [1.5, 0.5], "tie": [0.5, 0.5], "lose": [0.0, 1.0]}

    def score_each(_: RewardScorer, groups: Any, *, attributes: bool = False) -> list[Any]:
        return [rewards[each.responses[0]] for each in groups]

    monkeypatch.setattr(RewardScorer, "score_each", score_each)
    write(in_tmp / "a.csv", [{"chosen": name, "rejected": "x"} for name in ("win", "win", "tie", "lose")])
    write(in_tmp / "b.csv", [{"chosen": "win", "rejected": "x"}, {"chosen": "win", "rejected": "win"}])
    write(in_tmp / "c.csv", [{"response": "win"}])
    command = ["score", "--model", str(text_folder), "--device", "cpu", "--output", "out", "a.csv", "b.csv"]
    unused = "; rows not compared: 1 chosen equal to rejected (first: b.csv:1)"
    for suffix in ("", ", already scored"):
        assert main(command) == 0
        assert capsys.readouterr().out.splitlines() == [
            f"out/a.parquet: 4 rows{suffix}",
            "  global_step_1: accuracy 0.5000 (2 of 4 comparisons, 1 tied), mean margin 0.25",
            f"out/b.parquet: 2 rows{suffix}",
            f"  global_step_1: accuracy 1.0000 (1 of 1 comparisons), mean margin 1{unused}",
            "all files:",
            f"  global_step_1: accuracy 0.6000 (3 of 5 comparisons, 1 tied), mean margin 0.4{unused}",
        ]


def test_labels_that_cannot_be_used_are_a_warning(
    in_tmp: Path, chat_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"response": "A", "completions": [{"response": "a", "score": 1}, {"response": "b", "score": 2}]}]
    (in_tmp / "a.jsonl").write_text(json.dumps(rows[0]) + "\n")
    options = ScoreOptions((str(chat_folder),), ("a.jsonl",), "out", device="cpu")
    assert not score_files(options)[0].agreement
    assert "a.jsonl: accuracy is not computed: rows are scored as response, but their labels are of" in caplog.text


@pytest.mark.parametrize("output", ["out.jsonl", "out.parquet"])
def test_best_names_the_highest_reward_of_each_list(
    output: str, in_tmp: Path, chat_folder: Path, chat_scorer: RewardScorer
) -> None:
    said = [{"role": "assistant", "content": "hm"}, {"role": "user", "content": "?"}]
    responses: list[Any] = [["good", "bad", 'a "quoted" \u00e9'], [], ["same", "same"], None, [said, "x"]]
    rows = [{"prompt": "Why?", "responses": json.dumps(each)} for each in responses]
    write(in_tmp / "a.csv", rows)
    command = ["score", "--model", str(chat_folder), "--device", "cpu", "a.csv", "--best", "--output", output]
    assert main(command) == 0
    if output.endswith("jsonl"):
        found = [json.loads(line) for line in Path(output).read_text(encoding="utf-8").splitlines()]
    else:
        found = pq.read_table(output).to_pylist()
    assert list(found[0])[-3:] == ["rewards", "best_index", "best_response"]
    for row, given in zip(found, responses, strict=True):
        if not row["rewards"]:
            assert row["best_index"] is row["best_response"] is None
            continue
        best = given.index(given[row["rewards"].index(max(row["rewards"]))])
        assert row["best_index"] == best
        text = given[best]
        assert row["best_response"] == (text if isinstance(text, str) else json.dumps(text))
    assert found[2]["best_index"] == 0, "the first of equal responses"
    assert [row["best_index"] is None for row in found] == [False, True, False, True, False]
    assert main([text for text in command if text != "--best"]) == 2, "another command's output"


def test_best_of_several_models_has_their_names(in_tmp: Path, chat_folder: Path, text_folder: Path) -> None:
    (in_tmp / "a.jsonl").write_text(json.dumps({"prompt": "Why?", "responses": ["a", "b"]}) + "\n")
    models = (str(chat_folder), str(text_folder))
    score_files(ScoreOptions(models, ("a.jsonl",), "out", device="cpu", best=True))
    row = json.loads((in_tmp / "out/a.jsonl").read_text())
    assert [name.rpartition("/")[2] for name in row][2:] == ["rewards", "best_index", "best_response"] * 2


def test_best_of_pairs_is_refused(in_tmp: Path, text_folder: Path) -> None:
    write(in_tmp / "a.csv", PAIRS)
    with pytest.raises(UserError, match=r"a\.csv: --best chooses from a list of responses, but this file has pairs"):
        score_files(ScoreOptions((str(text_folder),), ("a.csv",), "out", device="cpu", best=True))
