"""LoRA: one reward everywhere, a head that is kept, exact resume, and nothing trained or saved but adapter and head."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from rm_gallery.cli import main
from rm_gallery.data.batching.packed_batch import collate
from rm_gallery.errors import UserError
from rm_gallery.files import sha256_files
from rm_gallery.modeling.adapters import add_lora
from rm_gallery.modeling.config import LoraConfig
from rm_gallery.modeling.reward_model import load_reward_model
from rm_gallery.schema import PreferenceGroup
from rm_gallery.scoring import RewardScorer
from rm_gallery.scoring.loading import load_folder
from tests.small import make_model, random_groups, text_pairs, whole_texts
from tests.training.rank_runs import Act, Run, run_all
from tests.training.short_runs import Lost, assert_same_run, lose, settings, train, weights, when_logged, write_data

LORA = ("model.lora.rank=4", "model.lora.alpha=8")
TEXTS = [row[side] for row in text_pairs(6) for side in ("chosen", "rejected")]
LAST = "global_step_6"


@pytest.fixture(autouse=True)
def data(in_tmp: Path) -> None:
    write_data()


def peft_rewards(folder: Path, base: Path, texts: list[str] = TEXTS) -> list[float]:
    """By transformers and peft alone."""
    from peft import PeftModel
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = AutoConfig.from_pretrained(folder)
    network = AutoModelForSequenceClassification.from_pretrained(base, config=config, dtype=torch.float32)
    network = PeftModel.from_pretrained(network, folder).eval()
    with torch.no_grad():
        return [network(**tokenizer(text, return_tensors="pt")).logits.item() for text in texts]


def scores(folder: Path | str, **options: Any) -> list[float]:
    scorer = RewardScorer.from_folder(folder, device="cpu", dtype="fp32", **options)
    return [reward for (reward,) in scorer.score([PreferenceGroup("", [text]) for text in TEXTS])]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("qwen2", ()),
        pytest.param("bert", (), marks=pytest.mark.slow),
        pytest.param("qwen3", ("model.lora.use_dora=true",), marks=pytest.mark.slow),
        pytest.param("llama", ("model.lora.use_rslora=true",), marks=pytest.mark.slow),
        pytest.param("mistral", ("model.lora.target_modules=[q_proj, v_proj]",), marks=pytest.mark.slow),
        *(pytest.param(kind, (), marks=pytest.mark.slow) for kind in ("gemma3_text", "roberta", "deberta-v2")),
        pytest.param("modernbert", ("model.lora.use_dora=true", "model.lora.use_rslora=true"), marks=pytest.mark.slow),
    ],
)
def test_adapter_peft_scorer_and_merged_folder_give_one_reward(
    kind: str, options: tuple[str, ...], in_tmp: Path, caplog: Any, capsys: Any
) -> None:
    base = make_model(kind, in_tmp / "base")
    before = sha256_files(base, [path.name for path in base.iterdir()])
    run = train(base, "run", *LORA, *options)
    folder = run / LAST  # the run itself has compared its rewards with peft's
    expected = peft_rewards(folder, base)
    assert scores(run) == pytest.approx(expected, abs=1e-4)
    torch.manual_seed(7)
    state = torch.get_rng_state()
    assert scores(folder) == scores(folder), "no random weight"
    assert torch.equal(torch.get_rng_state(), state)
    assert main(["merge", str(run), "--output", "merged"]) == 0
    assert scores("merged") == pytest.approx(expected, abs=1e-4)
    assert not (Path("merged") / "adapter_config.json").exists()
    assert max(abs(a - b) for a, b in zip(expected, base_with_head(base, folder), strict=True)) > 1e-3, (
        "LoRA has effect"
    )
    assert sha256_files(base, list(before)) == before
    assert main(["merge", str(run), "--output", "merged"]) == 2
    assert "merged: exists; name another folder with --output" in capsys.readouterr().err


def base_with_head(base: Path, folder: Path) -> list[float]:
    """The rewards of the base model with the trained head and the matrices of LoRA set to zero."""
    state = load_file(folder / "adapter_model.safetensors")
    zero = folder.with_name("zero")
    zero.mkdir()
    for path in folder.iterdir():
        if path.is_file():
            (zero / path.name).write_bytes(path.read_bytes())
    save_file({name: each * ("lora_B" not in name) for name, each in state.items()}, zero / "adapter_model.safetensors")
    return peft_rewards(zero, base)


def test_only_adapter_and_head_are_trained_and_saved(qwen2_folder: Path, caplog: Any) -> None:
    caplog.set_level("INFO")
    folder = train(qwen2_folder, "run", *LORA, "model.fsdp_config.model_dtype=bf16") / LAST
    assert "model   qwen2, 4,128 of 31,296 parameters trained" in caplog.text
    assert json.loads(Path("runs/run/run.json").read_text())["model"]["trained_parameters"] == 4128
    names = set()
    for path in (folder / "training_state").glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            names |= set(file.keys())
    assert all("lora_" in name or ".score." in name for name in names)
    assert {name for name in names if name.startswith("optimizer.")} == {
        name.replace("model.", "optimizer.", 1) + suffix
        for name in names if name.startswith("model.") for suffix in (".exp_avg", ".exp_avg_sq", ".step")
    }  # fmt: skip
    found = weights(folder)
    assert len(found) == 29 and found["base_model.model.score.weight"].dtype == torch.float32
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["task_type"], config["modules_to_save"], config["r"]) == ("SEQ_CLS", ["score"], 4)
    assert config["base_model_name_or_path"] == str(qwen2_folder)
    assert not list(folder.glob("model*.safetensors"))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        pytest.param("qwen2", ("model.lora.dropout=0.3",), marks=pytest.mark.slow),
        pytest.param(
            "qwen2",
            (
                "model.lora.dropout=0.3",
                "model.enable_gradient_checkpointing=true",
                "model.fsdp_config.model_dtype=bf16",
            ),
            marks=pytest.mark.slow,
        ),
        pytest.param("bert", ("model.lora.dropout=0.3", "trainer.async_save=true"), marks=pytest.mark.slow),
        pytest.param("llama", ("model.lora.use_dora=true",), marks=pytest.mark.slow),
    ],
)
def test_a_run_that_was_lost_resumes_bit_for_bit(
    kind: str, options: tuple[str, ...], in_tmp: Path, monkeypatch: Any
) -> None:
    base = make_model(kind, in_tmp / "base")
    whole = train(base, "whole", *LORA, *options)
    when_logged(monkeypatch, 5, lose)
    with pytest.raises(Lost):
        train(base, "parts", "trainer.save_freq=3", *LORA, *options)
    parts = train(base, "parts", "trainer.save_freq=3", *LORA, *options)
    assert_same_run(parts, whole)


def test_packed_texts_get_the_rewards_and_gradients_of_single_texts(qwen2_folder: Path) -> None:
    """The layers of packed batches must call the modules with LoRA, also in the last layer."""
    torch.manual_seed(0)
    model = load_reward_model(str(qwen2_folder)).model
    add_lora(model, LoraConfig(rank=4), str(qwen2_folder))
    trained = {name: each for name, each in model.named_parameters() if each.requires_grad}
    for name, parameter in trained.items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    groups = random_groups(3)
    packed = model(collate(groups))
    found = torch.autograd.grad(packed.square().sum(), list(trained.values()))
    model.network.set_attn_implementation("eager")  # the library's layers, for calls without `packed`
    single = torch.cat([model.network(torch.tensor([ids])).logits[0] for ids in whole_texts(groups)])
    expected = torch.autograd.grad(single.square().sum(), list(trained.values()))
    torch.testing.assert_close(packed, single, atol=1e-4, rtol=1e-4)
    for name, ours, theirs in zip(trained, found, expected, strict=True):
        assert theirs.abs().max() > 0, name
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("model.lora.target_modules=[q_prj]", "the backbone has no linear layer q_prj; it has down_proj, gate_proj"),
        ("model.lora.target_modules=[score]", "the backbone has no linear layer score; it has"),
        ("model.lora.target_modules=[]", "model.lora.target_modules is empty"),
        ("model.resize_embeddings=true", "an adapter has no embedding rows"),
        ("model.trust_remote_code=true", "model.trust_remote_code=true is not implemented"),
        ("model.lora.rank=-1", "model.lora.rank"),
    ],
)
def test_settings_that_cannot_be_trained_are_errors(
    options: str, message: str, qwen2_folder: Path, capsys: Any
) -> None:
    train(qwen2_folder, "run", *LORA, options, status=2)
    assert message in capsys.readouterr().err


def test_a_missing_package_is_named_with_its_extra(qwen2_folder: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    model = load_reward_model(str(qwen2_folder)).model
    with pytest.raises(UserError, match=r"needs the peft package: pip install 'rm-gallery\[lora\]'"):
        add_lora(model, LoraConfig(rank=4), str(qwen2_folder))


def test_lora_keys_without_a_rank_are_warned_about(qwen2_folder: Path, caplog: Any) -> None:
    train(qwen2_folder, "run", "model.lora.alpha=8", "trainer.total_training_steps=1")
    assert "model.lora has no effect with model.lora.rank=0: all parameters are trained" in caplog.text


@pytest.fixture
def adapter(qwen2_folder: Path, trained: Callable[..., Path]) -> Path:
    return trained("adapter", *LORA) / LAST


def drop_head(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    save_file({name: each for name, each in load_file(path).items() if "score" not in name}, path)


def drop_matrix(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    state = load_file(path)
    del state["base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"]
    save_file(state, path)


def change(**values: Any) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return act


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop_head, r"holds an adapter without a reward head \(task type SEQ_CLS, 28 tensors\); the head is missing"),
        (change(peft_type="IA3"), "holds an adapter of type IA3, which is not read"),
        (change(base_model_name_or_path="/nowhere/base"), r"base model /nowhere/base does not exist here; .*--base"),
        (change(base_model_name_or_path=None), "names no base model; name the folder of the base model with base="),
        (drop_matrix, r"does not fit its base model .*up_proj.lora_B.weight is missing"),
        (change(r=8), "does not fit its base model"),
        (lambda folder: (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin"), "as a pickle"),
        (lambda folder: (folder / "adapter_config.json").write_text("["), "adapter_config.json cannot be read"),
    ],
)
def test_an_adapter_that_cannot_be_scored_is_an_error_in_words(
    damage: Callable[[Path], object], message: str, adapter: Path
) -> None:
    damage(adapter)
    with pytest.raises(UserError, match=message):
        load_folder(adapter, device="cpu")


def test_a_base_model_that_moved_is_named(adapter: Path, qwen2_folder: Path, capsys: Any) -> None:
    expected = scores(adapter)
    change(base_model_name_or_path="/nowhere/base")(adapter)
    assert scores(adapter, base=str(qwen2_folder)) == expected
    options = ["--model", str(adapter), "--base", str(qwen2_folder)]
    assert main(["score", *options, "--output", "a.jsonl", "val.parquet"]) == 0
    assert main(["merge", str(adapter), "--base", str(qwen2_folder)]) == 0
    assert scores(f"{adapter}-merged") == pytest.approx(expected, abs=1e-4)
    with pytest.raises(UserError, match=r"base=.* is for adapters, and this folder holds none"):
        load_folder(qwen2_folder, base=str(qwen2_folder))


@pytest.mark.slow
@pytest.mark.parametrize("more", [{}, {"trainable_token_indices": [20, 30]}, {"bias": "all"}], ids=str)
def test_an_adapter_that_peft_wrote_is_scored_and_merged(more: dict[str, Any], qwen2_folder: Path) -> None:
    """No config.json, tokenizer or record, two labels in the base model's configuration, and rank 2 in one layer."""
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model
    from transformers import AutoModelForSequenceClassification

    network = AutoModelForSequenceClassification.from_pretrained(qwen2_folder, num_labels=1)
    network = get_peft_model(network, PeftConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj"], **more))
    for name, each in network.named_parameters():
        if each.requires_grad and "lora_A" not in name:
            torch.nn.init.normal_(each)
    network.save_pretrained("theirs")
    assert not Path("theirs/config.json").exists()
    ids = torch.tensor([[20, 30, 40, 50]])
    expected = network.eval()(ids).logits.item()
    from rm_gallery.data.tokenization.token_group import TokenGroup

    group = TokenGroup(ids[0, :2].int().numpy(), [ids[0, 2:].int().numpy()], [])
    assert load_folder("theirs", device="cpu").model(collate([group])).item() == pytest.approx(expected, abs=1e-4)
    assert main(["merge", "theirs", "--output", "merged"]) == 0
    assert load_folder("merged", device="cpu").model(collate([group])).item() == pytest.approx(expected, abs=1e-4)


@pytest.mark.slow
def test_the_snippets_of_the_page_run(adapter: Path, qwen2_folder: Path) -> None:
    page = (Path(__file__).parents[2] / "docs/lora.md").read_text()
    Path("checkpoints/bt/my-rm").mkdir(parents=True)
    adapter.rename(f"checkpoints/bt/my-rm/{LAST}")
    Path("Qwen2.5-0.5B-Instruct").symlink_to(qwen2_folder)
    [code] = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    exec(compile(code, "docs/lora.md", "exec"), {})
    command = re.findall(r"^rm-gallery (merge .*)$", page, re.MULTILINE)[0]
    assert main(command.split()) == 0
    assert (Path("my-rm") / "model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("model.fsdp_config.model_dtype=bf16",), ("model.lora.use_dora=true",)])
def test_two_processes_train_as_one_does(options: tuple[str, ...], in_tmp: Path, qwen2_folder: Path) -> None:
    def run(name: str, *more: str, **settings_of_run: Any) -> Run:
        return Run(settings(qwen2_folder, name, *LORA, *options, *more), **settings_of_run)

    fsdp2, ddp = "model.strategy=fsdp2", "model.strategy=ddp"
    done = run_all(
        [
            run("one", ranks=1),
            run("ddp", ddp),
            run("fsdp2", fsdp2),
            run("parts", fsdp2, act=Act(rank=1, step=3, what="SIGTERM")),
            run("parts", fsdp2),
        ],
        in_tmp,
    )
    assert [set(each.status) for each in done] == [{0}, {0}, {0}, {143}, {0}], "\n".join(each.log for each in done)
    assert_same_run(Path("runs/parts"), Path("runs/fsdp2"))
    one = weights(Path("runs/one") / LAST)
    for name in ("ddp", "fsdp2"):
        other = weights(Path("runs") / name / LAST)
        assert other.keys() == one.keys()
        difference = max(float((other[key] - one[key]).abs().max()) for key in one)
        assert difference < (1e-4 if "bf16" not in str(options) else 5e-3), (name, difference)


@pytest.mark.slow
def test_embeddings_and_norms_are_trained_saved_and_merged(qwen2_folder: Path, in_tmp: Path, capsys: Any) -> None:
    more = "model.lora.modules_to_save=[embed_tokens, input_layernorm, norm]"
    run = train(qwen2_folder, "run", *LORA, more)
    expected = peft_rewards(run / LAST, qwen2_folder)
    found, base = weights(run / LAST), load_file(qwen2_folder / "model.safetensors")
    for name in ("model.embed_tokens.weight", "model.norm.weight", "model.layers.1.input_layernorm.weight"):
        assert not torch.equal(found[f"base_model.model.{name}"], base[name])
    assert "base_model.model.model.layers.1.post_attention_layernorm.weight" not in found
    assert scores(run) == pytest.approx(expected, abs=1e-4)
    assert main(["merge", str(run), "--output", "merged"]) == 0
    assert scores("merged") == pytest.approx(expected, abs=1e-4)
    train(run / LAST, "more", "trainer.total_training_steps=1")
    train(qwen2_folder, "wrong", *LORA, "model.lora.modules_to_save=[emb]", status=2)
    assert "model.lora.modules_to_save: emb is no module of the backbone; it has " in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("options", [
    ("model.lora.use_dora=true", "model.lora.use_rslora=true", "model.fsdp_config.wrap_policy.min_num_params=500"),
    ("model.lora.use_rslora=true", "model.lora.modules_to_save=[embed_tokens, input_layernorm, norm]"),
])  # fmt: skip
def test_two_sharded_processes_train_as_one_does(options: tuple[str, ...], in_tmp: Path, qwen2_folder: Path) -> None:
    """A small wrap policy would wrap the parts of a layer with DoRA, which reads their weights without a call."""
    runs = [
        Run(settings(qwen2_folder, "one", *LORA, *options), ranks=1),
        Run(settings(qwen2_folder, "fsdp2", *LORA, *options, "model.strategy=fsdp2")),
    ]
    done = run_all(runs, in_tmp)
    assert [set(each.status) for each in done] == [{0}, {0}], "\n".join(each.log for each in done)
    one, two = (weights(Path("runs") / name / LAST) for name in ("one", "fsdp2"))
    assert one.keys() == two.keys()
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-4
