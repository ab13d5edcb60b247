"""LoRA adapters (Hu et al. 2021) through peft: adding them for training, and reading and merging their folders.

Training adds the low-rank matrices to linear layers of the network in place, freezes all other weights, and trains the
reward head (and poolers) in full. The folder is the one that peft writes for sequence classification:

adapter_model.safetensors      `base_model.model.` + name of the tensor, with the head under `modules_to_save`
adapter_config.json            settings, and the base model's folder or hub name

Nothing here imports peft until an adapter is added or read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from warnings import catch_warnings

import torch
from safetensors.torch import load_file
from torch import nn

from rm_gallery.errors import UserError, one_line
from rm_gallery.files import write_text
from rm_gallery.modeling.architectures import ARCHITECTURES
from rm_gallery.modeling.config import ALL_LINEAR, LoraConfig
from rm_gallery.modeling.freezing import modules_to_save
from rm_gallery.modeling.heads import HEADS
from rm_gallery.modeling.model_folder import check_values, quiet_transformers
from rm_gallery.modeling.reward_model import LoadedModel, RewardModel, load_reward_model
from rm_gallery.modeling.text_part import plain_renames, text_part
from rm_gallery.modeling.weight_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, list_names, read_adapter_files

_NAME = "default"  # of the adapter, in the names of peft's parameters
_PREFIX = "base_model.model."  # of the names in the file


@dataclass(frozen=True)
class Adapter:
    """What adapter_config.json says of an adapter in training."""

    config: LoraConfig
    base: str
    """Folder or hub name of the base model."""
    target_modules: tuple[str, ...]
    modules_to_save: tuple[str, ...]
    """Modules trained in full: the reward head, poolers."""

    def write_config(self, folder: Path) -> None:
        """Write adapter_config.json as peft does."""
        settings = _peft_config(
            self.config,
            base_model_name_or_path=self.base,
            target_modules=list(self.target_modules),
            modules_to_save=list(self.modules_to_save),
            inference_mode=True,
        )
        settings.save_pretrained(folder)
        path = folder / ADAPTER_CONFIG
        values = json.loads(path.read_text(encoding="utf-8"))
        values["target_modules"] = sorted(values["target_modules"])  # peft's order, of a set, differs between processes
        write_text(path, json.dumps(values, indent=2, sort_keys=True) + "\n")


def add_lora(model: RewardModel, config: LoraConfig, base: str) -> Adapter:
    """Add low-rank matrices to the linear layers in place; only they, the reward head and poolers stay trainable.

    base: folder or hub name of the model, for the adapter's folder. Draws from torch's random number generator. Raises
    UserError if peft is missing, and for `target_modules` that are no linear layers of the backbone.
    """
    peft = _import_peft("model.lora.rank")
    network = model.network
    check_type(network.config, what=f"model.lora.rank={config.rank}")
    saved = modules_to_save(network)
    kept = {module for name in saved for module in network.get_submodule(name).modules()}
    linear = [name for name, module in network.named_modules() if isinstance(module, nn.Linear) and module not in kept]
    last_names = sorted({name.rpartition(".")[2] for name in linear})
    wanted = last_names if config.target_modules == ALL_LINEAR else list(config.target_modules)
    chosen = {target: [name for name in linear if name == target or name.endswith(f".{target}")] for target in wanted}
    if unknown := [target for target, names in chosen.items() if not names]:
        raise UserError(
            f"model.lora.target_modules: the backbone has no linear layer {unknown[0]}; it has {', '.join(last_names)}"
        )
    names = sorted({name for found in chosen.values() for name in found})
    with _quiet():
        peft.inject_adapter_in_model(_peft_config(config, target_modules=names), network, adapter_name=_NAME)
    for name in saved:
        network.get_submodule(name).requires_grad_(True)
    path = os.path.expanduser(base)
    # peft matches `modules_to_save` by the ends of names.
    short = tuple(dict.fromkeys(name.rpartition(".")[2] for name in saved))
    return Adapter(config, os.path.abspath(path) if os.path.isdir(path) else base, tuple(wanted), short)


def check_type(config: Any, *, what: str) -> None:
    """Raise UserError for a model type with layers that may read weights past the modules that LoRA replaces."""
    if config.model_type not in ARCHITECTURES:
        raise UserError(
            f"{what}: adapters of {config.model_type} are not implemented; types: {', '.join(ARCHITECTURES)}"
        )


def stored_name(name: str) -> str:
    """The name in adapter_model.safetensors of a parameter of the network."""
    name = name.replace(f".lora_magnitude_vector.{_NAME}.weight", ".lora_magnitude_vector")  # DoRA
    return _PREFIX + name.replace(f".{_NAME}.", ".")


@dataclass(frozen=True)
class AdapterFolder:
    """A folder with an adapter of a sequence classification model and its head."""

    path: str
    base: str

    def load_merged(self, *, key: str) -> LoadedModel:
        """The base model with the adapter merged into its weights, in float32 on the CPU.

        The state of the random number generator does not change. Raises UserError for a base model that cannot be
        loaded or that does not fit the adapter.
        """
        peft = _import_peft(f"{key}={self.path}")
        folder = Path(self.path).expanduser()
        what = f"{key}={self.path}"
        with torch.random.fork_rng(devices=[]):
            loaded = load_reward_model(self.base, key="base", new_head=True)
            check_type(loaded.model.network.config, what=what)
            tensors = load_file(folder / ADAPTER_WEIGHTS)
            if lost := [name for name in loaded.new_parts if _PREFIX + name not in tensors]:
                raise UserError(f"{what}: neither the adapter nor its base model {self.base} has {lost[0]}")
            try:
                with _quiet():
                    settings = peft.PeftConfig.from_pretrained(folder)
                    adapted = peft.PeftModelForSequenceClassification(loaded.model.network, settings)
                    result = peft.set_peft_model_state_dict(adapted, tensors)
                    missing = [each for each in result.missing_keys if f".{_NAME}." in each or each.endswith(_NAME)]
                    if wrong := [*missing, *result.unexpected_keys]:
                        raise ValueError(f"{len(wrong)} tensors have no counterpart: {list_names(wrong)}")
                    network = adapted.merge_and_unload()
            except (ValueError, TypeError, KeyError, RuntimeError) as error:
                raise UserError(f"{what}: does not fit its base model {self.base} ({one_line(error)})") from error
        check_values(network.named_parameters(), what, but=HEADS)
        network.requires_grad_(True)
        return LoadedModel(RewardModel(network, loaded.model.way), "score.weight")

    def load_plain(self) -> Any:
        """The model as transformers and peft alone load it, in float32; the adapter is not merged."""
        from transformers import AutoConfig, AutoModelForSequenceClassification

        peft = _import_peft(f"model={self.path}")
        folder = Path(self.path).expanduser()
        base = os.path.expanduser(self.base)
        with torch.random.fork_rng(devices=[]), _quiet():
            config = text_part(AutoConfig.from_pretrained(folder if (folder / "config.json").is_file() else base))
            config.num_labels = 1
            if config.pad_token_id is None:  # of another trainer, whose folder has no config.json
                config.pad_token_id = 0
            network = AutoModelForSequenceClassification.from_pretrained(
                base, config=config, dtype=torch.float32, ignore_mismatched_sizes=True,
                key_mapping=plain_renames(base, key="base"),
            )  # fmt: skip
            return peft.PeftModel.from_pretrained(network, folder).eval()


def open_adapter(path: str, *, key: str, base: str | None = None) -> AdapterFolder | None:
    """The adapter of a folder; None for a folder without one.

    base: the base model, instead of that of adapter_config.json. Raises UserError for an adapter that is no LoRA, has
    no reward head or several labels, is a pickle, or whose base model is not known.
    """
    files = read_adapter_files(path, key=key)
    if files is None:
        if base is not None:
            raise UserError(f"{key}={path}: base={base} is for adapters, and this folder holds none; remove it")
        return None
    what = f"{key}={path}: the folder holds an adapter"
    kind, task = (str(files.config.get(name) or "unknown") for name in ("peft_type", "task_type"))
    heads = [each for name, each in files.tensors.items() if name.removeprefix(_PREFIX).startswith(HEADS)]
    weights = [each for each in heads if each.name.endswith(".weight") and len(each.shape) == 2]
    if task != "SEQ_CLS" or not weights:
        raise UserError(
            f"{what} without a reward head (task type {task}, {len(files.tensors)} tensors); the head is missing: "
            "save it with the adapter (peft: task_type SEQ_CLS, modules_to_save), or merge it into a reward model"
        )
    if kind != "LORA":
        raise UserError(f"{what} of type {kind}, which is not read; merge it into its base model first")
    if weights[-1].shape[0] != 1:
        raise UserError(f"{what} of a classifier with {weights[-1].shape[0]} labels, but a reward model has one")
    found = base or files.base
    is_local = found.startswith((".", "/", "~")) or found.count("/") > 1
    if not found or (is_local and not Path(found).expanduser().is_dir()):
        why = f"its base model {found} does not exist here" if found else "adapter_config.json names no base model"
        raise UserError(f"{what}, and {why}; name the folder of the base model with base= (--base)")
    return AdapterFolder(path, found)


def _peft_config(config: LoraConfig, **settings: Any) -> Any:
    peft = _import_peft("model.lora.rank")
    return peft.LoraConfig(
        task_type="SEQ_CLS", r=config.rank, lora_alpha=config.alpha, lora_dropout=config.dropout,
        use_dora=config.use_dora, use_rslora=config.use_rslora, **settings,
    )  # fmt: skip


def _import_peft(what: str) -> Any:
    try:
        with _quiet():
            import peft
    except ImportError as error:
        raise UserError(f"{what} needs the peft package: pip install 'rm-gallery[lora]'") from error
    return peft


@contextmanager
def _quiet() -> Iterator[None]:
    """No warnings of peft, and no load reports of transformers: what is wrong is checked and reported here."""
    with catch_warnings(action="ignore"), quiet_transformers():
        yield
