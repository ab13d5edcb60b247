"""`optim.name`: what each optimizer updates, how much state it has, and exact resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from rm_gallery.distributed.process_group import processes
from rm_gallery.modeling.parallel.master_weights import accumulate_in_float32
from rm_gallery.training.checkpoint.state import SavedWeights
from rm_gallery.training.config import OptimConfig
from rm_gallery.training.low_precision import _unpacked, round_stochastically
from rm_gallery.training.optim import build_optimizer
from tests import forks
from tests.small import make_model
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

OPTIMIZERS = {
    "adafactor": ("optim.name=adafactor", "optim.lr=1e-2"),
    "adamw_8bit": ("optim.name=adamw_8bit",),
    "muon": ("optim.name=muon",),
}


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


@pytest.mark.slow
def test_a_checkpoint_of_another_optimizer_is_an_error(qwen2_folder: Path, capsys: Any) -> None:
    train(qwen2_folder, "first", "trainer.save_freq=3")
    options = ("optim.name=muon", "trainer.resume_mode=runs/first/global_step_3")
    train(qwen2_folder, "second", *options, status=2)
    assert "momentum_buffer is missing" in capsys.readouterr().err


@pytest.mark.parametrize("shape", [(64, 512), (9, 600), (5, 30, 257)])
def test_moments_of_8_bits_give_about_the_updates_of_adamw(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    start, scale = torch.randn(shape), torch.logspace(-4, 0, shape[-2])[:, None]
    found = {}
    for name in ("adamw", "adamw_8bit"):
        torch.manual_seed(1)
        parameter, small = nn.Parameter(start.clone()), nn.Parameter(torch.ones(8, 8))
        optimizer = build_optimizer([("a", parameter), ("b", small)], OptimConfig(name=name, lr=1e-3, weight_decay=0.1))
        for _ in range(20):
            parameter.grad, small.grad = torch.randn(shape) * scale, torch.randn(8, 8)
            optimizer.step()
        found[name] = (parameter.detach(), small.detach(), optimizer.state[parameter])
    (exact, exact_small, _), (close, close_small, state) = found["adamw"], found["adamw_8bit"]
    assert torch.allclose(close_small, exact_small, rtol=0, atol=1e-7), "moments of small tensors are float32"
    assert (close - exact).norm() < 0.04 * (exact - start).norm()
    assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.uint8
    assert state["exp_avg_scale"].shape == (*shape[:-1], -(-shape[-1] // 256))


def test_a_second_moment_that_is_not_0_is_not_stored_as_0() -> None:
    parameter = nn.Parameter(torch.zeros(16, 256))
    parameter.grad = torch.logspace(-12, 0, 256).expand(16, -1).clone()
    parameter.grad[:, 1] = 0
    optimizer = build_optimizer([("a", parameter)], OptimConfig(name="adamw_8bit", lr=1e-3))
    optimizer.step()
    state = {key: value[:1] for key, value in optimizer.state[parameter].items() if value.ndim}
    moment = _unpacked(state, "exp_avg_sq", signed=False)[0]
    assert torch.equal(moment == 0, torch.arange(256) == 1)
    assert torch.allclose(moment[200:], 0.05 * parameter.grad[0, 200:] ** 2, rtol=0.25)


SHAPES = {
    "embed.weight": (50, 120),
    "layers.0.up": (17, 8),
    "layers.0.experts": (3, 40, 50),
    "norm": (9,),
    "head": (1, 8),
}


def compare_sharded(path: Path) -> int:
    """Largest difference between whole parameters and sharded ones after 5 steps, by optimizer and mesh."""
    found: dict[str, float] = {}
    with processes("cpu"):
        for shape in ((2,), (2, 1)):
            mesh = init_device_mesh("cpu", shape)
            where = [Replicate(), Shard(0)][-len(shape) :]
            for name in ("adamw_8bit", "muon", "adafactor"):
                torch.manual_seed(0)
                whole = {key: nn.Parameter(torch.randn(size)) for key, size in SHAPES.items()}
                parts = {
                    key: nn.Parameter(distribute_tensor(each.detach(), mesh, where)) for key, each in whole.items()
                }
                config = OptimConfig(name=name, lr=1e-2, weight_decay=0.1)
                both = [build_optimizer(each.items(), config) for each in (whole, parts)]
                for _ in range(5):
                    for key, each in whole.items():
                        each.grad = torch.randn(each.shape)
                        parts[key].grad = distribute_tensor(each.grad, mesh, where)
                    for optimizer in both:
                        optimizer.step()
                differences = [(parts[key].full_tensor() - each).abs().max() for key, each in whole.items()]  # type: ignore[attr-defined]
                found[f"{name} {shape}"] = float(torch.stack(differences).max())
    path.write_text(json.dumps(found))
    return 0


@pytest.mark.slow
def test_sharded_parameters_are_updated_as_whole_ones(tmp_path: Path) -> None:
    """One is sharded unevenly, and one rank has no row of the head."""
    path = tmp_path / "found.json"
    assert forks.finish(forks.ranks(2, compare_sharded, path, log=tmp_path / "log")) == [0, 0], (
        tmp_path / "log"
    ).read_text()
    found = json.loads(path.read_text())
    assert len(found) == 6
    assert all(value < 1e-6 for value in found.values()), found


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_two_processes_train_as_one_does_and_resume_on_one(name: str, in_tmp: Path, qwen2_folder: Path) -> None:
    options = (*OPTIMIZERS[name], "optim.lr=1e-4")
    fsdp2 = (*options, "model.strategy=fsdp2")
    stop = Act(rank=1, step=3, what="SIGTERM")
    done = run_all(
        [
            Run(settings(qwen2_folder, "one", *options), ranks=1),
            Run(settings(qwen2_folder, "ddp", *options, "model.strategy=ddp")),
            Run(settings(qwen2_folder, "fsdp2", *fsdp2)),
            Run(settings(qwen2_folder, "parts", *fsdp2), act=stop),
            Run(settings(qwen2_folder, "fewer", *options), ranks=1, copy=("runs/parts", "runs/fewer")),
            Run(settings(qwen2_folder, "parts", *fsdp2)),
        ],
        in_tmp,
    )
    status = [set(each.status) for each in done]
    assert status == [{0}, {0}, {0}, {143}, {0}, {0}], "".join(each.log for each in done)
    assert_same_run(Path("runs/parts"), Path("runs/fsdp2"))
    one = weights(Path("runs/one/global_step_6"))
    for other in ("ddp", "fsdp2", "fewer"):
        found = weights(Path("runs") / other / "global_step_6")
        assert max(float((one[key] - found[key]).abs().max()) for key in one) < 1e-4, other


STOCHASTIC = ("model.fsdp_config.master_weights=bf16_stochastic", "model.fsdp_config.model_dtype=bf16")


def test_stochastic_rounding_is_right_on_average_and_keeps_what_bf16_has() -> None:
    exact = torch.tensor([1 + 2**-8, -1 - 3 * 2**-10, 0.0, 2.0**-140, 3e38, float("inf"), float("nan"), -5.0])
    found = torch.empty(4000, len(exact), dtype=torch.bfloat16)
    round_stochastically(exact.expand(4000, -1), found, seed=1)
    again = torch.empty_like(found)
    round_stochastically(exact.expand(4000, -1), again, seed=1)
    assert found.view(torch.int16).equal(again.view(torch.int16))
    assert sorted(found[:, 0].unique().tolist()) == [1.0, 1 + 2**-7], "one of the two neighbours"
    assert found[:, 0].float().mean() == pytest.approx(1 + 2**-8, abs=3 * 2**-8 / 4000**0.5)
    assert found[:, 1].float().mean() == pytest.approx(-1 - 3 * 2**-10, abs=3 * 2**-8 / 4000**0.5)
    assert found[:, [2, 5, 7]].float().equal(exact[[2, 5, 7]].expand(4000, -1))
    assert found[:, 6].isnan().all()


def test_bf16_weights_have_the_state_and_gradients_of_float32(monkeypatch: Any) -> None:
    """Small updates, which plain rounding would lose, are made on average; the same seed gives the same weights."""
    found = []
    for seed in (0, 0, 1):
        parameter = nn.Parameter(torch.ones(200, 300, dtype=torch.bfloat16))
        accumulate_in_float32(parameter)
        optimizer = build_optimizer([("a", parameter)], OptimConfig(lr=1e-4), seed=seed)
        for _ in range(10):
            for _ in range(2):
                (parameter.sum() * 0.1).backward()
            assert parameter.grad is not None
            assert parameter.grad.dtype == torch.float32
            optimizer.step()
            optimizer.zero_grad()
        found.append(parameter.detach().float())
    assert optimizer.state[parameter]["exp_avg"].dtype == torch.float32
    assert found[0].mean() == pytest.approx(1 - 10 * 1e-4, abs=1e-4)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw", *OPTIMIZERS])
def test_a_run_with_bf16_weights_that_was_lost_resumes_bit_for_bit(
    name: str, in_tmp: Path, monkeypatch: Any, qwen2_folder: Path
) -> None:
    options = (*OPTIMIZERS.get(name, ()), *STOCHASTIC)
    whole = train(qwen2_folder, "whole", *options)
    when_logged(monkeypatch, 5, lose)
    with pytest.raises(Lost):
        train(qwen2_folder, "parts", "trainer.save_freq=3", *options)
    assert_same_run(train(qwen2_folder, "parts", "trainer.save_freq=3", *options), whole)
    saved = SavedWeights(whole / "global_step_6" / "training_state").meta_tensors()
    assert {str(each.dtype) for key, each in saved.items() if "score" not in key} == {"torch.bfloat16"}
    assert saved["score.weight"].dtype == torch.float32


@pytest.mark.slow
def test_two_processes_train_bf16_weights_and_resume(in_tmp: Path, qwen2_folder: Path) -> None:
    options = (*STOCHASTIC, "optim.lr=1e-4")
    fsdp2 = (*options, "model.strategy=fsdp2")
    done = run_all(
        [
            Run(settings(qwen2_folder, "one", *options), ranks=1),
            Run(settings(qwen2_folder, "ddp", *options, "model.strategy=ddp")),
            Run(settings(qwen2_folder, "fsdp2", *fsdp2)),
            Run(settings(qwen2_folder, "fsdp2-parts", *fsdp2), act=Act(rank=1, step=3, what="SIGTERM")),
            Run(settings(qwen2_folder, "fewer", *options), ranks=1, copy=("runs/fsdp2-parts", "runs/fewer")),
            Run(settings(qwen2_folder, "fsdp2-parts", *fsdp2)),
        ],
        in_tmp,
    )
    status = [set(each.status) for each in done]
    assert status == [{0}, {0}, {0}, {143}, {0}, {0}], "".join(each.log for each in done)
    assert_same_run(Path("runs/fsdp2-parts"), Path("runs/fsdp2"))
    losses = {
        name: [row["train/loss"] for row in rows(Path("runs") / name) if "train/loss" in row]
        for name in ("one", "ddp", "fsdp2", "fewer")
    }
    for name in ("ddp", "fsdp2", "fewer"):
        assert losses[name] == pytest.approx(losses["one"], abs=0.02), name


def test_bf16_weights_in_a_float32_model_are_an_error(qwen2_folder: Path, capsys: Any) -> None:
    train(qwen2_folder, "first", STOCHASTIC[0], status=2)
    assert "master_weights=bf16_stochastic with model_dtype=fp32" in capsys.readouterr().err
