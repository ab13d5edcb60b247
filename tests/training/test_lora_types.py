"""LoRA on model types that are not tested one by one: one reward everywhere, gradients, exact resume, plain peft."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.small_models import config_of, make_wrapper, save_language_model
from rm_gallery.cli import main
from rm_gallery.errors import UserError
from rm_gallery.modeling.adapters import add_lora
from rm_gallery.modeling.config import LoraConfig
from rm_gallery.modeling.generic_class import CODE_FILE
from rm_gallery.modeling.lora_layers import linear_layers, names_without_effect
from rm_gallery.modeling.packing import Way
from rm_gallery.modeling.reward_model import load_reward_model
from rm_gallery.modeling.twin import build_twin
from tests.modeling.test_other_heads import save_backbone
from tests.small import make_tokenizer
from tests.training.short_runs import Lost, assert_same_run, lose, train, weights, when_logged, write_data
from tests.training.test_lora import LAST, LORA, TEXTS, scores

ENCODERS = ("electra", "t5")
RESUMED = ("qwen3_moe", "jamba")
"""Types with tensors that have other names or shapes in a checkpoint than in the model."""


@pytest.fixture(autouse=True)
def data(in_tmp: Path) -> None:
    write_data()


def save_base(kind: str, folder: Path) -> Path:
    """A small model of this type with a tokenizer, without a reward head."""
    if kind in ENCODERS:
        return save_backbone(kind, folder)
    if kind == "gemma3":
        make_wrapper(kind).save_pretrained(folder)
    else:
        save_language_model(kind, folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def card_rewards(folder: Path, base: Path) -> list[float]:
    """By the code of the model card, which needs transformers and peft alone."""
    _, code = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    exec(code.replace("PATH_OR_NAME", str(folder)).replace("BASE_MODEL", str(base)), names)
    with torch.no_grad():
        return [names["model"](**names["tokenizer"](text, return_tensors="pt")).logits.item() for text in TEXTS]


@pytest.mark.slow
@pytest.mark.parametrize("kind", [
    "gemma2", "granite", "deepseek_v3", "qwen3_moe", "gpt2", "jamba", "gemma3", *ENCODERS,
])  # fmt: skip
def test_adapter_peft_scorer_and_merged_folder_give_one_reward(kind: str, in_tmp: Path, monkeypatch: Any) -> None:
    base = save_base(kind, in_tmp / "base")
    options = (*LORA, "optim.lr=1e-2", "data.input_style=text")
    whole = train(base, "whole", *options) / LAST  # the run itself has compared its rewards with peft's
    expected = card_rewards(whole, base)
    assert scores(whole) == pytest.approx(expected, abs=1e-4)
    assert max(expected) - min(expected) > 1e-2
    assert main(["merge", str(whole), "--output", "merged"]) == 0
    assert scores("merged") == pytest.approx(expected, abs=1e-4)
    found = weights(whole)
    assert all(each.any() for name, each in found.items() if ".lora_B" in name), "every layer is trained"
    assert (kind == "granite") == (whole / CODE_FILE).is_file()
    if kind not in RESUMED:
        return
    when_logged(monkeypatch, 5, lose)
    with pytest.raises(Lost):
        train(base, "parts", "trainer.save_freq=3", *options)
    assert_same_run(train(base, "parts", "trainer.save_freq=3", *options), whole.parent)


def test_layers_whose_weights_are_read_directly_have_no_lora(tmp_path: Path) -> None:
    """Mamba multiplies the weight of `dt_proj` itself, and its kernels on GPUs that of `x_proj` and `out_proj`."""
    found, direct = linear_layers(build_twin(config_of("jamba")))
    assert {name.rpartition(".")[2] for name in direct} == {"dt_proj"}
    assert "in_proj" in {name.rpartition(".")[2] for name in found}
    wo = [name for name in linear_layers(build_twin(config_of("t5")))[0] if name.endswith("wo")]
    assert wo, "T5 asks for the dtype of its weight, which is no product"


@pytest.mark.slow
def test_named_layers_without_effect_are_errors(in_tmp: Path) -> None:
    model = load_reward_model(str(save_base("jamba", in_tmp / "base"))).model
    message = "has no linear layer dt_proj that is called: transformers reads the weight of dt_proj directly"
    with pytest.raises(UserError, match=message):
        add_lora(model, LoraConfig(rank=2, target_modules=["dt_proj"]), "base")


@pytest.mark.slow
def test_a_type_whose_code_drops_the_layers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check on the small model compares with the merged one, and finds layers that no reward depends on."""
    config, way = config_of("electra"), Way(False, "")
    names = ["electra.encoder.layer.#.attention.self.query"]
    assert not names_without_effect(config, way, names, what="model.lora.rank=2")
    monkeypatch.setattr("rm_gallery.modeling.lora_layers.merge_layers", lambda network: None)  # LoRA counts twice
    with monkeypatch.context() as patch:
        patch.setattr("rm_gallery.modeling.packing.Probe.measure", lambda self, network: setattr(
            self, "wanted", torch.zeros(len(self.texts))))  # fmt: skip
        with pytest.raises(UserError, match=r"model.lora.rank=2: LoRA is not exact on electra: rewards of a small"):
            names_without_effect(config, way, names, what="model.lora.rank=2")
