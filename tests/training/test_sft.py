"""Runs of `objective.name=sft`: resumed, on several processes, as a chat model, and as the start of a reward model."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from rm_gallery.cli import main
from rm_gallery.core.models import OpenAIChatModel
from rm_gallery.errors import UserError
from rm_gallery.modeling.language_folder import check_losses
from rm_gallery.training.config import load_config
from tests.small import make_model
from tests.training.rank_runs import Run, run_all
from tests.training.short_runs import assert_same_run, rows, send, settings, train, when_logged, write_data

SHORT = "trainer.total_epochs=1"
SFT = ("objective.name=sft", "data.train_files=train.jsonl", "data.val_files=val.jsonl", "data.max_length=256")


def conversations(count: int, first: int = 0) -> list[dict[str, Any]]:
    """Counting, in one to three exchanges; several begin with the same question."""
    found = []
    for number in range(first, first + count):
        turns: list[dict[str, str]] = []
        for exchange in range(1 + number % 3):
            most = 1 + (number * (exchange + 1)) % 4
            turns += [
                {"role": "user", "content": f"Count to {most}."},
                {"role": "assistant", "content": " ".join(map(str, range(1, most + 1)))},
            ]
        found.append({"messages": turns})
    return found


@pytest.fixture(autouse=True)
def data(in_tmp: Path) -> None:
    for name, some in (("train", conversations(24)), ("val", conversations(10, 24))):
        Path(f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in some))


def test_names_of_other_trainers_are_read_or_answered(in_tmp: Path, qwen2_folder: Path, caplog: Any) -> None:
    common = [f"model.partial_pretrain={qwen2_folder}", "trainer.experiment_name=a", *SFT]
    page = [
        "data.micro_batch_size=12", "data.multiturn.enable=true", "data.multiturn.messages_key=turns",
        "data.multiturn.tools_key=null", "ulysses_sequence_parallel_size=8", "use_remove_padding=true",
    ]  # fmt: skip
    with caplog.at_level("INFO"):
        config = load_config(None, [*common, *page])
    assert config.data.budget == 12 * 256
    assert config.trainer.default_local_dir == "./checkpoints/sft"
    assert (config.data.format, config.data.columns.messages, config.data.tools_key) == (
        "conversation",
        "turns",
        "tools",
    )
    assert config.trainer.save_best_metric == "val/loss"
    assert "sequences are not split over GPUs" in caplog.text and "use_remove_padding has no effect" in caplog.text
    with pytest.raises(UserError) as error:
        load_config(None, [*common, "model.new_head=true", "data.truncation=left", "data.format=scored"])
    for part in ("no reward head", "answers would lose what they answer", "set auto, conversation, response, chosen"):
        assert part in str(error.value)
    with pytest.raises(UserError, match="it names the columns of"):
        load_config(None, [*common, "objective.name=bradley_terry", "data.multiturn.enable=true"])


@pytest.mark.slow
def test_a_stopped_run_is_resumed_bit_for_bit(qwen2_folder: Path, monkeypatch: Any) -> None:
    whole = train(qwen2_folder, "whole", *SFT)
    when_logged(monkeypatch, 4, send(signal.SIGTERM))
    train(qwen2_folder, "parts", *SFT, status=143)
    assert_same_run(train(qwen2_folder, "parts", *SFT), whole)
    losses = [row["train/loss"] for row in rows(whole) if "train/loss" in row]
    assert losses[-1] < losses[0] - 0.1
    assert {"val/loss", "val/perplexity", "val/token_accuracy"} <= rows(whole)[-1].keys()


@pytest.mark.slow
def test_ranks_sharding_and_checkpointing_give_the_same_losses(in_tmp: Path) -> None:
    model = make_model("qwen2", in_tmp / "untied", tie_word_embeddings=False)
    tied = make_model("qwen2", in_tmp / "tied", tie_word_embeddings=True)
    units = ["model.strategy=fsdp2", "model.fsdp_config.wrap_policy.min_num_params=1000"]
    variants: dict[str, tuple[Path, int, list[str]]] = {
        "whole": (model, 1, []), "ddp": (model, 2, ["model.strategy=ddp"]),
        "units": (model, 2, units),
        "apart": (model, 1, ["model.enable_gradient_checkpointing=true", "data.share_prompts=false"]),
        "tied": (tied, 1, []), "tied-fsdp": (tied, 2, ["model.strategy=fsdp2"]), "tied-units": (tied, 2, units),
    }  # fmt: skip
    runs = [Run(settings(folder, name, *SFT, SHORT, *more), ranks) for name, (folder, ranks, more) in variants.items()]
    done = run_all(runs, in_tmp)
    assert all(set(each.status) == {0} for each in done), "\n".join(each.log for each in done)
    assert not any("every rank reads the whole model" in each.log for each in done)
    for name in variants:
        same = "tied" if name.startswith("tied") else "whole"
        tensors, others = (load_file(f"runs/{each}/global_step_3/model.safetensors") for each in (name, same))
        assert tensors.keys() == others.keys()
        assert all(torch.allclose(tensors[each], others[each], atol=1e-5) for each in tensors), name
        wanted = rows(Path("runs") / same)
        for row, expected in zip(rows(Path("runs") / name), wanted, strict=True):
            for key in expected.keys() & {"train/loss", "val/loss", "val/token_accuracy"}:
                assert row[key] == pytest.approx(expected[key], abs=1e-4, rel=1e-3), (name, key)


@pytest.mark.slow
@pytest.mark.parametrize(("tied", "dtype"), [(True, "fp32"), (False, "bf16")])
def test_the_checkpoint_is_a_language_model_and_the_start_of_a_reward_model(
    tied: bool, dtype: str, in_tmp: Path
) -> None:
    model = make_model("qwen2", in_tmp / "m", tie_word_embeddings=tied)
    run = train(model, "a", *SFT, SHORT, f"model.fsdp_config.model_dtype={dtype}", "trainer.ema_decay=0.5")
    folder = run / "global_step_3"
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["Qwen2ForCausalLM"] and "rm_gallery" not in config
    assert "problem_type" not in config and (folder / "generation_config.json").is_file()
    network, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert (network.lm_head.weight is network.model.embed_tokens.weight) is tied
    turns = conversations(1)[0]["messages"]
    ids = tokenizer.apply_chat_template(turns, return_tensors="pt", return_dict=False)
    assert torch.isfinite(network(input_ids=ids, labels=ids).loss)
    # 1. It generates, and so does the average of the weights.
    for each in (folder, folder / "ema"):
        chat = OpenAIChatModel(model=str(each), is_local=True, max_tokens=4)
        assert isinstance(chat.chat(turns[:1]).content, str)
    # 2. A reward model starts from it, with a new head.
    Path("pairs.jsonl").write_text("".join(json.dumps({"chosen": f"a {n}", "rejected": "b"}) + "\n" for n in range(8)))
    wanted = ["data.train_files=pairs.jsonl", "data.val_files=", "trainer.total_epochs=1"]
    rewards = train(folder, "rm", *wanted)
    assert json.loads((rewards / "global_step_1/config.json").read_text())["problem_type"] == "regression"
    # 3. A wrong loss is an error.
    with pytest.raises(UserError, match="the reloaded model has the loss"):
        from rm_gallery.data.tokenization.token_group import Span, split_prefix

        check_losses(folder, [split_prefix([ids[0].tolist()], (), spans=[Span(0, 1, 9)])], [-1.0], exact=True)


@pytest.mark.slow
def test_weights_of_rows_are_factors_of_the_loss(qwen2_folder: Path, capsys: Any) -> None:
    def of_weights(name: str, *weights: Any, status: int = 0) -> dict[str, Any]:
        found = [{**row, "importance": weights[n % len(weights)]} for n, row in enumerate(conversations(10, 24))]
        for file in ("train", "val"):
            Path(f"{file}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in found))
        run = train(qwen2_folder, name, *SFT, SHORT, "data.weight_key=importance", "optim.lr=1e-9", status=status)
        return {} if status else rows(run)[-1]

    plain, twice, none = of_weights("a", 1), of_weights("b", 2), of_weights("c", None)
    assert twice["val/loss"] == pytest.approx(2 * plain["val/loss"], rel=1e-5)
    assert twice["val/perplexity"] == pytest.approx(plain["val/perplexity"], rel=1e-5)
    assert none["val/loss"] == plain["val/loss"]
    dropped = of_weights("d", 1, -1)
    assert dropped["val/loss"] > 0 and "negative importance" in (Path("runs/d/train.log")).read_text()
    of_weights("e", 0, status=2)
    assert "every weight is 0" in capsys.readouterr().err


@pytest.mark.slow
def test_commands_on_preferences_refuse_it_in_a_sentence(qwen2_folder: Path, capsys: Any) -> None:
    assert main(["show-data", *SFT]) == 2
    assert "which tokens are predicted depends on the chat template" in capsys.readouterr().err
    assert main(["estimate", f"model={qwen2_folder}", *SFT]) == 2
    assert "the estimate has neither the output layer nor its logits" in capsys.readouterr().err
    arguments = settings(qwen2_folder, "a", *SFT)
    assert main(["validate-config", *arguments]) == 0
    assert main(["validate-config", *settings(make_model("bert", Path("bert")), "b", *SFT)]) == 2
    assert "bert is none: it attends in both directions" in capsys.readouterr().err


@pytest.mark.slow
def test_the_auxiliary_loss_does_not_depend_on_ranks_and_is_resumed(in_tmp: Path, monkeypatch: Any) -> None:
    model = make_model("qwen2", in_tmp / "m", tie_word_embeddings=False)
    write_data()
    same = ("objective.lm_coefficient=0.1", SHORT, "trainer.log_freq=1")
    runs = [Run(settings(model, "one", *same), 1), Run(settings(model, "two", *same, "model.strategy=fsdp2"), 2)]
    done = run_all(runs, in_tmp)
    assert all(set(each.status) == {0} for each in done), "\n".join(each.log for each in done)
    one, two = rows(Path("runs/one")), rows(Path("runs/two"))
    for row, expected in zip(two, one, strict=True):
        for key in expected.keys() & {"train/loss", "train/lm_loss", "val/loss"}:
            assert row[key] == pytest.approx(expected[key], abs=1e-4, rel=1e-3), key
    losses = [row["train/lm_loss"] for row in one if "train/lm_loss" in row]
    assert len(losses) == 3 and losses[-1] < losses[0]
    when_logged(monkeypatch, 2, send(signal.SIGTERM))
    train(model, "parts", *same, status=143)
    assert_same_run(train(model, "parts", *same), Path("runs/one"), "global_step_3")
