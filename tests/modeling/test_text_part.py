"""Wrappers of text and images: the text model alone is trained, with the rewards that the wrapper gives a text."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.small_models import ENCODER_WRAPPERS, WRAPPERS, make_wrapper, text_states
from rm_gallery.data.batching.packed_batch import collate
from rm_gallery.errors import UserError
from rm_gallery.modeling.export import InputRecord, set_pad_token
from rm_gallery.modeling.head_init import init_head
from rm_gallery.modeling.meta_init import init_on_meta
from rm_gallery.modeling.model_folder import load_model_config, quiet_transformers
from rm_gallery.modeling.reward_model import load_reward_model
from rm_gallery.planning.model_shape import load_shape
from rm_gallery.scoring.scorer import RewardScorer
from tests.small import CHATML, chat_pairs, export_model, make_tokenizer, random_groups, whole_texts


def save_wrapper(kind: str, folder: Path, **options: Any) -> Any:
    """A small wrapper with a tokenizer whose chat template is that of the processor; returns the network."""
    with quiet_transformers():
        wrapper = make_wrapper(kind, **options)
        wrapper.save_pretrained(folder)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": CHATML}))
    return wrapper


def check_text_part(kind: str, folder: Path) -> None:
    wrapper = save_wrapper(kind, folder)
    torch.manual_seed(3)
    loaded = load_reward_model(str(folder))
    assert loaded.wrapper == kind and loaded.new_parts == ("score.weight",)
    groups = random_groups(0)[:4]
    with torch.no_grad():
        found = loaded.model.eval()(collate(groups))
        head = loaded.model.network.score
        wanted = torch.cat([head(text_states(wrapper, text)) for text in whole_texts(groups)])
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    assert wanted.std() > 0.01


def test_the_text_model_of_a_wrapper_gives_its_rewards(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        check_text_part("gemma3", tmp_path)
    assert "not read" not in caplog.text, "tensors of images are not missed"
    assert load_model_config(str(tmp_path)).model_type == "gemma3_text"
    assert load_shape(str(tmp_path)).model_type == "gemma3_text"


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in WRAPPERS if kind not in ("gemma3", *ENCODER_WRAPPERS)])
def test_every_wrapper_gives_the_rewards_of_its_text_model(kind: str, tmp_path: Path) -> None:
    check_text_part(kind, tmp_path)


def test_meta_initialization_finds_the_tensors_of_the_text_model(tmp_path: Path) -> None:
    save_wrapper("gemma3", tmp_path)
    torch.manual_seed(3)
    expected = load_reward_model(str(tmp_path)).model.network.state_dict()
    meta, files = init_on_meta(str(tmp_path), seed=3)
    assert meta.wrapper == "gemma3"
    state = {name: torch.full_like(value, float("nan")) for name, value in expected.items()}
    files.load_into(state)
    for name, value in expected.items():
        torch.testing.assert_close(state[name], value, atol=0, rtol=0, msg=name)


def test_a_reward_head_beside_the_text_model_is_kept(tmp_path: Path) -> None:
    save_wrapper("gemma3", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["v_head.summary.weight"] = torch.randn(1, 64)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = load_reward_model(str(tmp_path))
    assert loaded.head_name == "v_head.summary.weight"
    assert torch.equal(loaded.model.network.score.weight, tensors["v_head.summary.weight"])


@pytest.mark.parametrize("kind", ["gemma3", pytest.param("llava", marks=pytest.mark.slow)])  # tied, untied
def test_the_head_can_start_from_the_output_layer_of_the_wrapper(kind: str, tmp_path: Path) -> None:
    wrapper = save_wrapper(kind, tmp_path)
    loaded, tokenizer = load_reward_model(str(tmp_path)), make_tokenizer()
    init_head(loaded, "lm_head_difference", ("a", "b"), tokenizer, path=str(tmp_path))
    rows = wrapper.get_output_embeddings().weight[[tokenizer.convert_tokens_to_ids(each) for each in "ab"]]
    torch.testing.assert_close(loaded.model.network.score.weight[0], rows[0] - rows[1], atol=0, rtol=0)


def test_weights_without_a_text_model_are_an_error(tmp_path: Path) -> None:
    save_wrapper("gemma3", tmp_path)
    tensors = {name: each for name, each in load_file(tmp_path / "model.safetensors").items() if "embed_t" not in name}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="the text model is not found in the weights"):
        load_reward_model(str(tmp_path))


def test_a_checkpoint_of_a_wrapper_is_a_text_classifier(tmp_path: Path) -> None:
    save_wrapper("gemma3", tmp_path / "model")
    model = load_reward_model(str(tmp_path / "model")).model
    set_pad_token(model, make_tokenizer())
    folder = export_model(tmp_path / "out", model, make_tokenizer(), InputRecord("chat"))
    values = json.loads((folder / "config.json").read_text())
    assert values["architectures"] == ["Gemma3TextForSequenceClassification"]
    assert values["model_type"] == "gemma3_text" and "text_config" not in values
    assert not [name for name in load_file(folder / "model.safetensors") if "vision" in name or "language" in name]


@pytest.mark.parametrize("kind", ["gemma3", "qwen3_5", pytest.param("modernvbert", marks=pytest.mark.slow)])
def test_a_wrapper_with_its_own_head_is_scored_as_transformers_does(kind: str, tmp_path: Path) -> None:
    wrapper = save_wrapper(kind, tmp_path, classifier=True)
    (tmp_path / "chat_template.json").unlink()
    scorer = RewardScorer.from_folder(tmp_path, device="cpu")
    pair = "Air scatters light.", "No."
    ids = [torch.tensor([make_tokenizer()(text)["input_ids"]]) for text in pair]
    with torch.no_grad():
        wanted = [float(wrapper(input_ids=each, attention_mask=torch.ones_like(each)).logits[0, 0]) for each in ids]
    assert scorer.score_pairs([pair]) == [pytest.approx(tuple(wanted), abs=1e-4)]


@pytest.mark.slow
def test_a_wrapper_trains_with_the_template_of_its_processor(in_tmp: Path) -> None:
    from rm_gallery import train

    save_wrapper("gemma3", in_tmp / "model")
    result = train(in_tmp / "model", chat_pairs(24), **{
        "data.max_length": 128, "data.num_workers": 0, "trainer.total_training_steps": 2, "trainer.logger": [],
        "data.train_batch_size": 8, "model.fsdp_config.model_dtype": "fp32",
    })  # fmt: skip
    values = json.loads((result.checkpoint / "config.json").read_text())
    assert values["architectures"] == ["Gemma3TextForSequenceClassification"]
    assert json.loads((result.checkpoint / "tokenizer_config.json").read_text())["chat_template"] == CHATML


@pytest.mark.slow
def test_an_adapter_of_a_wrapper_loads_as_its_card_says(in_tmp: Path) -> None:
    from rm_gallery import train

    save_wrapper("gemma3", in_tmp / "model")
    result = train(in_tmp / "model", chat_pairs(24), **{
        "data.max_length": 128, "data.num_workers": 0, "trainer.total_training_steps": 2, "trainer.logger": [],
        "data.train_batch_size": 8, "model.fsdp_config.model_dtype": "fp32", "model.lora.rank": 4, "optim.lr": 1e-3,
    })  # fmt: skip
    card = (result.checkpoint / "README.md").read_text()
    assert "key_mapping=" in card
    plain = re.findall(r"```python\n(.*?)```", card, re.DOTALL)[1]
    names: dict[str, Any] = {}
    exec(plain.replace("PATH_OR_NAME", str(result.checkpoint)).replace("BASE_MODEL", str(in_tmp / "model")), names)
    messages = [{"role": "user", "content": "Why is the sky blue?"},
                {"role": "assistant", "content": "Air scatters short waves of light more."}]  # fmt: skip
    [reward] = RewardScorer.from_folder(result.checkpoint, device="cpu").score_messages([messages])
    assert names["reward"] == pytest.approx(reward, abs=1e-4)
