"""Ensembles: the mean, a lower bound or the minimum of several models, the same from every entry point."""

from __future__ import annotations

import asyncio
import json
import pickle
import statistics
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from rm_gallery import evaluate
from rm_gallery.cli import main
from rm_gallery.core.graders.common import RelevanceGrader
from rm_gallery.core.models import OpenAIChatModel
from rm_gallery.core.runner.fingerprint import of_grader
from rm_gallery.errors import UserError
from rm_gallery.scoring import EnsembleScorer, RewardScorer
from rm_gallery.scoring.ensemble import Reduction
from tests.scoring.models import make_checkpoint
from tests.small import text_pairs, write_pairs

PAIRS = [(each["chosen"], each["rejected"]) for each in text_pairs(8)]
TEXTS = [text for pair in PAIRS for text in pair]


def with_statistics(folder: Path, mean: float, std: float) -> Path:
    """The folder, whose record has a mean and standard deviation of validation rewards."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["rm_gallery"] |= {"reward_mean": mean, "reward_std": std}
    path.write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A decoder and an encoder, with other tokenizers, whose rewards have other scales."""
    root = tmp_path_factory.mktemp("members")
    decoder, encoder = (make_checkpoint(kind, root / kind)[0] for kind in ("qwen2", "bert"))
    return [with_statistics(decoder, 0.25, 0.5), with_statistics(encoder, -1.0, 4.0)]


def rewards_of(folder: Path, *, normalize: bool) -> list[float]:
    with RewardScorer.from_folder(folder, device="cpu", normalize=normalize) as scorer:
        return [reward for pair in scorer.score_pairs(PAIRS) for reward in pair]


def test_reductions() -> None:
    rewards = [[1.0, 4.0], [3.0, 0.0]]
    for text, expected in (("mean", [2, 2]), ("min", [1, 0]), ("lower", [1, 0]), ("lower:0.5", [1.5, 1])):
        assert Reduction(text).of(rewards) == list(zip(expected, (1, 2), strict=True))
    assert Reduction("mean").of(rewards, [(1, 2), (0, 3)]) == [(0.5, 0.5), (0.75, 0.75)]
    for wrong in ("median", "lower:", "lower:x", "lower:-1", "mean:2", ""):
        with pytest.raises(UserError, match=r"--ensemble=.*: must be mean, lower, lower:K or min"):
            Reduction(wrong, key="--ensemble")


@pytest.mark.slow
def test_members_with_other_tokenizers_are_normalized_and_combined(
    folders: list[Path], chat_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    ensemble = RewardScorer.from_folders(folders, reduce="lower:2", device="cpu")
    assert "rewards are normalized by each model's validation rewards" in caplog.text
    members = [rewards_of(folder, normalize=True) for folder in folders]
    expected = [statistics.mean(each) - 2 * statistics.pstdev(each) for each in zip(*members, strict=True)]
    found = [reward for pair in ensemble.score_pairs(PAIRS) for reward in pair]
    assert found == pytest.approx(expected, abs=1e-5)
    assert ensemble.attributes == ("std", "qwen2/global_step_1", "bert/global_step_1")
    [[row, *_]] = ensemble.score_attributes([ensemble.build_group(None, TEXTS)])
    assert row == pytest.approx(
        {"reward": expected[0], "std": statistics.pstdev(each[0] for each in members)}
        | {name: each[0] for name, each in zip(ensemble.attributes[1:], members, strict=True)},
        abs=1e-5,
    )
    assert [each for pair in asyncio.run(ensemble.ascore_pairs(PAIRS)) for each in pair] == pytest.approx(found)
    with RewardScorer.from_folder(chat_folder, device="cpu") as chat, pytest.raises(UserError, match="on raw text and"):
        EnsembleScorer([*ensemble.members, chat])


@pytest.mark.slow
def test_models_without_statistics_are_combined_as_they_are(
    folders: list[Path], text_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    models = [folders[0], text_folder]
    ensemble = RewardScorer.from_folders(models, reduce="min", device="cpu")
    assert f"rewards are combined as they are, since {text_folder} has no mean" in caplog.text
    members = [rewards_of(folder, normalize=False) for folder in models]
    found = [reward for pair in ensemble.score_pairs(PAIRS) for reward in pair]
    assert found == pytest.approx([min(each) for each in zip(*members, strict=True)], abs=1e-5)
    with pytest.raises(UserError, match=f"model={text_folder}: rewards cannot be normalized"):
        RewardScorer.from_folders(models, normalize=True)
    with pytest.raises(UserError, match="same folder twice"):
        RewardScorer.from_folders([text_folder, text_folder])
    again: EnsembleScorer = pickle.loads(pickle.dumps(ensemble))
    assert again.score_pairs(PAIRS) == ensemble.score_pairs(PAIRS)
    [failed] = ensemble.score_each([ensemble.build_group(None, [""])])
    assert str(failed).startswith("qwen2/global_step_1: ")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pairs.parquet", "lists.jsonl"])
def test_score_adds_columns_of_the_ensemble(
    folders: list[Path], in_tmp: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    if name == "pairs.parquet":
        write_pairs(Path(name), text_pairs(8))
    else:
        rows = [{"responses": list(pair), "scores": [1, 0]} for pair in PAIRS]
        Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["score", "--device", "cpu", name, *(f"--model={folder}" for folder in folders), "--ensemble"]
    assert main([*command, "lower", "--output", "out.parquet"]) == 0
    table = pq.read_table("out.parquet")
    is_pair = name == "pairs.parquet"
    base = ["reward_chosen", "reward_rejected"] if is_pair else ["rewards"]
    assert table.column_names[-2 * len(base) :] == [f"ensemble/{each}{end}" for end in ("", "_std") for each in base]
    columns = [table[f"ensemble/{each}"].to_pylist() for each in base]
    found = [reward for row in (zip(*columns, strict=True) if is_pair else columns[0]) for reward in row]
    with RewardScorer.from_folders(folders, reduce="lower", device="cpu") as ensemble:
        expected = [reward for pair in ensemble.score_pairs(PAIRS) for reward in pair]
    assert found == pytest.approx(expected, abs=1e-4)
    raw = table[f"qwen2/global_step_1/{base[0]}"].to_pylist()[0]
    assert (raw if is_pair else raw[0]) == pytest.approx(rewards_of(folders[0], normalize=False)[0], abs=1e-5)
    assert ("ensemble: accuracy" in capsys.readouterr().out) == is_pair  # lists without a prompt have no comparisons
    assert main([*command, "lower", "--output", "out.parquet"]) == 0 and "already scored" in capsys.readouterr().out
    for options in (["min"], ["lower", "--no-normalize"]):
        assert main([*command, *options, "--output", "out.parquet"]) == 2
        assert "was not made of this input, these models and settings" in capsys.readouterr().err


@pytest.mark.slow
def test_evaluate_graders_and_chat_models_give_the_same_rewards(
    folders: list[Path], in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_pairs(Path("pairs.parquet"), text_pairs(8))
    with RewardScorer.from_folders(folders, reduce="min", device="cpu") as ensemble:
        pairs = ensemble.score_pairs(PAIRS)
        [[asked]] = ensemble.score([ensemble.build_group("Why?", ["So."])])
        graded = RelevanceGrader(model=ensemble).evaluate(query="Why?", response="So.")
        assert getattr(graded, "score", graded) == pytest.approx(asked, abs=1e-5)
    margin = statistics.mean(chosen - rejected for chosen, rejected in pairs)
    both = "+".join(map(str, folders))
    result = evaluate(both, "pairs.parquet", probes=False, baselines=False, device="cpu", ensemble="min")
    [model] = result["models"]
    assert model["kind"] == "ensemble" and model["sets"][0]["mean_margin"] == pytest.approx(margin, abs=1e-4)
    command = ["evaluate", *(f"--model={folder}" for folder in folders), "pairs.parquet", "--ensemble", "min"]
    assert main([*command, "--no-probes", "--no-baselines", "--json", "out.json", "--device", "cpu"]) == 0
    models = json.loads(Path("out.json").read_text())["models"]
    assert [each["kind"] for each in models] == ["model", "model", "ensemble"]
    assert models[2]["sets"][0]["mean_margin"] == pytest.approx(margin, abs=1e-4)
    chat = OpenAIChatModel(both, is_local=True, ensemble="min", device="cpu")
    assert chat.chat([{"role": "assistant", "content": TEXTS[0]}]).parsed == pytest.approx(
        {"reward": pairs[0][0]}, abs=1e-5
    )
    other = OpenAIChatModel(both, is_local=True, device="cpu")
    assert len({of_grader(RelevanceGrader(model=each), None) for each in (chat, other)}) == 2


def test_what_is_no_ensemble_is_one_sentence(
    in_tmp: Path, text_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_pairs(Path("pairs.parquet"), text_pairs(2))
    one = ["--model", str(text_folder), "pairs.parquet"]
    for command, message in (
        (["score", *one, "--output", "out.parquet", "--ensemble", "mean"], "give --model more than once"),
        (["evaluate", *one, "--ensemble", "mean"], "--ensemble needs an ensemble"),
        (["evaluate", *one, "--normalize"], "--normalize is for ensembles"),
    ):
        assert main(command) == 2
        assert message in capsys.readouterr().err
