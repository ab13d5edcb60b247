"""A model folder: reads and checks its configuration, and loads its weights with the reward head.

Nothing here trains or computes rewards. What is wrong with a folder is an error: weights that are missing, zero,
not finite or quantized, a head that cannot be run.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rm_gallery.data.sources.hub import check_model_name, model_not_found
from rm_gallery.errors import UserError, one_line
from rm_gallery.modeling.architectures import ARCHITECTURES, NOT_TRAINED, common_setting
from rm_gallery.modeling.attention import dispatch
from rm_gallery.modeling.config import PackingSetting
from rm_gallery.modeling.generic_class import forget_code, register
from rm_gallery.modeling.heads import HEADS, RewardHead, find_head, is_reward_model, no_head, num_outputs, sort_unread
from rm_gallery.modeling.packing import ChooseWay, OtherHeadError, Way, check_loaded, choose_way
from rm_gallery.modeling.skeleton import wrong_buffers
from rm_gallery.modeling.text_part import reads_last_token, text_files, text_part
from rm_gallery.modeling.weight_files import (
    WeightFolder,
    check_not_adapter,
    check_not_quantized,
    list_names,
    read_weight_folder,
)

log = logging.getLogger(__name__)

_HEAD_PARTS = (*HEADS, "pooler", "head.", "pre_classifier.", "dense.")  # may be missing in the weights of a backbone


@dataclass(frozen=True)
class ResolvedHead:
    """Where the reward head comes from."""

    name: str
    """Tensor of the folder; empty for a newly initialized head."""
    adopted: RewardHead | None
    """A head with another name, whose values are to be copied into `score`."""
    bias: float
    new_parts: tuple[str, ...]
    """Missing tensors, to be initialized."""


@dataclass(frozen=True)
class ModelSource:
    """A model folder whose weights are not loaded yet."""

    path: str
    key: str
    config: Any
    """With one label and the run's dropout rates."""
    arguments: dict[str, Any]
    """More arguments for the library's class."""
    files: WeightFolder
    new_head: bool | None
    way: Way
    renames: Mapping[str, str] = field(default_factory=dict)
    """Patterns of names in the files and what replaces them: of a wrapper's text model."""
    wrapper: str = ""
    """Type of the wrapper, if the folder holds one."""

    @property
    def what(self) -> str:
        """The folder, in messages."""
        return f"{self.key}={self.path}"

    def load(self, library: Any, dtype: torch.dtype, *, trust_remote_code: bool) -> tuple[Any, ResolvedHead]:
        """The model on the CPU as `library` (an auto class of transformers) loads it, and its reward head.

        For scoring (`new_head` None), the state of the random number generator does not change. Raises UserError as
        `load_reward_model` does, and for scoring if a weight would be initialized randomly.
        """
        for_scoring = self.new_head is None
        with torch.random.fork_rng(devices=[], enabled=for_scoring or bool(self.new_head)):
            before = torch.get_rng_state()
            network, info = self.read(library, dtype, trust_remote_code)
            draws = not torch.equal(before, torch.get_rng_state())
            if for_scoring and draws:  # for weights that are then read, or for others
                first = _fingerprints(network)
                network, info = self.read(library, dtype, trust_remote_code)
                draws = first != _fingerprints(network)
        self.check_shapes(info["mismatched_keys"])
        missing = set(info["missing_keys"])
        if self.new_head:
            missing |= {name for name, _ in network.named_parameters() if name.startswith(HEADS)}
        unread = info["unexpected_keys"]
        if self.wrapper:
            unread = [name for name in unread if name in self.files.tensors]  # not those of images and sound
        head = self.resolve_head(network, missing, unread)
        if head.adopted is not None:
            head.adopted.copy_to(network.score)
            check_values([(head.name, network.score.weight)], self.what, but=() if for_scoring else (head.name,))
        elif for_scoring and draws:
            raise UserError(
                f"{self.what}: {type(network).__name__} initializes weights randomly when it is loaded, so rewards "
                "would differ each time; choose another model"
            )
        if self.new_head:
            initialize(network, missing)
        check_values(network.named_parameters(), self.what, but=() if for_scoring else HEADS)
        if self.config.model_type not in ARCHITECTURES and not trust_remote_code and (lost := wrong_buffers(network)):
            raise UserError(
                f"{self.what}: transformers does not initialize {lost[0]} when it loads {self.config.model_type}, so "
                "rewards would be wrong; choose another model"
            )
        if not self.way.is_checked:
            check_loaded(network, what=self.what)
        return network, head

    def read(self, library: Any, dtype: torch.dtype, trust_remote_code: bool) -> tuple[Any, Any]:
        """The model, and the library's report on names."""
        try:
            with quiet_transformers():
                return library.from_pretrained(
                    os.path.expanduser(self.path), config=self.config, dtype=dtype, output_loading_info=True,
                    trust_remote_code=trust_remote_code, ignore_mismatched_sizes=True,
                    key_mapping=dict(self.renames) or None, **self.arguments,
                )  # fmt: skip
        except Exception as error:
            reason = one_line(error)
            if reason.startswith("Weights only load failed"):
                reason = "its .bin file is a pickle with more than tensors, which can execute code; use safetensors"
            raise UserError(f"{self.what}: the model cannot be loaded ({reason})") from error

    def check_shapes(self, mismatched: Iterable[tuple[str, Sequence[int], Sequence[int]]]) -> None:
        """Raise UserError for tensors of another shape than the configuration says."""
        for name, found, wanted in sorted(mismatched):
            if not (self.new_head and name.startswith(HEADS)):
                raise UserError(
                    f"{self.what}: {name} has shape {list(found)}, but {list(wanted)} by config.json; copy both "
                    "files again"
                )

    def resolve_head(self, network: Any, missing: Iterable[str], unexpected: Iterable[str]) -> ResolvedHead:
        """Find the reward head among the tensors that the library's class reads and those that it does not.

        missing, unexpected: tensors of the class without values, and of the folder without a place. Logs a warning that
        names the latter. Raises UserError for a head that cannot be run and for missing tensors.
        """
        new_parts = tuple(sorted(missing))
        lost = lost_parts(new_parts)
        prefix = f"{network.base_model_prefix}."
        if twice := [name for name in self.files.tensors if prefix + name in self.files.tensors]:
            raise UserError(
                f"{self.what}: both {twice[0]} and {prefix}{twice[0]} are in the weights, but the model has only one; "
                "copy the folder again"
            )
        unread = sort_unread(network, self.files, unexpected)
        if lost:
            instead = f"; it has {list_names(unread.names)}" if unread.names else ""
            raise UserError(
                f"{self.what}: the weights lack {len(lost)} tensors (first: {lost[0]}){instead}; is the download "
                "complete?"
            )
        found, used, name = None, set(), ""
        is_missing = not has_head(new_parts)
        if not self.new_head:
            hint = "choose another folder" if self.new_head is None else "model.new_head=true trains a new head instead"
            found = find_head(network, self.files, unread, is_missing=is_missing, what=self.what, hint=hint)
            if found is not None:
                used = {each.name for each in (found.weight, found.bias) if each is not None}
            if found is not None and is_missing:
                new_parts, name = tuple(part for part in new_parts if part != "score.weight"), found.weight.name
            elif not is_missing:
                name = _head_weight(network)
            self._check_missing(new_parts, name)
        warn_of_unread(self.what, sorted(set(unread.names) - used), self.files.other_files)
        if hasattr(network.config, "value_head_prefix"):
            network.config.value_head_prefix = "score"  # where a checkpoint has it
        adopted = found if is_missing else None
        if adopted is not None and getattr(self.config, "auto_map", None) and not network.is_custom_code():
            log.warning(
                "%s: the folder has code of its own for its reward head (auto_map of config.json), which is not run: "
                "the head is read as one matrix at the last token",
                self.what,
            )
        return ResolvedHead(name, adopted, 0.0 if found is None else found.read_bias(), new_parts)

    def _check_missing(self, missing: Sequence[str], head_name: str) -> None:
        """Raise UserError for missing tensors of a model that has, or should have, a trained head."""
        names = list(self.config.architectures or [])
        has_part = any(name.startswith(tuple(f"{head}." for head in HEADS)) for name in self.files.tensors)
        if not missing or not (head_name or has_part or is_reward_model(names) or self.new_head is None):
            return
        if self.new_head is None and not is_reward_model(names) and not has_part:
            raise UserError(no_head(self.config, self.what))
        fix = "" if self.new_head is None else ", or set model.new_head=true to train a new head"
        raise UserError(
            f"{self.what}: {len(missing)} tensors are missing (first: {missing[0]}), so the reward head of "
            f"{(names or [self.config.model_type])[0]} is not complete; copy the folder again{fix}"
        )


def _fingerprints(network: Any) -> dict[str, tuple[float, float]]:
    """Two sums over each parameter and buffer, which differ between random values."""
    tensors = [*network.named_parameters(), *network.named_buffers()]
    return {
        name: (float(each.detach().double().sum()), float(each.detach().double().square().sum()))
        for name, each in tensors
    }


@torch.no_grad()
def initialize(network: Any, names: Iterable[str]) -> None:
    """Initialize the named parameters as transformers does, in the order of the modules, and no others."""
    chosen = set(names)
    for name, parameter in network.named_parameters():
        parameter._is_hf_initialized = name not in chosen
    for module in network.modules():
        module._is_hf_initialized = False
    network.initialize_weights()


def _head_weight(network: Any) -> str:
    """Name of the last matrix of the head."""
    weights = [name for name, _ in network.named_parameters() if name.endswith("weight")]
    return next((name for name in reversed(weights) if name.startswith(HEADS)), weights[-1])


def warn_of_unread(what: str, names: Sequence[str], files: Sequence[str]) -> None:
    """Log the tensors and files of a folder that are not read."""
    if names:
        log.warning(
            "%s: %d tensors are not read, since the model has no place for them: %s",
            what, len(names), list_names(names, limit=4),
        )  # fmt: skip
    if files:
        log.warning("%s: files with weights that are not read: %s", what, list_names(files))


def open_model(
    path: str, *, key: str, trust_remote_code: bool, dropout: float, new_head: bool | None = False,
    packing: PackingSetting = "auto", attributes: Sequence[str] = (), choose: ChooseWay | None = None,
) -> ModelSource:  # fmt: skip
    """The folder's configuration with one label, or one per attribute, and these dropout rates, and its weight files.

    See `load_reward_model`. choose: how a causal language model is run; the configuration keeps its labels then.

    Raises UserError as `load_model_config` does, and for quantized weights.
    """
    config = whole = read_model_config(path, key=key, trust_remote_code=trust_remote_code)
    files = read_weight_folder(path, key=key)
    renames: dict[str, str] = {}
    if new_head is not None or reads_last_token(whole):
        config = text_part(whole)
    if config is not whole:
        files, renames = text_files(config, files, what=f"{key}={path}")
    check_model_config(config, path, key=key, files=files, new_head=new_head, attributes=attributes)
    check_not_quantized(files, config, path, key=key)
    if choose is None:
        config.num_labels = max(1, len(attributes))
        config.problem_type = "regression"
    for name, value in vars(config).items():
        is_rate = isinstance(value, float | int) and not isinstance(value, bool)
        if is_rate and ("dropout" in name or name.endswith("pdrop")):
            setattr(config, name, dropout)
    arguments = {}
    way = (choose or choose_way)(config, packing, what=f"{key}={path}")
    if way.packed:
        dispatch.install()
        arguments["attn_implementation"] = dispatch.NAME
    return ModelSource(
        path, key, config, arguments, files, new_head, way, renames, "" if config is whole else whole.model_type
    )


_MAY_BE_ZERO = ("token_type_embeddings", "o_proj", "down_proj")
"""Matrices that are zero in published models: XLM-RoBERTa has no token types, and added identity layers write zeros."""


def check_values(tensors: Iterable[tuple[str, Tensor]], what: str, *, but: Sequence[str] = ()) -> None:
    """Raise UserError for a tensor that is not finite, and for a matrix that is all zero, as a truncated copy has.

    what: the model, for the message. but: names, or beginnings of names, of matrices that may be zero.
    """
    for name, tensor in tensors:
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        low, high = (float(each) for each in torch.aminmax(tensor.detach()))
        if not (math.isfinite(low) and math.isfinite(high)):
            raise UserError(f"{what}: {name} has values that are not finite (NaN or infinity); copy the model again")
        is_matrix = (
            tensor.ndim > 1 and not name.startswith(tuple(but)) and not any(each in name for each in _MAY_BE_ZERO)
        )
        if low == high == 0 and is_matrix:
            raise UserError(f"{what}: {name} is all zero; is the download complete?")


def lost_parts(missing: Iterable[str]) -> list[str]:
    """Required tensors among the missing ones: all except the reward head and the pooler."""
    return [name for name in missing if not name.startswith(_HEAD_PARTS) and ".pooler." not in name]


def has_head(missing: Iterable[str]) -> bool:
    """Whether a folder with these missing tensors has a reward head."""
    return not any(name.startswith(HEADS) for name in missing)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Disable progress bars and load reports of transformers; the caller reports missing tensors itself."""
    from transformers.utils import logging as library

    level, bars = library.get_verbosity(), library.is_progress_bar_enabled()
    library.set_verbosity_error()
    library.disable_progress_bar()
    try:
        yield
    finally:
        library.set_verbosity(level)
        if bars:
            library.enable_progress_bar()


def load_model_config(
    path: str, *, key: str = "model.partial_pretrain", trust_remote_code: bool = False, new_head: bool | None = False,
    attributes: Sequence[str] = (),
) -> Any:  # fmt: skip
    """The transformers configuration of a model folder that can be trained.

    Raises UserError for a folder without configuration or weights, an adapter, an architecture that is not
    supported, and a classifier with more than one label.
    """
    config = whole = read_model_config(path, key=key, trust_remote_code=trust_remote_code)
    files = read_weight_folder(path, key=key) if Path(path).expanduser().is_dir() else None
    if new_head is not None or reads_last_token(whole):
        config = text_part(whole)
    if config is not whole and files is not None:
        files, _ = text_files(config, files, what=f"{key}={path}")
    check_model_config(config, path, key=key, files=files, new_head=new_head, attributes=attributes)
    return config


def check_model_config(
    config: Any, path: str, *, key: str, files: WeightFolder | None = None, new_head: bool | None = False,
    attributes: Sequence[str] = (),
) -> None:  # fmt: skip
    """Raise UserError for a configuration that cannot be trained: see `load_model_config`."""
    check_class(config, what=f"{key}={path}")
    if new_head is not None and config.model_type in NOT_TRAINED:
        reason = NOT_TRAINED[config.model_type]
        raise UserError(f"{key}={path}: {config.model_type} cannot be trained: {reason}; choose another model")
    if not new_head:
        hint = "start from its base model, or set model.new_head=true"
        hint = "choose another folder" if new_head is None else hint
        check_one_label(config, files, path, key=key, hint=hint, attributes=attributes)


def check_class(config: Any, *, what: str) -> None:
    """Raise UserError for a type without a sequence classification class, and for a wrapper of several models.

    A decoder's class is made and registered where transformers has none.
    """
    from transformers import __version__

    parts = [name for name in ("text_config", "vision_config", "audio_config") if getattr(config, name, None)]
    if parts:
        raise OtherHeadError(
            f"{what}: architecture {config.model_type!r} is not supported: it wraps several models "
            f"({', '.join(parts)} in config.json); save its text model as a folder of its own"
        )
    if not register(config):
        raise UserError(
            f"{what}: architecture {config.model_type!r} is not supported: transformers {__version__} has neither a "
            "sequence classification class nor a causal language model of text for it; docs/models.md lists the types "
            "that run"
        )


def check_one_label(
    config: Any, files: WeightFolder | None, path: str, *, key: str, hint: str, attributes: Sequence[str] = ()
) -> None:
    """Raise UserError, ending in `hint`, for a classifier with more than one label, or other ones than `attributes`.

    The head in the weight files decides, if there is one; otherwise the configuration of a classifier, whose
    `num_labels` is 2 if it is not set.
    """
    is_classifier = any(name.endswith("ForSequenceClassification") for name in config.architectures or [])
    outputs = num_outputs(files) if files is not None else None
    if outputs is None and is_classifier and (files is None or not files.tensors):
        outputs = config.num_labels
    if attributes and outputs is not None:
        names = [str(name) for _, name in sorted((config.id2label or {}).items())]
        if outputs != len(attributes) or names != list(attributes):
            raise UserError(
                f"{key}={path}: a reward head of {outputs} outputs ({', '.join(names)}), but model.attributes are "
                f"{', '.join(attributes)}; name those of the folder, or set model.new_head=true"
            )
    elif outputs not in (None, 1):
        raise UserError(f"{key}={path}: a classifier with {outputs} labels, but a reward model has one; {hint}")


def read_model_config(path: str, *, key: str, trust_remote_code: bool = False) -> Any:
    """The transformers configuration of a model folder of any architecture.

    Raises UserError for an adapter and for a folder without configuration or weights.
    """
    from transformers import AutoConfig

    folder = Path(path).expanduser()
    check_not_adapter(path, key=key)
    check_model_name(path, key=key)
    try:
        config = AutoConfig.from_pretrained(os.path.expanduser(path), trust_remote_code=trust_remote_code)
    except Exception as error:
        if not folder.exists():
            raise model_not_found(path, error, key=key) from error
        raise UserError(
            f"{key}={path}: no model found ({one_line(error)}); name a folder with config.json and weights"
        ) from error
    _check_config(config, f"{key}={path}")
    forget_code(config)
    if folder.is_dir() and not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
        what = "GGUF files, which are quantized" if any(folder.glob("*.gguf")) else "no weights"
        raise UserError(f"{key}={path}: the folder has {what}; copy the model's *.safetensors files there")
    return config


def _check_config(config: Any, what: str) -> None:
    """Values that transformers accepts and that fail, without a sentence, where they are used."""
    names = config.architectures
    if not (names is None or (isinstance(names, list) and all(isinstance(name, str) for name in names))):
        raise UserError(f"{what}: architectures of config.json is {names!r}; it must be a list of class names")
    text_config = config.get_text_config()
    heads, key_heads = (common_setting(text_config, f"num_{name}_heads") for name in ("attention", "key_value"))
    if isinstance(heads, int) and isinstance(key_heads, int) and (key_heads < 1 or heads % key_heads):
        raise UserError(
            f"{what}: {heads} attention heads of config.json cannot share {key_heads} key-value heads; "
            "num_attention_heads must be a multiple of num_key_value_heads"
        )
