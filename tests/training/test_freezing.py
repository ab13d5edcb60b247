"""`model.freeze`: frozen weights do not change, cost nothing but their own memory, and are in every checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from rm_gallery.cli import main
from rm_gallery.data.batching.packed_batch import collate
from rm_gallery.modeling.config import FreezeSetting
from rm_gallery.modeling.freezing import freeze
from rm_gallery.modeling.reward_model import load_reward_model
from tests.small import chat_pairs, make_model, random_groups, write_pairs
from tests.training.rank_runs import Act, Run, run_all
from tests.training.short_runs import Lost, assert_same_run, lose, settings, train, weights, when_logged, write_data

LAST = "global_step_6"
EMBEDDINGS = {
    "qwen2": "model.embed_tokens.",
    "bert": "bert.embeddings.",
    "gpt2": ("transformer.wte", "transformer.wpe"),
}


@pytest.fixture(autouse=True)
def data(in_tmp: Path) -> None:
    write_data()


def trained_names(kind: str, setting: FreezeSetting, folder: Path) -> set[str]:
    model = load_reward_model(str(make_model(kind, folder))).model
    freeze(model.network, setting)
    return {name for name, each in model.network.named_parameters() if each.requires_grad}


@pytest.mark.parametrize(
    ("kind", "head", "layer"),
    [
        ("qwen2", {"score.weight"}, "model.layers.0."),
        ("bert", {"classifier.weight", "classifier.bias", "bert.pooler.dense.weight", "bert.pooler.dense.bias"},
         "bert.encoder.layer.0."),
        pytest.param("gpt2", {"score.weight"}, "transformer.h.0.", marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_what_each_setting_freezes(kind: str, head: set[str], layer: str, in_tmp: Path) -> None:
    everything = trained_names(kind, None, in_tmp / "a")
    assert trained_names(kind, "backbone", in_tmp / "a") == head
    without = {name for name in everything if not name.startswith(EMBEDDINGS[kind])}
    assert trained_names(kind, "embeddings", in_tmp / "a") == without
    assert trained_names(kind, 1, in_tmp / "a") == {name for name in without if not name.startswith(layer)}


def bytes_saved(base: Path, setting: FreezeSetting) -> tuple[int, list[bool]]:
    """Bytes that autograd saves besides parameters, and whether the input of each layer needs a gradient."""
    model = load_reward_model(str(base)).model.train()
    freeze(model.network, setting)
    inputs: list[bool] = []
    for layer in next(each for each in model.modules() if isinstance(each, torch.nn.ModuleList) and len(each) == 2):
        layer.register_forward_pre_hook(lambda _, given: inputs.append(given[0].requires_grad))
    held: dict[int, int] = {}

    def keep(tensor: Any) -> Any:
        if not isinstance(tensor, torch.nn.Parameter):
            held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda each: each):
        model(collate(random_groups(3))).sum().backward()
    return sum(held.values()), inputs


@pytest.mark.parametrize("kind", ["qwen2", *(pytest.param(each, marks=pytest.mark.slow) for each in ("bert", "gpt2"))])
def test_nothing_below_the_lowest_trained_parameter_is_in_the_graph(kind: str, in_tmp: Path) -> None:
    base = make_model(kind, in_tmp / "base")
    whole, half, head = (bytes_saved(base, setting) for setting in (None, 1, "backbone"))  # type: ignore[arg-type]
    assert (whole[1], half[1], head[1]) == ([True, True], [False, False], [False, False])
    assert whole[0] > 1.5 * half[0] > 10 * head[0], (whole, half, head)


@pytest.mark.parametrize("options", [pytest.param((), marks=pytest.mark.slow), ("model.fsdp_config.model_dtype=bf16",)])
def test_a_checkpoint_is_complete_and_frozen_weights_are_those_of_the_base(
    options: tuple[str, ...], qwen2_folder: Path, caplog: Any
) -> None:
    caplog.set_level("INFO")
    folder = train(qwen2_folder, "run", "model.freeze=1", *options) / LAST
    assert "parameters trained" in caplog.text and "all trained" not in caplog.text
    base, found = weights(qwen2_folder), weights(folder)
    base.pop("lm_head.weight", None)
    dtype = found["score.weight"].dtype
    same = {name for name in base if base[name].to(dtype).equal(found[name])}
    assert set(found) - set(base) == {"score.weight"}
    assert same == {name for name in base if name.startswith(("model.embed_tokens", "model.layers.0."))}
    state: dict[str, Any] = {}
    for path in (folder / "training_state").glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            state.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 (not a dict)
    assert {name for name in state if name.endswith("exp_avg")} == {
        f"optimizer.network.{name}.exp_avg" for name in found if name not in same
    }
    assert "of them trained (model.freeze=1) |" in (folder / "README.md").read_text()
    trained = json.loads(Path("runs/run/run.json").read_text())["model"]["trained_parameters"]
    assert trained == sum(each.numel() for name, each in found.items() if name not in same)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        pytest.param("qwen2", ("model.freeze=backbone",), marks=pytest.mark.slow),
        *(
            pytest.param(kind, options, marks=pytest.mark.slow)
            for kind in ("qwen2", "bert", "gpt2")
            for options in (
                ("model.freeze=1", "model.fsdp_config.model_dtype=bf16"),
                ("model.freeze=embeddings", "trainer.async_save=true"),
                ("model.freeze=backbone", "model.enable_gradient_checkpointing=true"),
            )
        ),
    ],
)
def test_a_run_that_was_lost_resumes_bit_for_bit(
    kind: str, options: tuple[str, ...], in_tmp: Path, monkeypatch: Any
) -> None:
    base = make_model(kind, in_tmp / "base")
    whole = train(base, "whole", *options)
    when_logged(monkeypatch, 5, lose)
    with pytest.raises(Lost):
        train(base, "parts", "trainer.save_freq=3", *options)
    assert_same_run(train(base, "parts", "trainer.save_freq=3", *options), whole)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("model.freeze=3",), "model.freeze=3: the model has 2 layers; set at most 2, or backbone"),
        (("model.freeze=0",), "model.freeze"),
        (("model.freeze=1", "model.resize_embeddings=true"), "new embedding rows must be trained"),
        (("model.freeze=backbone", "model.lora.rank=4"), "LoRA freezes all weights but its own and the reward head"),
    ],
)
def test_settings_that_contradict_are_errors(
    options: tuple[str, ...], message: str, qwen2_folder: Path, capsys: Any
) -> None:
    train(qwen2_folder, "run", *options, status=2)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("model.freeze=3",), "model.freeze=3: the model has 2 layers; set at most 2, or backbone"),
        *(
            pytest.param(*each, marks=pytest.mark.slow)
            for each in (
                (("model.freeze=2",), None),
                (("model.lora.rank=4", "model.lora.target_modules=[q_prj]"), "no linear layer q_prj; it has down_proj"),
                (("model.lora.rank=4", "model.lora.modules_to_save=[nrm]"), "modules_to_save: nrm is no module of"),
                (("model.lora.rank=4", "model.lora.target_modules=[q_proj]"), None),
                (("objective.name=sft", "model.freeze=3"), "model.freeze=3: the model has 2 layers"),
                (("objective.name=sft", "model.lora.rank=4", "model.lora.target_modules=[x]"), "no linear layer x; it"),
            )
        ),
    ],
)
def test_validate_config_knows_the_layers_of_the_model(
    options: tuple[str, ...], message: str | None, qwen2_folder: Path, capsys: Any
) -> None:
    write_pairs(Path("train.parquet"), chat_pairs(8))
    write_pairs(Path("val.parquet"), chat_pairs(8, seed=1))
    status = main(["validate-config", *settings(qwen2_folder, "run", *options)])
    said = capsys.readouterr().err
    assert (status, message is None or message in said) == (0 if message is None else 2, True), said


@pytest.mark.slow
def test_layers_that_are_no_list_cannot_be_counted(in_tmp: Path, capsys: Any) -> None:
    base = make_model("albert", in_tmp / "albert", embedding_size=16)
    train(base, "run", "model.freeze=1", status=2)
    assert (
        "model.freeze=1: the layers of albert are not one list; set embeddings or backbone" in capsys.readouterr().err
    )
    train(base, "run", "model.freeze=backbone")


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["backbone", "embeddings", "1"])
@pytest.mark.parametrize("kind", ["qwen2", "bert"])
def test_two_processes_train_as_one_does(setting: str, kind: str, in_tmp: Path) -> None:
    base = make_model(kind, in_tmp / "base")

    def run(name: str, *more: str, **settings_of_run: Any) -> Run:
        return Run(settings(base, name, f"model.freeze={setting}", "optim.lr=1e-4", *more), **settings_of_run)

    fsdp2, bf16 = "model.strategy=fsdp2", "model.fsdp_config.model_dtype=bf16"
    done = run_all(
        [
            run("one", ranks=1),
            run("ddp", "model.strategy=ddp"),
            run("fsdp2", fsdp2),
            run("parts", fsdp2, act=Act(rank=1, step=3, what="SIGTERM")),
            run("parts", fsdp2),
            run("bf16", "model.strategy=ddp", bf16, "trainer.save_freq=3"),
            run("cross", fsdp2, bf16, "trainer.resume_mode=runs/bf16/global_step_3"),
        ],
        in_tmp,
    )
    assert [set(each.status) for each in done] == [{0}, {0}, {0}, {143}, {0}, {0}, {0}], "".join(e.log for e in done)
    assert_same_run(Path("runs/parts"), Path("runs/fsdp2"))
    compare("ddp", "one", 1e-4)
    compare("fsdp2", "one", 1e-4)
    compare("cross", "bf16", 5e-3)


def compare(name: str, other: str, tolerance: float) -> None:
    found, expected = (weights(Path("runs") / each / LAST) for each in (name, other))
    assert found.keys() == expected.keys()
    assert max(float((found[key].float() - expected[key].float()).abs().max()) for key in found) < tolerance, name
