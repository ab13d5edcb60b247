"""The configuration of a training run: the sections of TrainConfig, and the checks across their fields.

Loads no torch: `show-data` and `estimate` read the same configuration.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt

from rm_gallery.config import known_keys, load, problem_of, to_save, to_yaml
from rm_gallery.data.benchmarks.named import check_set, named_benchmark
from rm_gallery.data.config import DataConfig, data_problems, has_validation, normalize_data
from rm_gallery.data.sources import entry_problems
from rm_gallery.data.sources.config import EVAL_SETS
from rm_gallery.errors import Problem, UserError, nearest
from rm_gallery.modeling.config import ModelConfig
from rm_gallery.modeling.weight_files import kind_of_quantization, read_adapter_files
from rm_gallery.training.familiar_names import key_for
from rm_gallery.training.metric_names import DEFAULT_METRIC, average_of, is_average, is_set_name, parse_metric
from rm_gallery.training.objective_config import ObjectiveConfig, data_of, metrics_of, objective_problems
from rm_gallery.training.trainer_config import TrainerConfig, trainer_problems

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class OptimConfig:
    """`optim`: the optimizer and the learning-rate schedule."""

    __pydantic_config__ = {"extra": "forbid", "allow_inf_nan": False}

    name: Literal["adamw", "adamw_8bit", "adafactor", "muon"] = "adamw"
    """Optimizer. `adamw_8bit` has AdamW's two moments in 8 bits; `adafactor` a row and a column per matrix instead;
    `muon` one momentum buffer per matrix of a layer, and AdamW for everything else. See docs/optimizers.md."""
    lr: Annotated[float, Gt(0)] = 1e-6
    """Peak learning rate. `adafactor` multiplies it by the root mean square of each parameter."""
    betas: tuple[Annotated[float, Ge(0), Lt(1)], Annotated[float, Ge(0), Lt(1)]] = (0.9, 0.95)
    """AdamW's decay rates for the moving averages of the gradient and its square."""
    eps: Annotated[float, Gt(0)] = 1e-8
    """AdamW's epsilon."""
    weight_decay: Annotated[float, Ge(0)] = 0.0
    """Decoupled weight decay, of matrices only: biases and norms are excluded."""
    clip_grad: Annotated[float, Ge(0)] = 1.0
    """Maximum gradient norm; 0 disables clipping."""
    lr_scheduler: Literal["cosine", "wsd", "constant"] = "cosine"
    """Learning-rate schedule after the warm-up: `cosine`, `wsd` (warmup-stable-decay) or `constant`."""
    warmup_steps_ratio: Annotated[float, Ge(0), Le(1)] = 0.0
    """Fraction of all steps for the linear warm-up from 0."""
    min_lr_ratio: Annotated[float, Ge(0), Le(1)] = 0.0
    """Learning rate at the end of `cosine` and `wsd`, as a fraction of the peak."""
    decay_steps_ratio: Annotated[float, Ge(0), Le(1)] = 0.1
    """`wsd`: fraction of all steps for the linear decay at the end."""


@dataclass(frozen=True)
class TrainConfig:
    """The whole configuration of a training run."""

    __pydantic_config__ = {"extra": "forbid"}

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    from_environment: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)
    """Not a key: the texts `${oc.env:NAME}` of the keys that read the environment; see `rm_gallery.config.to_save`."""

    def as_dict(self) -> dict[str, Any]:
        """Nested plain dict of every value, defaults included. It may hold secrets: `to_save` is for files."""
        return {name: asdict(getattr(self, name)) for name in ("model", "data", "objective", "optim", "trainer")}

    def to_save(self) -> dict[str, Any]:
        """The same without secrets, for everything that is written: files, trackers, messages."""
        return to_save(self.as_dict(), self.from_environment)

    def to_compare(self) -> dict[str, Any]:
        """As `to_save`, with a short hash of each value from the environment, so that a change of it is noticed."""
        values = self.as_dict()
        return to_save(values, {key: _marked(key, text, values) for key, text in self.from_environment.items()})

    def to_yaml(self) -> str:
        """`to_save` as YAML, which `load_config` reads back in an environment that has the same variables."""
        return to_yaml(self.to_save())


def _marked(key: str, text: Any, values: Any) -> str:
    """`${oc.env:NAME} (value 3f2a)`. 16 bits show that a value has changed, and too little to guess it."""
    for part in key.split("."):
        values = values[part]
    digest = hashlib.blake2b(f"{key}={values!r}".encode(errors="surrogatepass"), digest_size=2).hexdigest()
    return f"{text} (value {digest})"


def load_config(
    file: str | None,
    overrides: Sequence[str],
    *,
    settings: Mapping[str, Any] | None = None,
    only_data: bool = False,
) -> TrainConfig:
    """Read a YAML file, apply `key=value` overrides, and check everything.

    file: path of the YAML file, or None to start from the defaults.
    settings: values by dotted key, which replace those of file and overrides.
    only_data: for commands that read data and do not train. The model may be missing then, and values of `optim` and
    `trainer` are not checked against each other; unknown keys and wrong types are still rejected.
    Raises UserError that lists all problems, one a line.
    """
    check = problems_of_reading if only_data else problems_of_training
    config = load(TrainConfig, file, overrides, settings=settings, prepare=normalize, check=check)
    config = replace(config, data=data_of(config.objective, config.model, config.data))
    if config.data.filter_overlong_prompts and config.data.truncation != "error":
        log.warning(
            "data.truncation=%s has no effect: data.filter_overlong_prompts=true drops long texts; "
            "set data.filter_overlong_prompts=false to truncate them",
            config.data.truncation,
        )
    if config.trainer.experiment_name or only_data:
        return config
    return replace(config, trainer=replace(config.trainer, experiment_name=_default_name(config)))


def _default_name(config: TrainConfig) -> str:
    """`20261128-093005-3f2a91bc`: the time, and a fingerprint of the configuration.

    A run of `default_local_dir` with the same fingerprint gives its name, so that the same command resumes it.
    """
    values = config.to_compare()
    for key in ("default_local_dir", "default_hdfs_dir", "experiment_name", "resume_mode"):
        del values["trainer"][key]
    digest = hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode(errors="surrogatepass")).hexdigest()
    new = f"{time.strftime('%Y%m%d-%H%M%S')}-{digest[:8]}"
    if config.trainer.resume_mode == "disable":
        return new
    earlier = Path(config.trainer.default_local_dir).expanduser().glob(f"*-{digest[:8]}")
    return max((path.name for path in earlier), default=new)


def normalize(values: dict[str, Any]) -> Iterator[Problem]:
    """Before types are checked: `logger: console` becomes a list with one item; `data` as in `normalize_data`.

    Names that other trainers use for a setting are answered with the key.
    """
    trainer = values.get("trainer")
    if isinstance(trainer, dict) and isinstance(trainer.get("logger"), str):
        trainer["logger"] = [trainer["logger"]]
    yield from _normalize_eval_sets(trainer)
    _normalize_sft(values)
    yield from _familiar_names(values, known_keys(TrainConfig))
    if isinstance(model := values.get("model"), dict):
        yield from _continue_adapter(model)
    yield from normalize_data(values.get("data"))


def _normalize_sft(values: dict[str, Any]) -> None:
    """Keys of other trainers for supervised fine-tuning: those of ours, or logged as without effect."""
    if values.pop("use_remove_padding", None) is not None:
        log.info("use_remove_padding has no effect: texts are packed without padding (model.packing)")
    if (values.pop("ulysses_sequence_parallel_size", None) or 1) != 1:
        log.warning(
            "ulysses_sequence_parallel_size has no effect: sequences are not split over GPUs, every GPU computes whole "
            "texts; model.enable_gradient_checkpointing=true and data.max_length bound their memory"
        )
    objective, data, trainer = (values.get(name) for name in ("objective", "data", "trainer"))
    if not isinstance(objective, dict) or objective.get("name") != "sft":
        return
    if isinstance(data, dict) and "micro_batch_size" in data:
        data["micro_batch_size_per_gpu"] = data.pop("micro_batch_size")
    defaults = {"save_best_metric": "val/loss", "default_local_dir": "./checkpoints/sft"}
    if isinstance(trainer, dict | None):
        values["trainer"] = defaults | (trainer or {})


def _normalize_eval_sets(trainer: Any) -> Iterator[Problem]:
    """`eval_sets: null` is none; what is neither a path nor an entry is a problem, as for `data.val_files`."""
    sets = trainer.get("eval_sets") if isinstance(trainer, Mapping) else None
    if isinstance(trainer, dict) and "eval_sets" in trainer and sets is None:
        trainer["eval_sets"] = {}
    if sets is not None and not isinstance(sets, Mapping):
        text = f"{EVAL_SETS}={sets!r}: must be names with files, e.g. trainer.eval_sets.math=math.parquet"
        yield Problem(EVAL_SETS, text)
        return
    for name, files in (sets or {}).items():
        key = f"{EVAL_SETS}.{name}"
        found = entry_problems(files, key) or ([f"{key} names no file; set it, or remove the set"] if not files else [])
        if found:
            yield Problem(EVAL_SETS, "\n".join(found))


_LORA_KEYS = {
    "rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout", "target_modules": "target_modules",
    "use_dora": "use_dora", "use_rslora": "use_rslora",
}  # fmt: skip
"""Keys of `model.lora`, and their names in adapter_config.json."""


def _continue_adapter(model: dict[str, Any]) -> Iterator[Problem]:
    """With an adapter's folder as the model, `model.lora` gets the adapter's settings; other ones are problems."""
    path, given = model.get("partial_pretrain"), model.get("lora") or {}
    if not isinstance(path, str) or not path or not isinstance(given, dict):
        return
    try:
        files = read_adapter_files(path, key="model.partial_pretrain")
    except UserError as error:
        yield Problem("model.partial_pretrain", str(error))
        return
    if files is None:
        return
    found = {key: files.config[name] for key, name in _LORA_KEYS.items() if files.config.get(name) is not None}
    targets = found.get("target_modules", [])
    found["target_modules"] = sorted(targets) if isinstance(targets, list) else [targets]
    for key, value in found.items():
        wanted = given.get(key, value)
        if key != "dropout" and (sorted(map(str, wanted)) if isinstance(wanted, list) else wanted) != value:
            yield Problem(
                f"model.lora.{key}",
                f"model.lora.{key}={wanted}, but the adapter of model.partial_pretrain={path} has {value}; remove the "
                "key to continue it, or merge it first (rm-gallery merge)",
            )
    kept = set(files.config.get("modules_to_save") or ())
    if more := [name for name in given.get("modules_to_save") or () if name not in kept]:
        yield Problem(
            "model.lora.modules_to_save",
            f"model.lora.modules_to_save: the adapter of model.partial_pretrain={path} has no {more[0]}; remove it, or "
            "merge the adapter first (rm-gallery merge)",
        )
    model["lora"] = {**found, **given}
    quantized = kind_of_quantization(files.quantization)
    if model.setdefault("quantization", quantized) != quantized:
        yield Problem(
            "model.quantization",
            f"model.quantization={model['quantization']}, but the adapter of model.partial_pretrain={path} was trained "
            f"with {quantized or 'null'}; remove the key to continue it, or merge it first (rm-gallery merge)",
        )


def _familiar_names(values: Mapping[str, Any], known: Mapping[str, Any], prefix: str = "") -> Iterator[Problem]:
    for name, value in values.items():
        key = f"{prefix}{name}"
        is_section = is_dataclass(known.get(key))
        if isinstance(value, Mapping) and is_section:
            yield from _familiar_names(value, known, f"{key}.")
        elif is_section and isinstance(value, str) and (own := key_for(key)):
            yield Problem(key, f"{key}={value}: {key} is a section; write {own}={value}")
        elif key not in known and (own := key_for(key)):
            yield Problem(key, f"{key}: unknown key; write {own}")


def problems_of_training(config: TrainConfig) -> Iterator[Problem]:
    """Problems that prevent training with this configuration."""
    if config.model.quantization is not None and config.model.lora.rank and find_spec("bitsandbytes") is None:
        key, text = (
            "model.quantization",
            f"model.quantization={config.model.quantization} needs the bitsandbytes package",
        )
        yield Problem(key, f"{text}: pip install 'rm-gallery[qlora]'")
    yield from model_problems(config.model)
    yield from objective_problems(config.objective, config.model, config.data, config.trainer)
    yield from data_problems(config.data)
    yield from optim_problems(config.optim)
    yield from trainer_problems(config.trainer)
    yield from _validation_problems(config)
    if config.trainer.reward_statistics == "normalize" and not has_validation(config.data):
        key = "trainer.reward_statistics"
        yield Problem(key, f"{key}=normalize: there is no validation; set data.val_files or data.val_fraction")


def _validation_problems(config: TrainConfig) -> Iterator[Problem]:
    """Of the sets to validate on, and of the metric that chooses the best checkpoint and stops early."""
    trainer = config.trainer
    for name, files in trainer.eval_sets.items():
        key = f"{EVAL_SETS}.{name}"
        if not is_set_name(name):
            yield Problem(
                key, f"{key}: a set is named by letters, digits, '_', '-' and '.', and not as a metric; rename it"
            )
        elif trainer.ema_decay is not None and is_average(name):
            yield Problem(key, f"{key}: with trainer.ema_decay, {name} names metrics of the average; rename the set")
        yield from problem_of(key, partial(check_set, name, files, key=key))
        if config.objective.name == "sft" and (named := named_benchmark(name, files)):
            yield Problem(key, f"{key}: objective.name=sft trains no rewards, which {named.benchmark.title} compares")
    is_used = trainer.save_best or trainer.early_stopping_patience is not None
    key = "trainer.early_stopping_patience" if trainer.early_stopping_patience else "trainer.save_best"
    if not (has_validation(config.data) or trainer.eval_sets):
        if is_used:
            yield Problem(key, f"{key}: there is no validation; set data.val_files or data.val_fraction")
        return
    if trainer.early_stopping_patience is not None and trainer.test_freq <= 0:
        yield Problem(key, f"{key}: validation runs after the last step only; set trainer.test_freq")
    if is_used or trainer.save_best_metric != DEFAULT_METRIC:
        yield from _metric_problems(config)


def _metric_problems(config: TrainConfig) -> Iterator[Problem]:
    key, name = "trainer.save_best_metric", config.trainer.save_best_metric
    kinds = [
        *(["accuracy"] if config.objective.name != "sft" else []),
        "loss",
        *metrics_of(config.objective, config.model),
    ]
    sets = {"": kinds} if has_validation(config.data) else {}
    for each, files in config.trainer.eval_sets.items():
        sets[each] = kinds if named_benchmark(each, files) is None else ["accuracy", "loss", "margin", "score"]
    if config.trainer.ema_decay is not None:
        sets |= {average_of(each): of_set for each, of_set in sets.items()}
    known = [f"val/{each}/{kind}" if each else f"val/{kind}" for each in sets for kind in sets[each]]
    parsed = parse_metric(name)
    if parsed is not None and not parsed.direction:
        yield Problem(key, f"{key}={name}: neither higher nor lower is better; set one of {', '.join(known)}")
    elif parsed is None or parsed.kind not in sets.get(parsed.set, ()):
        hint = nearest(name, known)
        yield Problem(key, f"{key}={name}: validation has no such metric.{hint} It has {', '.join(known)}")


def problems_of_reading(config: TrainConfig) -> Iterator[Problem]:
    """Problems that prevent reading the data, and loading the tokenizer if a model is given."""
    if config.model.partial_pretrain:
        yield from _model_folder_problems(config.model)
    yield from data_problems(config.data)


def model_problems(model: ModelConfig) -> Iterator[Problem]:
    """Of the section `model`."""
    yield from _model_folder_problems(model)
    if not 0 <= model.dropout < 1:
        yield Problem("model.dropout", f"model.dropout={model.dropout}: must be at least 0 and below 1")
    if model.lora.rank:
        yield from _lora_problems(model)
    fsdp = model.fsdp_config
    if fsdp.master_weights == "bf16_stochastic" and fsdp.model_dtype == "fp32":
        key = "model.fsdp_config.master_weights"
        yield Problem(
            key, f"{key}=bf16_stochastic with model_dtype=fp32: the weights are in bf16; set model_dtype=bf16 or auto"
        )
    if model.quantization is not None:
        yield from _quantization_problems(model)
    if model.freeze is not None and model.resize_embeddings:
        yield Problem(
            "model.freeze",
            f"model.freeze={model.freeze} with model.resize_embeddings=true: new embedding rows must be trained, and "
            "the embeddings would be frozen; set one of them",
        )


def _lora_problems(model: ModelConfig) -> Iterator[Problem]:
    key, value = "model.lora.rank", f"model.lora.rank={model.lora.rank}"
    if find_spec("peft") is None:
        yield Problem(key, f"{value} needs the peft package: pip install 'rm-gallery[lora]'")
    if not model.lora.target_modules:
        yield Problem("model.lora.target_modules", "model.lora.target_modules is empty; set all-linear or names")
    if model.resize_embeddings:
        yield Problem(
            key, f"{value} with model.resize_embeddings=true: an adapter has no embedding rows; set one of them"
        )
    if model.freeze is not None:
        yield Problem(
            "model.freeze",
            f"model.freeze={model.freeze} with {value}: LoRA freezes all weights but its own and the reward head; "
            "remove one of them (model.lora.target_modules chooses where LoRA trains)",
        )
    if model.trust_remote_code:
        yield Problem(key, f"{value} with model.trust_remote_code=true is not implemented; set one of them")


def _quantization_problems(model: ModelConfig) -> Iterator[Problem]:
    key, value = "model.quantization", f"model.quantization={model.quantization}"
    if not model.lora.rank:
        yield Problem(
            key, f"{value} without LoRA: quantized weights cannot be trained; set model.lora.rank, or remove it"
        )
    if model.strategy in ("fsdp", "fsdp2"):
        yield Problem(
            key,
            f"{value} with model.strategy={model.strategy}: FSDP2 shards no quantized weights; set ddp, which "
            "holds them on every rank",
        )
    if model.fsdp_config.offloads_weights:
        yield Problem(key, f"{value} with model.fsdp_config.cpu_offload=true is not implemented; set one of them")


def _model_folder_problems(model: ModelConfig) -> Iterator[Problem]:
    key, path = "model.partial_pretrain", model.partial_pretrain
    is_local = path.startswith((".", "/", "~")) or path.count("/") > 1  # a hub name is owner/model
    if not path:
        yield Problem(key, f"{key} is not set; give a model folder or hub name to start from")
    elif is_local and not Path(path).expanduser().is_dir():
        yield Problem(key, f"{key}={path}: no such folder (working directory {os.getcwd()})")


def optim_problems(optim: OptimConfig) -> Iterator[Problem]:
    """Of the section `optim`."""
    warmup, decay = optim.warmup_steps_ratio, optim.decay_steps_ratio
    if optim.lr_scheduler == "wsd" and warmup + decay > 1:
        key = "optim.warmup_steps_ratio"
        yield Problem(key, f"{key}={warmup} with decay_steps_ratio={decay}: must be at most 1 together for wsd")
