"""`optim.name`: what each optimizer updates, how much state it has, and exact resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rm_gallery.training.config import OptimConfig
from rm_gallery.training.optim import build_optimizer
from tests.small import make_model
from tests.training.rank_runs import Run, run_all
from tests.training.short_runs import Lost, assert_same_run, lose, settings, train, weights, when_logged, write_data

OPTIMIZERS = {"adafactor": ("optim.name=adafactor", "optim.lr=1e-2"), "muon": ("optim.name=muon",)}


@pytest.fixture(autouse=True)
def data(in_tmp: Path) -> None:
    write_data()


def parameters() -> list[tuple[str, nn.Parameter]]:
    torch.manual_seed(0)
    shapes = {"embed_tokens.weight": (50, 8), "layers.0.up.weight": (16, 8), "layers.0.norm.weight": (8,)}
    named = [(name, nn.Parameter(torch.randn(shape))) for name, shape in {**shapes, "score.weight": (1, 8)}.items()]
    for _, each in named:
        each.grad = torch.randn(each.shape)
    return named


def test_muon_updates_matrices_of_layers_and_adamw_the_rest() -> None:
    config = OptimConfig(name="muon", lr=1e-3, weight_decay=0.1)
    named, plain = parameters(), parameters()
    build_optimizer(named, config).step()
    build_optimizer(plain, OptimConfig(lr=1e-3, weight_decay=0.1)).step()
    before = {name: each.detach() for name, each in parameters()}
    for (name, found), (_, adamw) in zip(named, plain, strict=True):
        assert torch.equal(found, adamw) is (name != "layers.0.up.weight"), name
    moved = (named[1][1].detach() - before["layers.0.up.weight"] * (1 - 1e-4)).square().mean().sqrt()
    assert moved.item() == pytest.approx(2e-4, rel=0.35), "0.2 lr: the size that AdamW's updates have"


@pytest.mark.parametrize(("name", "numbers"), [("adamw", 2 * 544), ("muon", 544 + 416), ("adafactor", 9 + 58 + 24 + 8)])
def test_numbers_of_state(name: Any, numbers: int) -> None:
    named = parameters()
    optimizer = build_optimizer(named, OptimConfig(name=name))
    optimizer.step()
    state = [v for each in optimizer.state.values() for v in each.values() if isinstance(v, torch.Tensor) and v.ndim]
    assert sum(each.numel() for each in state) == numbers


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("kind", ["qwen2", "bert"])
def test_a_run_that_was_lost_resumes_bit_for_bit(name: str, kind: str, in_tmp: Path, monkeypatch: Any) -> None:
    base, options = make_model(kind, in_tmp / "base"), (*OPTIMIZERS[name], "model.fsdp_config.model_dtype=bf16")
    whole = train(base, "whole", *options)
    when_logged(monkeypatch, 5, lose)
    with pytest.raises(Lost):
        train(base, "parts", "trainer.save_freq=3", *options)
    assert_same_run(train(base, "parts", "trainer.save_freq=3", *options), whole)


def test_a_checkpoint_of_another_optimizer_is_an_error(qwen2_folder: Path, capsys: Any) -> None:
    train(qwen2_folder, "first", "trainer.save_freq=3")
    options = ("optim.name=muon", "trainer.resume_mode=runs/first/global_step_3")
    train(qwen2_folder, "second", *options, status=2)
    assert "momentum_buffer is missing" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_two_processes_train_as_one_does_and_sharding_is_refused(name: str, in_tmp: Path, qwen2_folder: Path) -> None:
    options = (*OPTIMIZERS[name], "optim.lr=1e-4")
    done = run_all(
        [
            Run(settings(qwen2_folder, "one", *options), ranks=1),
            Run(settings(qwen2_folder, "ddp", *options, "model.strategy=ddp")),
            Run(settings(qwen2_folder, "fsdp2", *options, "model.strategy=fsdp2")),
        ],
        in_tmp,
    )
    assert [set(each.status) for each in done] == [{0}, {0}, {2}], "".join(each.log for each in done)
    assert f"optim.name={name} cannot update sharded parameters (fsdp2)" in done[2].log
    one, ddp = (weights(Path("runs") / each / "global_step_6") for each in ("one", "ddp"))
    assert max(float((one[key] - ddp[key]).abs().max()) for key in one) < 1e-4
