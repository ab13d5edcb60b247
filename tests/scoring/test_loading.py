"""Folders that can be scored with, those that cannot, and texts that are too long."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from rm_gallery.errors import UserError
from rm_gallery.schema import PreferenceGroup
from rm_gallery.scoring import RewardScorer
from tests.scoring.models import make_checkpoint, make_classifier

OWN_CODE = """
import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutputWithPast

class TinyConfig(PretrainedConfig):
    model_type = "tiny_own"
    def __init__(self, reward_token_id=9, **extra):
        self.reward_token_id = reward_token_id
        super().__init__(**extra)

class TinyForRewardModel(PreTrainedModel):
    config_class = TinyConfig
    def __init__(self, config):
        super().__init__(config)
        self.tok_embeddings = torch.nn.Embedding(264, 8)
        self.v_head = torch.nn.Linear(8, 1, bias=False)
        self.post_init()
    def _init_weights(self, module):
        if hasattr(module, "weight"):
            torch.nn.init.normal_(module.weight)
    def get_input_embeddings(self):
        return self.tok_embeddings
    def forward(self, input_ids, attention_mask):
        hidden = self.tok_embeddings(input_ids) * attention_mask.unsqueeze(-1)
        values = self.v_head(hidden.cumsum(1))[..., 0] + input_ids  # [R, L]
        last = attention_mask.sum(1, keepdim=True) - 1
        return SequenceClassifierOutputWithPast(logits=values.gather(1, last))
"""


def edit_config(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def load(folder: Path) -> RewardScorer:
    return RewardScorer.from_folder(folder, device="cpu")


def test_a_folder_that_is_no_model_ends_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no model found"):
        load(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        load(tmp_path / "lost")


def test_an_adapter_without_a_head_ends_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "base"}')
    with pytest.raises(UserError, match=r"holds an adapter without a reward head .* the head is missing: save it"):
        load(tmp_path)


@pytest.mark.parametrize("kind", ["qwen2", "gpt2"])
def test_a_two_label_classifier_ends_in_one_sentence(kind: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a classifier with 2 labels, but a reward model has one"):
        load(make_classifier(kind, tmp_path, num_labels=2, **({"num_key_value_heads": 2} if kind == "qwen2" else {})))


def test_a_language_model_is_not_given_a_random_head(qwen2_folder: Path) -> None:
    with pytest.raises(UserError, match="Qwen2ForCausalLM is not a sequence classification model"):
        load(qwen2_folder)


def test_a_head_that_cannot_be_run_is_named(qwen2_folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(qwen2_folder, tmp_path / "model"))
    layers = {"v_head.0.weight": torch.ones(32, 32), "v_head.2.weight": torch.ones(1, 32)}
    save_file({**load_file(folder / "model.safetensors"), **layers}, folder / "model.safetensors")
    with pytest.raises(
        UserError, match=r"cannot be run \(v_head.0.weight \[32, 32\], v_head.2.*; choose another folder"
    ):
        load(folder)


def test_weights_without_the_head_are_refused(text_folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(text_folder, tmp_path / "model"))
    weights = load_file(folder / "model.safetensors")
    del weights["score.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"1 tensors are missing \(first: score.weight\)"):
        load(folder)


def test_a_folder_without_tokenizer_or_weights_ends_in_one_sentence(text_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(text_folder, tmp_path / "model"))
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="has no weights"):
        load(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    shutil.copy(text_folder / "model.safetensors", folder)
    with pytest.raises(UserError, match="tokenizer"):
        load(folder)


@pytest.mark.parametrize(("option", "value"), [("device", "gpu"), ("device", "cuda:77"), ("dtype", "fp8")])
def test_a_wrong_device_or_dtype_ends_in_one_sentence(text_folder: Path, option: str, value: str) -> None:
    with pytest.raises(UserError, match=f"{option}={value}"):
        RewardScorer.from_folder(text_folder, **{option: value})  # type: ignore[arg-type]


def test_a_foreign_folder_reads_chats_when_its_tokenizer_has_a_template(tmp_path: Path) -> None:
    styles = [load(make_classifier("gpt2", tmp_path / str(chat), chat=chat)).record.input_style for chat in (0, 1)]
    assert styles == ["text", "chat"]


def test_models_with_code_of_their_own_need_leave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    source = make_classifier("gpt2", tmp_path / "source")
    folder = tmp_path / "own"
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / name, folder)
    (folder / "tiny_own_code.py").write_text(OWN_CODE)
    auto_map = {"AutoConfig": "tiny_own_code.TinyConfig", "AutoModel": "tiny_own_code.TinyForRewardModel"}
    values = {"model_type": "tiny_own", "architectures": ["TinyForRewardModel"], "auto_map": auto_map}
    (folder / "config.json").write_text(json.dumps({**values, "reward_token_id": 9}))
    from safetensors.torch import save_file

    embedding = torch.zeros(264, 8)
    embedding[263] = 1  # of no token here: an embedding of zeros is an error
    weights = {"tok_embeddings.weight": embedding, "v_head.weight": torch.ones(1, 8)}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"needs code from its folder \(tiny_own\).*trust_remote_code=True"):
        load(folder)
    scorer = RewardScorer.from_folder(folder, device="cpu", trust_remote_code=True)
    rewards = scorer.score([PreferenceGroup("", ["a", "a longer text"]), PreferenceGroup("", ["b"])])
    assert rewards == [[9.0, 9.0], [9.0]], "the reward is read at the reward token behind each text"
    hides = OWN_CODE.replace("config_class =", '_keys_to_ignore_on_load_missing = ["v_head"]\n    config_class =')
    (folder / "tiny_own_code.py").write_text(hides)
    save_file({"tok_embeddings.weight": embedding}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="TinyForRewardModel initializes weights randomly when it is loaded"):
        RewardScorer.from_folder(folder, device="cpu", trust_remote_code=True)


def test_a_text_past_the_position_table_is_refused(tmp_path: Path) -> None:
    scorer = load(make_checkpoint("bert", tmp_path)[0])
    with pytest.raises(UserError, match=r"group 1: .*longer than the 512 tokens that the model has positions for"):
        scorer.score([PreferenceGroup("", ["short"]), PreferenceGroup("", ["long " * 200])])
    results = scorer.score_each([PreferenceGroup("", ["long " * 200]), PreferenceGroup("", ["short"])])
    assert isinstance(results[0], Exception) and isinstance(results[1], list)


def test_a_decoder_scores_a_longer_text_and_says_so_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    scorer = load(make_checkpoint("qwen2", tmp_path, max_length=50)[0])
    for _ in range(2):
        assert scorer.score([PreferenceGroup("", ["long " * 20])])[0]
    assert caplog.text.count("a text has 100 tokens, more than the max_length of training (50)") == 1


def other_layout(source: Path, folder: Path, tensors: dict[str, torch.Tensor], **config: object) -> Path:
    """The folder of a reward model with these tensors instead of `score.weight`."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, folder)
    state = load_file(folder / "model.safetensors")
    state.pop("score.weight")
    save_file({**state, **tensors}, folder / "model.safetensors", metadata={"format": "pt"})
    edit_config(folder, **config)
    return folder


@pytest.mark.parametrize("kind", ["qwen2", pytest.param("gpt2", marks=pytest.mark.slow)])
@pytest.mark.slow
def test_a_head_under_another_name_gives_the_same_rewards(kind: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    more = {"num_key_value_heads": 2} if kind == "qwen2" else {}
    source = make_classifier(kind, tmp_path / "source", **more)
    head = load_file(source / "model.safetensors")["score.weight"]
    groups = [PreferenceGroup("", ["a", "a longer text"])]
    [expected] = load(source).score(groups)
    bias = {"v_head.summary.weight": head, "v_head.summary.bias": torch.tensor([0.5])}
    folders = {
        0.0: [
            other_layout(source, tmp_path / "openrlhf", {"value_head.weight": head}, architectures=["XForCausalLM"]),
            other_layout(source, tmp_path / "labels", {"score.weight": head}, id2label={"0": "a", "1": "b"}),
        ],
        0.5: [
            other_layout(source, tmp_path / "trl", bias),
            other_layout(source, tmp_path / "token", {"score.weight": head, "score.bias": torch.tensor([0.5])}),
            other_layout(source, tmp_path / "factory", {}, architectures=["XForCausalLM"]),
        ],
    }
    save_file(bias, tmp_path / "factory/value_head.safetensors")
    for shift, layouts in folders.items():
        for folder in layouts:
            torch.manual_seed(len(folder.name))
            before = torch.get_rng_state()
            [rewards] = load(folder).score(groups)
            assert torch.equal(before, torch.get_rng_state()), "nothing is drawn"
            torch.testing.assert_close(rewards, [each + shift for each in expected], atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", ["qwen2", "bert", "gpt2"])
@pytest.mark.slow
def test_no_weight_is_initialized_by_loading(kind: str, tmp_path: Path) -> None:
    """Two loads are equal bit for bit, and each missing tensor is an error, those of the head included."""
    from safetensors.torch import load_file, save_file

    more = {"num_key_value_heads": 2} if kind == "qwen2" else {}
    folder = make_classifier(kind, tmp_path / "model", **more)
    states = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        states.append(load(folder).engine.model.state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    file = folder / "model.safetensors"
    tensors = load_file(file)
    head = next(name for name in tensors if name.startswith(("score.w", "classifier.w")))
    names = [head, *[*tensors][::9]]
    for name in names:
        save_file({key: value for key, value in tensors.items() if key != name}, file, metadata={"format": "pt"})
        with pytest.raises(UserError, match=f"first: {name}"):
            load(folder)


def test_a_tokenizer_with_more_tokens_than_the_embedding_is_an_error(text_folder: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = Path(shutil.copytree(text_folder, tmp_path / "model"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<|new|>", "<|newer|>"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(
        UserError, match=r"264 rows, but the tokenizer has 1 tokens .*\(ids 264 to 264, first: '<\|newer\|>'\)"
    ):
        load(folder)


def test_a_pad_token_without_a_row_changes_no_reward(tmp_path: Path) -> None:
    """The embedding has a row for each token, and none of them can pad: the new row is zero, not random."""
    folder = make_classifier("gpt2", tmp_path / "model", vocab_size=263)
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace("<|pad|>", "<|first|>").replace("<|endoftext|>", "<|second|>"))
    groups = [PreferenceGroup("", ["a", "a longer text"])]
    states = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        scorer = load(folder)
        assert torch.equal(before, torch.get_rng_state())
        states.append((scorer.score(groups), scorer.engine.model.network.get_input_embeddings().weight[263:]))
    assert states[0][0] == states[1][0] and states[0][1].shape == (1, 32) and not states[0][1].any()
