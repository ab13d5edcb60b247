"""The configuration of a run: sections composed of their owners' dataclasses, read from Hydra, checked at once."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

from rm_gallery.data.formats import FormatConfig, check_custom_class
from rm_gallery.data.packing import PackingConfig
from rm_gallery.data.source import SourceConfig, find_files
from rm_gallery.data.tokenize import TokenizeConfig
from rm_gallery.errors import UserError, nearest
from rm_gallery.modeling.parallel import ModelConfig
from rm_gallery.training.checkpoint import CheckpointConfig
from rm_gallery.training.optim import OptimConfig
from rm_gallery.training.trackers import TRACKERS, TrackerConfig
from rm_gallery.training.trainer import LoopConfig


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
    return check_config(compose(file, overrides))


def compose(file: str | None, overrides: Sequence[str]) -> dict[str, Any]:
    """The YAML file with overrides applied, as Hydra composes it: defaults lists and override grammar included.

    Hydra knows only keys that the file holds; here every override may also add one, and `check_config` decides
    which keys exist. Hydra writes no files this way.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    path = None if file is None else Path(file).expanduser().absolute()
    if path is not None and not path.is_file():
        raise UserError(f"{file}: no such configuration file (working directory {Path.cwd()})")
    folder = Path(__file__).parent.absolute() if path is None else path.parent
    arguments = [_may_add(override, folder) for override in overrides]
    try:
        with initialize_config_dir(str(folder), version_base="1.3", job_name="rm-gallery"):
            composed = hydra_compose(None if path is None else path.stem, arguments)
        container = OmegaConf.to_container(composed, resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_hydra_sentence(error, file)) from error
    except Exception as error:  # YAML that cannot be parsed ends in an error of the YAML library
        if type(error).__module__.startswith("yaml"):
            raise UserError(f"{file}: not valid YAML ({' '.join(str(error).split())})") from error
        raise
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def _may_add(override: str, folder: Path) -> str:
    """`key=value` as Hydra's `++key=value`, which sets a key whether or not the file holds it."""
    key, equals, _ = override.partition("=")
    if not equals and not override.startswith("~"):
        raise UserError(f"{override!r}: an override is written key=value, as in optim.lr=1e-6")
    is_plain = re.fullmatch(r"[A-Za-z_][\w.]*", key) is not None
    is_hydra = key.startswith("hydra.") or (folder / key).is_dir()
    return f"++{override}" if is_plain and not is_hydra else override


def _hydra_sentence(error: Exception, file: str | None) -> str:
    text = " ".join(str(error).split()).partition(" See https://")[0]
    if "LexerNoViableAltException" in text or "mismatched input" in text or "no viable alternative" in text:
        return f'{text}; a value with "=", spaces or commas needs quotes, as in \'trainer.experiment_name="a=b"\''
    return f"{file or 'configuration'}: {text}"


def check_config(values: Mapping[str, Any]) -> TrainConfig:
    """Typed configuration from nested plain values.

    Raises UserError that lists every unknown key, wrong type, value out of range and contradiction, one a line.
    """
    from pydantic import TypeAdapter, ValidationError

    values = _lists_from_strings(values)
    adapter = TypeAdapter(TrainConfig)
    problems: list[str] = []
    try:
        config = adapter.validate_python(values)
    except ValidationError as error:
        problems += dict.fromkeys(_sentences(error))
        # Without the keys that are wrong the rest can still be checked, so that all is said at once.
        for problem in error.errors():
            _remove(values, problem["loc"])
        config = adapter.validate_python(values)
    problems += _problems(config)
    if problems:
        raise UserError("\n".join(problems))
    return config


def _remove(values: dict[str, Any], location: Sequence[Any]) -> None:
    """Delete the key at this place; what pydantic appends behind the key (list positions, types) is passed over."""
    for part in location[:-1]:
        if not isinstance(values.get(part), dict):
            location = (part,)
            break
        values = values[part]
    values.pop(location[-1], None)


def _lists_from_strings(values: Mapping[str, Any]) -> dict[str, Any]:
    """A copy in which `trainer.logger=console` means a list of one."""
    result = deepcopy(dict(values))
    trainer = result.get("trainer")
    if isinstance(trainer, dict) and isinstance(trainer.get("logger"), str):
        trainer["logger"] = [trainer["logger"]]
    return result


def _sentences(error: Any) -> Iterator[str]:
    """One sentence per problem that pydantic found, with the key as people write it."""
    known = list(known_keys(TrainConfig))
    for problem in error.errors(include_url=False):
        parts = [str(part) for part in problem["loc"]]
        path = ".".join(parts)
        while parts and ".".join(parts) not in known and problem["type"] not in ("unexpected_keyword_argument",):
            parts.pop()  # pydantic appends list positions and names of union members
        key = ".".join(parts) or path
        if problem["type"] == "unexpected_keyword_argument":
            yield f"{path}: unknown key.{_nearest_key(path, known)}"
        elif problem["type"] == "literal_error":
            choices = re.findall(r"'([^']*)'", str(problem["ctx"]["expected"]))
            wrong = str(problem["input"])
            yield f"{key}={wrong}: must be one of {', '.join(choices)}.{nearest(wrong, choices)}"
        else:
            message = problem["msg"][0].lower() + problem["msg"][1:]
            yield f"{key}={problem['input']!r}: {message}"


def _nearest_key(path: str, known: Sequence[str]) -> str:
    """The nearest known key: by its last part in the same section first, then by its whole path."""
    section, _, name = path.rpartition(".")
    siblings = [key.rpartition(".")[2] for key in known if key.rpartition(".")[0] == section]
    if hint := nearest(name, siblings):
        return hint.replace(" Did you mean '", f" Did you mean '{section}." if section else " Did you mean '")
    elsewhere = [key for key in known if key.rpartition(".")[2] == name]
    return f" Did you mean {elsewhere[0]!r}?" if elsewhere else nearest(path, known)


def known_keys(config: type, prefix: str = "") -> Iterator[str]:
    """Every key of the configuration, sections too, as `model.fsdp_config.model_dtype`."""
    hints = get_type_hints(config)
    for each in fields(config):
        yield prefix + each.name
        if is_dataclass(hints[each.name]):
            yield from known_keys(hints[each.name], f"{prefix}{each.name}.")


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
    if trainer.log_freq < 1:
        problems.append(f"trainer.log_freq={trainer.log_freq}: must be at least 1")
    if not trainer.experiment_name or "/" in trainer.experiment_name:
        problems.append(f"trainer.experiment_name={trainer.experiment_name!r}: must be a folder name without '/'")
    try:
        check_custom_class(data.custom_cls)
    except UserError as error:
        problems.append(str(error))
    return problems


def _is_local(path: str) -> bool:
    return path.startswith((".", "/", "~"))
