"""Whole training runs through the command line's own path: curves, checkpoints, the run folder."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml

from rm_gallery.cli import main
from rm_gallery.files import MANIFEST, check_manifest
from rm_gallery.modeling.export import read_record, rescore
from rm_gallery.schema import PreferenceGroup
from rm_gallery.scoring import RewardScorer
from tests.small import chat_pairs, make_model, make_tokenizer, text_pairs, write_pairs

pytestmark = pytest.mark.slow


@pytest.fixture
def data(in_tmp: Path) -> Path:
    """24 training and 10 validation pairs in the working directory."""
    write_pairs(in_tmp / "train.parquet", text_pairs(24))
    write_pairs(in_tmp / "val.parquet", text_pairs(10, seed=1))
    return in_tmp


def train(model: Path, *overrides: str, name: str = "run", status: int = 0) -> Path:
    """Train in float32 on train.parquet; returns the run folder."""
    settings = {
        "model.partial_pretrain": str(model),
        "model.fsdp_config.model_dtype": "fp32",
        "data.train_files": "train.parquet",
        "data.val_files": "val.parquet",
        "data.max_length": "128",
        "data.train_batch_size": "8",
        "optim.lr": "1e-4",
        "trainer.default_local_dir": "runs",
        "trainer.experiment_name": name,
    }
    settings.update(override.split("=", 1) for override in overrides)
    assert main(["train", *(f"{key}={value}" for key, value in settings.items())]) == status
    return Path("runs") / name


def metrics(run: Path, name: str) -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row[name] for row in rows if name in row]


@pytest.mark.parametrize("kind", ["qwen2", pytest.param("bert", marks=pytest.mark.slow)])
def test_any_token_budget_gives_the_same_loss_curve(kind: str, data: Path, tmp_path: Path) -> None:
    model = make_model(kind, tmp_path / kind)
    steps = ["trainer.total_training_steps=30", "trainer.test_freq=10"]
    runs = [
        train(model, *steps, f"data.max_tokens_per_micro_batch={budget}", name=f"budget{budget}")
        for budget in (256, 512, 100000)
    ]
    for name in ("train/loss", "val/loss", "val/accuracy", "train/grad_norm"):
        first = metrics(runs[0], name)
        assert len(first) == (3 if name.startswith("val") else 30)
        for run in runs[1:]:
            assert metrics(run, name) == pytest.approx(first, abs=1e-5), name


def test_micro_batch_size_sets_the_budget_in_pairs_of_full_length(data: Path, qwen2_folder: Path) -> None:
    small = train(qwen2_folder, "data.micro_batch_size_per_gpu=1", name="one")
    large = train(qwen2_folder, "data.micro_batch_size_per_gpu=8", name="eight")
    assert metrics(small, "train/loss") == pytest.approx(metrics(large, "train/loss"), abs=1e-5)


@pytest.mark.parametrize("strategy", ["auto", "fsdp", "fsdp2", "ddp"])
def test_every_strategy_trains_alike_in_one_process(strategy: str, data: Path, qwen2_folder: Path) -> None:
    run = train(qwen2_folder, f"model.strategy={strategy}", "model.fsdp_config.cpu_offload=true", "optim.lr=1e-3")
    assert metrics(run, "train/loss")[-1] < metrics(run, "train/loss")[0]


def test_two_runs_with_one_seed_are_the_same_bit_for_bit(data: Path, qwen2_folder: Path) -> None:
    runs = [train(qwen2_folder, "trainer.seed=7", name=name) for name in ("a", "b")]
    weights = [(run / "global_step_3/model.safetensors").read_bytes() for run in runs]
    assert weights[0] == weights[1]
    assert metrics(runs[0], "train/loss") == metrics(runs[1], "train/loss")
    other = train(qwen2_folder, "trainer.seed=8", name="c")
    assert metrics(other, "train/loss") != metrics(runs[0], "train/loss")


def test_all_pairs_are_used_and_the_last_step_counts_what_it_has(data: Path, qwen2_folder: Path) -> None:
    run = train(qwen2_folder, "data.train_batch_size=10", "trainer.total_epochs=2")
    assert metrics(run, "train/epoch") == pytest.approx([1 / 3, 2 / 3, 1, 4 / 3, 5 / 3, 2])
    dropping = train(qwen2_folder, "data.train_batch_size=10", "data.drop_last=true", name="drop")
    assert len(metrics(dropping, "train/loss")) == 2


def test_checkpoints_and_validations_come_when_due_and_at_the_end(data: Path, qwen2_folder: Path) -> None:
    run = train(qwen2_folder, "trainer.total_epochs=2", "trainer.save_freq=4", "trainer.test_freq=2",
                "trainer.val_before_train=true")  # fmt: skip
    assert sorted(path.name for path in run.glob("global_step_*")) == ["global_step_4", "global_step_6"]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "val/loss" in row] == [0, 2, 4, 6]


def test_checkpoint_is_a_complete_folder_for_every_consumer(data: Path, qwen2_folder: Path) -> None:
    folder = train(qwen2_folder) / "global_step_3"
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["Qwen2ForSequenceClassification"]
    assert config["id2label"] == {"0": "reward"} and config["label2id"] == {"reward": 0}
    assert config["problem_type"] == "regression"
    tokenizer_config = json.loads((folder / "tokenizer_config.json").read_text())
    assert config["pad_token_id"] is not None and tokenizer_config["pad_token"] != tokenizer_config["eos_token"]
    assert "<|im_start|>" in tokenizer_config["chat_template"]
    listed = json.loads((folder / MANIFEST).read_text())["sha256"]
    assert sorted(name for name in listed if "/" not in name) == [
        ".gitignore", "README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    assert sorted([*listed, MANIFEST]) == sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()
    )
    assert check_manifest(folder) is None
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", framework="pt") as tensors:
        names = set(tensors.keys())
        assert tensors.get_slice("score.weight").get_shape() == [1, 32]
    assert not any(name.startswith("lm_head") or name == "score.bias" for name in names)
    assert all(name.startswith("model.") for name in names - {"score.weight"})


def test_checkpoint_records_text_or_chat(data: Path, qwen2_folder: Path) -> None:
    text = read_record(train(qwen2_folder, name="text") / "global_step_3")
    for name, seed in (("train", 0), ("val", 1)):
        write_pairs(Path(f"{name}.parquet"), chat_pairs(24, seed=seed))
    chat = read_record(train(qwen2_folder, name="chat") / "global_step_3")
    assert text is not None and text.input_style == "text"
    assert chat is not None and chat.input_style == "chat" and chat.max_length == 128


@pytest.mark.parametrize(("dtype", "wanted"), [("auto", "bfloat16"), ("fp32", "float32"), ("bf16", "bfloat16")])
def test_export_dtype_decides_the_type_of_saved_weights(
    dtype: str, wanted: str, data: Path, qwen2_folder: Path
) -> None:
    run = train(qwen2_folder, "model.fsdp_config.model_dtype=bf16", f"trainer.export_dtype={dtype}")
    assert json.loads((run / "global_step_3/config.json").read_text())["dtype"] == wanted
    from safetensors.torch import load_file

    assert {str(tensor.dtype) for tensor in load_file(run / "global_step_3/model.safetensors").values()} == {
        f"torch.{wanted}"
    }


def test_bfloat16_compute_follows_the_float32_curve(data: Path, qwen2_folder: Path) -> None:
    exact = train(qwen2_folder, name="fp32")
    rounded = train(qwen2_folder, "model.fsdp_config.model_dtype=bf16", name="bf16")
    assert metrics(rounded, "train/loss") == pytest.approx(metrics(exact, "train/loss"), abs=0.05)


def test_training_goes_on_from_a_reward_model_with_its_head(data: Path, qwen2_folder: Path, caplog: Any) -> None:
    first = train(qwen2_folder, "optim.lr=1e-3", name="first")
    assert "reward head: newly initialized" in caplog.text
    caplog.clear()
    train(first / "global_step_3", "trainer.val_before_train=true", name="second")
    assert "reward head: loaded" in caplog.text
    assert metrics(Path("runs/second"), "val/loss")[0] == pytest.approx(metrics(first, "val/loss")[-1], abs=1e-6)


@pytest.mark.curves
def test_run_folder_explains_itself(data: Path, qwen2_folder: Path) -> None:
    write_pairs(
        data / "train.parquet", [*text_pairs(8), {"chosen": None, "rejected": "x"}, {"chosen": "y", "rejected": "y"}]
    )
    run = train(qwen2_folder)
    facts = json.loads((run / "run.json").read_text())
    assert facts["data"]["train"]["comparisons"] == 8
    assert facts["data"]["train"]["dropped"] == {
        "null chosen": {"rows": 1, "first": "train.parquet:8"},
        "chosen equal to rejected": {"rows": 1, "first": "train.parquet:9"},
    }
    assert facts["versions"]["torch"] == metadata.version("torch")
    assert len(facts["data"]["train"]["fingerprint"]) == 16
    assert yaml.safe_load((run / "config.yaml").read_text())["data"]["train_batch_size"] == 8
    assert (run / "curves.png").stat().st_size > 10_000


def test_an_earlier_run_is_not_overwritten(data: Path, qwen2_folder: Path, capsys: Any) -> None:
    run = train(qwen2_folder)
    before = (run / "metrics.jsonl").read_bytes()
    train(qwen2_folder, "trainer.resume_mode=disable", status=2)
    assert "holds an earlier run (newest checkpoint global_step_3)" in capsys.readouterr().err
    train(qwen2_folder)
    assert capsys.readouterr().out == "checkpoint: runs/run/global_step_3\n", "it is complete"
    assert (run / "metrics.jsonl").read_bytes() == before


def test_processes_that_cannot_meet_are_refused_in_words(
    data: Path, qwen2_folder: Path, monkeypatch: Any, capsys: Any
) -> None:
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "0"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    train(qwen2_folder, status=2)
    assert "rank 0 cannot reach the other processes" in capsys.readouterr().err


def test_saved_rewards_match_whatever_template_the_tokenizer_has(data: Path, tmp_path: Path) -> None:
    """A tokenizer without template and with pad = EOS: both are settled, and text models get a plain template."""
    folder = make_model("llama", tmp_path / "llama")
    tokenizer = make_tokenizer()
    tokenizer.chat_template, tokenizer.pad_token = None, tokenizer.eos_token
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    saved = train(folder) / "global_step_3"
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(saved)
    assert loaded.pad_token_id != loaded.eos_token_id
    turns = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    assert loaded.apply_chat_template(turns, tokenize=False) == "Why?\n\nSo."
    assert len(rescore(saved, [loaded("Why?")["input_ids"]])) == 1


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_dropout_in_training_does_not_touch_the_check_of_a_checkpoint(kind: str, data: Path, tmp_path: Path) -> None:
    run = train(make_model(kind, tmp_path / kind, initializer_range=0.5), "model.dropout=0.5")
    assert (run / "global_step_3").is_dir()


def test_a_text_model_with_prompts_is_scored_as_it_was_trained(data: Path, qwen2_folder: Path) -> None:
    rows = [{"prompt": f"Question {n}. ", "chosen": "good " * (n % 3 + 1), "rejected": "bad"} for n in range(12)]
    for name in ("train", "val"):
        write_pairs(Path(f"{name}.parquet"), rows)
    saved = train(qwen2_folder, "data.input_style=text") / "global_step_2"
    record = read_record(saved)
    assert record is not None and record.separator == ""
    scorer = RewardScorer.from_folder(saved, device="cpu")
    [[built]] = scorer.score([scorer.build_group("Question 1. ", ["good good "])])
    [[direct]] = scorer.score([PreferenceGroup("", ["Question 1. good good "])])
    assert built == pytest.approx(direct, abs=1e-6)
    turns = [{"role": "user", "content": "Question 1. "}, {"role": "assistant", "content": "good good "}]
    assert scorer.score_messages([turns]) == [pytest.approx(direct, abs=1e-6)]
