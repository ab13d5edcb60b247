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
from typing import Any, TypeVar, get_args

from rm_gallery.data.batching.plan import PackingConfig
from rm_gallery.data.custom import check_custom_class
from rm_gallery.data.sources import SourceConfig, check_val_fraction, entry_problems, find_files
from rm_gallery.data.token_cache.prepare import PrepareConfig
from rm_gallery.errors import UserError, nearest
from rm_gallery.modeling.config import ModelConfig
from rm_gallery.training.checkpoint import CheckpointConfig, refuse_earlier_run
from rm_gallery.training.compose import compose
from rm_gallery.training.optim import OptimConfig
from rm_gallery.training.problems import key_of, known_keys, sentence
from rm_gallery.training.trackers import TRACKERS, TrackerConfig
from rm_gallery.training.trainer import LoopConfig

log = logging.getLogger(__name__)

_FILES = ("data.train_files", "data.val_files")


@dataclass(frozen=True)
class DataConfig(SourceConfig, PrepareConfig, PackingConfig):
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


Config = TypeVar("Config", bound=TrainConfig)


def load_config(file: str | None, overrides: Sequence[str], *, only_data: bool = False) -> TrainConfig:
    """Read a YAML file through Hydra, apply `key=value` overrides, and check everything.

    file: path of the YAML file, or None for the defaults of the code.
    only_data: for commands that read data and train nothing. No model has to be named then, and what is wrong with
    the values of `optim` and `trainer` is left to training; unknown keys and wrong types are refused all the same.
    Raises UserError that lists all problems, one a line.
    """
    values = read_values(file, overrides, TrainConfig)
    config: TrainConfig = check_config(values, only_data=only_data)
    if config.data.filter_overlong_prompts and config.data.truncation != "error":
        log.warning(
            "data.truncation=%s does nothing while data.filter_overlong_prompts=true leaves long texts out; "
            "set data.filter_overlong_prompts=false to cut them",
            config.data.truncation,
        )
    return config


def read_values(file: str | None, overrides: Sequence[str], kind: type[TrainConfig]) -> dict[str, Any]:
    """Nested plain values of a YAML file with overrides applied, for the keys of this kind of configuration."""
    text_keys = {key for key, hint in known_keys(kind).items() if str in (hint, *get_args(hint))}
    return compose(file, overrides, text_keys=text_keys)


def check_config(
    values: Mapping[str, Any],
    kind: type[Config] = TrainConfig,  # type: ignore[assignment]
    *,
    only_data: bool = False,
    unused: Sequence[str] = (),
) -> Config:
    """Typed configuration from nested plain values; `only_data` as for `load_config`.

    unused: keys and sections whose contradictions and missing files do not matter here.
    Raises UserError that lists every unknown key, wrong type, value out of range and contradiction, one a line.
    """
    from pydantic import TypeAdapter, ValidationError

    values = _tidied(values)
    known = known_keys(kind)
    adapter = TypeAdapter(kind)
    problems = {**_switches_for_numbers(values, known), **_entry_problems(values)}
    for key in _FILES:
        if key in problems:  # pydantic would say the same once for each type that an entry may have
            _remove(values, key)
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
    found = [text for text in _problems(config) if not only_data or _concerns_data(text, config)]
    sentences = [*problems.values(), *(text for text in found if not _is_about(text, [*problems, *unused]))]
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


def _entry_problems(values: Mapping[str, Any]) -> dict[str, str]:
    """Sentences, by key, for files that are neither paths nor sections of keys."""
    data = values.get("data")
    found = {key: entry_problems(data.get(key[5:]), key) for key in _FILES} if isinstance(data, Mapping) else {}
    return {key: "\n".join(sentences) for key, sentences in found.items() if sentences}


def _remove(values: dict[str, Any], key: str) -> None:
    *sections, name = key.split(".")
    for section in sections:
        values = values.get(section, {})
    values.pop(name, None)


def _is_about(sentence: str, keys: Iterable[str]) -> bool:
    """Whether a sentence, which begins with its key, is about one of these keys or a key in such a section."""
    return any(re.match(rf"{re.escape(key)}(?!\w)", sentence) for key in keys)


def _concerns_data(sentence: str, config: TrainConfig) -> bool:
    """Whether a problem stops a command that only reads data."""
    return _is_about(sentence, ("data", "model.partial_pretrain") if config.model.partial_pretrain else ("data",))


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
    if data.custom_cls.name and data.input_style == "text":
        problems.append("data.input_style=text: data.custom_cls gives messages; leave one of the two out")
    if data.custom_cls.name and data.format != "auto":
        problems.append(f"data.format={data.format}: data.custom_cls reads the rows; leave one of the two out")
    if trainer.resume_mode not in ("auto", "disable") and not re.search(r"/|^global_step_", trainer.resume_mode):
        problems.append(
            f"trainer.resume_mode={trainer.resume_mode}: must be auto, disable or the path of a global_step_N folder."
            f"{nearest(trainer.resume_mode, ('auto', 'disable'))}"
        )
    for check in (
        lambda: refuse_earlier_run(trainer.run_dir, anyway=trainer.resume_mode == "disable"),
        lambda: check_val_fraction(data),
        lambda: check_custom_class(data.custom_cls),
    ):
        try:
            check()
        except UserError as error:
            problems.append(str(error))
    return problems


def _is_local(path: str) -> bool:
    return path.startswith((".", "/", "~")) or path.count("/") > 1  # a hub name is owner/model
