"""Runs with `model.router_aux_loss_coef`: the same on one rank and two, with resume, and next to other settings."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from benchmarks.small_models import save_language_model
from tests.small import make_tokenizer, write_pairs
from tests.training.rank_runs import Act, Run, run_all
from tests.training.short_runs import (
    Lost,
    assert_same_run,
    lose,
    rows,
    settings,
    train,
    weights,
    when_logged,
    write_data,
)

LOSS = "model.router_aux_loss_coef=0.1"
LAST = "global_step_6"


@pytest.fixture
def base(in_tmp: Path) -> Path:
    """A small mixture of experts, and data."""
    write_data()
    return mixture(in_tmp / "base")


def mixture(folder: Path, kind: str = "qwen3_moe") -> Path:
    save_language_model(kind, folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def losses(run: Path) -> list[float]:
    return [row["train/router_aux_loss"] for row in rows(run) if "train/router_aux_loss" in row]


@pytest.mark.slow
def test_a_run_logs_the_loss_beside_the_preference_loss(base: Path) -> None:
    found = losses(train(base, "run", LOSS))
    assert len(found) == 6 and found[-1] < found[0] - 0.01, found


@pytest.mark.slow
def test_micro_batches_and_shared_prompts_do_not_change_the_loss(base: Path) -> None:
    found = losses(train(base, "run", LOSS))
    assert losses(train(base, "small", LOSS, "data.max_tokens_per_micro_batch=2000", "data.share_prompts=false")
                  )[0] == pytest.approx(found[0], abs=1e-6)  # fmt: skip
    without = rows(train(base, "without", "model.router_aux_loss_coef=0"))
    assert "train/router_aux_loss" not in without[0]
    assert without[0]["train/loss"] == pytest.approx(rows(Path("runs/run"))[0]["train/loss"], abs=1e-6)


@pytest.mark.slow
def test_responses_with_attributes_have_the_loss_with_and_without_shared_prompts(base: Path) -> None:
    draw = random.Random(0)
    data = [{"prompt": f"Question {n // 2}?", "response": "so " * draw.randint(1, 9), "good": n % 5} for n in range(24)]
    write_pairs(Path("train.parquet"), data)
    write_pairs(Path("val.parquet"), data[:6])
    attributes = ("objective.name=attributes", "model.attributes=[good]", "optim.clip_grad=0")
    found = train(base, "run", LOSS, *attributes)
    assert len(losses(found)) == 6
    apart = train(base, "apart", LOSS, *attributes, "data.share_prompts=false")
    assert losses(apart)[0] == pytest.approx(losses(found)[0], abs=1e-5)


def test_other_types_are_refused(qwen2_folder: Path, in_tmp: Path, capsys: Any) -> None:
    write_data()
    train(qwen2_folder, "run", LOSS, status=2)
    assert "model.router_aux_loss_coef: qwen2 has no load-balancing loss of routers in tran" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("options", [
    ("model.freeze=1",), ("model.enable_gradient_checkpointing=true", "model.packing=padded"),
    ("model.dropout=0.1", "model.fsdp_config.model_dtype=bf16", "trainer.log_freq=2"),
])  # fmt: skip
def test_a_run_that_was_lost_resumes_bit_for_bit(options: tuple[str, ...], base: Path, monkeypatch: Any) -> None:
    whole = train(base, "whole", LOSS, *options)
    assert losses(whole)[-1] < losses(whole)[0]
    when_logged(monkeypatch, 4, lose)
    with pytest.raises(Lost):
        train(base, "parts", LOSS, "trainer.save_freq=3", *options)
    assert_same_run(train(base, "parts", LOSS, "trainer.save_freq=3", *options), whole)


@pytest.mark.slow
def test_two_ranks_train_as_one_does_and_resume_bit_for_bit(base: Path, in_tmp: Path) -> None:
    def run(name: str, *more: str, **of_run: Any) -> Run:
        return Run(settings(base, name, LOSS, "optim.lr=1e-4", *more), **of_run)

    fsdp2 = "model.strategy=fsdp2"
    done = run_all(
        [
            run("one", ranks=1),
            run("ddp", "model.strategy=ddp"),
            run("fsdp2", fsdp2),
            run("parts", fsdp2, act=Act(rank=1, step=3, what="SIGTERM")),
            run("parts", fsdp2),
        ],
        in_tmp,
    )
    assert [set(each.status) for each in done] == [{0}] * 3 + [{143}, {0}], "".join(each.log for each in done)
    assert_same_run(Path("runs/parts"), Path("runs/fsdp2"))
    expected = losses(Path("runs/one"))
    for name in ("ddp", "fsdp2"):
        assert losses(Path("runs") / name) == pytest.approx(expected, abs=2e-5), name
        found, wanted = weights(Path("runs") / name / LAST), weights(Path("runs/one") / LAST)
        assert max(float((found[key] - wanted[key]).abs().max()) for key in wanted) < 1e-4, name
