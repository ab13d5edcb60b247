"""LoRA adapters (Hu et al. 2021) through peft: adding them for training, merging them, and their configuration file.

Training adds the low-rank matrices to linear layers of the network in place, freezes all other weights, and trains the
reward head (and poolers) in full. The folder is the one that peft writes for sequence classification:

adapter_model.safetensors      `base_model.model.` + name of the tensor, with the head under `modules_to_save`
adapter_config.json            settings, and the base model's folder or hub name

Nothing here imports peft until an adapter is added. `adapter_folder.py` reads these folders.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from warnings import catch_warnings

import torch
from torch import nn

from rm_gallery.errors import UserError
from rm_gallery.files import write_text
from rm_gallery.modeling.architectures import ARCHITECTURES
from rm_gallery.modeling.config import ALL_LINEAR, LoraConfig
from rm_gallery.modeling.freezing import modules_to_save
from rm_gallery.modeling.model_folder import quiet_transformers
from rm_gallery.modeling.reward_model import RewardModel
from rm_gallery.modeling.weight_files import ADAPTER_CONFIG

BASE_RECORD = "rm_gallery_base"
"""Key of an adapter's config.json with the fingerprint of the base model's weights."""
_NAME = "default"  # of the adapter, in the names of peft's parameters
_PREFIX = "base_model.model."  # of the names in the file


@dataclass(frozen=True)
class Adapter:
    """What the folder says of an adapter in training."""

    settings: Any
    """peft's LoraConfig."""
    base: str
    """Folder or hub name of the base model."""
    modules_to_save: tuple[str, ...]
    """Modules trained in full: the reward head, poolers."""
    base_fingerprint: str
    """See `weights_fingerprint`."""

    def write_config(self, folder: Path) -> None:
        """Write adapter_config.json as peft does."""
        self.settings.save_pretrained(folder)
        path = folder / ADAPTER_CONFIG
        values = json.loads(path.read_text(encoding="utf-8"))
        values.update(
            base_model_name_or_path=self.base, task_type="SEQ_CLS", inference_mode=True, revision=None,
            modules_to_save=list(self.modules_to_save),
        )  # fmt: skip
        if isinstance(values["target_modules"], list):
            values["target_modules"].sort()  # peft's order, of a set, differs between processes
        write_text(path, json.dumps(values, indent=2, sort_keys=True) + "\n")


def add_lora(model: RewardModel, config: LoraConfig, base: str) -> Adapter:
    """Add low-rank matrices to the linear layers in place; only they, the reward head and poolers stay trainable.

    base: folder or hub name of the model, for the adapter's folder. Draws from torch's random number generator. Raises
    UserError if peft is missing, and for `target_modules` that are no linear layers of the backbone.
    """
    peft = import_peft("model.lora.rank")
    network = model.network
    check_type(network.config, what=f"model.lora.rank={config.rank}")
    kept = {module for name in modules_to_save(network) for module in network.get_submodule(name).modules()}
    linear = [name for name, module in network.named_modules() if isinstance(module, nn.Linear) and module not in kept]
    last_names = sorted({name.rpartition(".")[2] for name in linear})
    wanted = last_names if config.target_modules == ALL_LINEAR else list(config.target_modules)
    chosen = {target: [name for name in linear if name == target or name.endswith(f".{target}")] for target in wanted}
    if unknown := [target for target, names in chosen.items() if not names]:
        raise UserError(
            f"model.lora.target_modules: the backbone has no linear layer {unknown[0]}; it has {', '.join(last_names)}"
        )
    names = sorted({name for found in chosen.values() for name in found})
    settings = peft.LoraConfig(
        r=config.rank, lora_alpha=config.alpha, lora_dropout=config.dropout, target_modules=names,
        use_dora=config.use_dora, use_rslora=config.use_rslora,
    )  # fmt: skip
    adapter = add_layers(model, settings, base, also_trained=modules_to_save(network))
    settings.target_modules = set(wanted)
    return adapter


def add_layers(model: RewardModel, settings: Any, base: str, *, also_trained: Iterable[str]) -> Adapter:
    """Add the layers that `settings` (peft's LoraConfig) describes in place, and make them trainable.

    also_trained: names of modules, or their ends, that are trained in full as the head is; all others are frozen.
    """
    peft = import_peft("model.lora.rank")
    network = model.network
    fingerprint = weights_fingerprint(model)
    ends = list(dict.fromkeys([*_heads(network), *also_trained]))
    settings.inference_mode, settings.modules_to_save = False, None
    excluded = settings.exclude_modules
    if excluded is None:  # no LoRA in modules that are trained in full
        settings.exclude_modules = rf"(.*\.)?({'|'.join(map(re.escape, ends))})(\..*)?"
    with quiet():
        peft.inject_adapter_in_model(settings, network, adapter_name=_NAME)
    settings.exclude_modules = excluded
    trained = [name for name, _ in network.named_modules() if any(f".{name}".endswith(f".{end}") for end in ends)]
    for name in trained:
        network.get_submodule(name).requires_grad_(True)
    path = os.path.expanduser(base)
    # peft matches `modules_to_save` by the ends of names.
    short = tuple(dict.fromkeys(name.rpartition(".")[2] for name in trained))
    return Adapter(settings, os.path.abspath(path) if os.path.isdir(path) else base, short, fingerprint)


def check_type(config: Any, *, what: str) -> None:
    """Raise UserError for a model type with layers that may read weights past the modules that LoRA replaces."""
    if config.model_type not in ARCHITECTURES:
        raise UserError(
            f"{what}: adapters of {config.model_type} are not implemented; types: {', '.join(ARCHITECTURES)}"
        )


def _heads(network: Any) -> list[str]:
    """The modules with parameters outside of the backbone: the reward head, and its dense layers."""
    outside = [name for name, _ in network.named_children() if name != network.base_model_prefix]
    return [name for name in outside if any(True for _ in network.get_submodule(name).parameters())]


@torch.no_grad()
def merge_layers(network: nn.Module) -> None:
    """Merge the layers of an adapter into the weights in place, and restore the modules that they were added to."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    places = [(parent, *each) for parent in network.modules() for each in parent.named_children()]
    for parent, name, module in places:
        if isinstance(module, AuxiliaryTrainingWrapper):  # trained rows of an embedding
            setattr(parent, name, module.unload_and_optionally_merge_module(True, False, None))
        elif isinstance(module, BaseTunerLayer) and not isinstance(parent, AuxiliaryTrainingWrapper):
            module.merge()
            setattr(parent, name, module.get_base_layer())


def stored_name(name: str) -> str:
    """The name in adapter_model.safetensors of a parameter of the network."""
    short = short_name(name)
    assert short is not None
    return _PREFIX + short


def short_name(name: str) -> str | None:
    """The name in the network of a tensor of the file or of the network, without the name of the adapter.

    None for the base model's copy of a module that is trained in full (`original_module`).
    """
    if ".original_module." in name:
        return None
    name = re.sub(rf"\.modules_to_save(\.{_NAME})?(?=\.)|\.{_NAME}(?=\.|$)", "", name.removeprefix(_PREFIX))
    return re.sub(r"\.lora_magnitude_vector\.weight$", ".lora_magnitude_vector", name)  # DoRA


@torch.no_grad()
def weights_fingerprint(model: RewardModel) -> str:
    """A digest of the float32 weights of the backbone, without poolers; call it before layers are added.

    It sums the bits of each tensor as integers: fast, and independent of the order in which values are added.
    """
    kept = {each for name in modules_to_save(model.network) for each in model.network.get_submodule(name).parameters()}
    sums = [
        (tuple(each.shape), int(each.detach().contiguous().view(torch.int32).sum(dtype=torch.int64)))
        for each in model.network.parameters()
        if each not in kept
    ]
    return hashlib.sha256(repr(sorted(sums)).encode()).hexdigest()[:32]


def import_peft(what: str) -> Any:
    """The package; raises UserError, which begins with `what`, if it is missing."""
    try:
        with quiet():
            import peft
    except ImportError as error:
        raise UserError(f"{what} needs the peft package: pip install 'rm-gallery[lora]'") from error
    return peft


@contextmanager
def quiet() -> Iterator[None]:
    """No warnings of peft, and no load reports of transformers: what is wrong is checked and reported here."""
    with catch_warnings(action="ignore"), quiet_transformers():
        yield
