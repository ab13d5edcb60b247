"""LoRA and the router loss with `objective.name=sft`."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from rm_gallery.cli import main
from rm_gallery.core.models import OpenAIChatModel
from rm_gallery.data.tokenization.token_group import Span, TokenGroup
from rm_gallery.errors import UserError
from rm_gallery.modeling.adapters import same_weights
from rm_gallery.modeling.language_folder import check_losses, plain_losses
from tests.small import make_model
from tests.training.rank_runs import Run, run_all
from tests.training.short_runs import assert_same_run, rows, send, settings, train, when_logged
from tests.training.test_lora_types import save_base
from tests.training.test_sft import SFT, SHORT, conversations

LORA = ("model.lora.rank=4", "optim.lr=1e-2")


@pytest.fixture(autouse=True)
def data(in_tmp: Path) -> None:
    for name, some in (("train", conversations(24)), ("val", conversations(10, 24))):
        Path(f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in some))


def small(folder: Path, kind: str = "qwen2", *, tied: bool = False) -> Path:
    return make_model(kind, folder, tie_word_embeddings=tied)


def losses(run: Path, key: str = "train/loss") -> list[float]:
    return [row[key] for row in rows(run) if key in row]


def probes(folder: Path) -> list[TokenGroup]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [
        tokenizer.apply_chat_template(each["messages"], return_tensors="np", return_dict=False)[0].astype("int32")
        for each in conversations(3)
    ]
    return [TokenGroup(text[:0], [text], (), spans=[Span(0, 1, len(text))]) for text in texts]


def test_fingerprints_are_compared_as_far_as_both_go() -> None:
    assert same_weights("a", "a") and same_weights("a-b", "a") and same_weights("a-b", "a-b")
    assert not (same_weights("a", "b") or same_weights("a-b", "a-c") or same_weights("b-b", "a"))


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
def test_the_adapter_is_loaded_by_peft_and_merged(tied: bool, in_tmp: Path, capsys: Any) -> None:
    base = small(in_tmp / "base", tied=tied)
    run = train(base, "run", *SFT, *LORA, SHORT, "trainer.ema_decay=0.5")
    folder = run / "global_step_3"
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["task_type"], config["modules_to_save"]) == ("CAUSAL_LM", None)
    assert not (folder / "model.safetensors").exists()
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        assert all(".lora_" in name for name in file.keys())  # noqa: SIM118
    # 1. Losses of plain transformers and peft: of the folder, its average, and the merged folder.
    groups = probes(folder)
    [ids, *_] = (torch.from_numpy(each.tails[0]).long()[None] for each in groups)
    found = {}
    for name, place in (("last", folder), ("ema", folder / "ema")):
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), place)
        found[name] = float(model(input_ids=ids, labels=ids).loss.detach())
        assert plain_losses(place, groups)[0] == pytest.approx(found[name], abs=1e-5)
    assert main(["merge", str(run), "--output", "merged"]) == 0
    merged = AutoModelForCausalLM.from_pretrained("merged", dtype=torch.float32)
    assert float(merged(input_ids=ids, labels=ids).loss.detach()) == pytest.approx(found["last"], abs=1e-4)
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) is tied
    assert not Path("merged/adapter_config.json").exists()
    chats = [OpenAIChatModel(str(each), is_local=True, max_tokens=8) for each in (folder, "merged", base)]
    found_texts = [each.chat("Count to 3.").content for each in chats]
    assert found_texts[0] == found_texts[1] != found_texts[2] and not chats[0].is_reward_model
    assert main(["average", str(run), str(folder / "ema"), "--output", "out"]) == 0
    assert main(["merge", str(folder / "ema"), "--output", "merged_ema"]) == 0
    states = [load_file(Path(each) / "model.safetensors") for each in ("merged", "merged_ema", "out")]
    for key, each in states[2].items():
        assert torch.allclose(each, (states[0][key] + states[1][key]) / 2, rtol=0, atol=1e-6)
    assert isinstance(OpenAIChatModel("out", is_local=True, max_tokens=8).chat("Count to 3.").content, str)
    with pytest.raises(UserError, match="normalize=True is for reward models"):
        OpenAIChatModel(str(folder), is_local=True, normalize=True)
    assert "rm_gallery_base" not in json.loads(Path("merged/config.json").read_text())
    assert abs(found["last"] - plain_losses(base, groups)[0]) > 1e-2
    with pytest.raises(UserError, match="the reloaded model has the loss"):
        check_losses(folder, groups, [-1.0] * 3, exact=True)
    # 2. Continued: the first losses are those of the last weights; another base model is an error.
    more = train(folder, "more", *SFT, "optim.lr=1e-2", SHORT, "trainer.val_before_train=true")
    assert losses(more, "val/loss")[0] == pytest.approx(losses(run, "val/loss")[-1], abs=1e-5)
    assert losses(more, "val/loss")[-1] < losses(more, "val/loss")[0]
    state = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        state.lm_head.weight.mul_(1.5)
    state.save_pretrained(base)
    train(folder, "other", *SFT, SHORT, status=2)
    assert "so losses differ from those of training" in capsys.readouterr().err
    with pytest.raises(UserError, match="so losses differ from those of training"):
        OpenAIChatModel(str(more / "global_step_3"), is_local=True).chat("Count to 3.")
    with pytest.raises(UserError, match="base model nowhere/at/all does not exist here"):
        OpenAIChatModel(str(folder), is_local=True, base="nowhere/at/all").chat("Count to 3.")


@pytest.mark.slow
def test_a_stopped_run_is_resumed_bit_for_bit(in_tmp: Path, monkeypatch: Any) -> None:
    base, options = small(in_tmp / "base"), (*SFT, *LORA, "model.lora.dropout=0.1", "trainer.ema_decay=0.5")
    whole = train(base, "whole", *options)
    when_logged(monkeypatch, 4, send(signal.SIGTERM))
    train(base, "parts", *options, status=143)
    assert_same_run(train(base, "parts", *options), whole)
    assert losses(whole)[-1] < losses(whole)[0] - 0.1


@pytest.mark.slow
def test_ranks_do_not_change_the_losses(in_tmp: Path) -> None:
    untied, experts = small(in_tmp / "untied"), save_base("qwen3_moe", in_tmp / "experts")
    balance = ("model.router_aux_loss_coef=0.1",)
    full = ("model.lora.modules_to_save=[lm_head,norm]",)
    ddp, fsdp2 = "model.strategy=ddp", "model.strategy=fsdp2"
    units = "model.fsdp_config.wrap_policy.min_num_params=1000"
    variants: dict[str, tuple[Path, int, tuple[str, ...]]] = {
        "lora": (untied, 1, LORA), "lora-ddp": (untied, 2, (*LORA, ddp)),
        "full": (untied, 1, (*LORA, *full)), "full-units": (untied, 2, (*LORA, *full, fsdp2, units)),
        "router": (experts, 1, balance), "router-fsdp2": (experts, 2, (*balance, fsdp2)),
    }  # fmt: skip
    runs = [Run(settings(folder, name, *SFT, SHORT, *more), ranks) for name, (folder, ranks, more) in variants.items()]
    done = run_all(runs, in_tmp)
    assert all(set(each.status) == {0} for each in done), "\n".join(each.log for each in done)
    for name in variants:
        for key in ("train/loss", "val/loss", "train/router_aux_loss"):
            wanted = losses(Path("runs") / name.partition("-")[0], key)
            assert losses(Path("runs") / name, key) == pytest.approx(wanted, abs=1e-4, rel=1e-3), (name, key)
            assert wanted or (key == "train/router_aux_loss" and not name.startswith("router"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gemma2", "gpt2", "gemma3"])
def test_other_types_have_lora_after_a_check(kind: str, in_tmp: Path) -> None:
    """gemma3 is a wrapper, whose text model is trained."""
    base = save_base(kind, in_tmp / "base")
    folder = train(base, "run", *SFT, *LORA, SHORT) / "global_step_3"
    assert losses(folder.parent)[-1] < losses(folder.parent)[0]
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        assert all(file.get_tensor(name).any() for name in file.keys() if ".lora_B" in name)  # noqa: SIM118
    # The code of the model card, which needs transformers and peft alone, and the merged folder.
    [code] = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    code = code.partition("generate = ")[0]
    names: dict[str, Any] = {}
    exec(code.replace("PATH_OR_NAME", str(folder)).replace("BASE_MODEL", str(base)), names)
    groups = probes(folder)
    ids = torch.from_numpy(groups[0].tails[0]).long()[None]
    found = float(names["model"](input_ids=ids, labels=ids).loss.detach())
    assert plain_losses(folder, groups)[0] == pytest.approx(found, abs=1e-5)
    assert main(["merge", str(folder), "--output", "merged"]) == 0
    assert plain_losses(Path("merged"), groups)[0] == pytest.approx(found, abs=1e-4)


@pytest.mark.slow
def test_adapters_of_reward_models_and_of_the_output_layer_are_refused(in_tmp: Path, capsys: Any) -> None:
    base = small(in_tmp / "base")
    Path("pairs.jsonl").write_text("".join(json.dumps({"chosen": f"a {n}", "rejected": "b"}) + "\n" for n in range(8)))
    rewards = train(base, "rm", *LORA, "data.train_files=pairs.jsonl", "data.val_files=", SHORT) / "global_step_1"
    train(rewards, "a", *SFT, SHORT, status=2)
    assert "an adapter of a reward model (score.weight)" in capsys.readouterr().err
    # The other way a reward model starts from the adapter of a language model, with a new head.
    adapter = train(base, "sft", *SFT, *LORA, SHORT) / "global_step_3"
    pairs = ("data.train_files=pairs.jsonl", "data.val_files=", SHORT)
    assert train(adapter, "b", *pairs, "model.new_head=true", "optim.lr=1e-2").is_dir()
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(target_modules=["lm_head"]))
    model.save_pretrained("head", save_embedding_layers=False)
    train(Path("head"), "c", *SFT, SHORT, status=2)
    assert "LoRA on the output layer" in capsys.readouterr().err
    # One that peft wrote is trained further.
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained("plain")
    more = train(Path("plain"), "d", *SFT, SHORT, "optim.lr=1e-2") / "global_step_3"
    assert json.loads((more / "adapter_config.json").read_text())["target_modules"] == ["q_proj"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantized_base_model_is_checked_and_merged(kind: str, in_tmp: Path, capsys: Any) -> None:
    pytest.importorskip("bitsandbytes", reason="QLoRA needs bitsandbytes")
    run = train(small(in_tmp / "base"), "run", *SFT, *LORA, SHORT, f"model.quantization={kind}")
    assert losses(run)[-1] < losses(run)[0]
    skipped = json.loads((run / "global_step_3/config.json").read_text())["rm_gallery_quantization"]
    assert "lm_head" in skipped["llm_int8_skip_modules"]
    with pytest.raises(UserError, match="pass quantized=False to merge the adapter"):
        OpenAIChatModel(str(run / "global_step_3"), is_local=True).chat("Count to 3.")
    chat = OpenAIChatModel(str(run / "global_step_3"), is_local=True, quantized=False, max_tokens=8)
    assert main(["merge", str(run), "--output", "merged"]) == 0
    merged = OpenAIChatModel("merged", is_local=True, max_tokens=8)
    assert chat.chat("Count to 3.").content == merged.chat("Count to 3.").content
    assert f"trained on a quantized base model ({kind}), and merged" in capsys.readouterr().err
