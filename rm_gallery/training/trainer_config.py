"""The section `trainer` of a training run's configuration, and its checks. Loads no torch, as config.py."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Lt

from rm_gallery.config import problem_of
from rm_gallery.data.sources.config import Files
from rm_gallery.errors import Problem, nearest
from rm_gallery.training.metric_names import DEFAULT_METRIC
from rm_gallery.training.trackers import TRACKERS, TrackerConfig


@dataclass(frozen=True)
class LoopConfig:
    """Part of `trainer`: length of the run, validation, and when to stop early."""

    __pydantic_config__ = {"extra": "forbid"}

    total_epochs: Annotated[int, Ge(1)] = 1
    """Epochs over the training data."""
    total_training_steps: Annotated[int, Ge(1)] | None = None
    """Optimizer steps; overrides `total_epochs`."""
    test_freq: int = -1
    """Steps between validations; the last step is always validated. 0 or less: only after the last one."""
    val_before_train: bool = False
    """Validate before the first step as well."""
    eval_sets: Mapping[str, Files] = field(default_factory=dict)
    """Further sets to validate on, by name: `{math: math.parquet}`, each what `data.val_files` takes, or a benchmark
    (`{rm: rm-bench}` of the hub, `{rewardbench-2: FOLDER}`). Their metrics are `val/NAME/accuracy` and so on, apart
    from those of the validation data. They do not change what is trained."""
    save_best_metric: str = DEFAULT_METRIC
    """Metric for `save_best` and `early_stopping_patience`: any accuracy, margin, score of a benchmark (higher is
    better) or loss (lower is) of a validation, e.g. `val/loss`, `val/NAME/accuracy` of a set or
    `val/accuracy/SOURCE`."""
    early_stopping_patience: Annotated[int, Ge(1)] | None = None
    """Stop after this many consecutive validations without a better `save_best_metric`; null never stops early."""
    ema_decay: Annotated[float, Gt(0), Lt(1)] | None = None
    """Keep an exponential moving average (EMA) of the weights with this decay, e.g. 0.999; null keeps none. It is
    validated too, as `val/ema/accuracy`, and each checkpoint holds it as a model of its own, `global_step_N/ema`."""
    max_bad_steps: Annotated[int, Ge(1)] = 10
    """Stop after this many consecutive steps with a non-finite loss or gradient."""
    seed: Annotated[int, Ge(0)] = 0
    """Random seed of the new reward head, the data order and dropout."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to train on; `auto` uses a GPU if there is one."""
    timeout_seconds: Annotated[float, Gt(0)] = 1800.0
    """With several processes: stop when a rank has kept the others waiting this long; the message names the rank."""


@dataclass(frozen=True)
class CheckpointConfig:
    """Part of `trainer`: where to save, what to keep, and what to resume from."""

    __pydantic_config__ = {"extra": "forbid"}

    default_local_dir: str = "./checkpoints/bt"
    """Parent of the run directory; `experiment_name` is appended unless the path ends with it already. With
    `objective.name=sft` the default is `./checkpoints/sft`."""
    save_freq: int = -1
    """Steps between checkpoints; one is always saved after the last step. 0 or less: only after the last one."""
    export_dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Dtype of the saved weights; `auto` is `model.fsdp_config.model_dtype`."""
    resume_mode: str = "auto"
    """`auto` resumes from the newest intact checkpoint of the run directory; with `disable`, a run directory that has
    checkpoints is an error; the path or URL of a `global_step_N` folder resumes from that checkpoint."""
    max_ckpt_to_keep: Annotated[int, Ge(1)] | None = None
    """Number of newest checkpoints to keep; null keeps all."""
    save_best: bool = False
    """Save after each validation with the best `save_best_metric` so far, and never delete that checkpoint. best.json
    names it."""
    async_save: bool = False
    """Save asynchronously: training waits only for the copy to host memory, which takes the size of this rank's shard
    of weights and optimizer state."""
    reward_statistics: Literal["record", "normalize"] = "record"
    """Mean and standard deviation of the validation rewards of a checkpoint's step: `record` keeps them in its record,
    for `score --normalize` and `RewardScorer(normalize=True)`; `normalize` also writes them into config.json under the
    names that OpenRLHF and vLLM use."""
    license: str = "unknown"
    """Licence in the model card of each checkpoint, e.g. `apache-2.0`."""
    default_hdfs_dir: str | None = None
    """Copy finished checkpoints to this URL as well: any that fsspec supports (hdfs://, s3://, gs://).
    `experiment_name` is appended as for the run directory. Nothing is ever deleted there."""


@dataclass(frozen=True)
class TrainerConfig(LoopConfig, CheckpointConfig, TrackerConfig):
    """`trainer`: duration, checkpoints, trackers."""

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
                f"run pip install 'rm-gallery[{name}]', or remove it from trainer.logger",
            )
    if trainer.log_freq < 1:
        yield Problem("trainer.log_freq", f"trainer.log_freq={trainer.log_freq}: must be at least 1")
    if trainer.experiment_name in (".", "..") or "/" in trainer.experiment_name:
        key = "trainer.experiment_name"
        yield Problem(key, f"{key}={trainer.experiment_name!r}: must be a folder name without '/'")
    if trainer.resume_mode not in ("auto", "disable") and not re.search(r"/|^global_step_", trainer.resume_mode):
        yield Problem(
            "trainer.resume_mode",
            f"trainer.resume_mode={trainer.resume_mode}: must be auto, disable or the path of a global_step_N folder."
            f"{nearest(trainer.resume_mode, ('auto', 'disable'))}",
        )
    if trainer.experiment_name:
        yield from problem_of(
            "trainer.default_local_dir",
            lambda: refuse_earlier_run(trainer.run_dir, anyway=trainer.resume_mode == "disable"),
        )
