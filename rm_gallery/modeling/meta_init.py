"""Meta-device initialization: a model without weights, and the safetensors files that each rank reads its shards from.

For sharded training: no rank ever holds the whole model. Parameters are on the meta device; buffers, which the files do
not contain, have their values.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from rm_gallery.errors import UserError, one_line
from rm_gallery.modeling.config import PackingSetting
from rm_gallery.modeling.heads import HEADS
from rm_gallery.modeling.language_model import LanguageModel, language_model_way
from rm_gallery.modeling.model_folder import (
    ModelSource,
    check_values,
    initialize,
    lost_parts,
    open_model,
    quiet_transformers,
    warn_of_unread,
)
from rm_gallery.modeling.reward_model import LoadedModel, RewardModel
from rm_gallery.modeling.skeleton import parameters_on_meta
from rm_gallery.modeling.stored_layout import MergedTensor, from_stored
from rm_gallery.modeling.weight_files import BUFFERS, FLOATS, StoredTensor


class MetaInitError(Exception):
    """transformers has to load this model itself; the message gives the reason."""


@dataclass(frozen=True)
class WeightFiles:
    """The location of each tensor of a transformers model, and the values of those newly initialized."""

    tensors: Mapping[str, StoredTensor | MergedTensor]
    """Name in the model -> the tensor of a file, or the tensors of which it is made."""
    new: Mapping[str, Tensor]
    """Name in the model -> value of a tensor that no file contains: reward head, pooler."""

    def load_into(self, state: Mapping[str, Tensor]) -> None:
        """Load every tensor of `state` in place; of a DTensor only this rank's shard is read.

        state: tensors under the model's names, of any floating-point dtype. Raises UserError for an unreadable file and
        as `check_values` does.
        """
        by_file: dict[Path, list[tuple[str, str]]] = {}
        for name in state:
            if name in self.new:
                rows = _local_rows(state[name])
                _local(state[name]).copy_(self.new[name][rows] if rows else self.new[name])
            elif isinstance(entry := self.tensors[name], MergedTensor):
                self._merge(state[name], entry)
            else:
                by_file.setdefault(entry.file, []).append((name, entry.name))
        for file, names in by_file.items():
            try:
                with safe_open(file, framework="pt") as source:
                    for name, saved in names:
                        _copy_rows(state[name], source.get_slice(saved))
                        local = _local(state[name])
                        # A shard alone may be zero: rows of the embedding that no token has.
                        values = local if local.any() or not local.numel() else source.get_tensor(saved)
                        check_values([(name, values)], str(file), but=HEADS)
            except UserError:
                raise
            except Exception as error:
                raise UserError(f"{file}: cannot read the weights ({one_line(error)})") from error

    @staticmethod
    def _merge(tensor: Tensor, entry: MergedTensor) -> None:
        first = next(iter(entry.pieces.values()))[0].file
        try:
            values = entry.read(_local_rows(tensor))
        except Exception as error:
            raise UserError(f"{first}: cannot read the weights of {entry.name} ({one_line(error)})") from error
        if values.numel():
            check_values([(entry.name, values)], str(first), but=HEADS)
            _local(tensor).copy_(values)


def _local_rows(tensor: Tensor) -> slice | None:
    """This rank's rows of a DTensor sharded along dimension 0; None for all rows (replicated, or no DTensor).

    FSDP shards as torch.chunk does. Example: 10 rows on 4 ranks are chunks of ceil(10 / 4) = 3 rows: 0-2, 3-5, 6-8, 9.
    """
    if not isinstance(tensor, DTensor):
        return None
    mesh_dims = [dim for dim, placement in enumerate(tensor.placements) if placement.is_shard()]
    if not mesh_dims:
        return None
    assert len(mesh_dims) == 1 and tensor.placements[mesh_dims[0]].is_shard(0), f"Shard(0) only: {tensor.placements}"
    num_shards, index = tensor.device_mesh.size(mesh_dims[0]), tensor.device_mesh.get_local_rank(mesh_dims[0])
    rows = -(-tensor.shape[0] // num_shards)
    start = min(index * rows, tensor.shape[0])
    return slice(start, min(start + rows, tensor.shape[0]))


def _local(tensor: Tensor) -> Tensor:
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def _copy_rows(tensor: Tensor, source: Any) -> None:
    local = _local(tensor)
    if local.numel():
        local.copy_(source[_local_rows(tensor) or slice(None)] if local.ndim else source[...])


def init_on_meta(
    path: str, *, seed: int, key: str = "model.partial_pretrain", trust_remote_code: bool = False,
    dropout: float = 0.0, new_head: bool = False, packing: PackingSetting = "auto", attributes: Sequence[str] = (),
) -> tuple[LoadedModel, WeightFiles]:  # fmt: skip
    """As `load_reward_model`, with parameters on the meta device and the files that contain them.

    Newly initialized tensors get the same values as from `load_reward_model` after `torch.manual_seed(seed)`. Raises
    MetaInitError where transformers has to load the model itself (no safetensors, names or shapes that it converts,
    quantized weights, custom code), and UserError as `load_reward_model` does.
    """
    from transformers import AutoModelForSequenceClassification

    source = open_model(
        path, key=key, trust_remote_code=trust_remote_code, dropout=dropout, new_head=new_head, packing=packing,
        attributes=attributes,
    )  # fmt: skip
    network = _without_weights(source, AutoModelForSequenceClassification, trust_remote_code)
    stored = source.files.tensors
    if new_head:
        stored = {name: each for name, each in stored.items() if not name.startswith(HEADS)}
    found, missing, unread = _locate_tensors(network, stored)
    lost = lost_parts(missing)
    if lost:
        raise MetaInitError(f"no file contains {lost[0]}")
    head = source.resolve_head(network, missing, unread)
    if head.adopted is not None:
        found["score.weight"] = head.adopted.weight
    new = _initialize(network, list(head.new_parts), seed)
    loaded = LoadedModel(
        RewardModel(network, source.way), head.name, head.bias, head.new_parts, source.wrapper, source.renames
    )
    return loaded, WeightFiles(found, new)


def init_language_model_on_meta(
    path: str, *, key: str = "model.partial_pretrain", trust_remote_code: bool = False, dropout: float = 0.0,
    packing: PackingSetting = "auto",
) -> tuple[LoadedModel, WeightFiles]:  # fmt: skip
    """As `load_language_model`, with parameters on the meta device; see `init_on_meta`.

    A tied output layer is the embedding's parameter, and read from its tensor.
    """
    from transformers import AutoModelForCausalLM, GenerationConfig

    source = open_model(
        path, key=key, trust_remote_code=trust_remote_code, dropout=dropout, new_head=True, packing=packing,
        choose=language_model_way,
    )  # fmt: skip
    network = _without_weights(source, AutoModelForCausalLM, trust_remote_code)
    found, missing, unread = _locate_tensors(network, source.files.tensors)
    for target, origin in (getattr(network, "all_tied_weights_keys", None) or {}).items():
        if target in found:  # transformers does not tie them if the values differ
            raise MetaInitError(f"the files have {target}, which the configuration ties to {origin}")
        if origin in found:
            found[target] = found[origin]
            missing.remove(target)
    if missing:
        raise MetaInitError(f"no file contains {missing[0]}")
    warn_of_unread(source.what, [name for name in unread if not BUFFERS.search(name)], source.files.other_files)
    if network.can_generate():
        with suppress(OSError):  # without generation_config.json that of the constructor stays
            network.generation_config = GenerationConfig.from_pretrained(os.path.expanduser(path))
    loaded = LoadedModel(LanguageModel(network, source.way), wrapper=source.wrapper, renames=source.renames)
    return loaded, WeightFiles(found, {})


def _without_weights(source: ModelSource, library: Any, trust_remote_code: bool) -> Any:
    """The model of a folder with its parameters on the meta device; see `init_on_meta` for what it raises."""
    if not source.way.is_checked:
        raise MetaInitError("its rewards are checked before training")
    if getattr(source.config, "quantization_config", None):
        raise MetaInitError("its weights are quantized")
    if trust_remote_code and getattr(source.config, "auto_map", None):
        raise MetaInitError("the folder has custom code")
    if not source.files.tensors:
        raise MetaInitError("it has neither model.safetensors nor the shards of an index")
    try:
        with quiet_transformers(), parameters_on_meta():
            return library.from_config(source.config, dtype=torch.float32, **source.arguments)
    except Exception as error:
        raise UserError(f"{source.what}: the model cannot be loaded ({one_line(error)})") from error


def _locate_tensors(
    network: Any, stored: Mapping[str, StoredTensor]
) -> tuple[dict[str, StoredTensor | MergedTensor], list[str], list[str]]:
    """The stored tensor of each tensor of the network, the names without one, and stored names that have no place.

    A causal language model has the names of our backbone and an extra head. A bare backbone lacks the prefix: its
    `norm.weight` is our `model.norm.weight`. Raises MetaInitError for another shape or dtype.
    """
    prefix = f"{network.base_model_prefix}."
    found: dict[str, StoredTensor | MergedTensor] = {}
    missing = []
    converted = from_stored(network, stored)
    for name, tensor in network.state_dict().items():
        entry = (
            stored.get(name) or stored.get(name.removeprefix(prefix)) or stored.get(prefix + name)
            or converted.get(name)
        )  # fmt: skip
        if entry is None:
            missing.append(name)
            continue
        if isinstance(entry, StoredTensor) and tuple(tensor.shape) != entry.shape:
            raise MetaInitError(f"{entry.name} has shape {list(entry.shape)}, not {list(tensor.shape)}")
        if isinstance(entry, StoredTensor) and entry.dtype not in FLOATS and tensor.is_floating_point():
            raise MetaInitError(f"{entry.name} has dtype {entry.dtype}")
        found[name] = entry
    read = {
        (piece.file, piece.name)
        for entry in found.values()
        for piece in (entry.all_pieces if isinstance(entry, MergedTensor) else [entry])
    }
    unread = [name for name, entry in stored.items() if (entry.file, entry.name) not in read]
    return found, sorted(missing), sorted(unread)


@torch.no_grad()
def _initialize(network: Any, names: list[str], seed: int) -> dict[str, Tensor]:
    """Values of the named tensors, as transformers initializes them when it loads a folder without them.

    Only these tensors are initialized, in the order of the modules, so the random numbers drawn are those of a process
    that loads the whole model: every rank gets the same values for the same seed.
    """
    if not names:
        return {}
    for name, parameter in list(network.named_parameters()):
        if name in names:
            _set_parameter(network, name, torch.empty(parameter.shape, dtype=parameter.dtype))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        initialize(network, names)
    values = {name: network.get_parameter_or_buffer(name).detach() for name in names}
    for name, value in values.items():
        if isinstance(network.get_parameter_or_buffer(name), nn.Parameter):
            _set_parameter(network, name, value.to("meta"))
    return values


def _set_parameter(network: nn.Module, name: str, value: Tensor) -> None:
    owner, _, last = name.rpartition(".")
    setattr(network.get_submodule(owner), last, nn.Parameter(value))
