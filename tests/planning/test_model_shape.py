"""Shapes: parameters counted from a configuration alone, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from rm_gallery.errors import UserError
from rm_gallery.planning.model_shape import KNOWN, load_shape
from tests.small import DECODERS, ENCODERS, fast_first, make_model


# Parameters without embeddings in billions, as the model cards give them.
@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("qwen2.5-0.5b", 0.36), ("qwen2.5-1.5b", 1.31), ("qwen2.5-3b", 2.77), ("qwen2.5-7b", 6.53),
        ("qwen3-0.6b", 0.44), ("qwen3-1.7b", 1.4), ("qwen3-4b", 3.6), ("qwen3-8b", 6.95), ("qwen3-14b", 13.2),
        ("qwen3-32b", 31.2),
    ],
)  # fmt: skip
@pytest.mark.slow
def test_known_shapes_have_the_published_number_of_parameters(name: str, billions: float) -> None:
    shape = load_shape(name)
    assert (shape.parameters - shape.largest_embedding) / 1e9 == pytest.approx(billions, rel=0.013)


# Parameters of the backbone with its embeddings, in millions, as the papers or cards give them.
@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("bert-base", 110), ("bert-large", 340), ("roberta-base", 125), ("roberta-large", 355),
        ("deberta-v3-base", 184), ("deberta-v3-large", 435), ("modernbert-base", 149), ("modernbert-large", 395),
        ("qwen2.5-72b", 71460), ("llama-3.2-1b", 1236), ("llama-3.1-8b", 7505), ("mistral-7b-v0.3", 7114),
    ],
)  # fmt: skip
def test_known_shapes_have_the_published_size(name: str, millions: float) -> None:
    assert load_shape(name).parameters / 1e6 == pytest.approx(millions, rel=0.015)


@pytest.mark.slow
def test_every_known_shape_can_be_built() -> None:
    for name in KNOWN:
        shape = load_shape(name)
        assert shape.parameters == shape.num_layers * shape.layer_parameters + shape.outer_parameters
        assert shape.source.startswith("published config.json of ")


@pytest.mark.parametrize("kind", fast_first([*DECODERS, *ENCODERS], 3))
def test_a_folder_a_file_and_the_real_model_agree(kind: str, tmp_path: Path) -> None:
    from rm_gallery.modeling.reward_model import load_reward_model

    folder = make_model(kind, tmp_path / "whole")
    (tmp_path / "bare").mkdir()
    file = tmp_path / "bare" / "config.json"
    file.write_text((folder / "config.json").read_text())
    shape = load_shape(str(folder))
    model = load_reward_model(str(folder)).model
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert shape.padded == model.padded
    assert load_shape(str(file)).parameters == load_shape(str(file.parent)).parameters == shape.parameters


@pytest.mark.parametrize("name", ["Qwen2.5-7B", "Qwen/Qwen2.5-7B", "Qwen/Qwen2.5-7B-Instruct"])
def test_a_known_shape_has_several_names(name: str) -> None:
    assert load_shape(name).parameters == load_shape("qwen2.5-7b").parameters


def test_windows_are_those_of_the_layers(tmp_path: Path) -> None:
    folder = make_model("gemma3_text", tmp_path / "gemma")
    assert load_shape(str(folder)).windows == (8, None)
    assert load_shape("qwen2.5-0.5b").windows == (None,) * 24


@pytest.mark.parametrize(
    ("model", "problem"),
    [
        ("./nowhere", "no such folder or file"),
        ("a/b/c", "no such folder or file"),
        ("nowhere.json", "no such folder or file"),
        ("qwen2.5-7bb", "neither a folder with config.json nor a known shape. Did you mean 'qwen2.5-7b'?"),
        ("someone/qwen2.5-7b", "the hub does not provide it"),
        (".", "the folder has no config.json"),
    ],
)
def test_a_name_that_is_no_model_is_refused(model: str, problem: str, in_tmp: Path) -> None:
    with pytest.raises(UserError, match=re.escape(problem)) as refused:
        load_shape(model)
    assert str(refused.value).startswith(f"model.partial_pretrain={model}: ")
    assert "\n" not in str(refused.value)


_QWEN: dict[str, Any] = {
    "model_type": "qwen2", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 100,
}  # fmt: skip


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "not a configuration"),
        ("[1]", "not a configuration"),
        ("{", "not a configuration"),
        (json.dumps({**_QWEN, "model_type": "vit"}), "architecture 'vit' is not supported"),
        (json.dumps({**_QWEN, "model_type": "nope"}), "not a configuration"),
        (json.dumps({**_QWEN, "num_hidden_layers": 10**7}), "num_hidden_layers=10000000 must be a number from 1 to"),
        (json.dumps({**_QWEN, "num_hidden_layers": 0}), "num_hidden_layers=0 must be"),
        (json.dumps({**_QWEN, "hidden_size": -8}), "no model can be built from this configuration"),
        (json.dumps({**_QWEN, "num_attention_heads": 0}), "no model can be built from this configuration"),
        (json.dumps({**_QWEN, "intermediate_size": 0}), "its sizes must be at least 1"),
        (json.dumps({**_QWEN, "num_key_value_heads": 3}), "num_attention_heads a multiple of num_key_value_heads"),
        (json.dumps({**_QWEN, "hidden_size": 10**12}), "no model can be built from this configuration"),
        (json.dumps({**_QWEN, "vocab_size": "many"}), "not a configuration"),
        (json.dumps({**_QWEN, "architectures": ["Qwen2ForSequenceClassification"], "num_labels": 3}), "3 labels"),
    ],
)
def test_a_broken_configuration_is_refused_in_one_sentence(text: str, problem: str, in_tmp: Path) -> None:
    Path("config.json").write_text(text)
    with pytest.raises(UserError, match=re.escape(problem)) as refused:
        load_shape("config.json")
    assert str(refused.value).startswith("model.partial_pretrain=config.json: ")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("kind", ["qwen3_moe", *(pytest.param(kind, marks=pytest.mark.slow) for kind in
                                                 ("mixtral", "gpt_oss", "olmoe", "qwen2_moe", "phimoe"))])  # fmt: skip
def test_all_experts_are_in_memory_and_those_of_one_token_in_the_computation(kind: str, tmp_path: Path) -> None:
    import torch

    from benchmarks.small_models import config_of
    from rm_gallery.modeling.twin import build_twin, shrink

    config = config_of(kind)
    network = build_twin(config)
    shrink(config).save_pretrained(tmp_path)
    shape = load_shape(str(tmp_path / "config.json"))
    layers = network.model.layers
    joined = [each for each in layers.parameters() if each.ndim == 3]
    linear = [each.weight for each in layers.modules() if isinstance(each, torch.nn.Linear)]
    assert len(joined) == 2 * len(layers) and all(len(each) == 4 for each in joined)
    assert shape.parameters == sum(each.numel() for each in network.parameters())
    assert shape.layer_parameters == sum(each.numel() for each in layers[0].parameters())
    active = sum(each.numel() for each in linear) + sum(each[:2].numel() for each in joined)
    assert (shape.experts_per_token, shape.active_parameters) == (2, active)
    assert shape.largest_matrix == max(each.numel() for each in (*joined, *linear))
    own = 32 if kind in ("qwen3_moe", "qwen2_moe") else 96
    assert shape.intermediate == 2 * own + (32 if kind == "qwen2_moe" else 0)
