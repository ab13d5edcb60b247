"""Configuration: the specification's keys are accepted, mistakes are named all at once, a run's file reads back."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from rm_gallery.config import build, known_keys
from rm_gallery.errors import UserError
from rm_gallery.training.config import TrainConfig, load_config, normalize, problems_of_training
from tests.small import CHATML, text_pairs, write_pairs

SPEC = """
model:
  partial_pretrain: Qwen/Qwen2.5-7B-Instruct
  trust_remote_code: true
  enable_gradient_checkpointing: true
  strategy: fsdp
  fsdp_config:
    cpu_offload: false
    offload_params: false
    param_offload: false
    optimizer_offload: false
    model_dtype: bf16
data:
  train_files: ./data/train.parquet
  val_files: ./data/test.parquet
  max_length: 4096
  micro_batch_size_per_gpu: 1
  train_batch_size: 256
  filter_overlong_prompts: true
optim:
  lr: 5e-7
  betas: [0.9, 0.95]
  weight_decay: 0.1
  clip_grad: 2.0
  lr_scheduler: cosine
  warmup_steps_ratio: 0.05
trainer:
  total_epochs: 3
  save_freq: 500
  test_freq: 500
  logger: ['console', 'swanlab']
  project_name: rm-gallery-bt
  experiment_name: qwen2.5-7b-bt
  default_local_dir: ./checkpoints/bt
"""
NEEDED = ["model.partial_pretrain=Qwen/Qwen2.5-7B-Instruct", "data.train_files=data/train.parquet"]


@pytest.fixture(autouse=True)
def without_hydra() -> None:
    """Replaces the fixture of conftest.py: here Hydra reads the overrides."""


@pytest.fixture(autouse=True)
def files(in_tmp: Path) -> Path:
    """The specification's data files and its YAML as spec.yaml."""
    for name in ("train", "test"):
        write_pairs(in_tmp / "data" / f"{name}.parquet", text_pairs(1))
    (in_tmp / "spec.yaml").write_text(SPEC)
    return in_tmp


def load(*overrides: str) -> TrainConfig:
    return load_config(None, [*NEEDED, *overrides])


def check_config(values: dict[str, Any]) -> TrainConfig:
    return build(TrainConfig, values, prepare=normalize, check=problems_of_training)


def problems(*overrides: str, file: str | None = None) -> list[str]:
    with pytest.raises(UserError) as error:
        load_config(file, [*NEEDED, *overrides])
    return str(error.value).splitlines()


def test_every_key_of_the_specification_is_accepted_with_its_value() -> None:
    found = load_config("spec.yaml", []).as_dict()
    written = yaml.safe_load(SPEC)
    written["optim"]["lr"] = 5e-7  # a string to PyYAML
    for section, values in written.items():
        for key, value in values.items():
            if isinstance(value, dict):
                assert {name: found[section][key][name] for name in value} == value
            else:
                assert found[section][key] == (tuple(value) if isinstance(value, list) else value), key


def test_the_overrides_of_the_specification_arrive_as_the_shell_passes_them() -> None:
    config = load_config(
        "spec.yaml",
        [
            "data.train_files=data/train.parquet", "data.val_files=data/test.parquet", "data.max_length=4096",
            "optim.lr=5e-7", "optim.clip_grad=2", "trainer.total_epochs=3", "trainer.logger=[console,swanlab]",
            "trainer.experiment_name=qwen2.5-7b-bt-0312T0915",
            "trainer.default_local_dir=./checkpoints/bt/qwen2.5-7b-bt-0312T0915",
        ],
    )  # fmt: skip
    assert (config.optim.lr, config.optim.clip_grad) == (5e-7, 2.0)
    assert config.trainer.logger == ("console", "swanlab")
    assert config.trainer.run_dir == Path("checkpoints/bt/qwen2.5-7b-bt-0312T0915")


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("trainer.logger=console", "trainer.logger", ("console",)),
        ("trainer.logger=[]", "trainer.logger", ()),
        ("trainer.eval_sets.my-set=data/train.parquet", "trainer.eval_sets", {"my-set": "data/train.parquet"}),
        ("optim.lr='5e-7'", "optim.lr", 5e-7),
        ("optim.betas=[0.8,0.9]", "optim.betas", (0.8, 0.9)),
        ("data.train_files=[data/train.parquet,data]", "data.train_files", ("data/train.parquet", "data")),
        ("data.val_files=null", "data.val_files", ""),
        ("data.prompt_key=null", "data.prompt_key", None),
        ("optim=null", "optim.lr", 1e-6),
        ("+data.max_length=7", "data.max_length", 7),
        ("trainer.experiment_name=123", "trainer.experiment_name", "123"),
        ("trainer.experiment_name=a=b (2)", "trainer.experiment_name", "a=b (2)"),
        ("trainer.default_local_dir=~/runs", "trainer.default_local_dir", "~/runs"),
        ("data.chat_template={{ messages[0]['content'] }}", "data.chat_template", "{{ messages[0]['content'] }}"),
    ],
)
@pytest.mark.slow
def test_values_are_read_as_people_write_them(override: str, key: str, value: Any) -> None:
    section, _, name = key.partition(".")
    assert getattr(getattr(load(override), section), name) == value


@pytest.mark.slow
@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("optim.lr=abc", "optim.lr='abc': must be a number"),
        ("optim.lr=0", "optim.lr=0: must be greater than 0"),
        ("optim.lr=inf", "optim.lr=inf: must be a finite number"),
        ("optim.lr=nan", "optim.lr=nan: must be a finite number"),
        ("optim.lr=true", "optim.lr=true: must be a number"),
        ("optim.betas=[0.9]", "optim.betas=[0.9]: too short"),
        ("optim.betas=[0.9,2]", "optim.betas=[0.9, 2]: must be less than 1"),
        ("optim.lr_scheduler=cosin",
         "optim.lr_scheduler=cosin: must be one of cosine, wsd, constant. Did you mean 'cosine'?"),
        ("optim.lr_scheduler=linear", "optim.lr_scheduler=linear: must be one of cosine, wsd, constant."),
        ("model.freeze=foo", "model.freeze=foo: must be one of backbone, embeddings, or an integer."),
        ("model.freeze=0", "model.freeze=0: must be one of backbone, embeddings, or greater than or equal to 1."),
        ("model.lora.target_modules=q_proj", "model.lora.target_modules=q_proj: must be one of all-linear, or a list."),
        ("model.attribute_weights={x: 1}", "model.attribute_weights={'x': 1.0}: 'x' is not in model.attributes"),
        ("optim=5", "optim=5: must be a section with the keys of OptimConfig"),
        ("data.train_batch_size=0", "data.train_batch_size=0: must be at least 1"),
        ("data.train_batch_size=2.5", "data.train_batch_size=2.5: must be an integer"),
        ("data.shuffle=maybe", "data.shuffle='maybe': must be true or false"),
        ("data.train_files={a:1}", "data.train_files={a:1}: no such file or folder (working directory "),
        ("+data.val_files={path:a,b:1}", "data.val_files.b: unknown key. Known are path, weight, split, subset, "),
        ("trainer.seed=-1", "trainer.seed=-1: must be greater than or equal to 0"),
        ("trainer.logger=[console,wandbb]",
         ("trainer.logger=wandbb: must be one of console, tensorboard, wandb, swanlab, mlflow, trackio. "
         "Did you mean 'wandb'?")),
        ("trainer.early_stopping_patience=2",
         "trainer.early_stopping_patience: there is no validation; set data.val_files or data.val_fraction"),
        ("trainer.experiment_name=a/b", "trainer.experiment_name='a/b': must be a folder name without '/'"),
        ("trainer.experiment_name=..", "trainer.experiment_name='..': must be a folder name without '/'"),
        ("model.partial_pretrain=./nope", "model.partial_pretrain=./nope: no such folder (working directory "),
        ("model.dropout=1", "model.dropout=1.0: must be at least 0 and below 1"),
        ("data.custom_cls.path=x.py", "data.custom_cls needs both path (a Python file) and name (the class in it)"),
        ("optim.lr", "'optim.lr': an override is written key=value without spaces, e.g. optim.lr=1e-6"),
        ("optim.lr = 1", "'optim.lr = 1': an override is written key=value without spaces"),
        ("=5", "'=5': an override is written key=value"),
        ("optim.betas=[0.9", "optim.betas=[0.9: cannot be read; close its brackets, or quote it if it is text"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_one_sentence_that_names_its_key(override: str, sentence: str) -> None:
    found = problems(override)
    assert len(found) == 1
    assert found[0].startswith(sentence)


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("optm.lr", "optm: unknown key. Did you mean 'optim'?"),
        ("lr", "lr: unknown key; write optim.lr"),
        ("optim.weight_deacy", "optim.weight_deacy: unknown key. Did you mean 'optim.weight_decay'?"),
        ("optim.warmup", "optim.warmup: unknown key. Did you mean 'optim.warmup_steps_ratio'?"),
        ("optim.max_length", "optim.max_length: unknown key. Did you mean 'data.max_length'?"),
        ("model.fsdp_config.dtype",
         "model.fsdp_config.dtype: unknown key; write model.fsdp_config.model_dtype (auto, bf16 or fp32)"),
        ("data.custom_cls.pth", "data.custom_cls.pth: unknown key. Did you mean 'data.custom_cls.path'?"),
        ("foo", "foo: unknown key; known here: model, data, objective, optim, trainer"),
        ("data.custom_cls.zzz",
         "data.custom_cls.zzz: unknown key; known here: data.custom_cls.path, data.custom_cls.name"),
    ],
)  # fmt: skip
def test_an_unknown_key_names_the_nearest_known_one(key: str, nearest: str) -> None:
    assert problems(f"{key}=1") == [nearest]


@pytest.mark.slow
def test_every_known_key_with_a_typo_is_found_again() -> None:
    for key in known_keys(TrainConfig):
        values: dict[str, Any] = {f"{key.rpartition('.')[2]}x": 1}
        for section in reversed(key.split(".")[:-1]):
            values = {section: values}
        with pytest.raises(UserError) as error:
            check_config(values)
        assert f"{key}x: unknown key. Did you mean '" in str(error.value)


def test_all_problems_are_named_at_once() -> None:
    found = problems(
        "optim.lr=x", "optim.wormup=1", "data.max_length=0", "trainer.logger=[wandbb]", "model.dropout=2",
        "data.val_files=nope.parquet", "foo=1",
    )  # fmt: skip
    keys = [sentence.partition(":")[0].partition("=")[0] for sentence in found]
    assert sorted(keys) == [
        "data.max_length", "data.val_files", "foo", "model.dropout", "optim.lr", "optim.wormup", "trainer.logger",
    ]  # fmt: skip


def test_nothing_configured_names_what_is_needed() -> None:
    with pytest.raises(UserError) as error:
        load_config(None, [])
    assert str(error.value).splitlines() == [
        "model.partial_pretrain is not set; give a model folder or hub name to start from",
        "data.train_files is not set; give a file, a folder, a URL or a hub dataset",
    ]


def test_a_wrong_section_is_not_reported_again_key_by_key() -> None:
    with pytest.raises(UserError) as error:
        check_config({"model": {"partial_pretrain": "a/b"}, "data": [1]})
    assert str(error.value) == "data=[1]: must be a section with the keys of DataConfig"


def test_wsd_ratios_that_overlap_are_refused() -> None:
    found = problems("optim.lr_scheduler=wsd", "optim.warmup_steps_ratio=0.6", "optim.decay_steps_ratio=0.6")
    assert found == ["optim.warmup_steps_ratio=0.6 with decay_steps_ratio=0.6: must be at most 1 together for wsd"]


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.yaml", b"optim:\n  lr: [1\n", "a.yaml: not valid YAML (while parsing a flow sequence in "),
        ("a.yaml", b"optim:\n\tlr: 1\n", "a.yaml: not valid YAML ("),
        ("a.yaml", b"optim:\n  lr: 1\n  lr: 2\n", "a.yaml: not valid YAML ("),
        ("a.yaml", b"- optim\n", "a.yaml: the file must contain keys with values"),
        ("a.yaml", b"hello\n", "hello: unknown key"),
        ("a.yaml", b"\xff\xfeoptim", "a.yaml: cannot be read as UTF-8 text ("),
        ("a.yaml", b"optim:\n  lr: ${oc.env:NOT_SET_HERE}\n", "a.yaml: KeyError raised while resolving interpolation"),
        ("a.yaml", b"optim:\n  lr: ???\n", "a.yaml: Missing mandatory value: lr"),
        ("a.yml", b"optim:\n  lr: 1\n", "a.yml: the name of a configuration file must end with .yaml; rename it"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_read_is_named(name: str, content: bytes, sentence: str) -> None:
    Path(name).write_bytes(content)
    found = problems(file=name)
    assert len(found) == 1
    assert found[0].startswith(sentence)


def test_a_missing_file_is_named() -> None:
    assert problems(file="nope.yaml")[0].startswith("nope.yaml: no such configuration file (working directory ")


@pytest.mark.parametrize("name", ["x=y/sp ace.yaml", "a.b.yaml"])
def test_odd_file_names_are_read(name: str) -> None:
    Path(name).parent.mkdir(exist_ok=True)
    Path(name).write_text("optim:\n  lr: 5e-7\n")
    assert load_config(name, NEEDED).optim.lr == 5e-7


def test_an_empty_file_gives_the_defaults() -> None:
    Path("empty.yaml").write_text("")
    named = [*NEEDED, "trainer.experiment_name=mine"]
    assert load_config("empty.yaml", named) == load("trainer.experiment_name=mine")


def test_a_later_override_wins() -> None:
    assert load_config("spec.yaml", ["optim.lr=1", "optim.lr=2"]).optim.lr == 2


def test_what_a_run_writes_reads_back_to_the_same_configuration() -> None:
    config = load_config(
        "spec.yaml",
        [
            "trainer.experiment_name='5e-7'", "trainer.project_name=null # x", "data.val_files=null",
            "data.train_files=[data/train.parquet,data]", "data.prompt_key='null'",
        ],
    )  # fmt: skip
    Path("config.yaml").write_text(config.to_yaml())
    assert load_config("config.yaml", []) == config


@pytest.mark.slow
def test_values_of_the_environment_are_saved_as_their_text_and_read_back(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("MY_SECRET", "sk-123"), ("RATE", "5e-7"), ("FILE", "data/train.parquet")):
        monkeypatch.setenv(name, value)
    overrides = [
        "trainer.project_name=${oc.env:MY_SECRET}", "data.cache_dir=c-${oc.env:MY_SECRET}-${oc.env:NONE,x}",
        "optim.lr=${oc.env:RATE}", "data.prompt_key=p-${trainer.project_name}", "trainer.experiment_name=e-${optim.lr}",
        "data.train_files=[{path: '${oc.env:FILE}', name: 'n-${oc.env:MY_SECRET}'}, data]",
        "data.val_files=https://u:pw@host/val.parquet?sig=abc",
    ]  # fmt: skip
    config = load(*overrides)
    assert (config.trainer.project_name, config.optim.lr, config.data.cache_dir) == ("sk-123", 5e-7, "c-sk-123-x")
    text = config.to_yaml()
    saved = yaml.safe_load(text)
    assert saved["trainer"]["project_name"] == "${oc.env:MY_SECRET}"
    assert saved["trainer"]["experiment_name"] == "e-5e-7"  # no secret: a plain value
    assert saved["data"]["cache_dir"] == "c-${oc.env:MY_SECRET}-${oc.env:NONE,x}"
    assert saved["data"]["prompt_key"] == "p-${trainer.project_name}"
    assert saved["data"]["train_files"] == [{"path": "${oc.env:FILE}", "name": "n-${oc.env:MY_SECRET}"}, "data"]
    assert saved["optim"]["lr"] == "${oc.env:RATE}"
    assert saved["data"]["val_files"] == "https://***@host/val.parquet?sig=***"
    for written in (text, repr(config.to_save()), repr(config.to_compare())):
        assert "sk-123" not in written and "pw" not in written and "abc" not in written
    Path("config.yaml").write_text(text)
    assert load_config("config.yaml", [overrides[-1]]) == config
    with pytest.raises(
        UserError, match=r"data.val_files=https://\*\*\*@host.*: a credential was removed when this was"
    ):
        load_config("config.yaml", [])


def test_a_change_in_the_environment_is_noticed_without_writing_the_value(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for value in ("one", "one", "two"):
        monkeypatch.setenv("MY_SECRET", value)
        found.append(load("trainer.project_name=${oc.env:MY_SECRET}").to_compare()["trainer"]["project_name"])
    assert found[0] == found[1] != found[2]
    assert all(re.fullmatch(r"\$\{oc.env:MY_SECRET\} \(value [0-9a-f]{4}\)", text) for text in found)


def test_the_texts_of_the_environment_are_no_key() -> None:
    assert problems("from_environment={a: b}") == ["from_environment: unknown key"]


def test_a_chat_template_reads_back() -> None:
    values = {"model": {"partial_pretrain": "a/b"}, "data": {"train_files": "data", "chat_template": CHATML},
              "trainer": {"experiment_name": "mine"}}  # fmt: skip
    config = check_config(values)
    Path("config.yaml").write_text(config.to_yaml())
    assert load_config("config.yaml", []) == config


@pytest.mark.parametrize(
    ("folder", "run_dir"),
    [
        ("./checkpoints/bt", "checkpoints/bt/exp-1"),
        ("./checkpoints/bt/exp-1", "checkpoints/bt/exp-1"),
        ("./checkpoints/bt/exp-1/", "checkpoints/bt/exp-1"),
        ("./my-exp-1", "my-exp-1/exp-1"),
    ],
)
def test_the_run_folder_ends_with_the_experiment_name_once(folder: str, run_dir: str) -> None:
    config = load("trainer.experiment_name=exp-1", f"trainer.default_local_dir={folder}")
    assert config.trainer.run_dir == Path(run_dir)


def test_truncation_that_does_nothing_is_warned_about(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("rm_gallery"), "propagate", True)
    load("data.truncation=left")
    assert "data.truncation=left has no effect: data.filter_overlong_prompts=true" in caplog.text
    caplog.clear()
    load("data.truncation=left", "data.filter_overlong_prompts=false")
    assert not caplog.records


@pytest.mark.slow
def test_the_default_name_holds_the_time_and_is_found_again_by_the_configuration() -> None:
    def name(*overrides: str) -> str:
        return load(*overrides).trainer.experiment_name

    first = name()
    assert re.fullmatch(r"\d{8}-\d{6}-[0-9a-f]{8}", first)
    earlier = f"20200101-000000{first[15:]}"
    Path("checkpoints/bt", earlier).mkdir(parents=True)
    assert name() == earlier
    assert name("trainer.resume_mode=disable") >= first, "never an earlier directory"
    assert name("optim.lr=1e-5")[15:] != first[15:], "another run"
    assert name("trainer.default_local_dir=other") != earlier
    assert name("trainer.experiment_name=mine") == "mine"
