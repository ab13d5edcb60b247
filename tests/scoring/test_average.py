"""`rm-gallery average`: the mean of weights, in float32, and one sentence for models that have none."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rm_gallery.cli import main
from rm_gallery.errors import UserError
from rm_gallery.files import check_manifest, manifest_names
from rm_gallery.modeling import export
from rm_gallery.modeling.export import read_statistics
from rm_gallery.scoring import RewardScorer
from rm_gallery.scoring.average import average
from rm_gallery.scoring.merge import merge
from tests.scoring.models import make_checkpoint, make_classifier, plain_rewards
from tests.scoring.test_ensemble import with_statistics
from tests.small import text_pairs

TEXTS = [row["chosen"] for row in text_pairs(4)]


def variant(folder: Path, to: Path, seed: int, dtype: torch.dtype = torch.float32) -> Path:
    """A copy of a model folder with other weights, as another run from the same base model would leave them."""
    shutil.copytree(folder, to)
    generator = torch.Generator().manual_seed(seed)
    state = load_file(to / "model.safetensors")
    for name, each in state.items():
        state[name] = (each + 0.02 * torch.randn(each.shape, generator=generator)).to(dtype)
    save_file(state, to / "model.safetensors", metadata={"format": "pt"})
    return to


@pytest.fixture
def variants(text_folder: Path, in_tmp: Path) -> list[Path]:
    """Three models of the same base."""
    return [variant(text_folder, in_tmp / f"run{seed}", seed) for seed in range(3)]


def test_weights_are_the_mean_of_the_models(
    variants: list[Path], capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with_statistics(variants[0], 1.0, 2.0)
    assert main(["average", *map(str, variants), "--weights", "2,1,1", "--output", "out"]) == 0
    assert capsys.readouterr().out == "averaged: out\n"
    states = [load_file(folder / "model.safetensors") for folder in variants]
    found = load_file("out/model.safetensors")
    assert found.keys() == states[0].keys()
    for name, each in found.items():
        expected = sum(share * state[name].double() for share, state in zip((0.5, 0.25, 0.25), states, strict=True))
        assert torch.allclose(each.double(), torch.as_tensor(expected), rtol=0, atol=1e-7)
    with RewardScorer.from_folder("out", device="cpu") as scorer:
        rewards = [reward for (reward,) in scorer.score([scorer.build_group(None, [text]) for text in TEXTS])]
    assert rewards == pytest.approx(plain_rewards(Path("out"), TEXTS), abs=1e-5)
    assert read_statistics("out") is None
    assert "do not hold for the average and are dropped" in caplog.text and "same base model" not in caplog.text
    assert check_manifest(Path("out")) is None
    assert "README.md" in manifest_names(Path("out/manifest.json").read_bytes())
    card = Path("out/README.md").read_text()
    assert "mean of those of 3 reward models" in card and "run0 | 0.5 |" in card and "How to use" in card
    assert main(["average", *map(str, variants), "--output", "out"]) == 2
    assert "out: exists" in capsys.readouterr().err


def change_config(key: str, value: Any) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        config = json.loads(path.read_text())
        (config["rm_gallery"] if key == "separator" else config)[key] = value
        path.write_text(json.dumps(config))

    return change


def change_state(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], object]:
    def apply(folder: Path) -> None:
        state = load_file(folder / "model.safetensors")
        change(state)
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})

    return apply


def add_token(folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"eos_token": "<|other|>"})
    tokenizer.save_pretrained(folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_config("rope_theta", 7.0), "run1 and run0 cannot be averaged: rope"),
        (change_config("id2label", {"0": "helpfulness"}), "cannot be averaged: id2label of config.json is "),
        (change_config("separator", ""), "cannot be averaged: the input of training"),
        (add_token, "cannot be averaged: the vocabulary of the tokenizer is"),
        (
            change_state(lambda state: state.update({"model.norm.weight": torch.full((32,), torch.inf)})),
            "run1: model.norm.weight has values that are not finite",
        ),
    ],
)
def test_models_that_have_no_mean_are_refused(
    variants: list[Path], change: Callable[[Path], object], message: str
) -> None:
    change(variants[1])
    with pytest.raises(UserError, match=message):
        average(variants, "out")
    assert sorted(path.name for path in Path().iterdir()) == ["run0", "run1", "run2"], "nothing is left"


@pytest.mark.slow
def test_arguments_that_make_no_average_are_refused(variants: list[Path], in_tmp: Path) -> None:
    for arguments, message in (
        ((variants[:1], "out"), "needs two or more"),
        ((variants[:1] * 2, "out"), "same folder twice"),
    ):
        with pytest.raises(UserError, match=message):
            average(*arguments)
    for weights, message in (([1.0], "1 numbers for 3 models"), ([1, -1, 1], "0 or more"), ([0, 0, 0], "not all 0")):
        with pytest.raises(UserError, match=message):
            average(variants, "out", weights=weights)
    other = make_checkpoint("llama", in_tmp / "llama")[0]
    with pytest.raises(UserError, match=r"cannot be averaged: architectures of config\.json"):
        average([variants[0], other], "out")


@pytest.mark.slow
def test_bfloat16_models_are_summed_in_float32_shard_by_shard(
    text_folder: Path, in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "_MAX_SHARD_BYTES", 10_000)
    folders = [variant(text_folder, in_tmp / f"bf{seed}", seed, torch.bfloat16) for seed in range(3)]
    average(folders, "out")
    states = [load_file(folder / "model.safetensors") for folder in folders]
    for path in Path("out").glob("model-*.safetensors"):
        for name, each in load_file(path).items():
            expected = sum(state[name].float() for state in states) / 3
            assert each.dtype == torch.bfloat16
            assert torch.allclose(each.float(), torch.as_tensor(expected), rtol=2**-8, atol=1e-6)
    assert json.loads(Path("out/config.json").read_text())["dtype"] == "bfloat16"
    average(folders, "wide", dtype="fp32")
    assert {each.dtype for each in load_file("wide/model.safetensors").values()} == {torch.float32}


@pytest.mark.slow
def test_models_of_other_base_models_are_warned_about(in_tmp: Path, caplog: pytest.LogCaptureFixture) -> None:
    folders = [make_checkpoint("qwen2", in_tmp / str(seed), seed=seed)[0] for seed in (1, 2)]
    average(folders, "out")
    assert "they do not come from the same base model" in caplog.text


@pytest.mark.slow
def test_classifiers_of_other_trainers_are_averaged(in_tmp: Path) -> None:
    base = make_classifier("qwen2", in_tmp / "base", num_key_value_heads=2)
    folders = [variant(base, in_tmp / f"run{seed}", seed) for seed in range(2)]
    average(folders, "out")
    assert load_file("out/model.safetensors")["score.weight"].shape == (1, 32)


@pytest.mark.slow
def test_adapters_are_merged_before_they_are_averaged(in_tmp: Path, text_folder: Path) -> None:
    from tests.small import make_model
    from tests.training.short_runs import train, write_data

    write_data()
    base = make_model("qwen2", in_tmp / "base")
    lora = ("model.lora.rank=4", "optim.lr=1e-2")
    runs = [train(base, f"seed{seed}", f"trainer.seed={seed}", *lora) for seed in (1, 2)]
    average(runs, "out")
    merged = [load_file(merge(run, f"merged{number}") / "model.safetensors") for number, run in enumerate(runs)]
    found = load_file("out/model.safetensors")
    for name, each in found.items():
        assert torch.allclose(each, (merged[0][name] + merged[1][name]) / 2, rtol=0, atol=1e-6)
    # The product of averaged factors is another matrix.
    adapters = [load_file(run / "global_step_6" / "adapter_model.safetensors") for run in runs]
    name = "layers.0.mlp.up_proj"
    one, two = (
        (adapters[0][key] + adapters[1][key]) / 2
        for key in (f"base_model.model.model.{name}.lora_{part}.weight" for part in "AB")
    )
    scale = json.loads((runs[0] / "global_step_6" / "adapter_config.json").read_text())["lora_alpha"] / 4
    wrong = load_file(base / "model.safetensors")[f"model.{name}.weight"] + scale * two @ one
    assert float((wrong - found[f"model.{name}.weight"]).abs().max()) > 1e-4
    assert not Path("out/adapter_config.json").exists()
    with RewardScorer.from_folder("out", device="cpu") as scorer:
        rewards = [reward for (reward,) in scorer.score([scorer.build_group(None, [text]) for text in TEXTS])]
    assert rewards == pytest.approx(plain_rewards(Path("out"), TEXTS), abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
def test_language_models_are_averaged(tied: bool, in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoModelForCausalLM

    from rm_gallery.core.models import OpenAIChatModel
    from tests.small import make_model

    base = make_model("qwen2", in_tmp / "base", tie_word_embeddings=tied)
    folders = [variant(base, in_tmp / f"lm{seed}", seed) for seed in range(2)]
    assert main(["average", *map(str, folders), "--output", "out"]) == 0
    states = [load_file(folder / "model.safetensors") for folder in (*folders, Path("out"))]
    assert ("lm_head.weight" in states[2]) is not tied
    for name, each in states[2].items():
        assert torch.allclose(each, (states[0][name] + states[1][name]) / 2, rtol=0, atol=1e-6)
    network = AutoModelForCausalLM.from_pretrained("out")
    assert (network.lm_head.weight is network.model.embed_tokens.weight) is tied
    assert not OpenAIChatModel("out", is_local=True).is_reward_model
    card = Path("out/README.md").read_text()
    assert "A language model whose weights are the mean of those of 2 language models" in card
    assert "text-generation" in card and "reward" not in card
    rewards = make_checkpoint("qwen2", in_tmp / "rm")[0]
    capsys.readouterr()
    assert main(["average", str(folders[0]), str(rewards), "--output", "mixed"]) == 2
    assert "lm0 is a language model and global_step_1 a reward model" in capsys.readouterr().err
