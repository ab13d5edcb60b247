"""Mean and standard deviation of the validation rewards: measured, saved, and applied on request."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from rm_gallery import RewardScorer
from rm_gallery.cli import main
from rm_gallery.core.models import OpenAIChatModel
from rm_gallery.errors import UserError
from rm_gallery.modeling.export import read_statistics
from tests.small import make_model, write_pairs
from tests.training.short_runs import settings, train, write_data

KEYS = ("mean", "std", "logit_mean", "logit_sigma")
SETTINGS = ("trainer.save_freq=2", "trainer.test_freq=4")


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


@pytest.fixture
def data(in_tmp: Path) -> list[str]:
    """Training and validation data; the texts of the latter, one of which is in two pairs."""
    write_data()
    rows = pq.read_table("val.parquet").to_pylist()
    rows.append({**rows[0], "rejected": "so bad"})
    write_pairs(Path("val.parquet"), rows)
    return sorted({row[side] for row in rows for side in ("chosen", "rejected")})


@pytest.mark.slow
def test_they_are_of_distinct_responses_and_of_the_step_of_the_weights(
    data: list[str], qwen2_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = train(qwen2_folder, "plain", *SETTINGS)
    assert read_statistics(run / "global_step_2") is None, "step 2 was not validated"
    for step in (4, 6):
        scorer = RewardScorer.from_folder(run / f"global_step_{step}", device="cpu")
        [rewards] = scorer.score([scorer.build_group(None, data)])
        found = read_statistics(run / f"global_step_{step}")
        assert found == pytest.approx((statistics.mean(rewards), statistics.stdev(rewards)), rel=1e-5)
    assert not config_of(run / "global_step_6").keys() & set(KEYS), "other programs would change the rewards"
    assert "has no mean and std" not in caplog.text


@pytest.mark.slow
def test_they_are_written_for_other_programs_on_request_and_applied_on_request(
    data: list[str], qwen2_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = train(qwen2_folder, "named", *SETTINGS, "trainer.reward_statistics=normalize")
    assert "global_step_2 has no mean and std (trainer.reward_statistics=normalize)" in caplog.text
    folder = run / "global_step_6"
    mean, std = read_statistics(folder) or (0.0, 0.0)
    assert [config_of(folder)[key] for key in KEYS] == [mean, std, mean, std]
    raw, normal = (RewardScorer.from_folder(folder, device="cpu", normalize=each) for each in (False, True))
    expected = [(reward - mean) / std for reward in raw.score([raw.build_group(None, data)])[0]]
    assert normal.score([normal.build_group(None, data)])[0] == pytest.approx(expected)
    assert statistics.mean(expected) == pytest.approx(0, abs=1e-6) and statistics.stdev(expected) == pytest.approx(1)
    [chatted] = raw.score_messages([[{"role": "assistant", "content": data[0]}]])
    model = OpenAIChatModel(str(folder), is_local=True, device="cpu", normalize=True)
    answer = model.chat([{"role": "assistant", "content": data[0]}])
    assert answer.parsed == pytest.approx({"reward": (chatted - mean) / std})
    for name, options in (("raw", ()), ("normal", ("--normalize",))):
        command = ["score", "--model", str(folder), "val.parquet", "--output", f"{name}.parquet", "--device", "cpu"]
        assert main([*command, *options]) == 0
    found, plain = (pq.read_table(f"{name}.parquet")["reward_chosen"].to_pylist() for name in ("normal", "raw"))
    assert found == pytest.approx([(reward - mean) / std for reward in plain], rel=1e-5)


@pytest.mark.slow
def test_a_folder_without_them_is_refused(
    data: list[str], qwen2_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = train(qwen2_folder, "plain", "data.val_files=null") / "global_step_6"
    with pytest.raises(UserError, match=r"rewards cannot be normalized: config\.json has no mean and standard deviat"):
        RewardScorer.from_folder(folder, device="cpu", normalize=True)
    assert main(["score", "--model", str(folder), "val.parquet", "--output", "out.parquet", "--normalize"]) == 2
    assert f"model={folder}: rewards cannot be normalized" in capsys.readouterr().err
    without = settings(qwen2_folder, "none", "data.val_files=null", "trainer.reward_statistics=normalize")
    assert main(["train", *without]) == 2
    assert "trainer.reward_statistics=normalize: there is no validation" in capsys.readouterr().err


@pytest.mark.slow
def test_those_of_the_first_model_are_not_those_of_the_trained_one(data: list[str], tmp_path: Path) -> None:
    base = make_model("qwen2", tmp_path / "base")
    (base / "config.json").write_text(json.dumps(config_of(base) | dict.fromkeys(KEYS, 3.0)))
    folder = train(base, "plain", "data.val_files=null") / "global_step_6"
    assert read_statistics(base) == (3.0, 3.0)
    assert read_statistics(folder) is None


def test_values_that_cannot_normalize_are_refused(tmp_path: Path) -> None:
    for std in (0, -1, "1", None, float("nan")):
        (tmp_path / "config.json").write_text(json.dumps({"mean": 0.5, "std": std}))
        if std is None:
            assert read_statistics(tmp_path) is None
        else:
            with pytest.raises(UserError, match=r"cannot normalize rewards; remove them"):
                read_statistics(tmp_path)
