"""`model.head_init`: the last layer of a new reward head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.small_models import save_language_model
from rm_gallery.errors import UserError
from rm_gallery.modeling.head_init import init_head
from rm_gallery.modeling.meta_init import init_on_meta
from rm_gallery.modeling.reward_model import LoadedModel, load_reward_model
from tests.small import make_model, make_tokenizer


def start(folder: Path, setting: Any, words: tuple[str, str] = ("Y", "N"), **options: Any) -> LoadedModel:
    loaded = load_reward_model(str(folder), **options)
    init_head(loaded, setting, words, make_tokenizer(), path=str(folder))
    return loaded


@pytest.mark.parametrize("is_tied", [False, True])
def test_the_first_reward_is_the_difference_of_two_logits(is_tied: bool, in_tmp: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = make_model("qwen2", in_tmp / "base", tie_word_embeddings=is_tied)
    assert ("lm_head.weight" in load_file(folder / "model.safetensors")) is not is_tied
    loaded = start(folder, "lm_head_difference")
    ids, (yes, no) = torch.tensor([[20, 30, 40]]), (make_tokenizer()(word)["input_ids"][0] for word in "YN")
    loaded.model.network.set_attn_implementation("eager")
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits[0, -1]
        reward = loaded.model.network(ids).logits.item()
    assert reward == pytest.approx(float(logits[yes] - logits[no]), abs=1e-4) and abs(reward) > 1e-2
    on_meta, files = init_on_meta(str(folder), seed=0)
    init_head(on_meta, "lm_head_difference", ("Y", "N"), make_tokenizer(), path=str(folder), new=files.new)
    assert files.new["score.weight"].equal(loaded.model.network.score.weight.data)


@pytest.mark.parametrize(("kind", "extra"), [
    ("granite", {"logits_scaling": 8.0}), pytest.param("cohere", {"logit_scale": 0.25}, marks=pytest.mark.slow),
    pytest.param("granitemoe", {"logits_scaling": 6.0}, marks=pytest.mark.slow),
    pytest.param("hyperclovax", {"logits_scaling": 0.5}, marks=pytest.mark.slow),
])  # fmt: skip
def test_a_factor_on_the_logits_is_part_of_the_head(kind: str, extra: dict[str, Any], in_tmp: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = save_language_model(kind, in_tmp / "base", **extra)
    loaded = start(folder, "lm_head_difference", packing="padded")
    ids, (yes, no) = torch.tensor([[20, 30, 40]]), (make_tokenizer()(word)["input_ids"][0] for word in "YN")
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits[0, -1]
        reward = loaded.model.network(ids).logits.item()
    assert reward == pytest.approx(float(logits[yes] - logits[no]), abs=1e-4) and abs(reward) > 1e-2


def test_a_soft_cap_of_the_logits_is_a_warning(in_tmp: Path, caplog: Any) -> None:
    start(save_language_model("gemma2", in_tmp / "base"), "lm_head_difference", packing="padded")
    assert "rewards start as differences of logits before their soft cap of 30" in caplog.text


@pytest.mark.parametrize("kind", ["qwen2", "bert", "roberta"])
def test_zero_sets_the_last_layer_alone(kind: str, in_tmp: Path) -> None:
    torch.manual_seed(0)
    folder = make_model(kind, in_tmp / "base")
    torch.manual_seed(0)
    expected = dict(load_reward_model(str(folder)).model.network.named_parameters())
    torch.manual_seed(0)
    found = dict(start(folder, "zero").model.network.named_parameters())
    changed = {name for name in found if not found[name].equal(expected[name])}
    assert {"qwen2": "score.weight", "bert": "classifier.weight", "roberta": "classifier.out_proj.weight"}[
        kind
    ] in changed
    assert all(not found[name].any() for name in changed) and len(changed) <= 2


@pytest.mark.parametrize(
    ("kind", "extra", "setting", "words", "message"),
    [
        ("qwen2", {}, "lm_head_difference", ("Yes", "N"), "'Yes' is 3 tokens of this tokenizer, and must be one; set"),
        ("bert", {}, "lm_head_difference", ("Y", "N"), "has no output layer of a language model|is not one row"),
    ],
)
def test_what_cannot_be_computed_is_an_error(
    kind: str, extra: dict[str, Any], setting: str, words: tuple[str, str], message: str, in_tmp: Path
) -> None:
    with pytest.raises(UserError, match=message):
        start(make_model(kind, in_tmp / "base", **extra), setting, words)


def test_a_folder_with_its_own_head_is_not_overwritten(in_tmp: Path) -> None:
    folder = make_model("qwen2", in_tmp / "base")
    loaded = load_reward_model(str(folder))
    loaded.model.network.save_pretrained(in_tmp / "reward")
    with pytest.raises(UserError, match=r"has a reward head; set model.new_head=true to replace it"):
        start(in_tmp / "reward", "zero")
    assert not start(in_tmp / "reward", "zero", new_head=True).model.network.score.weight.any()
