"""LoRA adapters (Hu et al. 2021) through peft: adding them for training, merging them, and their configuration file.

Training adds the low-rank matrices to linear layers of the network in place, freezes all other weights, and trains the
reward head (and poolers) in full; of a language model the matrices alone. The folder is the one that peft writes for
sequence classification, or for causal language models:

adapter_model.safetensors      `base_model.model.` + name of the tensor, with the head under `modules_to_save`
adapter_config.json            settings, and the base model's folder or hub name

Nothing here imports peft until an adapter is added. `adapter_folder.py` reads these folders.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rm_gallery.errors import UserError
from rm_gallery.files import write_text
from rm_gallery.modeling.config import ALL_LINEAR, LoraConfig
from rm_gallery.modeling.freezing import modules_to_save
from rm_gallery.modeling.lora_layers import (
    ADAPTER_NAME,
    generic_name,
    import_peft,
    inject,
    is_read_directly,
    linear_layers,
    names_without_effect,
)
from rm_gallery.modeling.quantization import QuantizeOptions
from rm_gallery.modeling.reward_model import RewardModel
from rm_gallery.modeling.weight_files import ADAPTER_CONFIG, QUANTIZATION_RECORD

log = logging.getLogger(__name__)

BASE_RECORD = "rm_gallery_base"
"""Key of an adapter's config.json with the fingerprint of the base model's weights."""
_PREFIX = "base_model.model."  # of the names in the file
_TASKS = {False: "SEQ_CLS", True: "CAUSAL_LM"}  # by whether it is a language model


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
    quantization: Mapping[str, Any] | None = None
    """How the base model is quantized, see `quantization.settings_of`; None if it is not."""
    task_type: str = "SEQ_CLS"
    """peft's name: `SEQ_CLS`, or `CAUSAL_LM`."""

    def base_record(self) -> dict[str, Any]:
        """What config.json says of the base model."""
        record: dict[str, Any] = {BASE_RECORD: self.base_fingerprint}
        return record if self.quantization is None else record | {QUANTIZATION_RECORD: dict(self.quantization)}

    def write_config(self, folder: Path) -> None:
        """Write adapter_config.json as peft does."""
        self.settings.save_pretrained(folder)
        path = folder / ADAPTER_CONFIG
        values = json.loads(path.read_text(encoding="utf-8"))
        values.update(
            base_model_name_or_path=self.base, task_type=self.task_type, inference_mode=True, revision=None,
            modules_to_save=list(self.modules_to_save) or None,
        )  # fmt: skip
        if isinstance(values["target_modules"], list):
            values["target_modules"].sort()  # peft's order, of a set, differs between processes
        write_text(path, json.dumps(values, indent=2, sort_keys=True) + "\n")


def add_lora(
    model: RewardModel, config: LoraConfig, base: str, *, quantization: QuantizeOptions | None = None
) -> Adapter:
    """Add low-rank matrices to the linear layers in place; only they, the reward head and poolers stay trainable.

    base: folder or hub name of the model, for the adapter's folder. Draws from torch's random number generator. Raises
    UserError if peft is missing, for `target_modules` that are no linear layers of the backbone or have no effect, and
    for a type whose rewards with LoRA would differ from those of the merged model.
    """
    what = f"model.lora.rank={config.rank}"
    peft = import_peft("model.lora.rank")
    network = model.network
    also_trained = [*_new_modules(model), *_trained_in_full(model, config.modules_to_save)]
    names = [name for name in _targets(model, config, what) if not _is_inside(name, also_trained)]
    settings = peft.LoraConfig(
        r=config.rank, lora_alpha=config.alpha, lora_dropout=config.dropout, target_modules=names,
        use_dora=config.use_dora, use_rslora=config.use_rslora,
    )  # fmt: skip
    every = [name for name, _ in network.named_modules()]
    _log_share(network, names)
    adapter = add_layers(model, settings, base, also_trained=also_trained, quantization=quantization)
    settings.target_modules = _short_names(names, [name for name in every if not _is_inside(name, also_trained)])
    return adapter


def check_targets(model: RewardModel, config: LoraConfig) -> None:
    """Raise UserError for `target_modules` and `modules_to_save` as `add_lora` does, also without weights."""
    _trained_in_full(model, config.modules_to_save)
    _targets(model, config, f"model.lora.rank={config.rank}")


def _log_share(network: Any, names: Iterable[str]) -> None:
    """Log how much of the model has LoRA, where experts in one tensor, which are no linear layers, have none."""
    experts = [name for name, each in network.named_parameters() if each.ndim == 3]
    if experts:
        covered = sum(network.get_submodule(name).weight.numel() for name in names)
        log.info(
            "LoRA: on the matrices with %.1f%% of the parameters; experts in one tensor have none (%s)",
            100 * covered / sum(each.numel() for each in network.parameters()),
            ", ".join(dict.fromkeys(map(generic_name, experts))),
        )


def _new_modules(model: RewardModel) -> list[str]:
    """What base models lack: head and poolers; nothing of a language model, whose output layer is the base model's."""
    return [] if model.is_language_model else modules_to_save(model.network)


def _trained_in_full(model: RewardModel, ends: Iterable[str]) -> list[str]:
    """Names of the modules that `modules_to_save` names by the ends of their names."""
    found: list[str] = []
    network = model.network
    inside = "" if model.is_language_model else f"{network.base_model_prefix}."
    every = [name for name, _ in network.named_modules() if name and name.startswith(inside)]
    owners: dict[nn.Parameter, set[str]] = {}
    for name, each in network.named_parameters(remove_duplicate=False):
        owners.setdefault(each, set()).add(name)
    for end in ends:
        key = f"model.lora.modules_to_save: {end}"
        names = [name for name in every if f".{name}".endswith(f".{end}")]
        parameters = [each for name in names for each in network.get_submodule(name).parameters()]
        if not parameters:
            ends_here = {
                name.rpartition(".")[2] for name in every if any(True for _ in network.get_submodule(name).parameters())
            }
            known = ", ".join(sorted(name for name in ends_here if not name.isdigit()))
            raise UserError(
                f"{key} is no module of the {'model' if model.is_language_model else 'backbone'}; it has {known}"
            )
        if shared := [each for each in parameters if len(owners[each]) > 1]:
            raise UserError(
                f"{key} shares its weight with other modules ({', '.join(sorted(owners[shared[0]]))}), and peft would "
                "separate them; remove it"
            )
        found.extend(names)
    return found


def _targets(model: RewardModel, config: LoraConfig, what: str) -> list[str]:
    """Names of the layers that `target_modules` chooses, without those that LoRA cannot be added to."""
    network, key = model.network, "model.lora.target_modules"
    linear, direct = linear_layers(network)
    last_names = sorted({name.rpartition(".")[2] for name in linear})
    if not linear:
        raise UserError(f"{what}: {network.config.model_type} has no linear layers that LoRA can be added to")
    wanted = last_names if config.target_modules == ALL_LINEAR else list(config.target_modules)
    chosen = {target: [name for name in linear if name == target or name.endswith(f".{target}")] for target in wanted}
    if unknown := [target for target, names in chosen.items() if not names]:
        why = ""
        if any(f".{name}".endswith(f".{unknown[0]}") for name in direct):
            why = f" that is called: transformers reads the weight of {unknown[0]} directly"
        raise UserError(f"{key}: the backbone has no linear layer {unknown[0]}{why}; it has {', '.join(last_names)}")
    names = sorted({name for found in chosen.values() for name in found})
    unused = names_without_effect(
        network.config, model.way, map(generic_name, names), what=what, language_model=model.is_language_model
    )
    without = [name for name in names if generic_name(name) in unused]
    if without and config.target_modules != ALL_LINEAR:
        raise UserError(f"{key}: no reward depends on {without[0]} of {network.config.model_type}; remove it")
    if config.target_modules == ALL_LINEAR and (left := sorted(map(generic_name, {*without, *direct}))):
        log.info(
            "LoRA: not added to %s, since their weights are read directly or no reward depends on them",
            ", ".join(dict.fromkeys(left)),
        )
    return [name for name in names if name not in without]


def _is_inside(name: str, modules: Iterable[str]) -> bool:
    return any(f"{name}.".startswith(f"{each}.") for each in modules)


def _short_names(names: Iterable[str], every: Iterable[str]) -> set[str]:
    """The last parts of the names if no other module has one of them, as peft matches; else the whole names."""
    chosen = set(names)
    short = {name.rpartition(".")[2] for name in chosen}
    found = {name for name in every if name.rpartition(".")[2] in short}
    return short if found == chosen else chosen


def add_layers(
    model: RewardModel, settings: Any, base: str, *, also_trained: Iterable[str],
    quantization: QuantizeOptions | None = None,
) -> Adapter:  # fmt: skip
    """Add the layers that `settings` (peft's LoraConfig) describes in place, and make them trainable.

    also_trained: names of modules, or their ends, that are trained in full as the head is; all others are frozen.
    quantization: how the base model is quantized before. Raises UserError for layers that would have no effect, since
    the library reads their weight directly.
    """
    network = model.network
    fingerprint = weights_fingerprint(network, language_model=model.is_language_model)
    ends = list(dict.fromkeys([*([] if model.is_language_model else _heads(network)), *also_trained]))
    trained = [name for name, _ in network.named_modules() if any(f".{name}".endswith(f".{end}") for end in ends)]
    short = _peft_ends(trained, [name for name, _ in network.named_modules()])
    record = None if quantization is None else quantization.quantize(network, but=trained)
    settings.inference_mode, settings.modules_to_save = False, None
    excluded = settings.exclude_modules
    if excluded is None and ends:  # no LoRA in modules that are trained in full
        settings.exclude_modules = rf"(.*\.)?({'|'.join(map(re.escape, ends))})(\..*)?"
    inject(network, settings)
    settings.exclude_modules = excluded
    adapted = [name for name, module in network.named_modules() if hasattr(module, "lora_A")]
    if direct := [name for name in adapted if is_read_directly(network, name)]:
        raise UserError(
            f"LoRA on {direct[0]} of {network.config.model_type} has no effect: transformers reads its weight directly"
        )
    for name in trained:
        network.get_submodule(name).requires_grad_(True)
    path = os.path.expanduser(base)
    place, task = os.path.abspath(path) if os.path.isdir(path) else base, _TASKS[model.is_language_model]
    return Adapter(settings, place, short, fingerprint, record, task)


def _peft_ends(names: Iterable[str], every: Iterable[str]) -> tuple[str, ...]:
    """Names as short as they can be: peft takes each module whose name ends with one of `modules_to_save`."""
    chosen, all_names = list(names), list(every)
    short: list[str] = []
    for name in chosen:
        last = name.rpartition(".")[2]
        short.append(last if all(each in chosen for each in all_names if each.endswith(last)) else name)
    return tuple(dict.fromkeys(short))


def _heads(network: Any) -> list[str]:
    """The modules with parameters outside of the backbone: the reward head, and its dense layers."""
    outside = [name for name, _ in network.named_children() if name != network.base_model_prefix]
    return [name for name in outside if any(True for _ in network.get_submodule(name).parameters())]


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
    name = re.sub(
        rf"\.modules_to_save(\.{ADAPTER_NAME})?(?=\.)|\.{ADAPTER_NAME}(?=\.|$)", "", name.removeprefix(_PREFIX)
    )
    return re.sub(r"\.lora_magnitude_vector\.weight$", ".lora_magnitude_vector", name)  # DoRA


@torch.no_grad()
def weights_fingerprint(network: Any, *, language_model: bool = False) -> str:
    """A digest of the float32 weights of the backbone, without poolers; call it before layers are added.

    It sums the bits of each tensor as integers: fast, and independent of the order in which values are added. Of a
    language model whose output layer is not its embedding, that of this layer follows, after a hyphen.
    """
    kept: set[nn.Parameter] = set()
    for name in modules_to_save(network):
        kept |= set(network.get_submodule(name).parameters())
    if language_model:
        kept -= set(getattr(network, network.base_model_prefix).parameters())
    found = _digest(each for each in network.parameters() if each not in kept)
    return f"{found}-{_digest(kept)}" if language_model and kept else found


def same_weights(first: str, second: str) -> bool:
    """Whether two fingerprints are of the same weights, as far as both cover them."""
    return all(one == other for one, other in zip(first.split("-"), second.split("-"), strict=False))


def _digest(parameters: Iterable[nn.Parameter]) -> str:
    sums = [
        (tuple(each.shape), int(each.detach().contiguous().view(torch.int32).sum(dtype=torch.int64)))
        for each in parameters
    ]
    return hashlib.sha256(repr(sorted(sums)).encode()).hexdigest()[:32]
