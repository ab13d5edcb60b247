"""The configuration of a run: sections made of their owners' dataclasses, all problems named at once."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, field, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

from rm_gallery.data.formats import FormatConfig, check_custom_class
from rm_gallery.data.packing import PackingConfig
from rm_gallery.data.source import SourceConfig, find_files
from rm_gallery.data.tokenize import TokenizeConfig
from rm_gallery.errors import UserError, nearest
from rm_gallery.modeling.parallel import ModelConfig
from rm_gallery.training.checkpoint import CheckpointConfig, refuse_earlier_run
from rm_gallery.training.compose import compose
from rm_gallery.training.optim import OptimConfig
from rm_gallery.training.problems import key_of, known_keys, sentence
from rm_gallery.training.trackers import TRACKERS, TrackerConfig
from rm_gallery.training.trainer import LoopConfig

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DataConfig(SourceConfig, FormatConfig, TokenizeConfig, PackingConfig):
    """`data`: where the pairs lie, how a row is read, how texts become tokens, how tokens become batches."""

    @property
    def budget(self) -> int:
        """Most tokens of one micro-batch."""
        return self.token_budget(self.max_length)


@dataclass(frozen=True)
class TrainerConfig(LoopConfig, CheckpointConfig, TrackerConfig):
    """`trainer`: how long, where to save, what to report to."""

    @property
    def run_dir(self) -> Path:
        """`default_local_dir`, with `experiment_name` appended unless it ends with it already."""
        folder = Path(self.default_local_dir).expanduser()
        return folder if folder.name == self.experiment_name else folder / self.experiment_name

    @property
    def copies_url(self) -> str | None:
        """`default_hdfs_dir`, with `experiment_name` appended likewise; None without one."""
        if self.default_hdfs_dir is None:
            return None
        url = self.default_hdfs_dir.rstrip("/")
        return url if url.rpartition("/")[2] == self.experiment_name else f"{url}/{self.experiment_name}"


@dataclass(frozen=True)
class TrainConfig:
    """All of a training run."""

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
        from omegaconf import OmegaConf

        return OmegaConf.to_yaml(OmegaConf.create(self.as_dict()))


def load_config(file: str | None, overrides: Sequence[str]) -> TrainConfig:
    """Read a YAML file through Hydra, apply `key=value` overrides, and check everything.

    file: path of the YAML file, or None for the defaults of the code.
    Raises UserError that lists all problems, one a line.
    """
    text_keys = {key for key, hint in known_keys(TrainConfig).items() if str in (hint, *get_args(hint))}
    config = check_config(compose(file, overrides, text_keys=text_keys))
    if config.data.filter_overlong_prompts and config.data.truncation != "error":
        log.warning(
            "data.truncation=%s does nothing while data.filter_overlong_prompts=true leaves long texts out; "
            "set data.filter_overlong_prompts=false to cut them",
            config.data.truncation,
        )
    return config


def check_config(values: Mapping[str, Any]) -> TrainConfig:
    """Typed configuration from nested plain values.

    Raises UserError that lists every unknown key, wrong type, value out of range and contradiction, one a line.
    """
    from pydantic import TypeAdapter, ValidationError

    values = _tidied(values)
    known = known_keys(TrainConfig)
    adapter = TypeAdapter(TrainConfig)
    problems = _switches_for_numbers(values, known)
    try:
        config = adapter.validate_python(values)
    except ValidationError as error:
        for problem in error.errors(include_url=False):
            key = key_of(problem, known)
            problems.setdefault(key, sentence(key, problem, values, known))
        # Without the keys that are wrong the rest can still be checked, so that all is said at once.
        for key in problems:
            _remove(values, key)
        config = adapter.validate_python(values)
    sentences = [*problems.values(), *(text for text in _problems(config) if not _is_about(text, problems))]
    if sentences:
        raise UserError("\n".join(sentences))
    return config


def _tidied(values: Mapping[str, Any]) -> dict[str, Any]:
    """A copy in which an empty section means its defaults, `logger: console` a list of one, `val_files: null` none."""
    sections = {each.name for each in fields(TrainConfig)}
    result = {key: deepcopy(value) for key, value in values.items() if value is not None or key not in sections}
    trainer, data = result.get("trainer"), result.get("data")
    if isinstance(trainer, dict) and isinstance(trainer.get("logger"), str):
        trainer["logger"] = [trainer["logger"]]
    if isinstance(data, dict) and data.get("val_files", "") is None:
        data["val_files"] = ""
    return result


def _switches_for_numbers(values: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, str]:
    """Sentences, by key, for true and false where a number belongs; pydantic would read them as 1 and 0."""
    found = {}
    for key, hint in known.items():
        value: Any = values
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if isinstance(value, bool) and {int, float} & {hint, *get_args(hint)}:
            found[key] = f"{key}={str(value).lower()}: must be a number"
    return found


def _remove(values: dict[str, Any], key: str) -> None:
    *sections, name = key.split(".")
    for section in sections:
        values = values.get(section, {})
    values.pop(name, None)


def _is_about(sentence: str, keys: Iterable[str]) -> bool:
    """Whether a sentence, which begins with its key, is about one of these keys or a key in such a section."""
    return any(re.match(rf"{re.escape(key)}(?!\w)", sentence) for key in keys)


def _problems(config: TrainConfig) -> list[str]:
    """Every contradiction and every missing file, as sentences."""
    data, trainer = config.data, config.trainer
    problems = []
    if not config.model.partial_pretrain:
        problems.append("model.partial_pretrain is not set; name the model folder to start from")
    elif _is_local(config.model.partial_pretrain) and not Path(config.model.partial_pretrain).expanduser().is_dir():
        problems.append(
            f"model.partial_pretrain={config.model.partial_pretrain}: no such folder (working directory {os.getcwd()})"
        )
    if not data.train_files:
        problems.append("data.train_files is not set; name a parquet file or a folder of them")
    for key, paths in (("data.train_files", data.train_files), ("data.val_files", data.val_files)):
        try:
            if paths:
                find_files(paths, key=key)
        except UserError as error:
            problems.append(str(error))
    for key in ("train_batch_size", "micro_batch_size_per_gpu", "max_length", "max_tokens_per_micro_batch"):
        value = getattr(data, key)
        if value is not None and value < 1:
            problems.append(f"data.{key}={value}: must be at least 1")
    if not 0 <= config.model.dropout < 1:
        problems.append(f"model.dropout={config.model.dropout}: must be at least 0 and below 1")
    for name in trainer.logger:
        if name not in TRACKERS:
            problems.append(f"trainer.logger={name}: must be one of {', '.join(TRACKERS)}.{nearest(name, TRACKERS)}")
        elif name != "console" and find_spec(name) is None:
            problems.append(
                f"trainer.logger={name}: the package is not installed; "
                f"run pip install 'rm-gallery[{name}]', or leave it out of trainer.logger"
            )
    warmup, decay = config.optim.warmup_steps_ratio, config.optim.decay_steps_ratio
    if config.optim.lr_scheduler == "wsd" and warmup + decay > 1:
        problems.append(f"optim.warmup_steps_ratio={warmup} with decay_steps_ratio={decay}: together at most 1 for wsd")
    if trainer.log_freq < 1:
        problems.append(f"trainer.log_freq={trainer.log_freq}: must be at least 1")
    if trainer.experiment_name in ("", ".", "..") or "/" in trainer.experiment_name:
        problems.append(f"trainer.experiment_name={trainer.experiment_name!r}: must be a folder name without '/'")
    try:
        refuse_earlier_run(trainer.run_dir, anyway=trainer.resume_mode == "disable")
    except UserError as error:
        problems.append(str(error))
    if trainer.resume_mode not in ("auto", "disable") and not re.search(r"/|^global_step_", trainer.resume_mode):
        problems.append(
            f"trainer.resume_mode={trainer.resume_mode}: must be auto, disable or the path of a global_step_N folder."
            f"{nearest(trainer.resume_mode, ('auto', 'disable'))}"
        )
    try:
        check_custom_class(data.custom_cls)
    except UserError as error:
        problems.append(str(error))
    return problems


def _is_local(path: str) -> bool:
    return path.startswith((".", "/", "~")) or path.count("/") > 1  # a hub name is owner/model
