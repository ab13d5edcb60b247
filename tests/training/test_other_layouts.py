"""Reward models of other trainers are continued: the first step has their rewards, and exports those of plain torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from rm_gallery.objectives.bradley_terry import BradleyTerry
from rm_gallery.scoring import RewardScorer
from tests.modeling.test_model_folder import make_folder
from tests.small import make_model, make_tokenizer, text_pairs, write_pairs
from tests.training.short_runs import train, weights
from tests.training.test_lora import LORA, peft_rewards

HEAD = torch.linspace(-1, 1, 32).unsqueeze(0)
BIAS = torch.tensor([0.75])
PAIRS = text_pairs(8)
TEXTS = [row[side] for row in PAIRS for side in ("chosen", "rejected")]
STEPS = ("trainer.total_training_steps=4", "data.max_tokens_per_micro_batch=4000", "data.val_files=null")
CLASSIFIER = {"architectures": ["Qwen2ForSequenceClassification"], "num_labels": 1}
LAYOUTS: dict[str, tuple[dict[str, Tensor], dict[str, Any]]] = {
    "transformers: score": ({"score.weight": HEAD}, CLASSIFIER),
    "transformers: score with a bias": ({"score.weight": HEAD, "score.bias": BIAS}, CLASSIFIER),
    "OpenRLHF: value_head": ({"value_head.weight": HEAD}, {"value_head_prefix": "value_head"}),
    "OpenRLHF: v_head of a classifier": ({"v_head.weight": HEAD}, {**CLASSIFIER, "value_head_prefix": "v_head"}),
    "TRL: v_head.summary with a bias": ({"v_head.summary.weight": HEAD, "v_head.summary.bias": BIAS}, {}),
    "LLaMA-Factory: value_head.safetensors": ({}, {}),
    "score_head": ({"score_head.weight": HEAD}, {"architectures": ["QwenForScore"]}),
    "reward_head with a bias": ({"reward_head.weight": HEAD, "reward_head.bias": BIAS}, {}),
    "regression_layer in bfloat16": ({"regression_layer.weight": HEAD.bfloat16()}, {"architectures": ["RewardModel"]}),
    "model.v_head": ({"model.v_head.weight": HEAD}, {}),
}
TWO_LAYERS = {"score.0.weight": torch.ones(32, 32), "score.2.weight": HEAD}
REFUSED: dict[str, tuple[dict[str, Tensor], dict[str, Any], str]] = {
    "two layers": (TWO_LAYERS, {}, "the reward head cannot be run (score.0.weight [32, 32], score.2.weight [1, 32])"),
    "a norm": ({"ln.weight": HEAD[0] + 1, "reward_head.weight": HEAD}, {}, "head cannot be run (ln.weight [32], "),
    "19 outputs": ({"regression_layer.weight": HEAD.repeat(19, 1)}, {}, "cannot be run (regression_layer.weight [19, "),
    "two heads": (
        {"score.weight": HEAD, "v_head.weight": HEAD + 1}, {"value_head_prefix": "v_head"}, "two reward heads, score",
    ),
    "a pickle": ({}, {}, "value_head.bin holds the reward head as a pickle, which can execute code and is not read"),
    "no head": ({}, CLASSIFIER, "1 tensors are missing (first: score.weight), so the reward head of "),
}  # fmt: skip


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("qwen2", tmp_path_factory.mktemp("backbone"))


def foreign_rewards(folder: Path, head: Tensor) -> list[float]:
    """The head's matrix, as read from the file of the other trainer, on the backbone's last token; without its bias."""
    from transformers import AutoModel

    network = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        hidden = [network(**make_tokenizer()(text, return_tensors="pt")).last_hidden_state[0, -1] for text in TEXTS]
    return [float(each @ head[0].float()) for each in hidden]


def plain_rewards(folder: Path) -> list[float]:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    network = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return [network(**tokenizer(text, return_tensors="pt")).logits.item() for text in TEXTS]


def largest(ours: list[float], theirs: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_reward_model_of_any_layout_is_continued(
    layout: str, backbone: Path, in_tmp: Path, monkeypatch: Any, caplog: Any
) -> None:
    tensors, config = LAYOUTS[layout]
    folder = make_folder(
        backbone, in_tmp / "foreign", tensors, drop="lm_head" if "score" in str(config) else "", **config
    )
    if layout.startswith("LLaMA-Factory"):
        save_file({"v_head.summary.weight": HEAD, "v_head.summary.bias": BIAS}, folder / "value_head.safetensors")
    head = next(iter(tensors.values()), HEAD)
    write_pairs(Path("train.parquet"), PAIRS)
    expected = foreign_rewards(folder, head)
    calls: list[Tensor] = []
    original = BradleyTerry.loss

    def loss(self: BradleyTerry, rewards: Tensor, batch: Any) -> Tensor:
        calls.append(rewards.detach().clone())
        return original(self, rewards, batch)

    monkeypatch.setattr(BradleyTerry, "loss", loss)
    figures = []
    for name, options in (("full", ()), ("lora", (*LORA, "optim.lr=1e-2"))):
        calls.clear()
        last = train(folder, name, *STEPS, *options) / "global_step_4"
        assert len(calls) == 4, "one micro-batch a step"
        first = largest(sorted(calls[0].tolist()), sorted(expected))  # the rewards of the first step, before any update
        assert first < 1e-5
        [trained] = [each for key, each in weights(last).items() if key.endswith("score.weight")]
        assert 0 < float((trained - head.float()).abs().max()) < 0.1, "continued, not replaced"
        plain = plain_rewards(last) if name == "full" else peft_rewards(last, folder, TEXTS)
        assert largest(plain, expected) > 1e-2, "trained"
        scorer = RewardScorer.from_folder(last, device="cpu", dtype="fp32")
        scored = [float(reward) for (reward,) in scorer.score([scorer.build_group(None, [text]) for text in TEXTS])]
        figures += [first, largest(scored, plain)]
        assert figures[-1] < 1e-4
    dropped = "reward head: its bias of 0.75 is dropped" in caplog.text
    assert dropped == ("bias" in str(tensors) or layout.startswith("LLaMA-Factory"))
    print(f"\n| {layout} | " + " | ".join(f"{each:.1e}" for each in figures) + f" | {'dropped' if dropped else ''} |")


@pytest.mark.slow
@pytest.mark.parametrize("layout", REFUSED)
def test_a_head_that_cannot_be_run_is_refused(layout: str, backbone: Path, in_tmp: Path, capsys: Any) -> None:
    tensors, config, message = REFUSED[layout]
    folder = make_folder(backbone, in_tmp / "foreign", tensors, **config)
    if layout == "a pickle":
        torch.save({"v_head.summary.weight": HEAD}, folder / "value_head.bin")
    write_pairs(Path("train.parquet"), PAIRS)
    for options in ((), LORA):
        train(folder, "run", *STEPS, *options, status=2)
        error = capsys.readouterr().err
        assert message in error
    print(f"\n| {layout} | {error.strip().replace(str(folder), 'FOLDER')} |")
