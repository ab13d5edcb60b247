"""Adapters that are trained further: of a run, of peft, of LLaMA-Factory; heads are kept, contradictions named."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rm_gallery.cli import main
from rm_gallery.data.batching.packed_batch import collate
from rm_gallery.data.tokenization.tokenizer import load_tokenizer
from rm_gallery.distributed.process_group import World
from rm_gallery.errors import UserError
from rm_gallery.modeling.weight_files import tokenizer_folder
from rm_gallery.scoring.loading import load_folder
from rm_gallery.training.config import load_config
from rm_gallery.training.model_setup import start_model
from tests.small import make_model, random_groups
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

LORA = ("model.lora.rank=4", "model.lora.alpha=8")
LAST = "global_step_6"
FILE = "adapter_model.safetensors"
HEAD = "base_model.model.score.weight"


@pytest.fixture(autouse=True)
def data(in_tmp: Path) -> None:
    write_data()


@pytest.fixture
def adapter(qwen2_folder: Path, trained: Callable[..., Path]) -> Path:
    return trained("adapter", *LORA) / LAST


def start_rewards(folder: Path, *overrides: str) -> torch.Tensor:
    """The rewards of the model that a run from this folder starts with."""
    config = load_config(None, settings(folder, "more", *overrides))
    tokenizer = load_tokenizer(tokenizer_folder(str(folder), key="model", base=config.model.lora.base))
    model = start_model(config, tokenizer, World(0, 1, torch.device("cpu"), 0, 1)).model
    with model.inference():
        return model(collate(random_groups(3)))


def scored(folder: Path, **options: Any) -> torch.Tensor:
    loaded = load_folder(folder, device="cpu", dtype="fp32", **options)
    with torch.no_grad():
        return loaded.model(collate(random_groups(3)))


def change(folder: Path, **values: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def rename(folder: Path, act: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    save_file(act(load_file(folder / FILE)), folder / FILE)


def as_state_dict(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The names of the parameters in peft, and the untrained copy of the head."""
    found = {
        (name.replace(".score.", ".score.modules_to_save.default.") if "lora" not in name
         else name.removesuffix(".weight") + ".default.weight"): each
        for name, each in state.items()
    }  # fmt: skip
    return found | {"base_model.model.score.original_module.weight": torch.randn_like(state[HEAD])}


def as_llama_factory(folder: Path) -> None:
    """An adapter of a causal language model, and the head with a bias in a file of its own."""
    head = load_file(folder / FILE)[HEAD]
    rename(folder, lambda state: {name: each for name, each in state.items() if name != HEAD})
    save_file({"v_head.summary.weight": head, "v_head.summary.bias": torch.tensor([0.5])},
              folder / "value_head.safetensors")  # fmt: skip
    change(folder, task_type="CAUSAL_LM", modules_to_save=None)
    (folder / "config.json").unlink()


@pytest.mark.slow
def test_a_run_continues_an_adapter_with_its_settings_and_rewards(
    adapter: Path, qwen2_folder: Path, caplog: Any
) -> None:
    caplog.set_level("INFO")
    torch.testing.assert_close(start_rewards(adapter), scored(adapter), atol=1e-5, rtol=0)
    more = train(adapter, "more", "trainer.total_training_steps=2")
    assert f"LoRA: continues the adapter of {adapter} (rank 4, alpha 8) on {qwen2_folder}" in caplog.text
    assert f"reward head: loaded from {adapter}" in caplog.text
    ours, theirs = (
        json.loads((each / "adapter_config.json").read_text()) for each in (more / "global_step_2", adapter)
    )
    assert ours == theirs
    before, after = weights(adapter), weights(more / "global_step_2")
    assert before.keys() == after.keys() and not any(before[name].equal(after[name]) for name in before)


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("model.lora.use_dora=true", "model.lora.use_rslora=true")])
def test_a_continued_run_resumes_bit_for_bit(options: tuple[str, ...], qwen2_folder: Path, monkeypatch: Any) -> None:
    first = train(qwen2_folder, "first", *LORA, *options) / LAST
    torch.testing.assert_close(start_rewards(first), scored(first), atol=1e-5, rtol=0)
    whole = train(first, "whole", "model.lora.dropout=0.3")
    when_logged(monkeypatch, 5, lose)
    with pytest.raises(Lost):
        train(first, "parts", "trainer.save_freq=3", "model.lora.dropout=0.3")
    assert_same_run(train(first, "parts", "trainer.save_freq=3", "model.lora.dropout=0.3"), whole)
    assert rows(whole)[0] != rows(first.parent)[0]


@pytest.mark.parametrize(
    "kind",
    [
        "value_head",
        *(pytest.param(each, marks=pytest.mark.slow) for each in ("state dict", "LLaMA-Factory", "no config.json")),
    ],
)
def test_the_head_of_another_trainer_is_kept(kind: str, adapter: Path, qwen2_folder: Path, caplog: Any) -> None:
    expected = scored(adapter)
    if kind == "state dict":
        rename(adapter, as_state_dict)
    elif kind == "LLaMA-Factory":
        as_llama_factory(adapter)
    elif kind == "value_head":
        rename(adapter, lambda state: {name.replace(".score.", ".value_head."): each for name, each in state.items()})
    else:
        for path in [*adapter.glob("tokenizer*"), adapter / "config.json"]:
            path.unlink()
    bias = 0.5 if kind == "LLaMA-Factory" else 0.0
    torch.testing.assert_close(scored(adapter), expected + bias, atol=1e-5, rtol=0)
    torch.testing.assert_close(start_rewards(adapter), expected, atol=1e-5, rtol=0)
    assert ("its bias of 0.5 is dropped" in caplog.text) == bool(bias)
    assert main(["merge", str(adapter), "--output", "merged"]) == 0
    torch.testing.assert_close(scored(Path("merged")), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.lora.rank=8", r"model.lora.rank=8, but the adapter of model.partial_pretrain=.* has 4; remove the key"),
        ("model.lora.rank=0", "model.lora.rank=0, but the adapter"),
        ("model.lora.alpha=16", "model.lora.alpha=16, but the adapter"),
        ("model.lora.use_dora=true", "model.lora.use_dora=True, but the adapter"),
        ("model.lora.target_modules=[q_proj]", r"model.lora.target_modules=\['q_proj'\], but the adapter"),
    ],
)
def test_contradictions_to_the_adapter_are_named(override: str, message: str, adapter: Path) -> None:
    with pytest.raises(UserError, match=message):
        load_config(None, settings(adapter, "more", override))
    load_config(None, settings(adapter, "more", "model.lora.rank=4", "model.lora.dropout=0.1"))


def test_what_cannot_be_continued_is_an_error(adapter: Path, qwen2_folder: Path) -> None:
    for values, message in (
        ({"bias": "all"}, r"its biases are trained \(bias=all\); merge it first"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights=pissa changes the weights of the base model"),
        ({"trainable_token_indices": [1]}, "adapters with trainable_token_indices cannot be trained further"),
    ):
        before = (adapter / "adapter_config.json").read_text()
        change(adapter, **values)
        with pytest.raises(UserError, match=message):
            start_rewards(adapter)
        (adapter / "adapter_config.json").write_text(before)
    change(adapter, base_model_name_or_path="/nowhere/base")
    with pytest.raises(UserError, match=r"name the folder of the base model with model\.lora\.base"):
        start_rewards(adapter)
    start_rewards(adapter, f"model.lora.base={qwen2_folder}")
    with pytest.raises(UserError, match="is for adapters, and this folder holds none"):
        start_rewards(qwen2_folder, f"model.lora.base={qwen2_folder}")


def test_an_adapter_without_a_head_gets_a_new_one_only_when_asked(adapter: Path, caplog: Any) -> None:
    caplog.set_level("INFO")
    rename(adapter, lambda state: {name: each for name, each in state.items() if name != HEAD})
    with pytest.raises(UserError, match="without a reward head"):
        start_rewards(adapter)
    start_rewards(adapter, "model.new_head=true")
    assert "reward head: newly initialized" in caplog.text


def test_a_base_model_with_other_weights_is_noticed(
    adapter: Path, qwen2_folder: Path, in_tmp: Path, caplog: Any
) -> None:
    other = make_model("qwen2", in_tmp / "other", seed=1)
    message = "the adapter was trained on other weights than those of"
    change(adapter, base_model_name_or_path=str(other))
    for load in (scored, start_rewards):
        with pytest.raises(UserError, match=message):
            load(adapter)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        scored(adapter, base=str(other))
    assert message in caplog.text
    caplog.clear()
    scored(adapter, base=str(qwen2_folder))
    assert message not in caplog.text


@pytest.mark.slow
def test_roberta_keeps_its_head_of_two_layers(in_tmp: Path) -> None:
    base = make_model("roberta", in_tmp / "base")
    first = train(base, "first", *LORA) / LAST
    torch.testing.assert_close(start_rewards(first), scored(first), atol=1e-5, rtol=0)
    train(first, "more", "trainer.total_training_steps=1")


def test_graders_and_runner_score_with_an_adapter(adapter: Path, qwen2_folder: Path) -> None:
    from rm_gallery.core.graders.common import RelevanceGrader
    from rm_gallery.core.models import OpenAIChatModel
    from rm_gallery.core.runner import GradingRunner
    from rm_gallery.scoring import RewardScorer

    change(adapter, base_model_name_or_path="/nowhere/base")
    scorer = RewardScorer.from_folder(adapter, device="cpu", dtype="fp32", base=str(qwen2_folder))
    [[wanted]] = scorer.score([scorer.build_group("Why?", ["Air scatters light."])])
    model = OpenAIChatModel(str(adapter), is_local=True, device="cpu", dtype="fp32", base=str(qwen2_folder))
    assert model.is_reward_model
    grader = RelevanceGrader(model=model)
    assert grader.evaluate(query="Why?", response="Air scatters light.").score == pytest.approx(wanted, abs=1e-6)
    results = GradingRunner({"relevance": grader}).run([{"query": "Why?", "response": "Air scatters light."}])
    assert results["relevance"][0].score == pytest.approx(wanted, abs=1e-6)
    with pytest.raises(UserError, match="/nowhere/base does not exist here"):
        OpenAIChatModel(str(adapter), is_local=True).chat([{"role": "user", "content": "Why?"}])
    with pytest.raises(UserError, match="is for adapters, and this folder holds none"):
        OpenAIChatModel(str(qwen2_folder), is_local=True, base="x")
