"""QLoRA: a quantized base model gives one reward everywhere, and merges into the model that is not quantized."""

from __future__ import annotations

import json
import logging
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from rm_gallery.cli import main
from rm_gallery.core.models import OpenAIChatModel
from rm_gallery.data.batching.packed_batch import collate
from rm_gallery.errors import UserError
from rm_gallery.modeling.adapters import add_lora
from rm_gallery.modeling.config import LoraConfig, Quantization
from rm_gallery.modeling.quantization import QuantizeOptions, num_parameters
from rm_gallery.modeling.reward_model import RewardModel, load_reward_model
from rm_gallery.training.config import load_config
from tests.small import make_model, random_groups
from tests.training.rank_runs import Run, run_all
from tests.training.short_runs import Lost, assert_same_run, lose, settings, train, weights, when_logged, write_data
from tests.training.test_lora import LAST, LORA, TEXTS, scores
from tests.training.test_lora_types import card_rewards

needs_package = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes (extra qlora) is missing")


@pytest.fixture(autouse=True)
def data(in_tmp: Path) -> None:
    write_data()


def quantized(folder: Path, kind: Quantization) -> RewardModel:
    torch.manual_seed(0)
    model = load_reward_model(str(folder)).model
    options = QuantizeOptions(kind, torch.float32, torch.device("cpu"), "model.quantization")
    add_lora(model, LoraConfig(rank=4), str(folder), quantization=options)
    return model


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ((), "model.quantization=nf4 without LoRA: quantized weights cannot be trained; set model.lora.rank"),
        (
            (*LORA, "model.strategy=fsdp2"),
            "model.quantization=nf4 with model.strategy=fsdp2: FSDP2 shards no quantized",
        ),
        ((*LORA, "model.fsdp_config.cpu_offload=true"), "with model.fsdp_config.cpu_offload=true is not implemented"),
    ],
)
def test_what_cannot_be_trained_is_an_error(overrides: tuple[str, ...], message: str, qwen2_folder: Path) -> None:
    with pytest.raises(UserError, match=message):
        load_config(None, settings(qwen2_folder, "run", "model.quantization=nf4", *overrides))


def test_a_missing_package_is_named_with_its_extra(qwen2_folder: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    with pytest.raises(UserError, match=r"needs the bitsandbytes package: pip install 'rm-gallery\[qlora\]'"):
        quantized(qwen2_folder, "nf4")


@needs_package
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_rewards_and_gradients_do_not_depend_on_the_batch(kind: Quantization, qwen2_folder: Path) -> None:
    """int8 with a threshold for outliers would: a large feature of one text changes how the others are computed."""
    model = quantized(qwen2_folder, kind)
    matrices = [name for name, each in model.named_parameters() if not each.is_floating_point()]
    assert len(matrices) == 14 and "score" not in str(matrices) and "embed" not in str(matrices)
    assert num_parameters(model) == num_parameters(load_reward_model(str(qwen2_folder)).model) + 4096
    groups = random_groups(3)
    with model.inference():
        together = model(collate(groups))
        alone = torch.cat([model(collate([group])) for group in groups])
        plain = load_reward_model(str(qwen2_folder), new_head=True).model.eval()
        plain.head.load_state_dict(model.head.state_dict())
        difference = float((plain(collate(groups)) - together).abs().max())
    # int8 rounds activations, and sums in another order may round one of them differently.
    torch.testing.assert_close(together, alone, atol=1e-4 if kind == "nf4" else 1e-2, rtol=1e-4)
    assert 1e-3 < difference < 1.0
    model(collate(groups)).square().sum().backward()
    assert all(each.grad is not None for name, each in model.named_parameters() if "lora_B" in name)


@needs_package
@pytest.mark.slow
@pytest.mark.parametrize(("kind", "base_kind", "options"), [
    ("nf4", "qwen2", ()), ("int8", "qwen2", ()), ("nf4", "bert", ()), ("nf4", "llama", ("model.lora.use_dora=true",)),
])  # fmt: skip
def test_trainer_scorer_and_plain_peft_give_one_reward(
    kind: str, base_kind: str, options: tuple[str, ...], in_tmp: Path, monkeypatch: Any, caplog: Any
) -> None:
    base = make_model(base_kind, in_tmp / "base")
    options = (*LORA, f"model.quantization={kind}", "optim.lr=1e-2", *options)
    caplog.set_level(logging.INFO)
    run = train(base, "run", *options)  # it has compared its rewards with those of transformers and peft
    assert f"model.quantization={kind}: " in caplog.text and "are quantized" in caplog.text
    record = json.loads((run / LAST / "config.json").read_text())["rm_gallery_quantization"]
    assert record["load_in_4bit" if kind == "nf4" else "load_in_8bit"] is True
    expected = card_rewards(run / LAST, base)
    assert scores(run) == pytest.approx(expected, abs=1e-4 if kind == "nf4" else 1e-2)
    unquantized = scores(run, quantized=False)
    moved = max(abs(ours - theirs) for ours, theirs in zip(unquantized, expected, strict=True))
    assert moved > 1e-4
    for quantized, wanted in ((True, expected), (False, unquantized)):
        chat = OpenAIChatModel(str(run / LAST), is_local=True, device="cpu", dtype="fp32", quantized=quantized)
        scorer = chat.reward_scorer
        [[reward]] = scorer.score([scorer.build_group(None, [TEXTS[0]])])
        assert reward == pytest.approx(wanted[0], abs=1e-4 if kind == "nf4" else 1e-2)
    caplog.clear()
    assert main(["merge", str(run), "--output", "merged"]) == 0
    assert f"trained on a quantized base model ({kind}), and merged into the one that is not quantized" in caplog.text
    assert scores("merged") == pytest.approx(unquantized, abs=1e-4)
    when_logged(monkeypatch, 5, lose)
    with pytest.raises(Lost):
        train(base, "parts", "trainer.save_freq=3", *options)
    assert_same_run(train(base, "parts", "trainer.save_freq=3", *options), run)
    more = load_config(None, settings(run / LAST, "more"))
    assert more.model.quantization == kind
    with pytest.raises(UserError, match=f"was trained with {kind}; remove the key to continue it"):
        load_config(None, settings(run / LAST, "more", "model.quantization=null"))


@needs_package
@pytest.mark.slow
def test_two_processes_train_as_one_does(in_tmp: Path, qwen2_folder: Path) -> None:
    options = (*LORA, "model.quantization=nf4")
    runs = [Run(settings(qwen2_folder, "one", *options), ranks=1), Run(settings(qwen2_folder, "ddp", *options))]
    done = run_all(runs, in_tmp)
    assert [set(each.status) for each in done] == [{0}, {0}], "\n".join(each.log for each in done)
    one, two = (weights(Path("runs") / name / LAST) for name in ("one", "ddp"))
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-4
    assert len(TEXTS) == 12
