"""Names of other trainers: each is answered with a key that exists."""

from __future__ import annotations

import pytest

from rm_gallery.cli import main
from rm_gallery.config import known_keys
from rm_gallery.errors import UserError
from rm_gallery.training.config import TrainConfig, load_config
from rm_gallery.training.familiar_names import NAMES

KNOWN = known_keys(TrainConfig)


def test_every_answer_is_a_key_and_no_name_is_one() -> None:
    assert {key for key, _ in NAMES.values()} <= set(KNOWN)
    assert not set(NAMES) & {key for key in KNOWN if "." in key}


@pytest.mark.parametrize(
    ("arguments", "answers"),
    [
        (["--lr", "1e-5"], ["--lr 1e-5: write optim.lr=1e-5"]),
        (["--learning-rate=1e-5"], ["--learning-rate 1e-5: write optim.lr=1e-5"]),
        (
            ["--model_name_or_path", "org/model", "--output_dir", "out"],
            [
                "--model_name_or_path org/model: write model.partial_pretrain=org/model",
                "--output_dir out: write trainer.default_local_dir=VALUE (trainer.experiment_name is appended to it)",
            ],
        ),
        (["--bf16", "optim.lr=1"], ["--bf16: write model.fsdp_config.model_dtype=VALUE (auto, bf16 or fp32)"]),
    ],
)
def test_options_are_answered_with_keys(
    arguments: list[str], answers: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["train", *arguments])
    assert ended.value.code == 2
    assert capsys.readouterr().err.splitlines() == [f"rm-gallery: error: {answer}" for answer in answers]


@pytest.mark.parametrize(
    ("override", "answer"),
    [
        ("optim.learning_rate=1e-5", "optim.learning_rate: unknown key; write optim.lr"),
        ("trainer.eval_steps=5", "trainer.eval_steps: unknown key; write trainer.test_freq"),
        ("trainer.total_steps=5", "trainer.total_steps: unknown key; write trainer.total_training_steps"),
        ("model=org/name", "model=org/name: model is a section; write model.partial_pretrain=org/name"),
        ("lr=1", "lr: unknown key; write optim.lr"),
    ],
)
def test_keys_are_answered_with_keys(override: str, answer: str) -> None:
    with pytest.raises(UserError) as error:
        load_config(None, [override])
    assert answer in str(error.value).splitlines()


@pytest.mark.parametrize("value", ["console,tensorboard", "['console','tensorboard']", '["console", "tensorboard"]'])
def test_trackers_are_a_list_with_or_without_brackets(value: str) -> None:
    settings = {"model.partial_pretrain": "org/model", "data.train_files": "org/data"}
    config = load_config(None, [f"trainer.logger={value}"], settings=settings)
    assert config.trainer.logger == ("console", "tensorboard")
