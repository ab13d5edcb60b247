"""The model card of a checkpoint: what it says, and that its examples give the rewards of the trainer."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from rm_gallery import train
from rm_gallery.config import compose
from rm_gallery.training.config import load_config
from rm_gallery.training.model_card import model_card
from tests.small import chat_pairs, text_pairs

SETTINGS: dict[str, Any] = {
    "data.max_length": 128, "data.num_workers": 0, "trainer.total_training_steps": 2, "trainer.logger": [],
    "data.train_batch_size": 8, "model.fsdp_config.model_dtype": "fp32", "trainer.experiment_name": "my-rm",
}  # fmt: skip


def card_of(**settings: Any) -> str:
    config = load_config(None, [], settings={**SETTINGS, **settings})
    return model_card(
        config, num_parameters=1234, comparisons=5678, step=9, metrics={"val/accuracy": 0.75}, input_style="chat"
    )


def metadata_of(card: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(card.split("---\n")[1])
    return found


@pytest.mark.parametrize("pairs", [chat_pairs, text_pairs], ids=["chat", "text"])
@pytest.mark.slow
def test_the_examples_of_the_card_give_the_same_reward(pairs: Any, in_tmp: Path, qwen2_folder: Path) -> None:
    result = train(qwen2_folder, pairs(24), **SETTINGS, **{"trainer.license": "apache-2.0", "data.val_fraction": 0.2})
    card = (result.checkpoint / "README.md").read_text()
    assert metadata_of(card)["license"] == "apache-2.0"
    assert "base_model" not in metadata_of(card), "a local path is no name of the hub"
    assert str(in_tmp) not in card and str(qwen2_folder.parent) not in card, "no local path is published"
    assert f"| val/accuracy | {result.metrics['val/accuracy']:.4f} |" in card
    ours, plain = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    names: dict[str, Any] = {}
    exec(plain.replace("PATH_OR_NAME", str(result.checkpoint)), names)
    *lines, call = ours.strip().rsplit("\nscorer.", 1)
    exec("\n".join(lines).replace("PATH", str(result.checkpoint)), names)
    [reward] = eval(f"scorer.{call}", names)
    assert names["reward"] == pytest.approx(reward, abs=1e-4)
    assert (result.checkpoint / ".gitignore").read_text().split() == [
        "training_state/*",
        "ema/*",
        "manifest.json",
        ".gitignore",
    ]


def test_names_of_the_hub_are_metadata_and_paths_are_shortened(in_tmp: Path) -> None:
    (in_tmp / "secret/place").mkdir(parents=True)
    (in_tmp / "secret/place/pairs.jsonl").write_text('{"chosen": "a", "rejected": "b"}\n')
    files = ["org/pairs/train.parquet", "secret/place/pairs.jsonl", "https://host/x.parquet?token=abc"]
    card = card_of(**{"model.partial_pretrain": "Qwen/Qwen2.5-0.5B", "data.train_files": files})
    assert metadata_of(card)["base_model"] == "Qwen/Qwen2.5-0.5B"
    assert metadata_of(card)["datasets"] == ["org/pairs"]
    assert "| training data | org/pairs, pairs.jsonl, x.parquet (5,678 pairs) |" in card
    assert "secret" not in card and "abc" not in card
    assert "| steps | 9 of 8 pairs |" in card and "| parameters | 1,234 |" in card


def test_a_name_cannot_break_the_table(in_tmp: Path) -> None:
    (in_tmp / "a|b.jsonl").write_text('{"chosen": "a", "rejected": "b"}\n')
    card = card_of(**{"model.partial_pretrain": "org/model", "data.train_files": "a|b.jsonl"})
    assert "| training data | a\\|b.jsonl (5,678 pairs) |" in card


def test_what_the_environment_holds_is_not_published(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rm_gallery.config.compose", compose)  # Hydra's, which reads `${oc.env:NAME}`
    variables = {"RATE": "0.0123", "REPOSITORY": "org/private", "NAME": "secret-run", "SEED": "4711", "FOLDER": "inner"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    for name in ("inner/pairs.jsonl", "some/val.jsonl"):
        (in_tmp / name).parent.mkdir()
        (in_tmp / name).write_text('{"chosen": "a", "rejected": "b"}\n')
    config = load_config(None, [
        "model.partial_pretrain=${oc.env:REPOSITORY}", "data.train_files=[{path: '${oc.env:FOLDER}/pairs.jsonl'}]",
        "data.val_files=['${oc.env:NONE,some/val.jsonl}']", "optim.lr=${oc.env:RATE}", "optim.weight_decay=0.5",
        "trainer.experiment_name=${oc.env:NAME}", "trainer.seed=${oc.env:SEED}",
    ])  # fmt: skip
    card = model_card(config, num_parameters=1, comparisons=2, step=3, metrics={}, input_style="text")
    assert not [value for value in variables.values() if value in card]
    assert "# ${oc.env:NAME}" in card and "| learning rate | ${oc.env:RATE}, " in card
    assert "| weight decay, clipping | 0.5, 1 |" in card and "| base model | ${oc.env:REPOSITORY} |" in card
    assert "| training data | pairs.jsonl (2 pairs) |" in card
    assert "| validation data | ${oc.env:NONE,some/val.jsonl} |" in card
