"""The configuration of a training run: the sections of TrainConfig, and what must hold between their fields.

Loads no torch: `show-data` and `estimate` read the same configuration.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt

from rm_gallery.config import load, problem_of, to_yaml
from rm_gallery.data.config import DataConfig, data_problems, normalize_data
from rm_gallery.errors import Problem, nearest
from rm_gallery.modeling.config import ModelConfig
from rm_gallery.training.trackers import TRACKERS, TrackerConfig

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class OptimConfig:
    """`optim`: AdamW and its schedule."""

    __pydantic_config__ = {"extra": "forbid", "allow_inf_nan": False}

    lr: Annotated[float, Gt(0)] = 1e-6
    """Highest learning rate."""
    betas: tuple[Annotated[float, Ge(0), Lt(1)], Annotated[float, Ge(0), Lt(1)]] = (0.9, 0.95)
    """AdamW's decay rates of the gradient's mean and of its square."""
    eps: Annotated[float, Gt(0)] = 1e-8
    """AdamW's term against division by zero."""
    weight_decay: Annotated[float, Ge(0)] = 0.0
    """On matrices only: biases and norms are not decayed."""
    clip_grad: Annotated[float, Ge(0)] = 1.0
    """Largest gradient norm; 0 does not clip."""
    lr_scheduler: Literal["cosine", "wsd", "constant"] = "cosine"
    """Course of the rate after the warm-up: `cosine`, `wsd` (warmup-stable-decay) or `constant`."""
    warmup_steps_ratio: Annotated[float, Ge(0), Le(1)] = 0.0
    """Share of all steps in which the rate rises from 0."""
    min_lr_ratio: Annotated[float, Ge(0), Le(1)] = 0.0
    """Rate at the end of `cosine` and `wsd`, as a share of the highest."""
    decay_steps_ratio: Annotated[float, Ge(0), Le(1)] = 0.1
    """`wsd`: share of all steps in which the rate falls at the end."""


@dataclass(frozen=True)
class LoopConfig:
    """Part of `trainer`: how long, how often, and when to give up."""

    __pydantic_config__ = {"extra": "forbid"}

    total_epochs: Annotated[int, Ge(1)] = 1
    """Passes over the training data."""
    total_training_steps: Annotated[int, Ge(1)] | None = None
    """Optimizer steps; takes the place of `total_epochs`."""
    test_freq: int = -1
    """Steps between validations; one is always made at the end. 0 or less: only that one."""
    val_before_train: bool = False
    """Validate before the first step as well."""
    max_bad_steps: Annotated[int, Ge(1)] = 10
    """Stop after so many steps in a row whose loss or gradient is not finite."""
    seed: Annotated[int, Ge(0)] = 0
    """Of the new reward head, the order of data, and dropout."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; `auto` takes a GPU when there is one."""
    timeout_seconds: Annotated[float, Gt(0)] = 1800.0
    """Several processes: stop when one has been waited for so long; the message names it."""


@dataclass(frozen=True)
class CheckpointConfig:
    """Part of `trainer`: where and what to save, and where to go on from."""

    __pydantic_config__ = {"extra": "forbid"}

    default_local_dir: str = "./checkpoints/bt"
    """Run folder; `experiment_name` is appended unless it ends with it already."""
    save_freq: int = -1
    """Steps between checkpoints; one is always written at the end. 0 or less: only that one."""
    export_dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Type of the saved weights; `auto` is `model.fsdp_config.model_dtype`."""
    resume_mode: str = "auto"
    """`auto` goes on from the newest whole checkpoint of the run folder, `disable` refuses a folder that holds some;
    the path or URL of a `global_step_N` folder goes on from that one."""
    max_ckpt_to_keep: Annotated[int, Ge(1)] | None = None
    """Newest checkpoints that are kept; null keeps all."""
    save_best: bool = False
    """Save after each validation with the highest `val/accuracy` so far, and never delete that checkpoint; best.json
    names it."""
    async_save: bool = False
    """Write in the background: training waits for the copy to host memory only, which needs room there for this
    process's share of weights and optimizer state."""
    default_hdfs_dir: str | None = None
    """A second place that finished checkpoints are copied to: any URL that fsspec knows (hdfs://, s3://, gs://).
    `experiment_name` is appended as for the run folder; nothing is ever deleted there."""


@dataclass(frozen=True)
class TrainerConfig(LoopConfig, CheckpointConfig, TrackerConfig):
    """`trainer`: how long to train, where to save, what to report to."""

    @property
    def run_dir(self) -> Path:
        """`default_local_dir`, with `experiment_name` appended unless it ends with it already."""
        folder = Path(self.default_local_dir).expanduser()
        return folder if folder.name == self.experiment_name else folder / self.experiment_name

    @property
    def mirror_url(self) -> str | None:
        """`default_hdfs_dir`, with `experiment_name` appended likewise; None if it is not set."""
        if self.default_hdfs_dir is None:
            return None
        url = self.default_hdfs_dir.rstrip("/")
        return url if url.rpartition("/")[2] == self.experiment_name else f"{url}/{self.experiment_name}"


@dataclass(frozen=True)
class TrainConfig:
    """The whole configuration of a training run."""

    __pydantic_config__ = {"extra": "forbid"}

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)

    def as_dict(self) -> dict[str, Any]:
        """Nested plain dict of every value, defaults included."""
        return asdict(self)

    def to_yaml(self) -> str:
        """The same as YAML, which `load_config` reads back."""
        return to_yaml(self.as_dict())


def load_config(file: str | None, overrides: Sequence[str], *, only_data: bool = False) -> TrainConfig:
    """Read a YAML file, apply `key=value` overrides, and check everything.

    file: path of the YAML file, or None to start from the defaults.
    only_data: for commands that read data and do not train. The model may be missing then, and values of `optim` and
    `trainer` are not checked against each other; unknown keys and wrong types are refused all the same.
    Raises UserError that lists all problems, one a line.
    """
    check = problems_of_reading if only_data else problems_of_training
    config = load(TrainConfig, file, overrides, prepare=normalize, check=check)
    if config.data.filter_overlong_prompts and config.data.truncation != "error":
        log.warning(
            "data.truncation=%s does nothing while data.filter_overlong_prompts=true leaves long texts out; "
            "set data.filter_overlong_prompts=false to cut them",
            config.data.truncation,
        )
    return config


def normalize(values: dict[str, Any]) -> Iterator[Problem]:
    """Before types are checked: `logger: console` means a list of one; `data` as in `normalize_data`."""
    trainer = values.get("trainer")
    if isinstance(trainer, dict) and isinstance(trainer.get("logger"), str):
        trainer["logger"] = [trainer["logger"]]
    return normalize_data(values.get("data"))


def problems_of_training(config: TrainConfig) -> Iterator[Problem]:
    """Everything that keeps this configuration from training."""
    yield from model_problems(config.model)
    yield from data_problems(config.data)
    yield from optim_problems(config.optim)
    yield from trainer_problems(config.trainer)


def problems_of_reading(config: TrainConfig) -> Iterator[Problem]:
    """Everything that keeps a command from reading the data, with the model's tokenizer if a model is named."""
    if config.model.partial_pretrain:
        yield from _model_folder_problems(config.model)
    yield from data_problems(config.data)


def model_problems(model: ModelConfig) -> Iterator[Problem]:
    """Of the section `model`."""
    yield from _model_folder_problems(model)
    if not 0 <= model.dropout < 1:
        yield Problem("model.dropout", f"model.dropout={model.dropout}: must be at least 0 and below 1")


def _model_folder_problems(model: ModelConfig) -> Iterator[Problem]:
    key, path = "model.partial_pretrain", model.partial_pretrain
    is_local = path.startswith((".", "/", "~")) or path.count("/") > 1  # a hub name is owner/model
    if not path:
        yield Problem(key, f"{key} is not set; name the model folder to start from")
    elif is_local and not Path(path).expanduser().is_dir():
        yield Problem(key, f"{key}={path}: no such folder (working directory {os.getcwd()})")


def optim_problems(optim: OptimConfig) -> Iterator[Problem]:
    """Of the section `optim`."""
    warmup, decay = optim.warmup_steps_ratio, optim.decay_steps_ratio
    if optim.lr_scheduler == "wsd" and warmup + decay > 1:
        key = "optim.warmup_steps_ratio"
        yield Problem(key, f"{key}={warmup} with decay_steps_ratio={decay}: together at most 1 for wsd")


def trainer_problems(trainer: TrainerConfig) -> Iterator[Problem]:
    """Of the section `trainer`."""
    from rm_gallery.training.checkpoint.folders import refuse_earlier_run  # loads torch

    for name in trainer.logger:
        if name not in TRACKERS:
            text = f"trainer.logger={name}: must be one of {', '.join(TRACKERS)}.{nearest(name, TRACKERS)}"
            yield Problem("trainer.logger", text)
        elif name != "console" and find_spec(name) is None:
            yield Problem(
                "trainer.logger",
                f"trainer.logger={name}: the package is not installed; "
                f"run pip install 'rm-gallery[{name}]', or leave it out of trainer.logger",
            )
    if trainer.log_freq < 1:
        yield Problem("trainer.log_freq", f"trainer.log_freq={trainer.log_freq}: must be at least 1")
    if trainer.experiment_name in ("", ".", "..") or "/" in trainer.experiment_name:
        key = "trainer.experiment_name"
        yield Problem(key, f"{key}={trainer.experiment_name!r}: must be a folder name without '/'")
    if trainer.resume_mode not in ("auto", "disable") and not re.search(r"/|^global_step_", trainer.resume_mode):
        yield Problem(
            "trainer.resume_mode",
            f"trainer.resume_mode={trainer.resume_mode}: must be auto, disable or the path of a global_step_N folder."
            f"{nearest(trainer.resume_mode, ('auto', 'disable'))}",
        )
    yield from problem_of(
        "trainer.default_local_dir",
        lambda: refuse_earlier_run(trainer.run_dir, anyway=trainer.resume_mode == "disable"),
    )
