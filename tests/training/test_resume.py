"""A run that was stopped and started again is the run that was never stopped, bit for bit."""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rm_gallery.data.batching.packed_batch import PackedBatch
from rm_gallery.objectives import OBJECTIVES, bradley_terry
from tests.small import make_model, text_pairs, write_pairs
from tests.training.short_runs import Lost, StandIn, assert_same_run, lose, rows, send, train, when_logged, write_data


@pytest.fixture(autouse=True)
def data(in_tmp: Path) -> None:
    write_data()


@pytest.mark.parametrize("stop_after", [4, *(pytest.param(step, marks=pytest.mark.slow) for step in (1, 2, 3, 5))])
def test_stopped_after_any_step_and_started_again(
    stop_after: int, qwen2_folder: Path, trained: Callable[..., Path], monkeypatch: Any, capsys: Any
) -> None:
    """Steps 2 and 4 are validated: the signal comes before that, so the run that goes on does it."""
    same = ("trainer.test_freq=2", "optim.warmup_steps_ratio=0.3")
    whole = trained("whole", *same)
    when_logged(monkeypatch, stop_after, send(signal.SIGTERM))
    parts = train(qwen2_folder, "parts", *same, status=143)
    sentence = f"stopped by SIGTERM after step {stop_after} of 6; global_step_{stop_after} is saved; rerun the command"
    assert sentence in capsys.readouterr().err
    assert rows(parts)[-1]["step"] == stop_after
    train(qwen2_folder, "parts", *same)
    assert_same_run(parts, whole)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("qwen2", ["model.enable_gradient_checkpointing=true", "model.fsdp_config.model_dtype=bf16"]),
        ("llama", ["model.dropout=0.3", "trainer.async_save=true"]),
        ("bert", ["model.dropout=0.3", "model.enable_gradient_checkpointing=true"]),
        pytest.param(
            "deberta-v2", ["model.dropout=0.3", "data.max_tokens_per_micro_batch=600"], marks=pytest.mark.slow
        ),
        pytest.param("modernbert", [], marks=pytest.mark.slow),
    ],
)
def test_random_states_and_all_kinds_of_models(
    kind: str, settings: list[str], tmp_path: Path, monkeypatch: Any
) -> None:
    """Lost without notice in step 5, after the checkpoint of step 3."""
    model = make_model(kind, tmp_path / "model")
    whole = train(model, "whole", *settings)
    when_logged(monkeypatch, 5, lose)
    with pytest.raises(Lost):
        train(model, "parts", "trainer.save_freq=3", *settings)
    train(model, "parts", "trainer.save_freq=3", *settings)
    assert_same_run(Path("runs/parts"), whole)


@pytest.mark.slow
def test_a_log_line_over_steps_of_both_starts(qwen2_folder: Path, monkeypatch: Any) -> None:
    whole = train(qwen2_folder, "whole", "trainer.log_freq=4")
    when_logged(monkeypatch, 4, lose)
    with pytest.raises(Lost):
        train(qwen2_folder, "parts", "trainer.log_freq=4", "trainer.save_freq=3")
    train(qwen2_folder, "parts", "trainer.log_freq=4", "trainer.save_freq=3")
    assert [row["step"] for row in rows(whole)] == [4, 6, 6]
    assert_same_run(Path("runs/parts"), whole)


@pytest.mark.slow
def test_a_signal_in_the_middle_of_a_step_leaves_the_step_for_later(
    qwen2_folder: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    """Dropout was drawn in the part of the step that is thrown away."""
    model = make_model("bert", tmp_path / "model")
    settings = ("model.dropout=0.3", "data.max_tokens_per_micro_batch=200")
    whole = train(model, "whole", *settings)
    calls = iter(range(1000))

    def objective(rewards: torch.Tensor, batch: PackedBatch) -> Any:
        if next(calls) == 9:
            send(signal.SIGTERM)()
        return bradley_terry(rewards, batch)

    with monkeypatch.context() as patch:
        patch.setitem(OBJECTIVES, "bradley_terry", StandIn(function=objective))
        parts = train(model, "parts", *settings, status=143)
    micro_batches = next(calls)
    done = len(rows(parts))
    assert 1 <= done < 6 and micro_batches < 24, "it stopped within a step"
    assert (parts / f"global_step_{done}").is_dir()
    train(model, "parts", *settings)
    assert_same_run(parts, whole)


@pytest.mark.slow
def test_a_signal_before_the_first_step_ends_at_once(qwen2_folder: Path, monkeypatch: Any, capsys: Any) -> None:
    when_logged(monkeypatch, 0, send(signal.SIGTERM), val=True)
    run = train(qwen2_folder, "run", "trainer.val_before_train=true", status=143)
    assert "stopped by SIGTERM after step 0 of 6; no step was completed" in capsys.readouterr().err
    assert not list(run.glob("global_step_*"))
    train(qwen2_folder, "run", "trainer.val_before_train=true")
    assert [row["step"] for row in rows(run)] == [0, 1, 2, 3, 4, 5, 6, 6]


def test_ctrl_c_saves_and_ends_with_130(qwen2_folder: Path, monkeypatch: Any, capsys: Any) -> None:
    handler = signal.getsignal(signal.SIGINT)
    when_logged(monkeypatch, 2, send(signal.SIGINT))
    run = train(qwen2_folder, "run", status=130)
    assert "stopped by Ctrl-C after step 2 of 6; global_step_2 is saved" in capsys.readouterr().err
    assert (run / "global_step_2").is_dir()
    assert signal.getsignal(signal.SIGINT) is handler


def test_launcher_and_scheduler_may_both_send_sigterm(qwen2_folder: Path, monkeypatch: Any) -> None:
    def twice() -> None:
        send(signal.SIGTERM)()
        send(signal.SIGTERM)()

    when_logged(monkeypatch, 2, twice)
    assert (train(qwen2_folder, "run", status=143) / "global_step_2").is_dir()


@pytest.mark.slow
def test_bad_steps_are_counted_over_starts(qwen2_folder: Path, monkeypatch: Any) -> None:
    def objective(rewards: torch.Tensor, batch: PackedBatch) -> Any:
        loss, sums = bradley_terry(rewards, batch)
        return loss * (math.nan if int(batch.input_ids.sum()) % 3 == 0 else 1), sums

    monkeypatch.setitem(OBJECTIVES, "bradley_terry", StandIn(function=objective))
    whole = train(qwen2_folder, "whole", "trainer.max_bad_steps=6")
    when_logged(monkeypatch, 3, send(signal.SIGTERM))
    parts = train(qwen2_folder, "parts", "trainer.max_bad_steps=6", status=143)
    assert 0 < rows(parts)[-1]["train/bad_steps"] < rows(whole)[-2]["train/bad_steps"]
    train(qwen2_folder, "parts", "trainer.max_bad_steps=6")
    assert_same_run(parts, whole)


@pytest.mark.slow
def test_a_run_in_which_every_step_was_bad_goes_on_without_optimizer_state(
    qwen2_folder: Path, monkeypatch: Any
) -> None:
    calls = iter(range(1000))

    def objective(rewards: torch.Tensor, batch: PackedBatch) -> Any:
        loss, sums = bradley_terry(rewards, batch)
        return loss * (math.nan if next(calls) < 2 else 1), sums

    one_batch = "data.max_tokens_per_micro_batch=2000"
    monkeypatch.setitem(OBJECTIVES, "bradley_terry", StandIn(function=objective))
    whole = train(qwen2_folder, "whole", one_batch)
    calls = iter(range(1000))
    when_logged(monkeypatch, 2, send(signal.SIGTERM))
    parts = train(qwen2_folder, "parts", one_batch, status=143)
    train(qwen2_folder, "parts", one_batch)
    assert rows(parts)[1]["train/bad_steps"] == 2
    assert_same_run(parts, whole)


@pytest.mark.slow
def test_a_longer_run_of_a_constant_rate_is_the_one_that_was_as_long_from_the_start(qwen2_folder: Path) -> None:
    constant = "optim.lr_scheduler=constant"
    whole = train(qwen2_folder, "whole", constant)
    parts = train(qwen2_folder, "parts", constant, "trainer.total_epochs=1")
    assert (parts / "global_step_3").is_dir()
    train(qwen2_folder, "parts", constant, f"trainer.resume_mode={parts / 'global_step_3'}")
    assert [row for row in rows(parts) if "train/loss" in row] == [row for row in rows(whole) if "train/loss" in row]
    assert rows(parts)[-1] == rows(whole)[-1]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (["trainer.total_epochs=3"], "belongs to a run of 6 steps, now 9 are configured, and with this schedule the "),
        pytest.param(
            ["trainer.total_training_steps=2"],
            "is at step 3, past the 2 steps that are configured; raise ",
            marks=pytest.mark.slow,
        ),
    ],
)
@pytest.mark.slow
def test_a_length_that_cannot_be_is_refused(
    settings: list[str], sentence: str, qwen2_folder: Path, monkeypatch: Any, capsys: Any
) -> None:
    when_logged(monkeypatch, 3, send(signal.SIGTERM))
    train(qwen2_folder, "run", status=143)
    train(qwen2_folder, "run", *settings, status=2)
    assert sentence in capsys.readouterr().err


@pytest.mark.slow
def test_another_run_in_the_same_folder_is_refused_by_what_differs(
    qwen2_folder: Path, tmp_path: Path, capsys: Any
) -> None:
    run = train(qwen2_folder, "run", "trainer.total_training_steps=1")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != "train.log"}
    write_pairs(Path("other.parquet"), text_pairs(23))
    other_model = make_model("llama", tmp_path / "llama")
    for setting, sentences in {
        "trainer.seed=5": ["trainer.seed=5, was 0"],
        "data.train_batch_size=4": ["data.train_batch_size=4, was 8"],
        "data.shuffle=false": ["data.shuffle=false, was true"],
        "data.max_tokens_per_micro_batch=400": ["data.max_tokens_per_micro_batch=400, was 300"],
        "data.train_files=other.parquet": [
            "training data: fingerprint ",
            "data.train_files=other.parquet, was train",
        ],
        "data.max_length=64": ["data.max_length=64, was 128"],
        f"model.partial_pretrain={other_model}": ["model: llama with ", ", was qwen2 with "],
    }.items():
        train(qwen2_folder, "run", "trainer.total_training_steps=1", setting, status=2)
        error = capsys.readouterr().err
        assert "runs/run/global_step_1: belongs to a different run: " in error
        for sentence in sentences:
            assert sentence in error, (setting, error)
        assert "plan=" not in error
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != "train.log"} == before


@pytest.mark.slow
def test_another_configuration_needs_another_directory_or_the_name_of_the_checkpoint(
    qwen2_folder: Path, caplog: Any, capsys: Any
) -> None:
    run = train(qwen2_folder, "run", "optim.lr_scheduler=constant", "trainer.total_epochs=1")
    changed = ("optim.lr_scheduler=constant", "optim.lr=1e-5", "optim.weight_decay=0.5")
    last = run / "global_step_3"
    train(qwen2_folder, "run", *changed, status=2)
    assert (
        f"{run}: holds a run with another configuration (newest checkpoint global_step_3): optim.lr=1e-05, was 0.001;"
        " optim.weight_decay=0.5, was 0.0; trainer.total_epochs=2, was 1. For a new run set trainer.experiment_name=..."
        f"; to continue that run with the new values set trainer.resume_mode={last}"
    ) in capsys.readouterr().err
    train(qwen2_folder, "run", "optim.lr_scheduler=constant", "trainer.total_epochs=1", "trainer.save_freq=2")
    assert "resuming with changed settings: trainer.save_freq=2, was " in caplog.text
    assert f"the run is complete: {last} is its last step" in caplog.text
    train(qwen2_folder, "run", *changed, f"trainer.resume_mode={last}")
    assert "resuming with changed settings: optim.lr=1e-05, was 0.001; optim.weight_decay=0.5, was 0.0" in caplog.text
    assert [row["train/lr"] for row in rows(run) if "train/lr" in row] == [1e-3] * 3 + [1e-5] * 3
    facts = json.loads((run / "run.json").read_text())
    assert facts["start_step"] == 3
    assert [start["start_step"] for start in facts["earlier_starts"]] == [0]


@pytest.mark.slow
def test_early_stopping_survives_a_restart_and_ends_the_run(qwen2_folder: Path, monkeypatch: Any, caplog: Any) -> None:
    early = ("trainer.early_stopping_patience=2", "trainer.test_freq=1", "trainer.save_freq=1", "optim.lr=1e-12")
    whole = train(qwen2_folder, "whole", *early)
    assert sorted(path.name for path in whole.glob("global_step_*")) == [f"global_step_{step}" for step in (1, 2, 3)]
    when_logged(monkeypatch, 2, send(signal.SIGTERM))
    parts = train(qwen2_folder, "parts", *early, status=143)
    train(qwen2_folder, "parts", *early)
    assert rows(parts) == rows(whole)
    files = [run / "global_step_3/model.safetensors" for run in (parts, whole)]
    assert files[0].read_bytes() == files[1].read_bytes()
    train(qwen2_folder, "parts", *early)
    assert f"the run is complete: {parts / 'global_step_3'} is its last step" in caplog.text
