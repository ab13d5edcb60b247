"""Shared prompts in training: the same rewards, gradients, curves and figures; no group is too large."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rm_gallery.cli import main
from rm_gallery.data.batching.bin_packing import Packer
from rm_gallery.data.batching.packed_batch import collate
from rm_gallery.data.batching.prompt_sharing import plan_step
from rm_gallery.data.token_cache.arrays import TokenData
from rm_gallery.data.tokenization.token_group import Origin, TokenGroup
from rm_gallery.modeling.reward_model import RewardModel, load_reward_model
from rm_gallery.objectives import bradley_terry
from rm_gallery.training.validation import validate
from tests.small import make_model, same_prompt_groups, text_pairs, write_pairs

pytestmark = pytest.mark.slow

KINDS = ("qwen2", "gemma3_text", "bert")


def stored(seed: int) -> TokenData:
    by_prompt = same_prompt_groups(seed)
    return TokenData.from_groups(
        (group, Origin(prompt_hash=prompt, source="ab"[prompt % 2]))
        for prompt, groups in enumerate(by_prompt)
        for group in groups
    )


def step_gradients(model: RewardModel, data: TokenData, packer: Packer, *, share: bool) -> dict[str, torch.Tensor]:
    plan = plan_step(data, np.arange(len(data)), packer, share_prompts=share)
    model.zero_grad(set_to_none=True)
    for pack in plan.packs[0]:
        batch = collate(plan.load(data, pack))
        (bradley_terry(model(batch), batch)[0] / plan.num_comparisons).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", KINDS)
def test_shared_cut_and_plain_steps_have_the_same_gradients(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = load_reward_model(str(make_model(kind, tmp_path))).model.eval()
    for seed in (0, 6):
        data = stored(seed)
        whole = step_gradients(model, data, Packer(10**6, padded=model.padded), share=False)
        for budget, share in ((10**6, True), (200, True), (80, False)):
            found = step_gradients(model, data, Packer(budget, padded=model.padded), share=share)
            for name, gradient in found.items():
                scale = max(1.0, float(whole[name].abs().max()))
                torch.testing.assert_close(gradient, whole[name], atol=1e-6 * scale, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_shared_responses_have_their_own_rewards(kind: str, tmp_path: Path) -> None:
    model = load_reward_model(str(make_model(kind, tmp_path))).model.eval()
    data = stored(2)
    plan = plan_step(data, np.arange(len(data)), Packer(300, padded=model.padded))
    none = np.zeros(0, np.int32)
    with torch.no_grad():
        for pack in plan.packs[0]:
            groups = plan.load(data, pack)
            texts = [np.concatenate([group.prefix, tail]) for group in groups for tail in group.tails]
            alone = torch.cat([model(collate([TokenGroup(none, [text], ())])) for text in texts])
            torch.testing.assert_close(model(collate(groups)), alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_validation_has_the_same_figures_with_and_without(kind: str, tmp_path: Path) -> None:
    model = load_reward_model(str(make_model(kind, tmp_path))).model
    data = stored(4)
    expected = validate(model, data, bradley_terry, token_budget=10**6, share_prompts=False)
    assert "val/accuracy/a" in expected
    for budget in (70, 400, 10**6):
        assert validate(model, data, bradley_terry, token_budget=budget) == pytest.approx(expected, abs=1e-5)


def train(model: Path, name: str, *overrides: str) -> list[dict[str, Any]]:
    """A run's metrics."""
    settings = [
        f"model.partial_pretrain={model}", "model.fsdp_config.model_dtype=fp32", "data.train_files=train.jsonl",
        "data.val_files=val.parquet", "data.max_length=256", "data.train_batch_size=16", "optim.lr=1e-4",
        "trainer.total_training_steps=20", "trainer.default_local_dir=runs", f"trainer.experiment_name={name}",
        "trainer.logger=[]", "trainer.device=cpu", "data.max_tokens_per_micro_batch=600", "data.input_style=text",
        *overrides,
    ]  # fmt: skip
    assert main(["train", *settings]) == 0
    return [json.loads(line) for line in (Path("runs") / name / "metrics.jsonl").read_text().splitlines()]


def write_data() -> None:
    """Pairs of few prompts with responses in common, and a ranking of each."""
    with Path("train.jsonl").open("w") as file:
        for prompt in range(6):
            answers = [f"{'good ' * number}{'bad ' * (5 - number)}end {prompt}" for number in range(6)]
            question = f"Question {prompt}, which is long enough to be worth computing only once. "
            for better, worse in list(combinations(range(6), 2))[::2]:
                row = {"prompt": question, "chosen": answers[worse], "rejected": answers[better]}
                file.write(json.dumps(row) + "\n")
    write_pairs(Path("val.parquet"), text_pairs(8))


@pytest.mark.parametrize("kind", ["qwen2", pytest.param("bert", marks=pytest.mark.slow)])
def test_the_loss_curve_is_the_same_with_the_switch_on_and_off(kind: str, in_tmp: Path, tmp_path: Path) -> None:
    write_data()
    model = make_model(kind, tmp_path / kind)
    on, off = (train(model, f"{share}", f"data.share_prompts={share}") for share in ("true", "false"))
    names = ("train/loss", "train/accuracy", "train/margin", "train/reward_chosen", "train/reward_rejected",
             "train/grad_norm", "train/epoch", "val/loss", "val/accuracy")  # fmt: skip
    for name in names:
        curve = [row[name] for row in off if name in row]
        assert len(curve) == (20 if name.startswith("train") else 1)
        assert [row[name] for row in on if name in row] == pytest.approx(curve, abs=1e-5), name


def test_sixteen_ranked_responses_are_trained_on_in_pieces(
    in_tmp: Path, qwen2_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    answers = ["answer " * (1 + number) for number in range(16)]
    row = {"prompt": "Question? ", "responses": answers, "scores": list(range(16))}
    Path("train.jsonl").write_text(json.dumps(row))
    write_pairs(Path("val.parquet"), text_pairs(8))
    steps = ["trainer.total_training_steps=3", "data.max_length=512"]
    curves = []
    for budget in (400, 100_000):
        caplog.clear()
        rows = train(qwen2_folder, f"budget{budget}", *steps, f"data.max_tokens_per_micro_batch={budget}")
        curves.append([row["train/loss"] for row in rows if "train/loss" in row])
        assert "exceed the token budget" not in caplog.text
    assert curves[0] == pytest.approx(curves[1], abs=1e-5)
    train(qwen2_folder, "tiny", *steps, "data.max_tokens_per_micro_batch=100")
    assert (
        "data.train_files: " in caplog.text
        and "gets a micro-batch alone; the longest, train.jsonl:0, has " in caplog.text
    )


def test_the_switch_may_not_change_in_a_run(
    in_tmp: Path, qwen2_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_data()
    train(qwen2_folder, "run", "trainer.total_training_steps=1")
    with pytest.raises(AssertionError):
        train(qwen2_folder, "run", "trainer.total_training_steps=1", "data.share_prompts=false")
    assert "data.share_prompts=false, was true" in capsys.readouterr().err
